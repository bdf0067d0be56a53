"""Triton forward of LoRA linear layers that share x, in one pass over x or split in two.

    S[M, R] = s_g x_lora[M, K] lora_a[R, K]ᵀ                  s_g of the projection of each column
    y_g[M, N_g] = c_g * (x[M, K] weight_g[N_g, K]ᵀ + S_g lora_b_g[N_g, R_g]ᵀ) + bias_g

One pass: a program accumulates its tile of x weightᵀ and, from the same tile of x, its rows of S;
after the K loop S is scaled in the accumulator's precision, rounded once to x's dtype and
multiplied by lora_bᵀ into the tile. The first column of programs of each projection stores S for
backward. Every column tile repeats S's product, R/BLOCK_N more arithmetic, which buys the only
second reader of x.

Split: one pass over x makes S (dropping elements of x on the way), then a GEMM makes all y, its
rank-R product after its K loop: it then shares the loop's shared memory instead of adding to it (4
stages still fit on sm_90), and any rank is a loop over BLOCK_R.

Shapes, and what is a tuple over projections: `triton_common.py`. lora_a, lora_b, bias, S and y are
contiguous; x and the weights have any strides. c_g[N_g] are DoRA's column scales, 1 without them.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.lora_linear import triton_descriptor
from lora_kernels.lora_linear.dropout import Dropout
from lora_kernels.lora_linear.plan import Plan
from lora_kernels.lora_linear.tables import PassConfig, TileConfig
from lora_kernels.lora_linear.triton_common import (
    accumulator_dtype,
    as_tuple,
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
    pick,
    pick_size,
    projection_of,
    scaling_arguments,
    tile_of,
)
from lora_kernels.lora_linear.triton_decode import decode


@triton.jit
def one_pass_kernel(
    x_ptr, weights, lora_a_ptr, lora_bs, biases, column_scales, ys, s_ptr, scalings, first_r,
    M, N, K, R, stride_xm, stride_xk, stride_wn, stride_wk, stride_sm,
    SCALING_IS_TENSOR: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    block_m, block_n = tile_of(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), count_blocks(N, BLOCK_N), GROUP_M
    )
    g, first_block = projection_of(block_n, N, BLOCK_N)
    N_g, R_g, first = pick_size(N, g), pick_size(R, g), pick_size(first_r, g)
    offsets_m = offsets(block_m, BLOCK_M, INT64)
    offsets_n = offsets(block_n - first_block, BLOCK_N, INT64)
    offsets_k = offsets(0, BLOCK_K, INT64)
    offsets_r = offsets(0, BLOCK_R, INT64)
    # Rows past the end read the last row and are never stored: no mask in the loop.
    rows = tl.minimum(offsets_m, M - 1)
    mask_n = offsets_n < N_g
    mask_r = offsets_r < R_g

    x_ptrs = x_ptr + rows[:, None] * stride_xm + offsets_k[None, :] * stride_xk
    weight_ptrs = (
        pick(weights, g)
        + offsets_k[:, None] * stride_wk
        + offsets_n[None, :] * pick_size(stride_wn, g)
    )
    a_ptrs = lora_a_ptr + (first + offsets_r)[None, :] * K + offsets_k[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    for k in range(0, K, BLOCK_K):
        x, weight = load_operands(x_ptrs, weight_ptrs, mask_n, K - k, EVEN_N, EVEN_K, BLOCK_K)
        mask_a = mask_r[None, :]
        if not EVEN_K:
            mask_a = mask_a & (offsets_k < K - k)[:, None]
        lora_a = tl.load(a_ptrs, mask=mask_a, other=0.0)
        accumulator = tl.dot(x, weight, accumulator, input_precision=PRECISION, out_dtype=ACC)
        s = tl.dot(x, lora_a, s, input_precision=PRECISION, out_dtype=ACC)
        x_ptrs += BLOCK_K * stride_xk
        weight_ptrs += BLOCK_K * stride_wk
        a_ptrs += BLOCK_K

    scaled = (s * load_scaling(pick(scalings, g), SCALING_IS_TENSOR)).to(x_ptr.dtype.element_ty)
    lora_b = tl.load(
        pick(lora_bs, g) + offsets_n[None, :] * R_g + offsets_r[:, None],
        mask=mask_r[:, None] & mask_n[None, :], other=0.0,
    )  # fmt: skip
    accumulator = tl.dot(scaled, lora_b, accumulator, input_precision=PRECISION, out_dtype=ACC)
    if column_scales is not None:
        scale = tl.load(pick(column_scales, g) + offsets_n, mask=mask_n, other=0.0)
        accumulator *= scale.to(ACC)[None, :]
    if biases is not None:
        bias = tl.load(pick(biases, g) + offsets_n, mask=mask_n, other=0.0)
        accumulator += bias.to(ACC)[None, :]
    mask_m = offsets_m < M
    tl.store(
        pick(ys, g) + offsets_m[:, None] * N_g + offsets_n[None, :],
        accumulator.to(x_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )
    if s_ptr is not None:
        if block_n == first_block:
            tl.store(
                s_ptr + offsets_m[:, None] * stride_sm + (first + offsets_r)[None, :],
                scaled,
                mask=mask_m[:, None] & mask_r[None, :],
            )


# One compiled kernel serves every dropout rate.
@triton.jit(do_not_specialize=["threshold", "inverse_keep"])
def shrink_kernel(
    x_ptr, lora_a_ptr, s_ptr, seed_ptr, scalings, threshold, inverse_keep,
    M, K, R, stride_xm, stride_xk, stride_sm,
    SCALING_IS_TENSOR: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of S, columns of one block of the stacked rank; R is a tuple of its parts."""
    offsets_m = offsets(tl.program_id(0), BLOCK_M, INT64)
    offsets_r = offsets(tl.program_id(1), BLOCK_R, INT64)
    offsets_k = offsets(0, BLOCK_K, INT64)
    rows = tl.minimum(offsets_m, M - 1)
    scale = load_scaling(scalings[0], SCALING_IS_TENSOR)
    rank = R[0]
    for g in tl.static_range(1, len(R)):
        scale = tl.where(offsets_r >= rank, load_scaling(scalings[g], SCALING_IS_TENSOR), scale)
        rank += R[g]
    mask_r = offsets_r < rank
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offsets_k[None, :] * stride_xk
    a_ptrs = lora_a_ptr + offsets_r[None, :] * K + offsets_k[:, None]
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    for k in range(0, K, BLOCK_K):
        # BLOCK_R columns of lora_a take the place of a weight's, always masked.
        x, lora_a = load_operands(x_ptrs, a_ptrs, mask_r, K - k, False, EVEN_K, BLOCK_K)
        if DROPOUT:
            keep = dropout_keep(seed_ptr, threshold, inverse_keep, offsets_m, offsets_k + k, K)
            x = (x.to(ACC) * keep.to(ACC)).to(x.dtype)
        s = tl.dot(x, lora_a, s, input_precision=PRECISION, out_dtype=ACC)
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K
    if len(R) == 1:
        s *= scale
    else:
        s *= scale[None, :]
    tl.store(
        s_ptr + offsets_m[:, None] * stride_sm + offsets_r[None, :],
        s.to(s_ptr.dtype.element_ty),
        mask=(offsets_m < M)[:, None] & mask_r[None, :],
    )


