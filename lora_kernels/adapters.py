"""The adapters of a whole model: switched, disabled, deleted, merged, saved and loaded by name.

These functions work on any model that `inject_lora` has prepared. Each checks everything it needs
before it changes anything: after an error the model is as it was.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from lora_kernels.adapter_files import adapter_directory, load_adapter, save_adapter
from lora_kernels.adapter_state import (
    adapter_configs,
    adapter_state_dict,
    check_fit,
    check_known,
    check_values,
    copy_adapter,
)
from lora_kernels.config import validate_adapter_name
from lora_kernels.injection import (
    inject_lora,
    is_adapter_parameter,
    refuse_shared_weights,
    replace_modules,
    set_trainable_biases,
)
from lora_kernels.layers import LoraLinear, active_adapters, lora_layers
from lora_kernels.saved_modules import ModulesToSave, check_one_copy, saved_modules
from lora_kernels.sharding import is_first_process, is_sharded, refuse_sharded, reshard


def set_adapter(model: nn.Module, names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Makes these adapters, and no others, active in every layer that has them.

    What is active trains, unless inference_mode: the adapter, its modules_to_save, its biases.

    Raises:
        ValueError: a name is unknown or repeated, or two of them have a copy of one module.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    check_known(model, wanted)
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"adapter_name: expected each name once, got {wanted}")
    check_one_copy(dict(saved_modules(model)), wanted)
    reshard(model)
    for _, layer in lora_layers(model):
        layer.set_adapter([name for name in wanted if name in layer.lora_A], inference_mode)
    for _, module in saved_modules(model):
        module.set_adapter(wanted, inference_mode)
    set_trainable_biases(model, [] if inference_mode else wanted)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Removes an adapter from every layer; the oldest left becomes active where none is.

    The base stays as the adapter has left it: trained biases, and the residual of PiSSA and OLoRA.

    Raises:
        ValueError: the name is unknown, the adapter is merged, or the model is sharded.
    """
    check_known(model, [name])
    refuse_sharded(model, "an adapter cannot be deleted from", "set_adapter switches it off")
    layers = [layer for _, layer in lora_layers(model) if name in layer.lora_A]
    if any(name in layer.merged_adapters for layer in layers):
        raise ValueError(f"adapter_name: {name!r} is merged; unmerge before deleting it")
    active = active_adapters(model)
    for layer in layers:
        layer.delete_adapter(name)
    for _, module in list(saved_modules(model)):
        if name in module.modules_to_save:
            module.delete_adapter(name)
            if not module.modules_to_save:
                replace_modules(model, {module: module.original_module})
    if adapter_configs(model)[name].bias != "none":
        set_trainable_biases(model, [])
    configs = {key: value for key, value in adapter_configs(model).items() if key != name}
    model.lora_configs = configs  # type: ignore[assignment]
    if name in active:
        # Every layer chose for itself; the choice is the model's.
        set_adapter(model, [other for other in active if other != name] or list(configs)[:1])


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """While it is open, every layer computes its base alone. A merged layer is unmerged first.

    Biases that an adapter has trained are the base's own and stay, with a warning as PEFT's.
    """
    before: list[tuple[nn.Module, bool]] = [
        *((layer, layer.disabled) for _, layer in lora_layers(model)),
        *((module, module.disabled) for _, module in saved_modules(model)),
    ]
    try:
        enable_adapters(model, False)
        yield
    finally:
        for module, disabled in before:
            _enable(module, not disabled)


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """Switches all adapters on or off; a merged layer is unmerged before it is switched off."""
    reshard(model)
    active = active_adapters(model)
    trained = [name for name in active if adapter_configs(model)[name].bias != "none"]
    if trained and not enabled:
        warnings.warn(
            f"the biases that adapter {trained[0]!r} has trained (bias="
            f"{adapter_configs(model)[trained[0]].bias!r}) stay in the base model",
            stacklevel=2,
        )
    for _, layer in lora_layers(model):
        _enable(layer, enabled)
    for _, module in saved_modules(model):
        _enable(module, enabled)


def _enable(module: nn.Module, enabled: bool) -> None:
    if isinstance(module, LoraLinear):
        module.enable_adapters(enabled)
    elif isinstance(module, ModulesToSave):
        module.disabled = not enabled


