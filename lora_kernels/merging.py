"""What a layer's weight and bias are with adapters merged in.

    LoRA    weight += s B A                      bias += s lora_bias
    DoRA    weight  = c (weight + s B A)         bias  = bias₀ + c (bias - bias₀)

in the order of the adapters, as they compute; c = magnitude / ‖weight₀ + s B A‖ of each row, and
weight₀, bias₀ are those without any adapter (PEFT's `tuners/lora/variants.py`). PEFT merges a bias
on B unscaled also below a later DoRA adapter; here the merged layer computes what the unmerged did.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_kernels.lora_linear.dora import column_scale


def merged_weight_and_bias(
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Mapping[str, Tensor]],
    scalings: Sequence[float],
) -> tuple[Tensor, Tensor | None]:
    """weight [out, in] and bias [out] with the adapters in it, summed in float32 and rounded once.

    Args:
        weight, bias: those of the base, unchanged.
        adapters: for each, by PEFT's key: "lora_A.weight" [R, in], "lora_B.weight" [out, R] and,
            where it has them, "lora_B.bias" and "lora_magnitude_vector" [out].
        scalings: one for each.

    Raises:
        ValueError: an adapter has a bias and the base has none, or a result has NaN or Inf.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    has_bias = any("lora_B.bias" in adapter for adapter in adapters)
    if has_bias and bias is None:
        raise ValueError("merge: an adapter has lora_bias, and the layer no bias to merge it into")
    with torch.no_grad():
        total = weight.to(exact, copy=True)
        shift = torch.zeros(weight.shape[0], dtype=exact, device=weight.device)
        for adapter, scaling in zip(adapters, scalings, strict=True):
            lora_a, lora_b = adapter["lora_A.weight"], adapter["lora_B.weight"]
            total.add_(lora_b.to(exact) @ lora_a.to(exact), alpha=scaling)
            if "lora_B.bias" in adapter:
                shift.add_(adapter["lora_B.bias"], alpha=scaling)
            if "lora_magnitude_vector" in adapter:
                magnitude = adapter["lora_magnitude_vector"]
                scale = column_scale(magnitude, weight, lora_a, lora_b, scaling)
                total.mul_(scale[:, None])
                shift.mul_(scale)
        merged = total.to(weight.dtype)
        merged_bias = bias
        if has_bias and bias is not None:
            merged_bias = (bias + shift).to(bias.dtype)
    for name, tensor in (("weight", merged), ("bias", merged_bias)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"merge: the merged {name} has NaN or Inf")
    return merged, merged_bias
