"""Triton backward of LoRA linear layers that share x: dy is read twice in all, x once, no atomics.

    P[M, R] = s_g dy_g[M, N_g] lora_b_g[N_g, R_g]
    d_lora_b_g[N_g, R_g] = dy_gᵀ S_g[M, R_g]              d_bias_g[N_g] = Σ_m dy_g
        one pass over all dy (`dy_b`): each tile feeds both products and the sum
    dx[M, K] = Σ_g dy_g weight_g[N_g, K] + Σ_g keep_g * (P_g lora_a_g[R_g, K])
        one GEMM over the concatenated outputs, its rank-R product last (`dx`)
    d_lora_a[R, K] = Pᵀ x_lora[M, K]
        one pass over x (`d_a`)

A program of the two passes covers a chunk of rows and leaves partial results in float32, which are
added in the same order every time: P's over column blocks, those of the gradients over chunks.

Shapes, and what is a tuple over projections: `triton_common.py`. lora_a, lora_b, S and P are
contiguous; x, dy and the weights have any strides.
"""

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.lora_linear import triton_descriptor
from lora_kernels.lora_linear.dropout import Dropout
from lora_kernels.lora_linear.plan import Plan
from lora_kernels.lora_linear.tables import PassConfig, TileConfig, next_power_of_2
from lora_kernels.lora_linear.triton_common import (
    accumulator_dtype,
    count_blocks,
    dropout_arguments,
    dropout_keep,
    first_columns,
    input_precision,
    launch_options,
    load_operands,
    load_scaling,
    needs_int64,
    offsets,
    partial_dtype,
    pick,
    pick_size,
    projection_of,
    scaling_arguments,
    tile_of,
)