@triton.jit
def expand_kernel(
    x_ptr, weights, s_ptr, lora_bs, biases, column_scales, ys, first_r,
    M, N, K, R, stride_xm, stride_xk, stride_wn, stride_wk, stride_sm,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    block_m, block_n = tile_of(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), count_blocks(N, BLOCK_N), GROUP_M
    )
    g, first_block = projection_of(block_n, N, BLOCK_N)
    N_g, R_g, first = pick_size(N, g), pick_size(R, g), pick_size(first_r, g)
    offsets_m = offsets(block_m, BLOCK_M, INT64)
    offsets_n = offsets(block_n - first_block, BLOCK_N, INT64)
    offsets_k = offsets(0, BLOCK_K, INT64)
    rows = tl.minimum(offsets_m, M - 1)
    mask_n = offsets_n < N_g

    x_ptrs = x_ptr + rows[:, None] * stride_xm + offsets_k[None, :] * stride_xk
    weight_ptrs = (
        pick(weights, g)
        + offsets_k[:, None] * stride_wk
        + offsets_n[None, :] * pick_size(stride_wn, g)
    )
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in range(0, K, BLOCK_K):
        x, weight = load_operands(x_ptrs, weight_ptrs, mask_n, K - k, EVEN_N, EVEN_K, BLOCK_K)
        accumulator = tl.dot(x, weight, accumulator, input_precision=PRECISION, out_dtype=ACC)
        x_ptrs += BLOCK_K * stride_xk
        weight_ptrs += BLOCK_K * stride_wk

    lora_b_ptr = pick(lora_bs, g)
    # One step for most ranks. Pipelined, its first loads pass the K loop in registers: spills.
    for r in tl.range(0, R_g, BLOCK_R, num_stages=1):
        offsets_r = r + tl.arange(0, BLOCK_R)
        mask_r = offsets_r < R_g
        s = tl.load(
            s_ptr + rows[:, None] * stride_sm + (first + offsets_r)[None, :],
            mask=mask_r[None, :], other=0.0,
        )  # fmt: skip
        lora_b = tl.load(
            lora_b_ptr + offsets_n[None, :] * R_g + offsets_r[:, None],
            mask=mask_r[:, None] & mask_n[None, :], other=0.0,
        )  # fmt: skip
        accumulator = tl.dot(s, lora_b, accumulator, input_precision=PRECISION, out_dtype=ACC)
    if column_scales is not None:
        scale = tl.load(pick(column_scales, g) + offsets_n, mask=mask_n, other=0.0)
        accumulator *= scale.to(ACC)[None, :]
    if biases is not None:
        bias = tl.load(pick(biases, g) + offsets_n, mask=mask_n, other=0.0)
        accumulator += bias.to(ACC)[None, :]
    tl.store(
        pick(ys, g) + offsets_m[:, None] * N_g + offsets_n[None, :],
        accumulator.to(x_ptr.dtype.element_ty),
        mask=(offsets_m < M)[:, None] & mask_n[None, :],
    )


