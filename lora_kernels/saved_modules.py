"""Modules that are trained and saved as a whole with an adapter: PEFT's `modules_to_save`.

    model.lm_head                              a `ModulesToSave` in the module's place
    model.lm_head.original_module              the base model's own, frozen
    model.lm_head.modules_to_save.<adapter>    that adapter's copy

The active adapter's copy computes; where no active adapter has one, or adapters are disabled, the
original does. Names and semantics are PEFT's (`utils/other.py`, ModulesToSaveWrapper): copies are
deep and keep the base's dtype, one at most is active, and a file holds a copy under the name that
the module has in the base model.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class ModulesToSave(nn.Module):
    """A module of the base model and the adapters' copies of it; called, it is one of them.

    Its attributes are those of the module that computes now: `model.lm_head.weight` is the active
    adapter's.

    Attributes:
        active_adapter: whose copy computes; None: the original.
        disabled: True while the original is to compute.
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapter: str | None = None
        self.disabled = False
        original_module.requires_grad_(False)

    def add_adapter(self, name: str) -> None:
        """Copies the original for an adapter, which is not active yet."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module)

    def set_adapter(self, names: Sequence[str], inference_mode: bool = False) -> None:
        """Makes the copy of the one of these adapters that has one compute, and train."""
        self.active_adapter = next((name for name in names if name in self.modules_to_save), None)
        for name, module in self.modules_to_save.items():
            trained = name == self.active_adapter and not inference_mode
            for parameter in module.parameters():
                parameter.requires_grad_(trained and parameter.is_floating_point())

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter's copy; where it was active, the original computes."""
        del self.modules_to_save[name]
        if self.active_adapter == name:
            self.active_adapter = None

    def current(self) -> nn.Module:
        """The module that computes now."""
        if self.disabled or self.active_adapter is None:
            return self.original_module
        return self.modules_to_save[self.active_adapter]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Before __init__ (in copying and unpickling) there is no module to ask.
            if "original_module" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.current(), name)


def saved_modules(model: nn.Module) -> Iterator[tuple[str, ModulesToSave]]:
    """The (path, module) pairs of every `ModulesToSave` of a model, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSave):
            yield name, module


def check_one_copy(modules: Mapping[str, ModulesToSave], names: Sequence[str]) -> None:
    """Raises ValueError where several of these adapters have a copy of one module."""
    for path, module in modules.items():
        owners = [name for name in names if name in module.modules_to_save]
        if len(owners) > 1:
            raise ValueError(
                f"adapter_name: expected one adapter with a copy of {path} (modules_to_save) to be "
                f"active, got {owners}"
            )


def saved_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter's copies, by the names that they have in the base model."""
    return {
        f"{path}.{key}": tensor
        for path, module in saved_modules(model)
        if name in module.modules_to_save
        for key, tensor in module.modules_to_save[name].state_dict(keep_vars=True).items()
    }
