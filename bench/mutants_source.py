"""A mutant: one piece of text in one function of one source file, replaced by a faulty one."""

import ast
import textwrap
from dataclasses import dataclass
from functools import lru_cache

PACKAGE = "lora_kernels"


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: what is wrong, unique.
        file: a source file, relative to the package.
        function: the function (or class) that holds `old`, by name.
        old: text that occurs exactly once in that function.
        new: what replaces it.
        tests: pytest's names of them, relative to `tests/`, where a * stands for any text; the
            sharpest and fastest first.
    """

    name: str
    file: str
    function: str
    old: str
    new: str
    tests: tuple[str, ...]


def mutated_source(mutant: Mutant, source: str) -> str:
    """The source with the fault.

    Raises:
        ValueError: `function` or `old` is not there exactly once, or the result is no Python: the
            sources have changed and the mutant must follow.
    """
    place = f"mutant {mutant.name!r}: {mutant.file}"
    spans = _functions(source).get(mutant.function, [])
    if len(spans) != 1:
        raise ValueError(f"{place}: expected one {mutant.function!r}, found {len(spans)}")
    begin, end = spans[0]
    lines = source.splitlines(keepends=True)
    body = "".join(lines[begin:end])
    if (found := body.count(mutant.old)) != 1:
        raise ValueError(
            f"{place}: {mutant.function}: expected {mutant.old!r} exactly once, found {found}"
        )
    if mutant.old == mutant.new:
        raise ValueError(f"{place}: the replacement is the text itself")
    changed = body.replace(mutant.old, mutant.new)
    try:
        ast.parse(textwrap.dedent(changed))
    except SyntaxError as error:
        raise ValueError(f"{place}: with {mutant.new!r} this is no Python: {error}") from error
    return "".join([*lines[:begin], changed, *lines[end:]])


@lru_cache
def _functions(source: str) -> dict[str, list[tuple[int, int]]]:
    """The first and the last line of every function and class, by name."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.end_lineno is not None
            spans.setdefault(node.name, []).append((node.lineno - 1, node.end_lineno))
    return spans
