"""JSON as the files of strangers are read: bounded, without duplicate keys, depth or constants.

Python's own parser takes the last of two equal keys, and NaN, which is no JSON. What it makes of a
text can be thirty times as large, so that the number of values is bounded before it runs.
"""

import json
from collections import Counter
from typing import Any

from lora_kernels.field_checks import listed

MAX_DEPTH = 32
# At most 120 MiB of Python objects.
MAX_VALUES = 1 << 19


def parse_object(
    content: bytes,
    max_values: int = MAX_VALUES,
    max_depth: int = MAX_DEPTH,
    constants: bool = False,
) -> dict[str, Any]:
    """A JSON text's object.

    Args:
        content: UTF-8. How long it may be is the caller's to say, before it is read.
        max_values: most values in all objects and arrays together.
        max_depth: most objects and arrays inside one another.
        constants: whether NaN and the infinities are let through, for the caller to judge.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        ValueError: it is not JSON, not an object, has more values or is nested deeper than that,
            or has a key twice in one object.
    """
    if content.count(b",") >= max_values:
        raise ValueError(f"expected at most {max_values} values, got more")
    try:
        parsed = json.loads(
            content.decode(),
            object_pairs_hook=_without_duplicates,
            parse_constant=None if constants else _no_constant,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"expected a JSON object, got {type(parsed).__name__}")
    _check_depth(parsed, max_depth)
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"duplicate keys {listed(key for key in counts if counts[key] > 1)}")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_depth(parsed: Any, max_depth: int) -> None:
    level = [parsed]
    for _ in range(max_depth):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {max_depth} levels")
