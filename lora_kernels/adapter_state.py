"""An adapter's tensors in a model, by the keys that they have in PEFT's file (less its prefix).

    <path>.lora_A.weight [R, in]      <path>.lora_B.weight [out, R]      every adapted layer
    <path>.lora_B.bias [out]          lora_bias
    <path>.lora_magnitude_vector [out]                                   use_dora
    <path>.base_layer.bias [out]      bias: a base bias; of a layer without adapters <path>.bias
    <path>.<name>                     modules_to_save: all of the copy's state
    lm_head.base_layer.weight         PEFT adds the weight of an embedding or head that is targeted

With bias="all" PEFT writes the biases of a saved module twice more, as <path>.original_module.bias
and <path>.modules_to_save.bias; so does this.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapter_files import EMBEDDING_NAMES
from lora_kernels.config import LoraConfig
from lora_kernels.injection import is_adapter_parameter
from lora_kernels.layers import adapter_dtype, lora_layers
from lora_kernels.name_patterns import Budget
from lora_kernels.saved_modules import ModulesToSave, saved_modules, saved_tensors
from lora_kernels.sharding import reshard, sharded_like, whole
from lora_kernels.targets import linear_shape, match_modules_to_save, match_target_modules

Shape = tuple[int, ...]


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """The model's adapters: config by name."""
    return getattr(model, "lora_configs", {})


def check_known(model: nn.Module, names: list[str]) -> None:
    """Raises ValueError naming the adapters that the model does not have."""
    known = adapter_configs(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"adapter_name: {unknown} not found; the model has {list(known)}")


def adapter_state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's key without its prefix, not copied.

    Of a model that `fully_shard` has sharded they are gathered: every process calls this, and each
    gets the whole tensors.

    Raises:
        ValueError: the name is unknown.
    """
    check_known(model, [name])
    reshard(model)
    return {key: whole(tensor.detach()) for key, tensor in _tensors(model, name).items()}


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    config = adapter_configs(model)[name]
    tensors: dict[str, Tensor] = {
        f"{path}.{key}": parameter
        for path, layer in lora_layers(model)
        for key, parameter in layer.adapter_parameters(name).items()
    }
    return {
        **tensors,
        **saved_tensors(model, name),
        **_base_biases(model, name, config.bias),
        **_targeted_embeddings(model, config),
    }


def _base_biases(model: nn.Module, name: str, kind: str) -> dict[str, Tensor]:
    layers = {path: layer for path, layer in lora_layers(model) if layer.lora_A}
    if kind == "none":
        return {}
    if kind == "lora_only":
        return {
            f"{path}.base_layer.bias": layer.bias
            for path, layer in layers.items()
            if layer.bias is not None
        }
    tensors = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        owner, _, last = key.rpartition(".")
        if last != "bias":
            continue
        if f".modules_to_save.{name}." in f".{key}":
            tensors[f"{owner.removesuffix(f'.{name}')}.bias"] = tensor
        elif not is_adapter_parameter(key):
            tensors[f"{owner}.base_layer.bias" if owner in layers else key] = tensor
    return tensors


def _targeted_embeddings(model: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """The base tensors of the embedding and the head, where they are targets by their names."""
    targets = config.target_modules
    if isinstance(targets, str):
        named = targets.lower() != "all-linear"
    else:
        named = any(name in EMBEDDING_NAMES for name in targets or ())
    if not named:
        return {}
    ends: list[Any] = [
        getattr(model, getter)()
        for getter in ("get_input_embeddings", "get_output_embeddings")
        if hasattr(model, getter)
    ]
    return {
        f"{path}.base_layer.{key}": tensor
        for path, layer in lora_layers(model)
        if layer.lora_A and any(layer is end for end in ends)
        if not isinstance(targets, str) or path.rpartition(".")[2] in EMBEDDING_NAMES
        for key, tensor in (("weight", layer.weight), ("bias", layer.bias))
        if tensor is not None
    }


def check_fit(
    model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], source: str
) -> None:
    """Checks an adapter's tensors against a model that has it, or is to get it.

    Raises:
        ValueError: naming every key that is missing, unexpected or of another shape, or what the
            config selects that the model does not have.
        TypeError: it selects a module that is not a linear layer.
    """
    try:
        required, optional, redundant = _expected_shapes(model, config)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{source}: {error}") from error
    found = {_base_key(key): key for key in tensors}
    faults = [f"missing {key}" for key in required if _base_key(key) not in found]
    shapes = {_base_key(key): shape for key, shape in {**optional, **required}.items()}
    for base_key, key in found.items():
        shape = tuple(tensors[key].shape)
        if base_key in shapes:
            if shape != shapes[base_key]:
                faults.append(f"{key}: expected shape {shapes[base_key]}, got {shape}")
        elif not (key.endswith(".bias") and key.startswith(redundant)):
            faults.append(f"unexpected {key}: no such layer is targeted in this model")
    if faults:
        raise ValueError(f"{source}: the adapter does not fit the model: " + "; ".join(faults))


def _base_key(key: str) -> str:
    """The key without PEFT's mark of a layer that some adapter has: one file may have it or not."""
    return key.replace(".base_layer.", ".")


