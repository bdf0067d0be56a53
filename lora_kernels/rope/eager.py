"""Rotary position embedding out of torch operations: the CPU path.

    out = cos * x + (-sin1, sin2) * (x2, x1)        forward
    out = cos * x + (sin2, -sin1) * (x2, x1)        transposed, for the backward pass

Shapes: x and out [B, H, T, D], cos and sin [B or 1, T, rotary_dim].
"""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, transpose: bool) -> None:
    """Writes x rotated (or rotated back, if `transpose`) into `out`. It records no autograd."""
    rotary_dim = cos.shape[-1]
    half = rotary_dim // 2
    sin1, sin2 = sin.unsqueeze(1).chunk(2, dim=-1)
    halves = (sin2, -sin1) if transpose else (-sin1, sin2)
    # Not by cat, which under autocast refuses a 16-bit dtype that is not autocast's.
    factors = torch.empty_like(sin).unsqueeze(1)
    for part, half_row in zip(factors.chunk(2, dim=-1), halves, strict=True):
        part.copy_(half_row)

    # The halves are swapped by copies, so that both arithmetic passes run over whole rows: on two
    # CPU cores (bf16, 2048 x 32 heads x 128) 2.9 ms, against 8.5 ms with two half-row addcmul_.
    out[..., :half].copy_(x[..., half:rotary_dim])
    out[..., half:rotary_dim].copy_(x[..., :half])
    rotated = out[..., :rotary_dim]
    rotated.mul_(factors).addcmul_(x[..., :rotary_dim], cos.unsqueeze(1))
    if rotary_dim < x.shape[-1]:
        out[..., rotary_dim:].copy_(x[..., rotary_dim:])