@triton.jit
def dy_b_kernel(
    dys, lora_bs, s_ptr, p_ptr, db_ptr, dbias_ptr, first_r, first_n,
    M, N, R, R_MAX, N_ALL, stride_dym, stride_dyn, stride_sm,
    CHUNK_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Columns of one block of dy, rows of one chunk: P over the columns, d_lora_b over the rows."""
    column_blocks = count_blocks(N, BLOCK_N)
    chunk, block_n = tl.program_id(0) // column_blocks, tl.program_id(0) % column_blocks
    g, first_block = projection_of(block_n, N, BLOCK_N)
    N_g, R_g, first = pick_size(N, g), pick_size(R, g), pick_size(first_r, g)
    if INT64:
        chunk = chunk.to(tl.int64)
        block_n = block_n.to(tl.int64)
    offsets_n = offsets(block_n - first_block, BLOCK_N, INT64)
    offsets_r = offsets(tl.program_id(1), BLOCK_R, INT64)
    mask_n = offsets_n < N_g
    mask_r = offsets_r < R_g
    dy_columns = pick(dys, g) + offsets_n[None, :] * stride_dyn
    if p_ptr is not None:
        lora_b = tl.load(
            pick(lora_bs, g) + offsets_n[:, None] * R_g + offsets_r[None, :],
            mask=mask_n[:, None] & mask_r[None, :], other=0.0,
        )  # fmt: skip
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=ACC)
    dbias = tl.zeros((BLOCK_N,), dtype=ACC)
    for step in range(0, CHUNK_M // BLOCK_M):
        offsets_m = offsets(chunk * (CHUNK_M // BLOCK_M) + step, BLOCK_M, INT64)
        mask_m = offsets_m < M
        dy = tl.load(
            dy_columns + offsets_m[:, None] * pick_size(stride_dym, g),
            mask=mask_m[:, None] & mask_n[None, :], other=0.0,
        )  # fmt: skip
        if p_ptr is not None:
            p = tl.dot(dy, lora_b, input_precision=PRECISION, out_dtype=ACC)
            tl.store(
                p_ptr + (block_n * M + offsets_m)[:, None] * R_MAX + offsets_r[None, :],
                p, mask=mask_m[:, None] & mask_r[None, :],
            )  # fmt: skip
        if db_ptr is not None:
            s = tl.load(
                s_ptr + offsets_m[:, None] * stride_sm + (first + offsets_r)[None, :],
                mask=mask_m[:, None] & mask_r[None, :], other=0.0,
            )  # fmt: skip
            db = tl.dot(tl.trans(dy), s, db, input_precision=PRECISION, out_dtype=ACC)
        if dbias_ptr is not None:
            dbias += tl.sum(dy.to(ACC), axis=0)
    rows = chunk * N_ALL + pick_size(first_n, g) + offsets_n
    if db_ptr is not None:
        tl.store(
            db_ptr + rows[:, None] * R_MAX + offsets_r[None, :],
            db, mask=mask_n[:, None] & mask_r[None, :],
        )  # fmt: skip
    if dbias_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(dbias_ptr + rows, dbias, mask=mask_n)


@triton.jit
def reduce_p_kernel(
    partial_ptr, p_ptr, scalings, first_r, first_block, last_block,
    M, R, R_MAX, stride_pm,
    SCALING_IS_TENSOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """P_g = s_g times the sum of the column blocks' parts, rounded once; one projection each."""
    offsets_m = offsets(tl.program_id(0), BLOCK_M, INT64)
    g = tl.program_id(1)
    offsets_r = offsets(tl.program_id(2), BLOCK_R, INT64)
    mask = (offsets_m < M)[:, None] & (offsets_r < pick_size(R, g))[None, :]
    p = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    for block in range(pick_size(first_block, g), pick_size(last_block, g)):
        rows = offsets(block, 1, INT64) * M + offsets_m
        p += tl.load(partial_ptr + rows[:, None] * R_MAX + offsets_r[None, :], mask=mask, other=0.0)
    p *= load_scaling(pick(scalings, g), SCALING_IS_TENSOR)
    columns = pick_size(first_r, g) + offsets_r
    tl.store(
        p_ptr + offsets_m[:, None] * stride_pm + columns[None, :],
        p.to(p_ptr.dtype.element_ty), mask=mask,
    )  # fmt: skip


# One compiled kernel serves every dropout rate.
@triton.jit(do_not_specialize=["threshold", "inverse_keep"])
def dx_kernel(
    dys, weights, p_ptr, lora_a_ptr, dx_ptr, seeds_ptr, threshold, inverse_keep, first_r,
    M, N, K, R, stride_dym, stride_dyn, stride_wn, stride_wk, stride_pm,
    DROPOUT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_K] tile of dx; the reduction walks along N, BLOCK_N at a time."""
    block_m, block_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    offsets_m = offsets(block_m, BLOCK_M, INT64)
    offsets_k = offsets(block_k, BLOCK_K, INT64)
    offsets_n = offsets(0, BLOCK_N, INT64)
    rows = tl.minimum(offsets_m, M - 1)
    mask_k = offsets_k < K

    accumulator = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC)
    for g in tl.static_range(len(N)):
        dy_ptrs = dys[g] + rows[:, None] * stride_dym[g] + offsets_n[None, :] * stride_dyn[g]
        weight_ptrs = (
            weights[g] + offsets_n[:, None] * stride_wn[g] + offsets_k[None, :] * stride_wk[g]
        )
        for n in range(0, N[g], BLOCK_N):
            dy, weight = load_operands(
                dy_ptrs, weight_ptrs, mask_k, N[g] - n, EVEN_K, EVEN_N, BLOCK_N
            )
            accumulator = tl.dot(dy, weight, accumulator, input_precision=PRECISION, out_dtype=ACC)
            dy_ptrs += BLOCK_N * stride_dyn[g]
            weight_ptrs += BLOCK_N * stride_wn[g]

    # Without dropout the rank-R product lands in the same accumulator, stacked over projections.
    if DROPOUT:
        for g in tl.static_range(len(N)):
            tail = rank_product(
                tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC),
                p_ptr, lora_a_ptr, rows, offsets_k, mask_k, first_r[g], first_r[g] + R[g], K,
                stride_pm, BLOCK_R, ACC, PRECISION,
            )  # fmt: skip
            keep = dropout_keep(seeds_ptr + g, threshold, inverse_keep, offsets_m, offsets_k, K)
            accumulator += keep.to(ACC) * tail
    else:
        last: tl.constexpr = len(N) - 1
        accumulator = rank_product(
            accumulator, p_ptr, lora_a_ptr, rows, offsets_k, mask_k,
            0, first_r[last] + R[last], K, stride_pm, BLOCK_R, ACC, PRECISION,
        )  # fmt: skip
    tl.store(
        dx_ptr + offsets_m[:, None] * K + offsets_k[None, :],
        accumulator.to(dx_ptr.dtype.element_ty),
        mask=(offsets_m < M)[:, None] & mask_k[None, :],
    )


@triton.jit
def rank_product(
    accumulator, p_ptr, lora_a_ptr, rows, offsets_k, mask_k, first, last, K, stride_pm,
    BLOCK_R: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """accumulator + P[:, first:last] lora_a[first:last] of one tile."""
    # One step for most ranks. Pipelined, its first loads pass the N loop in registers: spills.
    for r in tl.range(first, last, BLOCK_R, num_stages=1):
        offsets_r = r + tl.arange(0, BLOCK_R)
        mask_r = offsets_r < last
        p = tl.load(
            p_ptr + rows[:, None] * stride_pm + offsets_r[None, :],
            mask=mask_r[None, :], other=0.0,
        )  # fmt: skip
        lora_a = tl.load(
            lora_a_ptr + offsets_r[:, None] * K + offsets_k[None, :],
            mask=mask_r[:, None] & mask_k[None, :], other=0.0,
        )  # fmt: skip
        accumulator = tl.dot(p, lora_a, accumulator, input_precision=PRECISION, out_dtype=ACC)
    return accumulator


@triton.jit(do_not_specialize=["threshold", "inverse_keep"])
def d_a_kernel(
    p_ptr, x_ptr, da_ptr, seed_ptr, threshold, inverse_keep,
    M, K, R, R_ALL, stride_pm, stride_xm, stride_xk,
    DROPOUT: tl.constexpr, CHUNK_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Columns of one block of x, rows of one chunk: d_lora_a over the chunk."""
    chunk_m = tl.program_id(0)
    if INT64:
        chunk_m = chunk_m.to(tl.int64)
    offsets_k = offsets(tl.program_id(1), BLOCK_K, INT64)
    offsets_r = offsets(tl.program_id(2), BLOCK_R, INT64)
    mask_k = offsets_k < K
    mask_r = offsets_r < R
    da = tl.zeros((BLOCK_K, BLOCK_R), dtype=ACC)
    for step in range(0, CHUNK_M // BLOCK_M):
        offsets_m = offsets(chunk_m * (CHUNK_M // BLOCK_M) + step, BLOCK_M, INT64)
        mask_m = offsets_m < M
        x = tl.load(
            x_ptr + offsets_m[:, None] * stride_xm + offsets_k[None, :] * stride_xk,
            mask=mask_m[:, None] & mask_k[None, :], other=0.0,
        )  # fmt: skip
        if DROPOUT:
            keep = dropout_keep(seed_ptr, threshold, inverse_keep, offsets_m, offsets_k, K)
            x = (x.to(ACC) * keep.to(ACC)).to(x.dtype)
        p = tl.load(
            p_ptr + offsets_m[:, None] * stride_pm + offsets_r[None, :],
            mask=mask_m[:, None] & mask_r[None, :], other=0.0,
        )  # fmt: skip
        da = tl.dot(tl.trans(x), p, da, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        da_ptr + (chunk_m * R_ALL + offsets_r)[None, :] * K + offsets_k[:, None],
        da, mask=mask_k[:, None] & mask_r[None, :],
    )  # fmt: skip


def dy_b(
    dys: list[Tensor],
    lora_bs: list[Tensor],
    s: Tensor | None,
    scalings: list[float],
    scaling_tensor: Tensor | None,
    config: PassConfig,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None]:
    """P[M, R] in dy's dtype, d_lora_b_g[N_g, R_g] and d_bias_g[N_g] in the accumulator's dtype.

    `needs` says which of the three are made; d_lora_b needs S.
    """
    if len({dy.stride(1) for dy in dys}) > 1:
        # One launch takes one stride along n.
        dys = [dy.contiguous() for dy in dys]
    like, m, n = dys[0], dys[0].shape[0], tuple(dy.shape[1] for dy in dys)
    ranks = tuple(lora_b.shape[1] for lora_b in lora_bs)
    r_max, accumulated = max(ranks), partial_dtype(like.dtype)
    blocks = [triton.cdiv(size, config.block_columns) for size in n]
    chunks = triton.cdiv(m, config.chunk)
    partial_p = partial_db = partial_dbias = None
    if needs[0]:
        partial_p = like.new_empty(sum(blocks), m, r_max, dtype=accumulated)
    if needs[1]:
        partial_db = like.new_empty(chunks, sum(n), r_max, dtype=accumulated)
    if needs[2]:
        partial_dbias = like.new_empty(chunks, sum(n), dtype=accumulated)
    int64 = needs_int64(*dys, *lora_bs, s, partial_p, partial_db)
    rank_blocks = triton.cdiv(r_max, config.block_r) if needs[0] or needs[1] else 1
    if m and sum(n):
        dy_b_kernel[(chunks * sum(blocks), rank_blocks)](
            tuple(dys), tuple(lora_bs), s, partial_p, partial_db, partial_dbias,
            first_columns(ranks), first_columns(n),
            m, n, ranks, r_max, sum(n),
            tuple(dy.stride(0) for dy in dys), like.stride(1), 0 if s is None else s.stride(0),
            CHUNK_M=config.chunk, BLOCK_M=config.block_rows, BLOCK_N=config.block_columns,
            BLOCK_R=config.block_r,
            ACC=accumulator_dtype(like.dtype), PRECISION=input_precision(like.dtype),
            INT64=int64,
            **launch_options(config),
        )  # fmt: skip
    p = d_lora_bs = d_biases = None
    if partial_p is not None:
        p = like.new_empty(m, sum(ranks))
        first_block = first_columns(blocks)
        scales = scaling_arguments(scalings, scaling_tensor, like.dtype, like.device)
        block_r = min(next_power_of_2(r_max), 64)
        if m:
            reduce_p_kernel[(triton.cdiv(m, 32), len(n), triton.cdiv(r_max, block_r))](
                partial_p, p, scales, first_columns(ranks), first_block,
                tuple(start + size for start, size in zip(first_block, blocks, strict=True)),
                m, ranks, r_max, p.stride(0),
                SCALING_IS_TENSOR=isinstance(scales[0], Tensor), BLOCK_M=32, BLOCK_R=block_r,
                ACC=accumulator_dtype(like.dtype), INT64=int64,
            )  # fmt: skip
    if partial_db is not None:
        d_lora_bs = [
            part[..., :rank].sum(0)
            for part, rank in zip(partial_db.split(n, dim=1), ranks, strict=True)
        ]
    if partial_dbias is not None:
        d_biases = [part.sum(0) for part in partial_dbias.split(n, dim=1)]
    return p, d_lora_bs, d_biases


def dx(
    dys: list[Tensor],
    weights: list[Tensor],
    p: Tensor,
    lora_a: Tensor,
    ranks: tuple[int, ...],
    config: TileConfig,
    dropout: Dropout | None = None,
) -> Tensor:
    """dx[M, K] = Σ_g dy_g weight_g + Σ_g keep_g * (P_g lora_a_g), by one kernel.

    `config.block_n` tiles K, the columns of dx, and `config.block_k` the reduction along N.
    """
    (m, k), n = (dys[0].shape[0], lora_a.shape[1]), tuple(dy.shape[1] for dy in dys)
    out = dys[0].new_empty(m, k)
    if out.numel() == 0:
        return out
    if config.descriptors and dropout is None:
        described = triton_descriptor.dx(dys, weights, p, lora_a, config)
        if described is not None:
            return described
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(k, config.block_n),)
    dx_kernel[grid](
        tuple(dys), tuple(weights), p, lora_a, out, *dropout_arguments(dropout),
        first_columns(ranks), m, n, k, ranks,
        tuple(dy.stride(0) for dy in dys), tuple(dy.stride(1) for dy in dys),
        tuple(weight.stride(0) for weight in weights),
        tuple(weight.stride(1) for weight in weights),
        p.stride(0),
        DROPOUT=dropout is not None,
        EVEN_N=all(size % config.block_k == 0 for size in n), EVEN_K=k % config.block_n == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_k, BLOCK_K=config.block_n,
        BLOCK_R=config.block_r, GROUP_M=config.group_m,
        ACC=accumulator_dtype(out.dtype), PRECISION=input_precision(out.dtype),
        INT64=needs_int64(*dys, *weights, p, lora_a, out),
        **launch_options(config),
    )  # fmt: skip
    return out


def d_a(
    p: Tensor,
    x: Tensor,
    ranks: tuple[int, ...],
    config: PassConfig,
    dropout: Dropout | None = None,
) -> Tensor:
    """d_lora_a[R, K] = Pᵀ dropout_g(x)[M, K] in the accumulator's dtype.

    Without dropout x is read once; with it once a projection, each of which has its own mask.
    """
    (m, k), r = x.shape, sum(ranks)
    chunks_m = triton.cdiv(m, config.chunk)
    da = x.new_empty(chunks_m, r, k, dtype=partial_dtype(x.dtype))
    parts: list[tuple[int, int, Dropout | None]] = [(0, r, None)]
    if dropout is not None:
        masks = (Dropout(seed, dropout.p) for seed in dropout.seeds.split(1))
        parts = list(zip(first_columns(ranks), ranks, masks, strict=True))
    for start, rank, mask in parts if da.numel() else []:
        grid = (
            chunks_m, triton.cdiv(k, config.block_columns), triton.cdiv(rank, config.block_r)
        )  # fmt: skip
        d_a_kernel[grid](
            p[:, start:], x, da[:, start:], *dropout_arguments(mask),
            m, k, rank, r, p.stride(0), *x.stride(),
            DROPOUT=mask is not None, CHUNK_M=config.chunk,
            BLOCK_M=config.block_rows, BLOCK_K=config.block_columns, BLOCK_R=config.block_r,
            ACC=accumulator_dtype(x.dtype), PRECISION=input_precision(x.dtype),
            INT64=needs_int64(p, x, da),
            **launch_options(config),
        )  # fmt: skip
    return da.sum(0)


def backward(
    dys: list[Tensor],
    x: Tensor | None,
    weights: list[Tensor],
    lora_a: Tensor,
    lora_bs: list[Tensor],
    s: Tensor | None,
    scalings: list[float],
    scaling_tensor: Tensor | None,
    dropout: Dropout | None,
    needs: tuple[bool, bool, bool, bool],
    plan: Plan,
) -> tuple[Tensor | None, Tensor | None, list[Tensor] | None, list[Tensor] | None]:
    """dx, d_lora_a (stacked), d_lora_b and d_bias per projection; None where `needs` says so."""
    assert plan.dx is not None and plan.dy_b is not None and plan.d_a is not None
    need_dx, need_da, need_db, need_dbias = needs
    ranks = tuple(lora_b.shape[1] for lora_b in lora_bs)
    p, d_lora_bs, d_biases = dy_b(
        dys, lora_bs, s, scalings, scaling_tensor, plan.dy_b,
        (need_dx or need_da, need_db, need_dbias),
    )  # fmt: skip
    d_x = d_lora_a = None
    if need_dx:
        assert p is not None
        d_x = dx(dys, weights, p, lora_a, ranks, plan.dx, dropout)
    if need_da:
        assert x is not None and p is not None
        d_lora_a = d_a(p, x, ranks, plan.d_a, dropout)
    return d_x, d_lora_a, d_lora_bs, d_biases
