"""Another forward for a module, in place: its class becomes a subclass made for the purpose.

Parameters, submodules, hooks, names and `isinstance` stay as they are, and putting the class back
undoes it. A forward set on the instance would shadow what others set there and be copied, bound to
the original, by `copy.deepcopy`.
"""

from collections.abc import Callable, Hashable
from functools import cache
from types import new_class
from typing import Any

from torch import nn

# What makes the subclass's attributes: called with the original class and the options.
Make = Callable[..., dict[str, Any]]


@cache
def _subclass(original: Any, make: Make, *options: Hashable) -> type[nn.Module]:
    namespace = {
        "__module__": __name__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "_recipe": (original, make, *options),
        **make(original, *options),
    }
    return new_class(f"Fused{original.__name__}", (original,), None, lambda n: n.update(namespace))


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """A pickle or copy names the recipe: the class itself has no name to be imported by."""
    reduced: Any = object.__reduce_ex__(module, protocol)
    _, _, *state = reduced
    return _blank, recipe(module), *state


def _blank(*made_from: Any) -> nn.Module:
    made = _subclass(*made_from)
    return made.__new__(made)


def swap(module: nn.Module, make: Make, *options: Hashable) -> None:
    """Makes `module` an instance of the subclass; `make` is a function of a module's top level."""
    original: Any = type(module)
    module.__class__ = _subclass(original, make, *options)


def swap_back(module: nn.Module) -> None:
    """Gives a swapped module its own class back; any other is left alone."""
    if recipe(module):
        module.__class__ = original_class(module)


def recipe(module: nn.Module) -> tuple[Any, ...]:
    """The original class, `make` and its options; empty for a module that is not swapped."""
    return type(module).__dict__.get("_recipe", ())


def original_class(module: nn.Module) -> type[nn.Module]:
    made_from = recipe(module)
    return made_from[0] if made_from else type(module)
