"""Regular expressions for module names, matched in a bounded number of steps.

Python's `re` tries one way through an expression after another, and "(a+)+$" has 2**n of them for a
name of n letters: an adapter's config could keep whoever loads it busy for ever. Here an
expression maps the set of positions at which it may begin to the set of those at which it may end:

    starts, ends      int, bit i for the position before the name's character i
    ends("a", starts)        (starts & {i: name[i] == "a"}) << 1
    ends(X Y, starts)        ends(Y, ends(X, starts))
    ends(X | Y, starts)      ends(X, starts) | ends(Y, starts)
    ends(X*, starts)         starts, and what X adds to it until it adds nothing

so that no position is looked at twice for one reason. It is the same language as `re`'s: it takes
Python's own parse of the expression. What is not regular (references to groups, atomic groups,
possessive repeats) is refused, and so is what takes more steps than a `Budget` has; that of
"(a+)+$" is some tens. An expression of letters and dots alone is left to `re`, which is faster.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from operator import or_
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 1 << 16
# Some seconds at most. A thousand names and a thousand patterns of letters take half of them.
MAX_STEPS = 1_000_000

Node = Callable[["_Run", int], int]


class Budget:
    """The steps that matching one config with all names may take."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self.left = steps

    def spend(self, steps: int, text: str) -> None:
        """Takes steps for an expression.

        Raises:
            ValueError: there are not as many left.
        """
        self.left -= steps
        if self.left < 0:
            raise ValueError(
                f"regular expression {text[:300]!r}: expected one that is matched with all names "
                f"within {MAX_STEPS} steps"
            )


class NamePattern:
    """A compiled expression.

    Raises:
        re.error, OverflowError, RecursionError: it is no regular expression, or one that is not
            supported, as `re.compile` raises them.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise re.error(f"longer than {MAX_LENGTH} characters")
        self.text = text
        parsed = parser.parse(text)
        flags = parsed.state.flags
        is_plain = _is_plain(parsed)
        self._plain = re.compile(text) if is_plain else None
        self._plain_end = re.compile(rf"(?:.*\.)?(?:{text})") if is_plain else None
        self._node = _sequence(parsed, flags)

    def fullmatch(self, name: str, budget: Budget | None = None) -> bool:
        """Whether the whole name matches.

        Raises:
            ValueError: the budget is used up.
        """
        if self._plain is not None:
            (budget or Budget()).spend(1, self.text)
            return self._plain.fullmatch(name) is not None
        return bool(self.ends(name, 1, budget) >> len(name) & 1)

    def match_end(self, name: str, budget: Budget | None = None) -> bool:
        """Whether the name matches, or what is behind one of its dots: PEFT's rule of patterns."""
        if self._plain_end is not None:
            (budget or Budget()).spend(1, self.text)
            return self._plain_end.fullmatch(name) is not None
        return bool(self.ends(name, segment_starts(name), budget) >> len(name) & 1)

    def index_after(self, name: str, budget: Budget | None = None) -> int | None:
        """The first number between dots that follows a match of whole parts of the name."""
        ends = self.ends(name, segment_starts(name), budget)
        numbers = re.finditer(r"\.(\d+)(?=\.)", name)
        return next((int(found[1]) for found in numbers if ends >> found.start() & 1), None)

    def ends(self, name: str, starts: int, budget: Budget | None = None) -> int:
        """The positions at which a match can end that begins at one of these."""
        return self._node(_Run(self.text, name, budget or Budget()), starts)


@lru_cache(maxsize=8192)
def name_pattern(text: str) -> NamePattern:
    """The compiled expression, from a cache."""
    return NamePattern(text)


@lru_cache(maxsize=8192)
def part_pattern(text: str) -> NamePattern:
    """The same for one that PEFT puts into another, where flags for the whole have no place."""
    parser.parse(f"({text})")
    return NamePattern(text)


def segment_starts(name: str) -> int:
    """The positions where a part of a dotted name begins."""
    return reduce(or_, (1 << i + 1 for i, character in enumerate(name) if character == "."), 1)


class _Run:
    """One name: its characters' masks, and what is left of the budget."""

    def __init__(self, text: str, name: str, budget: Budget) -> None:
        self.text, self.name, self.budget = text, name, budget
        self.masks: dict[Any, int] = {}

    def spend(self, steps: int) -> None:
        self.budget.spend(steps, self.text)

    def mask(self, key: Any, test: Callable[[int], bool], length: int) -> int:
        """The positions below `length` that pass a test, which is made once."""
        if key not in self.masks:
            self.spend(length)
            self.masks[key] = reduce(or_, (1 << i for i in range(length) if test(i)), 0)
        return self.masks[key]


def _is_plain(parsed: Any) -> bool:
    """Whether there is only one way through it: no choice, no repeat, no case to ignore."""
    return not parsed.state.flags & re.IGNORECASE and all(
        code in (op.LITERAL, op.ANY) for code, _ in parsed
    )


def _sequence(parsed: Any, flags: int) -> Node:
    nodes: list[Node] = []
    letters = ""
    for code, value in parsed:
        if code is op.LITERAL and not flags & re.IGNORECASE:
            letters += chr(value)
            continue
        if letters:
            nodes.append(_literal(letters))
            letters = ""
        nodes.append(_node(code, value, flags))
    if letters:
        nodes.append(_literal(letters))

    def ends(run: _Run, starts: int) -> int:
        for node in nodes:
            if not starts:
                break
            starts = node(run, starts)
        return starts

    return nodes[0] if len(nodes) == 1 else ends


