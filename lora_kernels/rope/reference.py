"""Rotary position embedding in plain differentiable torch: the specification and the tests' oracle.

    out1 = x1 cos1 - x2 sin1            x1, x2 = the two halves of x[..., :rotary_dim]
    out2 = x2 cos2 + x1 sin2            x[..., rotary_dim:] is passed through

cos1, cos2 are the two halves of cos, which need not be equal. Shapes: x [B, H, T, D],
cos and sin [B or 1, T, rotary_dim].
"""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One tensor rotated, computed in float32 (float64 for float64), returned in x's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1] // 2
    x1, x2, rest = x.to(dtype).tensor_split((half, 2 * half), dim=-1)
    cos1, cos2 = cos.to(dtype).unsqueeze(1).chunk(2, dim=-1)
    sin1, sin2 = sin.to(dtype).unsqueeze(1).chunk(2, dim=-1)
    return torch.cat((x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2, rest), dim=-1).to(x.dtype)