def merge_adapter(model: nn.Module, names: str | Sequence[str] | None = None) -> None:
    """Merges adapters (the active ones by default) into the weights of every layer.

    A sharded model's layers are gathered and merged one after another: every process calls this.

    Raises:
        ValueError: a name is unknown, a layer is merged already or disabled, a merged weight has
            NaN or Inf, a weight to merge into is shared with another module, or an adapter has
            lora_bias where a layer has no bias. No layer is then merged.
    """
    wanted = None if names is None else [names] if isinstance(names, str) else list(names)
    check_known(model, wanted or [])
    chosen = {
        path: layer.active_adapters if wanted is None else [n for n in wanted if n in layer.lora_A]
        for path, layer in lora_layers(model)
    }
    refuse_shared_weights(model, [path for path, adapters in chosen.items() if adapters], "merging")
    reshard(model)
    done: list[LoraLinear] = []
    for path, layer in lora_layers(model):
        try:
            layer.merge(chosen[path])
        except Exception as error:
            for merged in done:
                merged.unmerge()
            if isinstance(error, ValueError):
                raise ValueError(f"{path}: {error}") from error
            raise
        done.append(layer)


def unmerge_adapter(model: nn.Module) -> None:
    """Restores every merged weight, bit by bit."""
    reshard(model)
    for _, layer in lora_layers(model):
        layer.unmerge()


def unload(model: nn.Module) -> None:
    """Turns every LoraLinear back into an `nn.Linear` (or Conv1D) over its weight as it is now.

    Merge first to keep the adapters' effect. Of a module with copies the active adapter's remains.

    Raises:
        ValueError: the model is sharded.
    """
    refuse_sharded(
        model, "adapters cannot be unloaded from", "save them and merge them into the base model"
    )
    replacements: dict[nn.Module, nn.Module] = {}
    for _, layer in lora_layers(model):
        replacements[layer] = layer.to_linear()
    for _, module in saved_modules(model):
        kept = module.current()
        replacements[module] = replacements.get(kept, kept)
    replace_modules(model, replacements)
    model.lora_configs = {}  # type: ignore[assignment]


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model without adapters, as `unload` would leave it; nothing is copied.

    The names are those of the base model; of a module with copies it is the one that computes now.
    """
    modules = dict(saved_modules(model))
    current = {}
    for path, module in modules.items():
        state = module.current().state_dict(keep_vars=True)
        current.update({f"{path}.{key}": tensor for key, tensor in state.items()})
    inside = tuple(f"{path}." for path in modules)
    state = {
        key: tensor
        for key, tensor in {**model.state_dict(keep_vars=True), **current}.items()
        if key in current or not key.startswith(inside)
    }
    return {key: tensor for key, tensor in state.items() if not is_adapter_parameter(key)}


def save_adapters(
    model: nn.Module,
    directory: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    is_main_process: bool | None = None,
) -> None:
    """Writes adapters (all by default) as PEFT does: "default" here, others in their own folder.

    Args:
        is_main_process: whether this process is to write. By default it is, but that a sharded
            model, whose processes all call this to gather it, is written by rank 0 alone.

    Raises:
        ValueError: a name is unknown, or the model has no adapter.
        OSError: the files cannot be written; an older adapter there is then intact.
    """
    selected = list(adapter_configs(model)) if names is None else list(names)
    check_known(model, selected)
    if not selected:
        raise ValueError("names: expected at least one adapter, the model has none")
    if is_main_process is None:
        is_main_process = is_first_process() or not is_sharded(model)
    for name in selected:
        tensors = adapter_state_dict(model, name)
        if is_main_process:
            directory_of_one = adapter_directory(directory, name)
            save_adapter(directory_of_one, adapter_configs(model)[name], tensors)


def load_adapter_into(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
) -> None:
    """Reads an adapter directory (PEFT's two files) and adds it to the model under a name.

    Where the model has active adapters already, the new one is not active until `set_adapter`.

    Args:
        is_trainable: whether the adapter, where it becomes active, requires gradients.

    Raises:
        ValueError: the name is taken, the files are faulty, or their tensors do not fit the model;
            every key that does not fit is named, and the model is unchanged.
        FileNotFoundError: the directory or a file is missing.
    """
    validate_adapter_name(adapter_name)
    if adapter_name in adapter_configs(model):
        raise ValueError(f"adapter_name: {adapter_name!r} exists already in this model")
    config, tensors = load_adapter(
        directory, lambda config, outlines: check_fit(model, config, outlines, str(directory))
    )
    check_values(model, tensors, autocast_adapter_dtype, str(directory))
    try:
        inject_lora(model, config, adapter_name, autocast_adapter_dtype)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{directory}: {error}") from error
    copy_adapter(model, adapter_name, tensors)
    if not is_trainable and adapter_name in active_adapters(model):
        set_adapter(model, adapter_name, inference_mode=True)
