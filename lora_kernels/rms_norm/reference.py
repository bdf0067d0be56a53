"""RMSNorm in plain differentiable torch: the specification and the tests' oracle.

    total = x + residual                            (x, where there is no residual)
    rstd  = 1 / sqrt(mean(total²) + eps)            y = weight * (total * rstd)

Shapes: x, residual, total and y [..., H], weight [H].
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In the order of transformers' LlamaRMSNorm, and with its bits.

    Statistics are in float32 (float64 for float64 x, where LlamaRMSNorm stays in float32), and the
    normalised value is rounded to x's dtype before weight, which may be wider, multiplies it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * rstd).to(x.dtype)
