"""Triton kernels of a mixed batch: each row tile walks through the adapters of its rows.

    T[m, :R_a] = s_a z[m, C] factor_aᵀ                                        `shrink`
        S from x (C = K, factor_a = lora_a_a) and P from dy (C = N, factor_a = lora_b_aᵀ)
    out[m, OUT] = z[m, C] w[C, OUT] + bias + T[m, :R_a] factor_a[R_a, OUT]    `expand`
        y from x (w = weightᵀ, T = S, factor_a = lora_b_aᵀ) and
        dx from dy (w = weight, T = P, factor_a = lora_a_a)

The rows are taken in the order that sorts them by adapter. T[M, R_max] is in that order; z and out
are in the batch's own, gathered and scattered by row. A tile of sorted rows has a contiguous range
of adapters, mostly one; the rows of the others are masked to zero, so that one accumulator serves
them all and no segment is padded. A row without an adapter is masked out of every one.

Factors lie end to end (`packing.py`), row-major as PEFT stores them: lora_a_a is [R_a, C], and with
TRANSPOSED the factor is read from lora_b_a[C, R_a]. T, the factors, bias and out are contiguous;
z and the weight have any strides.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.lora_linear.tables import PassConfig, TileConfig
from lora_kernels.lora_linear.triton_common import (
    accumulator_dtype,
    dropout_keep,
    input_precision,
    launch_options,
    load_operands,
    needs_int64,
    offsets,
    tile_of,
)
from lora_kernels.lora_linear_mixed.packing import Packed
from lora_kernels.lora_linear_mixed.plan import MixedPlan
from lora_kernels.lora_linear_mixed.rows import MixedRows


@triton.jit
def adapters_between(sorted_adapters_ptr, first_row, last_row, COUNT):
    """The adapters of the sorted rows first_row .. last_row: begin, and end exclusive."""
    begin = tl.maximum(tl.load(sorted_adapters_ptr + first_row), 0)
    end = tl.minimum(tl.load(sorted_adapters_ptr + last_row), COUNT - 1) + 1
    return begin, end


@triton.jit
def rank_of(first_r_ptr, a, ALIGNED_R: tl.constexpr, INT64: tl.constexpr):
    """Σ of the ranks before adapter a, and its own rank."""
    first = tl.load(first_r_ptr + a)
    rank = tl.load(first_r_ptr + a + 1) - first
    if ALIGNED_R:
        first = tl.multiple_of(first, 16)
        rank = tl.multiple_of(rank, 16)
    if INT64:
        first = first.to(tl.int64)
        rank = rank.to(tl.int64)
    return first, rank


@triton.jit
def load_rows(order_ptr, offsets_m, mask_m, INT64: tl.constexpr):
    """The rows of the batch at some places of the sorted order; row 0 where masked."""
    rows = tl.load(order_ptr + offsets_m, mask=mask_m, other=0)
    if INT64:
        rows = rows.to(tl.int64)
    return rows


@triton.jit(do_not_specialize=["COUNT"])
def shrink_kernel(
    z_ptr, factors_ptr, t_ptr, order_ptr, sorted_adapters_ptr, starts_ptr, first_r_ptr,
    scalings_ptr, seed_ptr, thresholds_ptr, inverse_keeps_ptr,
    M, C, R_MAX, COUNT, stride_zm, stride_zc,
    TRANSPOSED: tl.constexpr, DROPOUT: tl.constexpr, EVEN_C: tl.constexpr, ALIGNED_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """BLOCK_M sorted rows of T, the columns of one block of the rank."""
    block_m = tl.program_id(0)
    offsets_m = offsets(block_m, BLOCK_M, INT64)
    offsets_r = offsets(tl.program_id(1), BLOCK_R, INT64)
    offsets_c = offsets(0, BLOCK_C, INT64)
    rows = load_rows(order_ptr, offsets_m, offsets_m < M, INT64)
    last_row = tl.minimum(block_m * BLOCK_M + BLOCK_M, M) - 1
    first_a, end_a = adapters_between(sorted_adapters_ptr, block_m * BLOCK_M, last_row, COUNT)
    t = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    scale = tl.zeros((BLOCK_M,), dtype=ACC)
    for a in range(first_a, end_a):
        begin, end = tl.load(starts_ptr + a), tl.load(starts_ptr + a + 1)
        first, rank = rank_of(first_r_ptr, a, ALIGNED_R, INT64)
        mine = (offsets_m >= begin) & (offsets_m < end)
        mask_r = offsets_r < rank
        scale = tl.where(mine, tl.load(scalings_ptr + a), scale)
        z_ptrs = z_ptr + rows[:, None] * stride_zm + offsets_c[None, :] * stride_zc
        if TRANSPOSED:
            factor_ptrs = factors_ptr + first * C + offsets_c[:, None] * rank + offsets_r[None, :]
            step = BLOCK_C * rank
        else:
            factor_ptrs = factors_ptr + first * C + offsets_r[None, :] * C + offsets_c[:, None]
            step = BLOCK_C
        # Without rows here, or with a rank that ends before this block, there is nothing to add.
        width = tl.where((begin < end) & (tl.program_id(1) * BLOCK_R < rank), C, 0)
        for c in range(0, width, BLOCK_C):
            mask_z, mask_f = mine[:, None], mask_r[None, :]
            if not EVEN_C:
                mask_z = mask_z & (offsets_c < C - c)[None, :]
                mask_f = mask_f & (offsets_c < C - c)[:, None]
            z = tl.load(z_ptrs, mask=mask_z, other=0.0)
            factor = tl.load(factor_ptrs, mask=mask_f, other=0.0)
            if DROPOUT:
                keep = dropout_keep(
                    seed_ptr, tl.load(thresholds_ptr + a), tl.load(inverse_keeps_ptr + a),
                    rows, offsets_c + c, C,
                )  # fmt: skip
                z = (z.to(ACC) * keep.to(ACC)).to(z.dtype)
            t = tl.dot(z, factor, t, input_precision=PRECISION, out_dtype=ACC)
            z_ptrs += BLOCK_C * stride_zc
            factor_ptrs += step
    t *= scale[:, None]
    tl.store(
        t_ptr + offsets_m[:, None] * R_MAX + offsets_r[None, :],
        t.to(t_ptr.dtype.element_ty),
        mask=(offsets_m < M)[:, None] & (offsets_r < R_MAX)[None, :],
    )


@triton.jit(do_not_specialize=["COUNT"])
def expand_kernel(
    z_ptr, weight_ptr, t_ptr, factors_ptr, bias_ptr, out_ptr,
    order_ptr, sorted_adapters_ptr, starts_ptr, first_r_ptr,
    seed_ptr, thresholds_ptr, inverse_keeps_ptr,
    M, OUT, C, R_MAX, COUNT, stride_zm, stride_zc, stride_wo, stride_wc,
    TRANSPOSED: tl.constexpr, DROPOUT: tl.constexpr, EVEN_O: tl.constexpr, EVEN_C: tl.constexpr,
    ALIGNED_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_O] tile of out; without a weight it adds to what out holds."""
    block_m, block_o = tile_of(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(OUT, BLOCK_O), GROUP_M
    )
    offsets_m = offsets(block_m, BLOCK_M, INT64)
    offsets_o = offsets(block_o, BLOCK_O, INT64)
    mask_m, mask_o = offsets_m < M, offsets_o < OUT
    rows = load_rows(order_ptr, offsets_m, mask_m, INT64)
    accumulator = tl.zeros((BLOCK_M, BLOCK_O), dtype=ACC)
    if weight_ptr is not None:
        offsets_c = offsets(0, BLOCK_C, INT64)
        # Rows past the end read row 0 and are never stored: no mask in the loop.
        z_ptrs = z_ptr + rows[:, None] * stride_zm + offsets_c[None, :] * stride_zc
        weight_ptrs = weight_ptr + offsets_c[:, None] * stride_wc + offsets_o[None, :] * stride_wo
        for c in range(0, C, BLOCK_C):
            z, weight = load_operands(z_ptrs, weight_ptrs, mask_o, C - c, EVEN_O, EVEN_C, BLOCK_C)
            accumulator = tl.dot(z, weight, accumulator, input_precision=PRECISION, out_dtype=ACC)
            z_ptrs += BLOCK_C * stride_zc
            weight_ptrs += BLOCK_C * stride_wc

    last_row = tl.minimum(block_m * BLOCK_M + BLOCK_M, M) - 1
    first_a, end_a = adapters_between(sorted_adapters_ptr, block_m * BLOCK_M, last_row, COUNT)
    if DROPOUT:
        tail = tl.zeros((BLOCK_M, BLOCK_O), dtype=ACC)
    # One step for most tiles. Pipelined, its first loads pass the loop above in registers: spills.
    for a in tl.range(first_a, end_a, num_stages=1):
        begin, end = tl.load(starts_ptr + a), tl.load(starts_ptr + a + 1)
        first, rank = rank_of(first_r_ptr, a, ALIGNED_R, INT64)
        mine = (offsets_m >= begin) & (offsets_m < end)
        for r in tl.range(0, tl.where(begin < end, rank, 0), BLOCK_R, num_stages=1):
            offsets_r = r + tl.arange(0, BLOCK_R)
            mask_r = offsets_r < rank
            t = tl.load(
                t_ptr + offsets_m[:, None] * R_MAX + offsets_r[None, :],
                mask=mine[:, None] & mask_r[None, :], other=0.0,
            )  # fmt: skip
            if TRANSPOSED:
                inside = offsets_o[None, :] * rank + offsets_r[:, None]
            else:
                inside = offsets_r[:, None] * OUT + offsets_o[None, :]
            factor = tl.load(
                factors_ptr + first * OUT + inside,
                mask=mask_r[:, None] & mask_o[None, :], other=0.0,
            )  # fmt: skip
            if DROPOUT:
                tail = tl.dot(t, factor, tail, input_precision=PRECISION, out_dtype=ACC)
            else:
                accumulator = tl.dot(
                    t, factor, accumulator, input_precision=PRECISION, out_dtype=ACC
                )
    if DROPOUT:
        adapters = tl.load(sorted_adapters_ptr + offsets_m, mask=mask_m, other=-1)
        known = (adapters >= 0) & (adapters < COUNT)
        thresholds = tl.load(thresholds_ptr + adapters, mask=known, other=0)
        inverse_keeps = tl.load(inverse_keeps_ptr + adapters, mask=known, other=0.0)
        keep = dropout_keep(
            seed_ptr, thresholds[:, None], inverse_keeps[:, None], rows, offsets_o, OUT
        )
        accumulator += keep.to(ACC) * tail
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offsets_o, mask=mask_o, other=0.0)
        accumulator += bias.to(ACC)[None, :]
    out_ptrs = out_ptr + rows[:, None] * OUT + offsets_o[None, :]
    mask = mask_m[:, None] & mask_o[None, :]
    if weight_ptr is None:
        accumulator += tl.load(out_ptrs, mask=mask, other=0.0).to(ACC)
    tl.store(out_ptrs, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


def aligned(ranks: tuple[int, ...]) -> bool:
    """Whether 16 divides every rank, and so every place in T and the factors."""
    return not any(rank % 16 for rank in ranks)


def shrink(
    z: Tensor,
    factors: Tensor,
    packed: Packed,
    rows: MixedRows,
    config: PassConfig,
    transposed: bool,
    dropout: bool,
) -> Tensor:
    """T[M, R_max] = s_a z factor_aᵀ in z's dtype, rows sorted by adapter.

    Args:
        transposed: the factors are lora_b_a[C, R_a], not lora_a_a[R_a, C].
        dropout: whether the packed adapters' dropout applies to z.
    """
    (m, c), r_max = z.shape, max(packed.ranks)
    t = z.new_empty(m, r_max)
    if m == 0:
        return t
    grid = (triton.cdiv(m, config.block_rows), triton.cdiv(r_max, config.block_r))
    shrink_kernel[grid](
        z, factors, t, rows.order, rows.sorted_adapters, rows.starts, packed.first_r,
        packed.scalings, *_dropout_pointers(packed, dropout),
        m, c, r_max, len(packed.ranks), *z.stride(),
        TRANSPOSED=transposed, DROPOUT=dropout, EVEN_C=c % config.block_columns == 0,
        ALIGNED_R=aligned(packed.ranks),
        BLOCK_M=config.block_rows, BLOCK_C=config.block_columns, BLOCK_R=config.block_r,
        ACC=accumulator_dtype(z.dtype), PRECISION=input_precision(z.dtype),
        INT64=needs_int64(z, factors, t),
        **launch_options(config),
    )  # fmt: skip
    return t


def expand(
    z: Tensor,
    weight: Tensor | None,
    t: Tensor,
    factors: Tensor,
    bias: Tensor | None,
    packed: Packed,
    rows: MixedRows,
    config: TileConfig,
    transposed: bool,
    dropout: bool,
    out: Tensor,
) -> None:
    """out[M, OUT] = z w + bias + T factor_a, or where weight is None out += bias + T factor_a.

    Args:
        weight: w[C, OUT], of any strides.
        transposed: the factors are lora_b_a[OUT, R_a], not lora_a_a[R_a, OUT].
        dropout: whether the packed adapters' dropout applies to T factor_a.
    """
    (m, c), o = z.shape, out.shape[1]
    if out.numel() == 0:
        return
    stride_wc, stride_wo = (0, 0) if weight is None else weight.stride()
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(o, config.block_n),)
    expand_kernel[grid](
        z, weight, t, factors, bias, out,
        rows.order, rows.sorted_adapters, rows.starts, packed.first_r,
        *_dropout_pointers(packed, dropout),
        m, o, c, t.shape[1], len(packed.ranks), *z.stride(), stride_wo, stride_wc,
        TRANSPOSED=transposed, DROPOUT=dropout,
        EVEN_O=o % config.block_n == 0, EVEN_C=c % config.block_k == 0,
        ALIGNED_R=aligned(packed.ranks),
        BLOCK_M=config.block_m, BLOCK_O=config.block_n, BLOCK_C=config.block_k,
        BLOCK_R=config.block_r, GROUP_M=config.group_m,
        ACC=accumulator_dtype(z.dtype), PRECISION=input_precision(z.dtype),
        INT64=needs_int64(z, weight, t, factors, out),
        **launch_options(config),
    )  # fmt: skip


def _dropout_pointers(packed: Packed, dropout: bool) -> tuple[Tensor | None, ...]:
    if not dropout:
        return None, None, None
    return packed.seed, packed.thresholds, packed.inverse_keeps


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Packed,
    rows: MixedRows,
    plan: MixedPlan,
) -> tuple[Tensor, Tensor]:
    """y[M, N], and the scaled S[M, R_max] with its rows sorted by adapter."""
    s = shrink(x, packed.lora_a, packed, rows, plan.shrink, False, packed.seed is not None)
    base: Tensor | None = weight.t()
    if plan.library_base:
        y, base, bias = F.linear(x, weight, bias), None, None
    else:
        y = x.new_empty(x.shape[0], weight.shape[0])
    expand(x, base, s, packed.lora_b, bias, packed, rows, plan.expand, True, False, y)
    return y, s
