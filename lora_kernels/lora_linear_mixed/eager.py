"""Forward and backward of a mixed batch out of library GEMMs, piece by piece of the rows.

    y = x weightᵀ + bias, dx = dy weight        over all rows at once
    S = s_a x_lora lora_a_aᵀ                    y    += S lora_b_aᵀ        d_lora_b_a += dyᵀ S
    P = s_a dy lora_b_a                         dx   += keep * (P lora_a_a)
                                                d_lora_a_a += Pᵀ x_lora

A piece is rows of one adapter: a slice where the batch has long runs of rows of one adapter (whole
sequences), else all the rows of that adapter, gathered. S[M, R_max] has the rows in the batch's own
order. The host must know the pieces, so on a GPU this waits for the device.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.lora_linear_mixed.packing import MixedDropout, mixed_keep
from lora_kernels.lora_linear_mixed.rows import MixedRows

Piece = tuple[int, slice | Tensor]
# Runs shorter than this on average cost more calls than gathering the rows costs copies.
MIN_RUN = 32


def pieces(rows: MixedRows) -> list[Piece]:
    """(adapter, rows) of every piece; rows of the base alone are in none."""
    m = rows.row_adapters.shape[0]
    ids, lengths = torch.unique_consecutive(rows.row_adapters, return_counts=True)
    if ids.shape[0] * MIN_RUN <= m or ids.shape[0] <= rows.adapters:
        found: list[Piece] = []
        first = 0
        for a, length in zip(ids.tolist(), lengths.tolist(), strict=True):
            if 0 <= a < rows.adapters:
                found.append((a, slice(first, first + length)))
            first += length
        return found
    starts, order = rows.starts.tolist(), rows.order.long()
    return [
        (a, order[starts[a] : starts[a + 1]])
        for a in range(rows.adapters)
        if starts[a] < starts[a + 1]
    ]


def forward(
    x: Tensor,
    weight: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    bias: Tensor | None,
    scalings: Sequence[float],
    rows: MixedRows,
    dropout: MixedDropout | None,
) -> tuple[Tensor, Tensor]:
    """y[M, N] and the scaled S[M, R_max], both in x's dtype; S is 0 where its row has no rank."""
    y = F.linear(x, weight, bias)
    s = x.new_zeros(x.shape[0], max(lora_a.shape[0] for lora_a in lora_as))
    branch_input = x if dropout is None else x * mixed_keep(dropout, rows.row_adapters, x)
    for a, piece in pieces(rows):
        part = _scaled_product(branch_input[piece], lora_as[a].t(), scalings[a])
        s[piece, : part.shape[1]] = part
        _add_product(y, piece, part, lora_bs[a].t())
    return y, s


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    s: Tensor | None,
    scalings: Sequence[float],
    rows: MixedRows,
    dropout: MixedDropout | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, all d_lora_a_a end to end, all d_lora_b_a likewise, d_bias; None where `needs` says so.

    x is needed for d_lora_a alone, S for d_lora_b alone.
    """
    need_dx, need_da, need_db, need_dbias = needs
    dx = torch.mm(dy, weight) if need_dx else None
    d_lora_a = _end_to_end(dy, lora_as) if need_da else None
    d_lora_b = _end_to_end(dy, lora_bs) if need_db else None
    d_as, d_bs = _views(d_lora_a, lora_as), _views(d_lora_b, lora_bs)
    keep = None
    if dropout is not None and (need_dx or need_da):
        keep = mixed_keep(dropout, rows.row_adapters, dy.new_empty(dy.shape[0], weight.shape[1]))
    seen: set[int] = set()
    for a, piece in pieces(rows):
        # An adapter's first piece overwrites memory that nobody has cleared.
        beta = float(a in seen)
        seen.add(a)
        if d_bs is not None:
            assert s is not None
            d_bs[a].addmm_(dy[piece].t(), s[piece, : lora_bs[a].shape[1]], beta=beta)
        if not (need_dx or need_da):
            continue
        p = _scaled_product(dy[piece], lora_bs[a], scalings[a])
        if dx is not None and keep is None:
            _add_product(dx, piece, p, lora_as[a])
        elif dx is not None and keep is not None:
            dx[piece] = dx[piece].addcmul(torch.mm(p, lora_as[a]), keep[piece])
        if d_as is not None:
            assert x is not None
            branch_input = x[piece] if keep is None else x[piece] * keep[piece]
            d_as[a].addmm_(p.t(), branch_input, beta=beta)
    for gradients in (d_as or [], d_bs or []):
        for a, gradient in enumerate(gradients):
            if a not in seen:
                gradient.zero_()
    return dx, d_lora_a, d_lora_b, dy.sum(0) if need_dbias else None


def _scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling left right, scaled before it is rounded; beta=0 means that nothing is added."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return out.addmm_(left, right, beta=0, alpha=scaling)


def _add_product(out: Tensor, piece: slice | Tensor, left: Tensor, right: Tensor) -> None:
    """out[piece] += left right."""
    if isinstance(piece, slice):
        out[piece].addmm_(left, right)
    else:
        out[piece] = torch.addmm(out[piece], left, right)


def _end_to_end(like: Tensor, factors: Sequence[Tensor]) -> Tensor:
    return like.new_empty(sum(factor.numel() for factor in factors))


def _views(flat: Tensor | None, factors: Sequence[Tensor]) -> list[Tensor] | None:
    if flat is None:
        return None
    parts = flat.split([factor.numel() for factor in factors])
    return [part.view(factor.shape) for part, factor in zip(parts, factors, strict=True)]
