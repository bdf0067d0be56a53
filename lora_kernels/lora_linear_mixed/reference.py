"""The mathematics of a mixed batch in plain differentiable torch: the specification.

    x[..., K]  weight[N, K]  lora_a_a[R_a, K]  lora_b_a[N, R_a]  row_adapters[...]  keep[..., K]
    y[m] = x[m] weightᵀ + bias + s_a ((x[m] * keep[m]) lora_a_aᵀ) lora_b_aᵀ,   a = row_adapters[m]
    y[m] = x[m] weightᵀ + bias                                                 where a = -1

Every adapter is run on every row, and each row keeps its own adapter's result: simple, and as many
times too much work as there are adapters. Source: PEFT's mixed batches (peft/tuners/lora/layer.py,
`_mixed_batch_forward`), with the branch in the adapter's dtype.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.lora_linear import reference


def lora_linear_mixed(
    x: Tensor,
    weight: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float] | Tensor,
    row_adapters: Tensor,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Returns y[..., N] in x's dtype; differentiable any number of times in every argument."""
    y = F.linear(x, weight, bias)
    for a, (lora_a, lora_b) in enumerate(zip(lora_as, lora_bs, strict=True)):
        alone = reference.lora_linear(x, weight, lora_a, lora_b, scalings[a], bias, keep)
        y = torch.where((row_adapters == a)[..., None], alone, y)
    return y
