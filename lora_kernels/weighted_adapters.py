"""add_weighted_adapter: a new adapter out of a weighted sum of others (PEFT's, `lora/model.py`).

    Δ_i = s_i B_i A_i        wanted: Σ w_i Δ_i

    "linear"   A = Σ ±√|w_i s_i| A_i    B = Σ √|w_i s_i| B_i     equal ranks; a rough approximation
    "cat"      A = [w_i s_i A_i]        B = [B_i]                rank Σ R_i; exact
    "svd"      A = Vᵀ_r                 B = U_r diag(S_r)        of Σ w_i Δ_i; exact if r suffices

The new adapter has scaling 1. Where layers' ranks differ, A and B are filled with zeros to its
rank. What PEFT drops without a word (a bias on B, DoRA's magnitude) is an error here; a module that
one of the adapters has a copy of (`modules_to_save`) goes with it, and rsLoRA's scaling, which PEFT
applies again to the new adapter, does not.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapter_state import adapter_configs, check_known
from lora_kernels.config import LoraConfig, validate_adapter_name
from lora_kernels.injection import inject_lora
from lora_kernels.layers import LoraLinear, lora_layers
from lora_kernels.saved_modules import check_one_copy, saved_modules
from lora_kernels.sharding import refuse_sharded

_KINDS = ("linear", "cat", "svd")


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
) -> None:
    """Adds the weighted sum of a model's adapters as a new one, neither active nor trainable.

    Args:
        adapters: names, each once; a layer that has some of them gets the sum of those.
        weights: one number for each, of either sign.
        adapter_name: the new adapter's.
        combination_type: "linear", "cat" or "svd"; of a single adapter always "linear".
        svd_rank: the new rank with "svd"; by default the largest of the adapters'.
        svd_clamp: a quantile in [0, 1]: values of A and B beyond it are cut off to it.
        svd_full_matrices, svd_driver: as in `torch.linalg.svd`.

    Raises:
        ValueError: a name is unknown, repeated or taken, weights and adapters differ in number, the
            type is not one of the three (PEFT's ties, dare and magnitude_prune), ranks differ with
            "linear", or the adapters cannot be summed. The model is then unchanged.
    """
    names, factors = list(adapters), [float(weight) for weight in weights]
    validate_adapter_name(adapter_name)
    if adapter_name in adapter_configs(model):
        raise ValueError(f"adapter_name: {adapter_name!r} exists already in this model")
    refuse_sharded(model, "adapters cannot be added to", "add them before fully_shard")
    configs = _checked(model, names, factors)
    if combination_type not in _KINDS:
        raise ValueError(f"combination_type: expected one of {_KINDS}, got {combination_type!r}")
    kind = "linear" if len(names) == 1 else combination_type
    ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
    if kind == "linear" and len(set(ranks)) > 1:
        raise ValueError(f"adapters: 'linear' expects adapters of one rank, got {ranks}")
    if svd_rank is not None and svd_rank < 1:
        raise ValueError(f"svd_rank: expected at least 1, got {svd_rank}")
    if svd_clamp is not None and not 0 <= svd_clamp <= 1:
        raise ValueError(f"svd_clamp: expected a number in [0, 1], got {svd_clamp}")
    rank = {"linear": ranks[0], "cat": sum(ranks), "svd": svd_rank or max(ranks)}[kind]

    sums: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for path, layer in lora_layers(model):
            present = [(n, w) for n, w in zip(names, factors, strict=True) if n in layer.lora_A]
            if not present:
                continue
            if kind == "linear":
                sums[path] = _linear(layer, present)
            elif kind == "cat":
                sums[path] = _cat(layer, present)
            else:
                delta = _delta(layer, present)
                a, b = _svd(delta, rank, svd_full_matrices, svd_driver)
                sums[path] = (a, b) if svd_clamp is None else _clamped(a, b, svd_clamp)
    inject_lora(model, _sum_config(configs, list(sums), rank), adapter_name)
    with torch.no_grad():
        for path, layer in lora_layers(model):
            if path in sums:
                a, b = sums[path]
                layer.lora_A[adapter_name].zero_()[: a.shape[0]] = a
                layer.lora_B[adapter_name].zero_()[:, : b.shape[1]] = b
        for _, module in saved_modules(model):
            for name in names:
                if name in module.modules_to_save and adapter_name in module.modules_to_save:
                    state = module.modules_to_save[name].state_dict()
                    module.modules_to_save[adapter_name].load_state_dict(state)


def _checked(model: nn.Module, names: list[str], weights: list[float]) -> list[LoraConfig]:
    if not names:
        raise ValueError("adapters: expected at least one name, got none")
    check_known(model, names)
    if len(set(names)) != len(names):
        raise ValueError(f"adapters: expected each name once, got {names}")
    if len(weights) != len(names) or not all(map(math.isfinite, weights)):
        raise ValueError(
            f"weights: expected {len(names)} finite numbers, one for each adapter, got {weights}"
        )
    configs = [adapter_configs(model)[name] for name in names]
    for name, config in zip(names, configs, strict=True):
        for field, plain in (("use_dora", False), ("lora_bias", False), ("bias", "none")):
            value = getattr(config, field)
            if value != plain:
                raise ValueError(
                    f"adapters: {name!r} has {field}={value!r}, which a weighted sum cannot keep"
                )
    check_one_copy(dict(saved_modules(model)), names)
    return configs


def _sum_config(configs: list[LoraConfig], paths: list[str], rank: int) -> LoraConfig:
    """The new adapter's config: the adapters' own targets if they agree, else the layers' names."""
    first = configs[0]
    changes: dict[str, Any] = {
        "r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
        "init_lora_weights": True,
        "modules_to_save": [name for config in configs for name in config.modules_to_save or ()]
        or None,
    }  # fmt: skip
    targets = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    if any(getattr(config, name) != getattr(first, name) for config in configs for name in targets):
        changes |= dict.fromkeys(targets) | {"target_modules": paths}
    return dataclasses.replace(first, **changes)


def _linear(layer: LoraLinear, present: list[tuple[str, float]]) -> tuple[Tensor, Tensor]:
    factors = [weight * layer.scaling[name] for name, weight in present]
    roots = [math.sqrt(abs(factor)) for factor in factors]
    # The sign on one side alone: on both it would cancel.
    signed = [root if factor >= 0 else -root for root, factor in zip(roots, factors, strict=True)]
    return (
        _weighted([layer.lora_A[name] for name, _ in present], signed, 0),
        _weighted([layer.lora_B[name] for name, _ in present], roots, 1),
    )


def _weighted(tensors: list[Tensor], factors: list[float], rank_dim: int) -> Tensor:
    """Σ factor tensor in the tensors' dtype, shorter ones filled with zeros along the rank."""
    rank = max(tensor.shape[rank_dim] for tensor in tensors)
    shape = [rank if d == rank_dim else n for d, n in enumerate(tensors[0].shape)]
    filled = [tensor.new_zeros(shape) for tensor in tensors]
    for whole, tensor in zip(filled, tensors, strict=True):
        whole.narrow(rank_dim, 0, tensor.shape[rank_dim]).copy_(tensor)
    # In float32 as PEFT has them, for the same numbers to the last bit.
    column = torch.tensor(factors, device=tensors[0].device)[:, None, None]
    return (torch.stack(filled) * column).sum(0).to(tensors[0].dtype)


def _cat(layer: LoraLinear, present: list[tuple[str, float]]) -> tuple[Tensor, Tensor]:
    lora_as = [layer.lora_A[name] * weight * layer.scaling[name] for name, weight in present]
    return torch.cat(lora_as), torch.cat([layer.lora_B[name] for name, _ in present], dim=1)


def _delta(layer: LoraLinear, present: list[tuple[str, float]]) -> Tensor:
    """Σ w s B A [out, in], at least in float32."""
    dtype = torch.promote_types(layer.lora_A[present[0][0]].dtype, torch.float32)
    deltas = [
        (layer.lora_B[name].to(dtype) @ layer.lora_A[name].to(dtype))
        .mul_(layer.scaling[name])
        .mul_(weight)
        for name, weight in present
    ]
    return sum(deltas[1:], deltas[0])


def _svd(
    delta: Tensor, rank: int, full_matrices: bool, driver: str | None
) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(delta, full_matrices=full_matrices, driver=driver)
    rank = min(rank, len(s))
    return vh[:rank], u[:, :rank] * s[:rank]


def _clamped(a: Tensor, b: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    limit = torch.quantile(torch.cat([b.flatten(), a.flatten()]), quantile)
    return a.clamp(-limit, limit), b.clamp(-limit, limit)
