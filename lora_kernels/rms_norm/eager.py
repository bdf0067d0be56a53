"""RMSNorm out of torch operations: the CPU path.

    rstd = 1 / sqrt(mean(x²) + eps)                 y  = weight * (x rstd)
    g = weight * dy                                 dx = rstd (g - x rstd² mean(g * x))
    d_weight = Σ_m dy * (x rstd)

Shapes: x, dy, y and dx [M, H], weight and d_weight [H], rstd [M].

The forward pass makes the operations of LlamaRMSNorm in its order, in place where it can: the same
bits. dx is the gradient of weight normalisation, w = scale v / norm(v), whose CPU kernel in torch
reads both rows once: with scale = sqrt(H) and, in place of norm(v), sqrt(H) / rstd, which holds
eps, it is the formula above.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# 16-bit tensors beyond the first number of elements are computed in blocks of the second, so that
# their float32 copies stay in the cache. On one core, 512 rows of 2048 in bf16 take 3.3 ms in
# blocks against 3.9 ms at once, of 4096 6.2 ms against 9.0; 512 rows of 576 gain nothing.
_UNDIVIDED = 2**19
_BLOCK = 2**17

_weight_norm_backward = getattr(torch.ops.aten, "_weight_norm_interface_backward", None)


def _blocks(compute: torch.dtype, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors [M, ...] in blocks of rows, where they need copies in the dtype `compute`."""
    x = tensors[0]
    if x.dtype == compute or x.numel() <= _UNDIVIDED or x.device.type != "cpu":
        yield tensors
    else:
        rows = max(1, _BLOCK // x.shape[1])
        yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    y: Tensor,
    total: Tensor,
    rstd: Tensor,
) -> None:
    """Writes y, rstd and, where there is a residual, total = x + residual."""
    if residual is not None:
        x = torch.add(x, residual, out=total)
    compute = rstd.dtype
    for x_block, y_block, rstd_block in _blocks(compute, x, y, rstd.unsqueeze(-1)):
        wide = x_block.to(compute)
        squares = torch.mul(wide, wide, out=y_block if y.dtype == compute else None)
        torch.mean(squares, -1, keepdim=True, out=rstd_block).add_(eps).rsqrt_()
        # Only a copy of x may be overwritten.
        normalised = torch.mul(wide, rstd_block, out=squares if x.dtype == compute else wide)
        if y.dtype == x.dtype:
            y_block.copy_(normalised).mul_(weight)
        else:
            torch.mul(normalised.to(x.dtype), weight, out=y_block)


def backward(
    dy: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx and d_weight, or None; dx includes `d_total`, the gradient of the normalised x itself."""
    compute = rstd.dtype
    rstd = rstd.unsqueeze(-1)
    dx = d_weight = None
    if need_x:
        factor = weight.to(compute)
        blocks = []
        for x_block, dy_block, rstd_block in _blocks(compute, x, dy, rstd):
            wide = dy_block.to(compute)
            g = torch.mul(wide, factor, out=None if dy.dtype == compute else wide)
            blocks.append(_input_gradient(g, x_block.to(compute), rstd_block).to(x.dtype))
        dx = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        if d_total is not None:
            dx.add_(d_total)
    if need_weight:
        products = dy.to(compute) * x.to(compute)
        d_weight = products.mul_(rstd).sum(0).to(weight.dtype)
    return dx, d_weight


def _input_gradient(g: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """dx [M, H] of g = weight * dy, contiguous; all are in the dtype of rstd [M, 1]."""
    if _weight_norm_backward is not None and x.device.type == "cpu":
        root = math.sqrt(x.shape[1])
        norm = rstd.reciprocal().mul_(root)
        scale = torch.full_like(norm, root)
        return _weight_norm_backward(g.contiguous(), x.contiguous(), scale, norm, 0)[0]
    normalised = x.contiguous() * rstd
    mean = (g * normalised).mean(-1, keepdim=True)
    return normalised.mul_(-mean).add_(g).mul_(rstd)