def _expected_shapes(
    model: nn.Module, config: LoraConfig
) -> tuple[dict[str, Shape], dict[str, Shape], tuple[str, ...]]:
    """Shapes of the tensors that must be there and that may be, and prefixes of repeated biases."""
    modules = dict(model.named_modules())
    required: dict[str, Shape] = {}
    optional: dict[str, Shape] = {}
    targets = set(match_target_modules(model, config))
    budget = Budget()
    for path in targets:
        out_features, in_features = linear_shape(modules[path])
        r = config.rank_for(path, budget)
        required[f"{path}.lora_A.weight"] = (r, in_features)
        required[f"{path}.lora_B.weight"] = (out_features, r)
        if config.lora_bias:
            required[f"{path}.lora_B.bias"] = (out_features,)
        if config.use_dora:
            required[f"{path}.lora_magnitude_vector"] = (out_features,)
        if path.rpartition(".")[2] in EMBEDDING_NAMES:
            for name, parameter in modules[path]._parameters.items():
                if parameter is not None:
                    optional[f"{path}.{name}"] = tuple(parameter.shape)
    saved = match_modules_to_save(model, config)
    for path in saved:
        module = modules[path]
        original = module.original_module if isinstance(module, ModulesToSave) else module
        for name, tensor in original.state_dict().items():
            required[f"{path}.{name}"] = tuple(tensor.shape)
    if config.bias == "none":
        return required, optional, ()
    wrapped = tuple(f"{path}.original_module." for path, _ in saved_modules(model))
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key.rpartition(".")[2] != "bias" or is_adapter_parameter(key):
            continue
        if key.startswith(wrapped) or key.startswith(tuple(f"{path}." for path in saved)):
            continue
        wanted = config.bias == "all" or key.rpartition(".")[0] in targets
        (required if wanted else optional)[key] = tuple(tensor.shape)
    parts = ("original_module", "modules_to_save")
    return required, optional, tuple(f"{path}.{part}." for path in saved for part in parts)


def check_values(
    model: nn.Module, tensors: Mapping[str, Tensor], autocast_adapter_dtype: bool, source: str
) -> None:
    """Checks that values which fit the model are finite in the dtypes that they will have there.

    Raises:
        ValueError: naming every key with a value that is not.
    """
    state = {
        _base_key(key).replace(".original_module.", "."): tensor
        for key, tensor in model.state_dict(keep_vars=True).items()
        if not is_adapter_parameter(key)
    }
    faults = []
    for key, tensor in tensors.items():
        module, mark, _ = key.partition(".lora_")
        base = state.get(f"{module}.weight" if mark else _base_key(key))
        if base is None or not tensor.is_floating_point():
            continue
        dtype = adapter_dtype(base.dtype, autocast_adapter_dtype) if mark else base.dtype
        if not tensor.to(dtype).isfinite().all():
            faults.append(f"{key}: expected values that are finite in {dtype}")
    if faults:
        raise ValueError(f"{source}: " + "; ".join(faults))


def copy_adapter(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copies checked tensors into an adapter that the model has, in the adapter's dtype.

    Each process of a sharded model has all of the tensors, and keeps its parts.
    """
    reshard(model)
    targets: dict[str, Tensor] = dict(model.named_parameters())
    targets |= {_base_key(key): tensor for key, tensor in _tensors(model, name).items()}
    with torch.no_grad():
        for key, tensor in tensors.items():
            # The repeated biases of a saved module may have no place under this name.
            target = targets.get(_base_key(key))
            if target is not None:
                target.copy_(sharded_like(tensor, target))
