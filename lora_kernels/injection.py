"""inject_lora: an adapter for any torch model, and what else of the model trains with it."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lora_kernels.config import LoraConfig, validate_adapter_name
from lora_kernels.init_weights import changes_weight, check_initialisation
from lora_kernels.layers import LoraLinear, check_replaceable, lora_layers
from lora_kernels.name_patterns import Budget
from lora_kernels.saved_modules import ModulesToSave
from lora_kernels.sharding import refuse_sharded
from lora_kernels.targets import (
    HEADS,
    is_conv1d,
    match_modules_to_save,
    match_target_modules,
)

Model = TypeVar("Model", bound=nn.Module)

_ADAPTER_PARTS = (
    ".lora_A.", ".lora_B.", ".lora_bias.", ".lora_magnitude_vector.", ".modules_to_save.",
)  # fmt: skip


def inject_lora(
    model: Model,
    config: LoraConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
) -> Model:
    """Adds an adapter to the layers of any torch model that `config` targets, in place.

    Targeted `nn.Linear`s (and transformers' Conv1Ds) become `LoraLinear`s over the same weights and
    under the same names, `modules_to_save` are wrapped (`saved_modules.py`). With the first adapter
    of a model every parameter is frozen but the adapter's and the biases that `config.bias` names;
    the adapter becomes active. A later one changes nothing that is there.

    Args:
        config: its target_modules choose the layers as PEFT does. With the task type of a
            classifier the head of the model is one of its modules_to_save, as in PEFT.
        adapter_name: letters, digits, "_" and "-".
        autocast_adapter_dtype: as in `LoraLinear.add_adapter`.

    Returns:
        The same model, whose `lora_configs` maps adapter names to configs.

    Raises:
        ValueError, TypeError: nothing matches a target, a target is no plain linear layer or has
            hooks, the adapter exists already, it is a second one with biases, a layer does not suit
            its initialisation, or the model is sharded. The model is then unchanged.
    """
    validate_adapter_name(adapter_name)
    configs: dict[str, LoraConfig] = getattr(model, "lora_configs", {})
    if adapter_name in configs:
        raise ValueError(f"adapter_name: {adapter_name!r} exists already in this model")
    _check_biases(configs, config)
    refuse_sharded(model, "adapters cannot be added to", "add them before fully_shard")
    config = _with_head(config)
    paths = match_target_modules(model, config)
    saved_paths = match_modules_to_save(model, config)
    modules = dict(model.named_modules())
    _check_targets(modules, paths, config, adapter_name)
    for path in saved_paths:
        _check_saveable(path, modules[path], adapter_name)
    if changes_weight(config.init_lora_weights):
        refuse_shared_weights(model, paths, "taking the adapter's part out of it")
    _warn_of_shared_weights(model, [*paths, *saved_paths])
    config = _with_orientation(config, [modules[path] for path in paths])

    trained = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    for name, parameter in model.named_parameters():
        if not is_adapter_parameter(name):
            parameter.requires_grad_(False)
    layers: dict[str, LoraLinear] = {}
    for path in paths:
        linear = modules[path]
        layers[path] = linear if isinstance(linear, LoraLinear) else LoraLinear.from_linear(linear)
    wrappers: dict[str, ModulesToSave] = {}
    for path in saved_paths:
        module = modules[path]
        wrapper = module if isinstance(module, ModulesToSave) else ModulesToSave(module)
        wrappers[path] = wrapper.train(module.training)
    new = {modules[path]: module for path, module in [*layers.items(), *wrappers.items()]}
    replace_modules(model, new)
    budget = Budget()
    for path, layer in layers.items():
        layer.add_adapter(adapter_name, config, path, autocast_adapter_dtype, budget)
        # What is active is a choice for the whole model, also for layers new to adapters.
        if configs and layer.active_adapters == [adapter_name]:
            layer.set_adapter([])
    for wrapper in wrappers.values():
        wrapper.add_adapter(adapter_name)
        wrapper.set_adapter([wrapper.active_adapter or ""] if configs else [adapter_name])
    model.lora_configs = {**configs, adapter_name: config}  # type: ignore[assignment]
    if configs:
        for parameter in model.parameters():
            parameter.requires_grad_(trained.get(id(parameter), parameter.requires_grad))
    else:
        set_trainable_biases(model, [adapter_name])
    return model


def set_trainable_biases(model: nn.Module, trained: Sequence[str]) -> None:
    """Makes the base model's biases train where their adapter is one of `trained`."""
    configs: Mapping[str, LoraConfig] = getattr(model, "lora_configs", {})
    for name, config in configs.items():
        for parameter in _biases(model, config.bias):
            parameter.requires_grad_(name in trained)


def _biases(model: nn.Module, kind: str) -> Iterator[nn.Parameter]:
    if kind == "lora_only":
        for _, layer in lora_layers(model):
            if layer.lora_A and layer.bias is not None:
                yield layer.bias
    elif kind == "all":
        for name, parameter in model.named_parameters():
            frozen = is_adapter_parameter(name) or ".original_module." in f".{name}"
            if name.rpartition(".")[2] == "bias" and not frozen:
                yield parameter


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of this full name is an adapter's."""
    return any(part in f".{name}" for part in _ADAPTER_PARTS)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Puts new modules in the places of old ones, everywhere a shared one is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def refuse_shared_weights(model: nn.Module, paths: Sequence[str], action: str) -> None:
    """Raises ValueError where a layer's weight is another module's too: `action` changes both."""
    owners = _owners(model)
    modules = dict(model.named_modules())
    for path in paths:
        sharing = owners[id(modules[path]._parameters["weight"])]
        if len(sharing) > 1:
            raise ValueError(
                f"{path}: its weight is shared by {sharing}; {action} would change them all"
            )


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The paths of the modules that have a parameter, by the parameter's id."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    return owners


def _warn_of_shared_weights(model: nn.Module, paths: Sequence[str]) -> None:
    owners = _owners(model)
    for path in paths:
        for parameter in model.get_submodule(path).parameters():
            others = [
                other for other in owners[id(parameter)] if not f"{other}.".startswith(f"{path}.")
            ]
            if others:
                warnings.warn(
                    f"{path}: its weight is shared with {others}; the adapter changes {path} alone",
                    stacklevel=3,
                )


def _with_head(config: LoraConfig) -> LoraConfig:
    """The config that also saves the head of its task, which a base model has not trained."""
    heads = HEADS.get(config.task_type or "", ())
    missing = [name for name in heads if name not in (config.modules_to_save or ())]
    if not missing:
        return config
    saved = [*(config.modules_to_save or ()), *missing]
    return dataclasses.replace(config, modules_to_save=saved)


def _check_biases(configs: Mapping[str, LoraConfig], config: LoraConfig) -> None:
    others = [name for name, other in configs.items() if other.bias != "none"]
    if config.bias != "none" and others:
        raise ValueError(
            f"bias: expected 'none', as the biases train with adapter {others[0]!r} already, got "
            f"{config.bias!r}"
        )


def _check_targets(
    modules: Mapping[str, nn.Module], paths: Sequence[str], config: LoraConfig, name: str
) -> None:
    mode, budget = config.init_lora_weights, Budget()
    for path in paths:
        module = modules[path]
        if not isinstance(module, LoraLinear):
            check_replaceable(f"target_modules: {path}", module)
        elif name in module.lora_A:
            raise ValueError(f"adapter_name: {name!r} exists already in {path}")
        elif module.merged_adapters and (changes_weight(mode) or config.use_dora):
            raise ValueError(
                f"{path}: {module.merged_adapters} are merged into the weight that the new adapter "
                "begins with; unmerge first"
            )
        weight = module.get_parameter("weight").detach()
        if is_conv1d(module) or getattr(module, "fan_in_fan_out", False):
            weight = weight.t()
        rank, scaling = config.rank_for(path, budget), config.scaling_for(path, budget)
        check_initialisation(mode, weight, rank, scaling, path)


def _check_saveable(path: str, module: nn.Module, name: str) -> None:
    containers = nn.ModuleDict | nn.ModuleList | nn.ParameterDict | nn.ParameterList
    if isinstance(module, containers):
        raise TypeError(f"modules_to_save: {path}: expected a module, got {type(module).__name__}")
    if isinstance(module, ModulesToSave):
        if name in module.modules_to_save:
            raise ValueError(f"adapter_name: {name!r} exists already in {path}")
        return
    for inner, layer in module.named_modules():
        if isinstance(layer, ModulesToSave) or (isinstance(layer, LoraLinear) and layer.lora_A):
            inside = ".".join(filter(None, (path, inner)))
            raise ValueError(
                f"modules_to_save: {path}: expected a module without adapters, {inside} has one"
            )


def _with_orientation(config: LoraConfig, targets: Sequence[nn.Module]) -> LoraConfig:
    """The config whose fan_in_fan_out is that of its layers, as PEFT corrects it."""
    transposed = [
        module.fan_in_fan_out if isinstance(module, LoraLinear) else is_conv1d(module)
        for module in targets
    ]
    wrong = [flag for flag in transposed if flag != config.fan_in_fan_out]
    if not wrong:
        return config
    kind = "Conv1D" if wrong[0] else "nn.Linear"
    warnings.warn(
        f"fan_in_fan_out is {config.fan_in_fan_out}, but the target module is a {kind}: it is "
        f"taken as {wrong[0]}",
        stacklevel=3,
    )
    # Of a model with both PEFT's config keeps the last.
    return dataclasses.replace(config, fan_in_fan_out=transposed[-1])
