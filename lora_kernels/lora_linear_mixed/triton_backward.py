"""Triton backward of a mixed batch; P and dx by the forward's kernels (`triton_forward.py`).

    P[m, :R_a] = s_a dy[m] lora_b_a                 dx[m] = dy[m] weight + keep * (P[m] lora_a_a)
    d_lora_b_a[N, R_a] = Σ_m dy[m]ᵀ S[m, :R_a]      d_lora_a_a[R_a, K] = Σ_m P[m, :R_a]ᵀ x_lora[m]
        over the rows m of adapter a                d_bias[N] = Σ_m dy[m]

A gradient of an adapter is a sum over its segment of the sorted rows. A program (`segments`) covers
a chunk of the sorted rows and leaves one partial result in the accumulator's precision for each
adapter that has rows there; `reduce` then adds an adapter's in the order of the chunks, so the bits
do not depend on the order in which programs run. The partial result of chunk i and adapter a is in
slot i + a: from one to the next in sorted order i or a grows, so no two share a slot, and there are
chunks + adapters - 1 of them, whatever the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.lora_linear.tables import PassConfig, next_power_of_2
from lora_kernels.lora_linear.triton_common import (
    accumulator_dtype,
    dropout_keep,
    input_precision,
    launch_options,
    needs_int64,
    offsets,
    partial_dtype,
)
from lora_kernels.lora_linear_mixed.packing import Packed
from lora_kernels.lora_linear_mixed.plan import MixedPlan
from lora_kernels.lora_linear_mixed.rows import MixedRows
from lora_kernels.lora_linear_mixed.triton_forward import (
    adapters_between,
    aligned,
    expand,
    load_rows,
    rank_of,
    shrink,
)

REDUCE_COLUMNS = 128


@triton.jit(do_not_specialize=["COUNT"])
def segments_kernel(
    t_ptr, z_ptr, partial_ptr, order_ptr, sorted_adapters_ptr, starts_ptr, first_r_ptr,
    seed_ptr, thresholds_ptr, inverse_keeps_ptr,
    M, C, R_MAX, COUNT, stride_zm, stride_zc,
    DROPOUT: tl.constexpr, ALIGNED_R: tl.constexpr, CHUNK_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Columns of one block of z, sorted rows of one chunk: zᵀ T of each adapter of the chunk."""
    chunk = tl.program_id(0)
    offsets_c = offsets(tl.program_id(1), BLOCK_C, INT64)
    offsets_r = offsets(tl.program_id(2), BLOCK_R, INT64)
    mask_c = offsets_c < C
    first_row = chunk * CHUNK_M
    end_row = tl.minimum(first_row + CHUNK_M, M)
    first_a, end_a = adapters_between(sorted_adapters_ptr, first_row, end_row - 1, COUNT)
    for a in range(first_a, end_a):
        begin = tl.maximum(tl.load(starts_ptr + a), first_row)
        end = tl.minimum(tl.load(starts_ptr + a + 1), end_row)
        _, rank = rank_of(first_r_ptr, a, ALIGNED_R, INT64)
        mask_r = offsets_r < rank
        gradient = tl.zeros((BLOCK_C, BLOCK_R), dtype=ACC)
        for m in range(begin, end, BLOCK_M):
            inside = tl.arange(0, BLOCK_M)
            offsets_m = m + (inside.to(tl.int64) if INT64 else inside)
            mask_m = offsets_m < end
            rows = load_rows(order_ptr, offsets_m, mask_m, INT64)
            z = tl.load(
                z_ptr + rows[:, None] * stride_zm + offsets_c[None, :] * stride_zc,
                mask=mask_m[:, None] & mask_c[None, :], other=0.0,
            )  # fmt: skip
            if DROPOUT:
                keep = dropout_keep(
                    seed_ptr, tl.load(thresholds_ptr + a), tl.load(inverse_keeps_ptr + a),
                    rows, offsets_c, C,
                )  # fmt: skip
                z = (z.to(ACC) * keep.to(ACC)).to(z.dtype)
            t = tl.load(
                t_ptr + offsets_m[:, None] * R_MAX + offsets_r[None, :],
                mask=mask_m[:, None] & mask_r[None, :], other=0.0,
            )  # fmt: skip
            gradient = tl.dot(tl.trans(z), t, gradient, input_precision=PRECISION, out_dtype=ACC)
        slot = chunk + a
        if INT64:
            slot = slot.to(tl.int64)
        tl.store(
            partial_ptr + (slot * R_MAX + offsets_r)[None, :] * C + offsets_c[:, None],
            gradient, mask=mask_c[:, None] & mask_r[None, :] & (begin < end),
        )  # fmt: skip


