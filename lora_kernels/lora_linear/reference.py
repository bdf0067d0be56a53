"""The mathematics of a LoRA linear layer in plain differentiable torch: the specification.

    x[M, K]  weight[N, K]  lora_a[R, K]  lora_b[N, R]  bias[N]  keep[M, K]  s = scaling
    y[M, N] = x weightᵀ + bias + s ((x * keep) lora_aᵀ) lora_bᵀ

and with a magnitude[N] (DoRA), c = magnitude / ‖weight + s lora_b lora_a‖ of each row, the norm
without gradient:

    y[M, N] = c * (x weightᵀ + s (x lora_aᵀ) lora_bᵀ) + bias

Source: Hu et al., "LoRA" (arXiv:2106.09685), with PEFT's order of operations and casts
(peft/tuners/lora/layer.py, `Linear.forward`): the branch runs in the adapter's dtype.
"""

import torch.nn.functional as F
from torch import Tensor


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """Returns y[..., N] in x's dtype; differentiable any number of times in every argument."""
    base = F.linear(x, weight, bias if magnitude is None else None)
    branch_input = x if keep is None else x * keep
    low_rank = F.linear(branch_input.to(lora_a.dtype), lora_a)
    delta = F.linear(low_rank.to(lora_b.dtype), lora_b) * scaling
    if magnitude is None:
        return (base + delta).to(base.dtype)
    merged = weight.to(lora_a.dtype) + scaling * (lora_b.to(lora_a.dtype) @ lora_a)
    scaled = (base + delta) * (magnitude / merged.detach().norm(dim=1))
    return (scaled if bias is None else scaled + bias).to(base.dtype)
