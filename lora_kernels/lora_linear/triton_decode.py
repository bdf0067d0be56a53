"""Triton forward for the few rows of a decoding step: one pass, split along K, in one launch.

    y_g[M, N_g] = bias_g + c_g Σ_k x[:, k] weight_g[:, k]ᵀ + s_g (x[:, k] lora_a_g[:, k]ᵀ) lora_b_gᵀ

where k runs over the splits. With M <= 16 the weights' bytes are all that counts, and the column
tiles alone are too few programs to fetch them. Both products are linear in x, so each split along K
multiplies its own part of S by lora_b. The parts of y go to memory in float32; of each tile's
programs the one that arrives last, told by an integer counter, adds them in the order of the
splits: the same bits every time. S is not kept: nothing is trained here.

Shapes, and what is a tuple over projections: `triton_common.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.lora_linear.tables import DecodeConfig
from lora_kernels.lora_linear.triton_common import (
    accumulator_dtype,
    as_tuple,
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
)


@triton.jit
def decode_kernel(
    x_ptr, weights, lora_a_ptr, lora_bs, biases, column_scales, ys, partial_ptr, arrived_ptr,
    scalings, first_r, first_n,
    M, N, K, R, N_ALL, stride_xm, stride_xk, stride_wn, stride_wk,
    SCALING_IS_TENSOR: tl.constexpr, SPLITS: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """EVEN_K: BLOCK_K * SPLITS divides K."""
    block_n, split = tl.program_id(0), tl.program_id(1)
    g, first_block = projection_of(block_n, N, BLOCK_N)
    N_g, R_g, first = pick_size(N, g), pick_size(R, g), pick_size(first_r, g)
    offsets_m = offsets(0, BLOCK_M, INT64)
    offsets_n = offsets(block_n - first_block, BLOCK_N, INT64)
    offsets_r = offsets(0, BLOCK_R, INT64)
    rows = tl.minimum(offsets_m, M - 1)
    mask_n = offsets_n < N_g
    mask_r = offsets_r < R_g
    span = tl.cdiv(K, BLOCK_K * SPLITS) * BLOCK_K
    begin = split * span
    offsets_k = begin + offsets(0, BLOCK_K, INT64)

    x_ptrs = x_ptr + rows[:, None] * stride_xm + offsets_k[None, :] * stride_xk
    weight_ptrs = (
        pick(weights, g)
        + offsets_k[:, None] * stride_wk
        + offsets_n[None, :] * pick_size(stride_wn, g)
    )
    a_ptrs = lora_a_ptr + (first + offsets_r)[None, :] * K + offsets_k[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    for k in range(begin, tl.minimum(begin + span, K), BLOCK_K):
        x, weight = load_operands(x_ptrs, weight_ptrs, mask_n, K - k, EVEN_N, EVEN_K, BLOCK_K)
        mask_a = mask_r[None, :]
        if not EVEN_K:
            mask_a = mask_a & (tl.arange(0, BLOCK_K) < K - k)[:, None]
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

    mask = (offsets_m < M)[:, None] & mask_n[None, :]
    is_last = True
    if SPLITS > 1:
        columns = pick_size(first_n, g) + offsets_n
        part_ptrs = partial_ptr + offsets_m[:, None] * N_ALL + columns[None, :]
        tl.store(part_ptrs + split * M * N_ALL, accumulator, mask=mask)
        # This program's stores come before its count, and all counts before the last one's loads.
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived_ptr + block_n, 1, sem="acq_rel") == SPLITS - 1
        tl.debug_barrier()
        if is_last:
            accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
            for part in range(0, SPLITS):
                # Past the L1 cache, which knows nothing of other programs' stores.
                accumulator += tl.load(
                    part_ptrs + part * M * N_ALL, mask=mask, other=0.0, cache_modifier=".cg"
                )
    if is_last:
        if column_scales is not None:
            scale = tl.load(pick(column_scales, g) + offsets_n, mask=mask_n, other=0.0)
            accumulator *= scale.to(ACC)[None, :]
        if biases is not None:
            bias = tl.load(pick(biases, g) + offsets_n, mask=mask_n, other=0.0)
            accumulator += bias.to(ACC)[None, :]
        tl.store(
            pick(ys, g) + offsets_m[:, None] * N_g + offsets_n[None, :],
            accumulator.to(x_ptr.dtype.element_ty), mask=mask,
        )  # fmt: skip


def decode(
    x: Tensor,
    weights: list[Tensor],
    lora_a: Tensor,
    lora_bs: list[Tensor],
    biases: list[Tensor] | None,
    column_scales: list[Tensor] | None,
    scalings: list[float],
    scaling_tensor: Tensor | None,
    config: DecodeConfig,
) -> list[Tensor]:
    """y_g[M, N_g] of at most 16 rows, by one kernel."""
    (m, k), n = x.shape, tuple(weight.shape[0] for weight in weights)
    ranks = [lora_b.shape[1] for lora_b in lora_bs]
    ys = [x.new_empty(m, size) for size in n]
    blocks = sum(triton.cdiv(size, config.block_n) for size in n)
    partial = arrived = None
    if config.splits > 1:
        partial = x.new_empty(config.splits, m, sum(n), dtype=partial_dtype(x.dtype))
        arrived = torch.zeros(blocks, dtype=torch.int32, device=x.device)
    scales = scaling_arguments(scalings, scaling_tensor, x.dtype, x.device)
    decode_kernel[(blocks, config.splits)](
        x, tuple(weights), lora_a, tuple(lora_bs), as_tuple(biases), as_tuple(column_scales),
        tuple(ys), partial, arrived, scales, first_columns(ranks), first_columns(n),
        m, n, k, tuple(ranks), sum(n), *x.stride(),
        tuple(weight.stride(0) for weight in weights), weights[0].stride(1),
        SCALING_IS_TENSOR=isinstance(scales[0], Tensor), SPLITS=config.splits,
        EVEN_N=all(size % config.block_n == 0 for size in n),
        EVEN_K=k % (config.block_k * config.splits) == 0,
        BLOCK_M=16, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=config.block_r,
        ACC=accumulator_dtype(x.dtype), PRECISION=input_precision(x.dtype),
        INT64=needs_int64(x, *weights, lora_a, partial),
        **launch_options(config),
    )  # fmt: skip
    return ys