@triton.jit
def reduce_kernel(
    partial_ptr, gradient_ptr, starts_ptr, first_r_ptr, C, R_MAX,
    TRANSPOSED: tl.constexpr, CHUNK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """One adapter's gradient, columns of one block: the sum over its chunks, 0 without rows."""
    a = tl.program_id(0)
    offsets_c = offsets(tl.program_id(1), BLOCK_C, INT64)
    offsets_r = offsets(tl.program_id(2), BLOCK_R, INT64)
    begin, end = tl.load(starts_ptr + a), tl.load(starts_ptr + a + 1)
    first, rank = rank_of(first_r_ptr, a, False, INT64)
    mask = (offsets_c < C)[:, None] & (offsets_r < rank)[None, :]
    first_chunk = begin // CHUNK_M
    end_chunk = tl.where(begin < end, (end - 1) // CHUNK_M + 1, first_chunk)
    gradient = tl.zeros((BLOCK_C, BLOCK_R), dtype=ACC)
    for chunk in tl.range(first_chunk, end_chunk, num_stages=1):
        slot = chunk + a
        if INT64:
            slot = slot.to(tl.int64)
        gradient += tl.load(
            partial_ptr + (slot * R_MAX + offsets_r)[None, :] * C + offsets_c[:, None],
            mask=mask, other=0.0,
        )  # fmt: skip
    if TRANSPOSED:
        inside = offsets_c[:, None] * rank + offsets_r[None, :]
    else:
        inside = offsets_r[None, :] * C + offsets_c[:, None]
    tl.store(
        gradient_ptr + first * C + inside, gradient.to(gradient_ptr.dtype.element_ty), mask=mask
    )


def segment_gradients(
    t: Tensor,
    z: Tensor,
    packed: Packed,
    rows: MixedRows,
    config: PassConfig,
    dtype: torch.dtype,
    transposed: bool,
    dropout: bool,
) -> Tensor:
    """All Σ_m T[m]ᵀ z[m] end to end, [R_a, C] each, or with `transposed` [C, R_a]; in `dtype`."""
    (m, c), r_max = z.shape, max(packed.ranks)
    chunks, adapters = triton.cdiv(m, config.chunk), len(packed.ranks)
    partial = z.new_empty(chunks + adapters - 1, r_max, c, dtype=partial_dtype(z.dtype))
    gradient = z.new_empty(sum(packed.ranks) * c, dtype=dtype)
    if gradient.numel() == 0:
        return gradient
    int64 = needs_int64(z, t, partial, gradient)
    pointers = (packed.seed, packed.thresholds, packed.inverse_keeps)
    if m:
        grid = (
            chunks, triton.cdiv(c, config.block_columns), triton.cdiv(r_max, config.block_r)
        )  # fmt: skip
        segments_kernel[grid](
            t, z, partial, rows.order, rows.sorted_adapters, rows.starts, packed.first_r,
            *(pointers if dropout else (None, None, None)),
            m, c, r_max, adapters, *z.stride(),
            DROPOUT=dropout, ALIGNED_R=aligned(packed.ranks), CHUNK_M=config.chunk,
            BLOCK_M=config.block_rows, BLOCK_C=config.block_columns, BLOCK_R=config.block_r,
            ACC=accumulator_dtype(z.dtype), PRECISION=input_precision(z.dtype), INT64=int64,
            **launch_options(config),
        )  # fmt: skip
    block_r = min(max(next_power_of_2(r_max), 16), 64)
    reduce_kernel[(adapters, triton.cdiv(c, REDUCE_COLUMNS), triton.cdiv(r_max, block_r))](
        partial, gradient, rows.starts, packed.first_r, c, r_max,
        TRANSPOSED=transposed, CHUNK_M=config.chunk, BLOCK_C=REDUCE_COLUMNS, BLOCK_R=block_r,
        ACC=accumulator_dtype(z.dtype), INT64=int64,
    )  # fmt: skip
    return gradient


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    s: Tensor | None,
    packed: Packed,
    rows: MixedRows,
    needs: tuple[bool, bool, bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
    plan: MixedPlan,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, all d_lora_a_a end to end, all d_lora_b_a likewise, d_bias; None where `needs` says so.

    x is needed for d_lora_a alone, S for d_lora_b alone. `dtypes` are those of the two gradients.
    """
    need_dx, need_da, need_db, need_dbias = needs
    m, k = dy.shape[0], weight.shape[1]
    dropout = packed.seed is not None
    p = dx = d_lora_a = d_lora_b = None
    if need_dx or need_da:
        p = shrink(dy, packed.lora_b, packed, rows, plan.shrink, True, False)
    if need_dx:
        assert p is not None
        base = None if plan.library_base else weight
        dx = torch.mm(dy, weight) if plan.library_base else dy.new_empty(m, k)
        expand(dy, base, p, packed.lora_a, None, packed, rows, plan.dx, False, dropout, dx)
    if need_da:
        assert x is not None and p is not None
        d_lora_a = segment_gradients(
            p, x, packed, rows, plan.segments, dtypes[0], False, dropout
        )  # fmt: skip
    if need_db:
        assert s is not None
        d_lora_b = segment_gradients(s, dy, packed, rows, plan.segments, dtypes[1], True, False)
    return dx, d_lora_a, d_lora_b, dy.sum(0) if need_dbias else None
