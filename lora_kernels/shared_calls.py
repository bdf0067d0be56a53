"""Which children a module's forward surely calls on one and the same input, by reading its source.

    q = self.q_proj(hidden_states)      k = self.k_proj(hidden_states)      v = ...
    self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

It answers with what holds in every run, whatever the forward's other statements do, and with
nothing for a forward that it cannot see through. So the outputs of all such children may be made
with the first of them.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

# What a forward may read of a variable between the calls that share it.
_HARMLESS = ("shape", "size", "dtype", "device", "ndim", "dim")

# Of what is inside these, each part may run without the others, or in another mode.
_BRANCHES = (
    ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.ExceptHandler, ast.With, ast.match_case,
    ast.BoolOp, ast.Compare, ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp,
    ast.GeneratorExp,
)  # fmt: skip

_EXITS = (ast.Return, ast.Break, ast.Continue)

_Position = tuple[int, int]


@cache
def shared_calls(forward: Callable[..., Any], names: frozenset[str]) -> tuple[tuple[str, ...], ...]:
    """The groups of children that `forward` calls with one variable, in the order of its source.

    Each child of a group is called in one place, as `self.name(variable)`, all in one block with no
    way out between them. The variable is never assigned, and but for its shape nothing else is done
    with it, so that it holds the same values in every one of the calls.

    Args:
        forward: a function, decorated or not.
        names: the children that count. Calling them writes nothing into their input.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return ()
    calls: dict[str, list[tuple[_Position, str, int]]] = {}
    innocent: set[ast.AST] = set()
    exits: list[_Position] = []
    for node, block in _with_blocks(next(iter(tree.body), tree)):
        if isinstance(node, ast.Attribute) and node.attr in _HARMLESS:
            innocent.add(node.value)
        elif isinstance(node, _EXITS):
            # What a return statement calls comes before the return.
            exits.append((node.end_lineno or 0, node.end_col_offset or 0))
        elif isinstance(node, ast.Call) and (child := _child_of_self(node.func)) in names:
            argument = node.args[0] if len(node.args) == 1 and not node.keywords else None
            variable = argument.id if isinstance(argument, ast.Name) else ""
            innocent.update(node.args)
            position = node.lineno, node.col_offset
            calls.setdefault(child, []).append((position, variable, block))
    touched = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and not (isinstance(node.ctx, ast.Load) and node in innocent)
    }
    groups: dict[tuple[str, int], list[tuple[_Position, str]]] = {}
    for child, found in calls.items():
        position, variable, block = found[0]
        if len(found) == 1 and variable and variable not in touched:
            groups.setdefault((variable, block), []).append((position, child))
    ordered = [sorted(group) for group in groups.values() if len(group) > 1]
    return tuple(
        tuple(child for _, child in group)
        for group in ordered
        if not any(group[0][0] < position < group[-1][0] for position in exits)
    )


def _with_blocks(root: ast.AST) -> list[tuple[ast.AST, int]]:
    """Every node below `root`, with a number for what runs exactly when its neighbours do."""
    found: list[tuple[ast.AST, int]] = []
    pending, blocks = [(root, 0)], 0
    while pending:
        node, block = pending.pop()
        found.append((node, block))
        branches = isinstance(node, _BRANCHES) and node is not root
        for _, value in ast.iter_fields(node):
            parts = value if isinstance(value, list) else [value]
            for part in parts:
                if branches and (part is parts[0] or isinstance(node, ast.BoolOp | ast.Compare)):
                    blocks += 1
                if isinstance(part, ast.AST):
                    pending.append((part, blocks if branches else block))
    return found


def _child_of_self(node: ast.AST) -> str:
    """The name in the expression self.name; empty for any other expression."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "self" else ""
    return ""
