"""The adapters of a whole model: switched, disabled, deleted, merged, saved and loaded by name.

These functions work on any model that `inject_lora` has prepared. Each checks everything it needs
before it changes anything: after an error the model is as it was.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_kernels.adapter_files import adapter_directory, load_adapter, save_adapter
from lora_kernels.config import LoraConfig, match_target_modules, validate_adapter_name
from lora_kernels.layers import (
    LoraLinear,
    active_adapters,
    inject_lora,
    lora_layers,
    replace_modules,
)


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """The model's adapters: config by name."""
    return getattr(model, "lora_configs", {})


def _check_known(model: nn.Module, names: Sequence[str]) -> None:
    known = adapter_configs(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"adapter_name: {unknown} not found; the model has {list(known)}")


def set_adapter(model: nn.Module, names: str | Sequence[str], inference_mode: bool = False) -> None:
    """Makes these adapters, and no others, active in every layer that has them.

    Raises:
        ValueError: a name is unknown or repeated.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    _check_known(model, wanted)
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"adapter_name: expected each name once, got {wanted}")
    for _, layer in lora_layers(model):
        layer.set_adapter([name for name in wanted if name in layer.lora_A], inference_mode)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Removes an adapter from every layer; the oldest left becomes active where none is.

    Raises:
        ValueError: the name is unknown, or the adapter is merged.
    """
    _check_known(model, [name])
    layers = [layer for _, layer in lora_layers(model) if name in layer.lora_A]
    if any(name in layer.merged_adapters for layer in layers):
        raise ValueError(f"adapter_name: {name!r} is merged; unmerge before deleting it")
    active = active_adapters(model)
    for layer in layers:
        layer.delete_adapter(name)
    configs = {key: value for key, value in adapter_configs(model).items() if key != name}
    model.lora_configs = configs  # type: ignore[assignment]
    if name in active:
        # Every layer chose for itself; the choice is the model's.
        set_adapter(model, [other for other in active if other != name] or list(configs)[:1])


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """While it is open, every layer computes its base alone. A merged layer is unmerged first."""
    before = [(layer, layer.disabled) for _, layer in lora_layers(model)]
    try:
        for layer, _ in before:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, disabled in before:
            layer.enable_adapters(not disabled)


def merge_adapter(model: nn.Module, names: str | Sequence[str] | None = None) -> None:
    """Merges adapters (the active ones by default) into the weights of every layer.

    Raises:
        ValueError: a name is unknown, a layer is merged already or disabled, a merged weight has
            NaN or Inf, or a weight to merge into is shared with another module. No layer is then
            merged.
    """
    wanted = None if names is None else [names] if isinstance(names, str) else list(names)
    _check_known(model, wanted or [])
    chosen = {
        path: layer.active_adapters if wanted is None else [n for n in wanted if n in layer.lora_A]
        for path, layer in lora_layers(model)
    }
    _refuse_shared_weights(model, [path for path, adapters in chosen.items() if adapters])
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


def _refuse_shared_weights(model: nn.Module, paths: Sequence[str]) -> None:
    weights = {path: module._parameters.get("weight") for path, module in model.named_modules()}
    owners: dict[int, list[str]] = {}
    for path, weight in weights.items():
        owners.setdefault(id(weight), []).append(path)
    for path in paths:
        sharing = owners[id(weights[path])]
        if len(sharing) > 1:
            raise ValueError(
                f"{path}: its weight is shared by {sharing}; merging would change them all"
            )


def unmerge_adapter(model: nn.Module) -> None:
    """Restores every merged weight, bit by bit."""
    for _, layer in lora_layers(model):
        layer.unmerge()


def unload(model: nn.Module) -> None:
    """Turns every LoraLinear back into an `nn.Linear` over its weight as it is now.

    Merge first to keep the adapters' effect.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    for _, layer in lora_layers(model):
        linear = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
        linear.weight, linear.bias = layer.weight, layer.bias
        replacements[layer] = linear.train(layer.training)
    replace_modules(model, replacements)
    model.lora_configs = {}  # type: ignore[assignment]


def adapter_state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's key without its prefix: "<path>.lora_A.weight" [R, in].

    Raises:
        ValueError: the name is unknown.
    """
    _check_known(model, [name])
    tensors = {}
    for path, layer in lora_layers(model):
        if name in layer.lora_A:
            tensors[f"{path}.lora_A.weight"] = layer.lora_A[name].detach()
            tensors[f"{path}.lora_B.weight"] = layer.lora_B[name].detach()
    return tensors


def save_adapters(
    model: nn.Module, directory: str | os.PathLike[str], names: Sequence[str] | None = None
) -> None:
    """Writes adapters (all by default) as PEFT does: "default" here, others in their own folder.

    Raises:
        ValueError: a name is unknown, or the model has no adapter.
        OSError: the files cannot be written; an older adapter there is then intact.
    """
    selected = list(adapter_configs(model)) if names is None else list(names)
    _check_known(model, selected)
    if not selected:
        raise ValueError("names: expected at least one adapter, the model has none")
    for name in selected:
        save_adapter(
            adapter_directory(directory, name),
            adapter_configs(model)[name],
            adapter_state_dict(model, name),
        )


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
    config, tensors = load_adapter(directory)
    check_fit(model, config, tensors, str(directory))
    inject_lora(model, config, adapter_name, autocast_adapter_dtype)
    copy_adapter(model, adapter_name, tensors)
    if not is_trainable:
        for _, layer in lora_layers(model):
            if adapter_name in layer.lora_A:
                layer.lora_A[adapter_name].requires_grad_(False)
                layer.lora_B[adapter_name].requires_grad_(False)


def check_fit(
    model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], source: str
) -> None:
    """Raises ValueError naming every key that is missing, unexpected or of another shape."""
    modules = dict(model.named_modules())
    expected: dict[str, tuple[int, int]] = {}
    for path in match_target_modules(model, config):
        module = modules[path]
        assert isinstance(module, nn.Linear)
        r = config.rank_for(path)
        expected[f"{path}.lora_A.weight"] = (r, module.in_features)
        expected[f"{path}.lora_B.weight"] = (module.out_features, r)
    faults = [f"missing {key}" for key in expected if key not in tensors]
    for key, tensor in tensors.items():
        if key not in expected:
            faults.append(f"unexpected {key}: no such layer is targeted in this model")
        elif tuple(tensor.shape) != expected[key]:
            faults.append(f"{key}: expected shape {expected[key]}, got {tuple(tensor.shape)}")
    if faults:
        raise ValueError(f"{source}: the adapter does not fit the model: " + "; ".join(faults))


def copy_adapter(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copies checked tensors into an adapter that the model has, in the adapter's dtype."""
    with torch.no_grad():
        for path, layer in lora_layers(model):
            if name in layer.lora_A:
                layer.lora_A[name].copy_(tensors[f"{path}.lora_A.weight"])
                layer.lora_B[name].copy_(tensors[f"{path}.lora_B.weight"])