def _tiles(config: TileConfig, n: tuple[int, ...], k: int) -> dict[str, object]:
    return {
        "EVEN_N": all(size % config.block_n == 0 for size in n),
        "EVEN_K": k % config.block_k == 0,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "BLOCK_R": config.block_r, "GROUP_M": config.group_m,
    }  # fmt: skip


def _grid(m: int, n: tuple[int, ...], config: TileConfig) -> tuple[int]:
    columns = sum(triton.cdiv(size, config.block_n) for size in n)
    return (triton.cdiv(m, config.block_m) * columns,)


def one_pass(
    x: Tensor,
    weights: list[Tensor],
    lora_a: Tensor,
    lora_bs: list[Tensor],
    biases: list[Tensor] | None,
    column_scales: list[Tensor] | None,
    scalings: list[float],
    scaling_tensor: Tensor | None,
    config: TileConfig,
    save_s: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """y_g[M, N_g] and, if asked for, the scaled S[M, R], by one kernel."""
    (m, k), n = x.shape, tuple(weight.shape[0] for weight in weights)
    ranks = [lora_b.shape[1] for lora_b in lora_bs]
    ys = [x.new_empty(m, size) for size in n]
    s = x.new_empty(m, sum(ranks)) if save_s else None
    scales = scaling_arguments(scalings, scaling_tensor, x.dtype, x.device)
    one_pass_kernel[_grid(m, n, config)](
        x, tuple(weights), lora_a, tuple(lora_bs), as_tuple(biases), as_tuple(column_scales),
        tuple(ys), s, scales, first_columns(ranks),
        m, n, k, tuple(ranks), *x.stride(),
        tuple(weight.stride(0) for weight in weights), weights[0].stride(1), sum(ranks),
        SCALING_IS_TENSOR=isinstance(scales[0], Tensor), **_tiles(config, n, k),
        ACC=accumulator_dtype(x.dtype), PRECISION=input_precision(x.dtype),
        INT64=needs_int64(x, *weights, lora_a, *ys),
        **launch_options(config),
    )  # fmt: skip
    return ys, s


def shrink(
    x: Tensor,
    lora_a: Tensor,
    ranks: list[int],
    scalings: list[float],
    scaling_tensor: Tensor | None,
    config: PassConfig,
    dropout: Dropout | None = None,
) -> Tensor:
    """The scaled S[M, R] = s_g dropout_g(x)[M, K] lora_a[R, K]ᵀ in x's dtype.

    Without dropout x is read once; with it once a projection, each of which has its own mask.
    """
    (m, k), s = x.shape, x.new_empty(x.shape[0], sum(ranks))
    scales = scaling_arguments(scalings, scaling_tensor, x.dtype, x.device)
    starts = first_columns(ranks)
    parts: list[tuple[int, tuple[int, ...], Any, Dropout | None]]
    parts = [(0, tuple(ranks), scales, None)]
    if dropout is not None:
        masks = (Dropout(seed, dropout.p) for seed in dropout.seeds.split(1))
        parts = [
            (start, (rank,), (scale,), mask)
            for start, rank, scale, mask in zip(starts, ranks, scales, masks, strict=True)
        ]
    for start, part_ranks, part_scales, mask in parts:
        rank = sum(part_ranks)
        seed, threshold, inverse_keep = dropout_arguments(mask)
        grid = (triton.cdiv(m, config.block_rows), triton.cdiv(rank, config.block_r))
        shrink_kernel[grid](
            x, lora_a[start : start + rank], s[:, start:],
            seed, part_scales, threshold, inverse_keep,
            m, k, part_ranks, *x.stride(), s.stride(0),
            SCALING_IS_TENSOR=isinstance(scales[0], Tensor), DROPOUT=mask is not None,
            EVEN_K=k % config.block_columns == 0,
            BLOCK_M=config.block_rows, BLOCK_K=config.block_columns, BLOCK_R=config.block_r,
            ACC=accumulator_dtype(x.dtype), PRECISION=input_precision(x.dtype),
            INT64=needs_int64(x, lora_a, s),
            **launch_options(config),
        )  # fmt: skip
    return s


def expand(
    x: Tensor,
    weights: list[Tensor],
    s: Tensor,
    lora_bs: list[Tensor],
    biases: list[Tensor] | None,
    column_scales: list[Tensor] | None,
    config: TileConfig,
) -> list[Tensor]:
    """y_g[M, N_g] = x weight_gᵀ + bias_g + S_g lora_b_gᵀ, by one kernel."""
    if config.descriptors:
        described = triton_descriptor.expand(x, weights, s, lora_bs, biases, column_scales, config)
        if described is not None:
            return described
    (m, k), n = x.shape, tuple(weight.shape[0] for weight in weights)
    ranks = [lora_b.shape[1] for lora_b in lora_bs]
    ys = [x.new_empty(m, size) for size in n]
    expand_kernel[_grid(m, n, config)](
        x, tuple(weights), s, tuple(lora_bs), as_tuple(biases), as_tuple(column_scales),
        tuple(ys), first_columns(ranks),
        m, n, k, tuple(ranks), *x.stride(),
        tuple(weight.stride(0) for weight in weights), weights[0].stride(1), s.stride(0),
        **_tiles(config, n, k),
        ACC=accumulator_dtype(x.dtype), PRECISION=input_precision(x.dtype),
        INT64=needs_int64(x, *weights, s, *ys),
        **launch_options(config),
    )  # fmt: skip
    return ys


def forward(
    x: Tensor,
    weights: list[Tensor],
    lora_a: Tensor,
    lora_bs: list[Tensor],
    biases: list[Tensor] | None,
    column_scales: list[Tensor] | None,
    scalings: list[float],
    scaling_tensor: Tensor | None,
    dropout: Dropout | None,
    save_s: bool,
    plan: Plan,
) -> tuple[list[Tensor], Tensor | None]:
    """y_g[M, N_g] and, if asked for, the scaled S[M, R], as the plan says."""
    assert plan.forward is not None and plan.shrink is not None
    ranks = [lora_b.shape[1] for lora_b in lora_bs]
    if x.shape[0] == 0:
        ys = [x.new_empty(0, weight.shape[0]) for weight in weights]
        return ys, x.new_empty(0, sum(ranks)) if save_s else None
    # One launch takes one stride along k.
    together = len({weight.stride(1) for weight in weights}) == 1
    if plan.decode is not None and together and not save_s:
        ys = decode(
            x,
            weights,
            lora_a,
            lora_bs,
            biases,
            column_scales,
            scalings,
            scaling_tensor,
            plan.decode,
        )
        return ys, None
    if plan.method == "one_pass" and together:
        return one_pass(
            x, weights, lora_a, lora_bs, biases, column_scales, scalings, scaling_tensor,
            plan.forward, save_s,
        )  # fmt: skip
    s = shrink(x, lora_a, ranks, scalings, scaling_tensor, plan.shrink, dropout)
    if together:
        ys = expand(x, weights, s, lora_bs, biases, column_scales, plan.forward)
    else:
        ys = [
            expand(
                x,
                [weight],
                s_g,
                [lora_b],
                biases and [biases[g]],
                column_scales and [column_scales[g]],
                plan.forward,
            )[0]
            for g, (weight, s_g, lora_b) in enumerate(
                zip(weights, s.split(ranks, dim=1), lora_bs, strict=True)
            )
        ]
    return ys, s if save_s else None
