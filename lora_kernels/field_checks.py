"""Checks of a config's fields: an error names the field, what was expected and what came."""

import math
import re
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def listed(names: Iterable[object], most: int = 1000) -> str:
    """Names for a message, all of them unless a file has been made to have ever so many."""
    found = list(islice(names, most + 1))
    text = ", ".join(shown(name) for name in found[:most])
    return f"[{text}, and more]" if len(found) > most else f"[{text}]"


def wrong(error: type[Exception], name: str, expected: str, value: object) -> Exception:
    return error(f"{name}: expected {expected}, got {shown(value)}")


def check_rank(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(TypeError, name, "an int", value)
    if value < 1:
        raise wrong(ValueError, name, "an int >= 1", value)


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(TypeError, name, "a number", value)
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise wrong(ValueError, name, "a finite number", value)


def check_regex(
    name: str, pattern: Any, compile_pattern: Callable[[str], re.Pattern[str]] = re.compile
) -> None:
    if not isinstance(pattern, str):
        raise wrong(TypeError, name, "a regular expression (str)", pattern)
    try:
        compile_pattern(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise wrong(ValueError, name, f"a regular expression ({error})", pattern) from error


def checked_names(name: str, value: Any) -> list[str] | str | None:
    if isinstance(value, str):
        check_regex(name, value)
        return value
    if value is None:
        return None
    if not isinstance(value, list | tuple | set | frozenset):
        raise wrong(TypeError, name, "a str, a list of str or None", value)
    for item in value:
        if not isinstance(item, str):
            raise wrong(TypeError, name, "a list of str", item)
        if not item:
            raise wrong(ValueError, name, "non-empty names", item)
    return as_list(value)


def as_list(items: Any) -> list[Any]:
    """One item or several as a list without duplicates; a set, whose order varies, is sorted."""
    if isinstance(items, str | int):
        return [items]
    return list(dict.fromkeys(sorted(items) if isinstance(items, set | frozenset) else items))