def _node(code: Any, value: Any, flags: int) -> Node:
    if code in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
        return _character(_character_test(code, value, flags))
    if code is op.SUBPATTERN:
        _, added, removed, inner = value
        return _sequence(inner, (flags | added) & ~removed)
    if code is op.BRANCH:
        return _branch([_sequence(inner, flags) for inner in value[1]])
    if code in (op.MAX_REPEAT, op.MIN_REPEAT):
        least, most, inner = value
        return _repeat(_sequence(inner, flags), least, most)
    if code is op.AT:
        return _place(value)
    if code in (op.ASSERT, op.ASSERT_NOT):
        direction, inner = value
        least, most = inner.getwidth()
        if direction < 0 and least != most:
            raise re.error("look-behind requires fixed-width pattern")
        width = least if direction < 0 else None
        return _assertion(_sequence(inner, flags), width, code is op.ASSERT)
    if code is op.FAILURE:
        return lambda run, starts: 0
    raise re.error(f"{str(code).lower()} is not supported: it is not regular")


def _literal(letters: str) -> Node:
    def ends(run: _Run, starts: int) -> int:
        run.spend(2)
        if letters not in run.masks:
            mask, at = 0, run.name.find(letters)
            while at >= 0:
                run.spend(1)
                mask |= 1 << at
                at = run.name.find(letters, at + 1)
            run.masks[letters] = mask
        return (starts & run.masks[letters]) << len(letters)

    return ends


def _character(test: Callable[[str], bool]) -> Node:
    def ends(run: _Run, starts: int) -> int:
        run.spend(2)
        mask = run.mask(test, lambda i: test(run.name[i]), len(run.name))
        return (starts & mask) << 1

    return ends


def _branch(nodes: Sequence[Node]) -> Node:
    return lambda run, starts: reduce(or_, (node(run, starts) for node in nodes), 0)


def _repeat(node: Node, least: int, most: Any) -> Node:
    def ends(run: _Run, starts: int) -> int:
        # Each time either moves on or may be left out: the name's length is enough of them.
        limit = len(run.name) + 1
        for _ in range(min(least, limit)):
            run.spend(1)
            starts = node(run, starts)
        reached = added = starts
        for _ in range(limit if most is op.MAXREPEAT else min(most - least, limit)):
            if not added:
                break
            run.spend(1)
            added = node(run, added) & ~reached
            reached |= added
        return reached

    return ends


def _place(where: Any) -> Node:
    def is_word(name: str, i: int) -> bool:
        return 0 <= i < len(name) and (name[i].isalnum() or name[i] == "_")

    def holds(name: str, i: int) -> bool:
        if where in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return i == 0
        if where is op.AT_END_STRING:
            return i == len(name)
        if where is op.AT_END:
            return i == len(name) or name[i:] == "\n"
        return (is_word(name, i - 1) != is_word(name, i)) == (where is op.AT_BOUNDARY)

    return lambda run, starts: (
        starts & run.mask(where, lambda i: holds(run.name, i), len(run.name) + 1)
    )


def _assertion(node: Node, width: int | None, wanted: bool) -> Node:
    """Look-ahead, or look-behind of a width."""

    def holds(run: _Run, i: int) -> bool:
        if width is None:
            return bool(node(run, 1 << i)) == wanted
        behind = i >= width and node(run, 1 << i - width) >> i & 1
        return bool(behind) == wanted

    def ends(run: _Run, starts: int) -> int:
        found = 0
        for i in range(starts.bit_length()):
            if starts >> i & 1:
                run.spend(1)
                found |= int(holds(run, i)) << i
        return found

    return ends


def _character_test(code: Any, value: Any, flags: int) -> Callable[[str], bool]:
    if code is op.ANY:
        return lambda character: bool(flags & re.DOTALL) or character != "\n"
    items = value if code is op.IN else [(op.LITERAL, value)]
    negated = code is op.NOT_LITERAL or items[0][0] is op.NEGATE

    def is_in(character: str) -> bool:
        return any(
            value == ord(character)
            if kind is op.LITERAL
            else value[0] <= ord(character) <= value[1]
            if kind is op.RANGE
            else kind is op.CATEGORY and _in_category(value, character, flags)
            for kind, value in items
        )

    def test(character: str) -> bool:
        cases = {character}
        if flags & re.IGNORECASE:
            cases |= {c for c in (character.lower(), character.upper()) if len(c) == 1}
        return any(map(is_in, cases)) != negated

    return test


def _in_category(category: Any, character: str, flags: int) -> bool:
    counts = not flags & re.ASCII or character.isascii()
    if category in (op.CATEGORY_DIGIT, op.CATEGORY_NOT_DIGIT):
        found, positive = character.isdecimal(), op.CATEGORY_DIGIT
    elif category in (op.CATEGORY_SPACE, op.CATEGORY_NOT_SPACE):
        found, positive = character.isspace(), op.CATEGORY_SPACE
    else:
        found, positive = character.isalnum() or character == "_", op.CATEGORY_WORD
    return (found and counts) == (category is positive)
