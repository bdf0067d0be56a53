"""A layer's further active adapters, one after another, where no one call does them all.

    LoRA    y += s ((dropout(x) Aᵀ) Bᵀ + lora_bias)
    DoRA    y += (c - 1) y₀ + c s (dropout(x) Aᵀ) Bᵀ      c = magnitude / ‖weight + s B A‖

y₀ is the sum so far without the base's bias, so that DoRA scales what the adapters before it have
made; with dropout it is dropout(x) weightᵀ (PEFT's rules: `tuners/lora/variants.py`).
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from lora_kernels.lora_linear.dora import column_scale


def add_successive(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter: Mapping[str, Tensor],
    scaling: float,
    dropout_p: float,
) -> Tensor:
    """y[..., out] with one adapter more, in the wider of y's and the adapter's dtype.

    Args:
        x: [..., in], the layer's input.
        weight, bias: [out, in] and [out], the base's.
        adapter: by PEFT's key, "lora_A.weight" [R, in], "lora_B.weight" [out, R] and, where it has
            them, "lora_B.bias" and "lora_magnitude_vector" [out].
        dropout_p: 0 in evaluation.
    """
    lora_a, lora_b = adapter["lora_A.weight"], adapter["lora_B.weight"]
    dropped = F.dropout(x, dropout_p) if dropout_p else x
    rank_r = F.linear(dropped.to(lora_a.dtype), lora_a)
    delta = F.linear(rank_r, lora_b, adapter.get("lora_B.bias")) * scaling
    magnitude = adapter.get("lora_magnitude_vector")
    if magnitude is None:
        return y + delta
    scale = column_scale(magnitude, weight, lora_a, lora_b, scaling)
    if dropout_p:
        scaled = F.linear(dropped, weight)
    else:
        scaled = y if bias is None else y - bias
    return y + (scale - 1) * scaled + scale * delta
