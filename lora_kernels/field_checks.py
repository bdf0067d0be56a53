"""Checks of a config's fields: an error names the field, what was expected and what came."""

import math
import re
from collections.abc import Callable, Iterable
from itertools import islice
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lora_kernels.name_patterns import NamePattern, name_pattern


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
    name: str, pattern: Any, compile_pattern: Callable[[str], NamePattern] = name_pattern
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


def check_types(settings: Any) -> None:
    """Checks every field of a dataclass of options against its annotation.

    An int is a number where a float is wanted; a bool is neither. Floats are finite.

    Raises:
        TypeError, ValueError: naming the field.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _is_of(kind, value):
            raise wrong(TypeError, name, getattr(kind, "__name__", str(kind)), value)
        if isinstance(value, float):
            check_number(name, value)


def _is_of(kind: Any, value: object) -> bool:
    origin = get_origin(kind)
    if origin is Literal:
        # Which of its values it may be is for the class to say.
        return isinstance(value, str)
    if origin in (Union, UnionType):
        return any(_is_of(part, value) for part in get_args(kind))
    if origin is list:
        item = get_args(kind)[0]
        return isinstance(value, list) and all(_is_of(item, one) for one in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)
