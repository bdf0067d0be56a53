"""Triton forward of a LoRA linear layer, in one pass over x or split in two.

    S[M, R] = s x_lora[M, K] lora_a[R, K]ᵀ
    y[M, N] = x[M, K] weight[N, K]ᵀ + bias[N] + S lora_b[N, R]ᵀ

One pass: a program accumulates its tile of x weightᵀ and, from the same tile of x, its rows of S;
after the K loop S is scaled in the accumulator's precision, rounded once to x's dtype and
multiplied by lora_bᵀ into the tile. The first column of programs stores S for backward. Every
column tile repeats S's product, R/BLOCK_N more arithmetic, which buys the only second reader of x.

Split: one pass over x makes S (dropping elements of x on the way), then `gemm_tail` makes y.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.lora_linear.dropout import drop_threshold
from lora_kernels.lora_linear.plan import PassConfig, Plan, TileConfig
from lora_kernels.lora_linear.triton_gemm import (
    accumulator_dtype,
    dropout_keep,
    gemm_tail,
    input_precision,
    kernel_scaling,
    launch_options,
    load_scaling,
    needs_int64,
    offsets,
    tile_of,
)


@triton.jit(do_not_specialize=["scaling"])
def one_pass_kernel(
    x_ptr, weight_ptr, lora_a_ptr, lora_b_ptr, bias_ptr, y_ptr, s_ptr, scaling,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    stride_b, stride_ym, stride_yn, stride_sm, stride_sr,
    SCALING_IS_TENSOR: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    block_m, block_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offsets_m = offsets(block_m, BLOCK_M, INT64)
    offsets_n = offsets(block_n, BLOCK_N, INT64)
    offsets_k = offsets(0, BLOCK_K, INT64)
    offsets_r = offsets(0, BLOCK_R, INT64)
    # Rows past the end read the last row and are never stored: no mask in the loop.
    rows = tl.minimum(offsets_m, M - 1)
    mask_n = offsets_n < N
    mask_r = offsets_r < R

    x_ptrs = x_ptr + rows[:, None] * stride_xm + offsets_k[None, :] * stride_xk
    weight_ptrs = weight_ptr + offsets_k[:, None] * stride_wk + offsets_n[None, :] * stride_wn
    a_ptrs = lora_a_ptr + offsets_k[:, None] * stride_ak + offsets_r[None, :] * stride_ar
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            lora_a = tl.load(a_ptrs, mask=mask_r[None, :], other=0.0)
        else:
            mask_k = offsets_k < K - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            lora_a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            weight = tl.load(weight_ptrs)
        elif EVEN_K:
            weight = tl.load(weight_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            mask = (offsets_k[:, None] < K - k) & mask_n[None, :]
            weight = tl.load(weight_ptrs, mask=mask, other=0.0)
        accumulator = tl.dot(x, weight, accumulator, input_precision=PRECISION, out_dtype=ACC)
        s = tl.dot(x, lora_a, s, input_precision=PRECISION, out_dtype=ACC)
        x_ptrs += BLOCK_K * stride_xk
        weight_ptrs += BLOCK_K * stride_wk
        a_ptrs += BLOCK_K * stride_ak

    scaled = (s * load_scaling(scaling, SCALING_IS_TENSOR)).to(x_ptr.dtype.element_ty)
    lora_b = tl.load(
        lora_b_ptr + offsets_r[:, None] * stride_br + offsets_n[None, :] * stride_bn,
        mask=mask_r[:, None] & mask_n[None, :], other=0.0,
    )  # fmt: skip
    accumulator = tl.dot(scaled, lora_b, accumulator, input_precision=PRECISION, out_dtype=ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offsets_n * stride_b, mask=mask_n, other=0.0)
        accumulator += bias.to(ACC)[None, :]
    mask_m = offsets_m < M
    tl.store(
        y_ptr + offsets_m[:, None] * stride_ym + offsets_n[None, :] * stride_yn,
        accumulator.to(y_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )
    if s_ptr is not None:
        if block_n == 0:
            tl.store(
                s_ptr + offsets_m[:, None] * stride_sm + offsets_r[None, :] * stride_sr,
                scaled,
                mask=mask_m[:, None] & mask_r[None, :],
            )


@triton.jit(do_not_specialize=["scaling", "threshold", "inverse_keep"])
def shrink_kernel(
    x_ptr, lora_a_ptr, s_ptr, seed_ptr, scaling, threshold, inverse_keep,
    M, K, R,
    stride_xm, stride_xk, stride_ar, stride_ak, stride_sm, stride_sr,
    SCALING_IS_TENSOR: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    offsets_m = offsets(tl.program_id(0), BLOCK_M, INT64)
    offsets_r = offsets(tl.program_id(1), BLOCK_R, INT64)
    offsets_k = offsets(0, BLOCK_K, INT64)
    rows = tl.minimum(offsets_m, M - 1)
    mask_r = offsets_r < R
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offsets_k[None, :] * stride_xk
    a_ptrs = lora_a_ptr + offsets_k[:, None] * stride_ak + offsets_r[None, :] * stride_ar
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            lora_a = tl.load(a_ptrs, mask=mask_r[None, :], other=0.0)
        else:
            mask_k = offsets_k < K - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            lora_a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        if DROPOUT:
            keep = dropout_keep(seed_ptr, threshold, inverse_keep, offsets_m, offsets_k + k, K)
            x = (x.to(ACC) * keep.to(ACC)).to(x.dtype)
        s = tl.dot(x, lora_a, s, input_precision=PRECISION, out_dtype=ACC)
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K * stride_ak
    tl.store(
        s_ptr + offsets_m[:, None] * stride_sm + offsets_r[None, :] * stride_sr,
        (s * load_scaling(scaling, SCALING_IS_TENSOR)).to(s_ptr.dtype.element_ty),
        mask=(offsets_m < M)[:, None] & mask_r[None, :],
    )


def one_pass(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    config: TileConfig,
    save_s: bool,
    force_int64: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y[M, N] and, if asked for, the scaled S[M, R], by one kernel."""
    (m, k), n, r = x.shape, weight.shape[0], lora_a.shape[0]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    s = torch.empty((m, r), dtype=x.dtype, device=x.device) if save_s else None
    if y.numel() == 0:
        return y, None if s is None else s.zero_()
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    one_pass_kernel[grid](
        x, weight, lora_a, lora_b, bias, y, s, scaling,
        m, n, k, r,
        *x.stride(), *weight.stride(), *lora_a.stride(), *lora_b.stride(),
        0 if bias is None else bias.stride(0), *y.stride(),
        *((0, 0) if s is None else s.stride()),
        SCALING_IS_TENSOR=isinstance(scaling, Tensor),
        EVEN_N=n % config.block_n == 0, EVEN_K=k % config.block_k == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=config.block_r, GROUP_M=config.group_m,
        ACC=accumulator_dtype(x.dtype), PRECISION=input_precision(x.dtype),
        INT64=force_int64 or needs_int64(x, weight, lora_a, lora_b, y),
        **launch_options(config),
    )  # fmt: skip
    return y, s


def shrink(
    x: Tensor,
    lora_a: Tensor,
    scaling: float | Tensor,
    config: PassConfig,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    force_int64: bool = False,
) -> Tensor:
    """S[M, R] = s dropout(x)[M, K] lora_a[R, K]ᵀ in x's dtype."""
    (m, k), r = x.shape, lora_a.shape[0]
    s = torch.empty((m, r), dtype=x.dtype, device=x.device)
    if s.numel() == 0:
        return s
    grid = (triton.cdiv(m, config.block_rows), triton.cdiv(r, config.block_r))
    shrink_kernel[grid](
        x, lora_a, s, seed, scaling, drop_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
        m, k, r, *x.stride(), *lora_a.stride(), *s.stride(),
        SCALING_IS_TENSOR=isinstance(scaling, Tensor), DROPOUT=seed is not None,
        EVEN_K=k % config.block_columns == 0,
        BLOCK_M=config.block_rows, BLOCK_K=config.block_columns, BLOCK_R=config.block_r,
        ACC=accumulator_dtype(x.dtype), PRECISION=input_precision(x.dtype),
        INT64=force_int64 or needs_int64(x, lora_a, s),
        **launch_options(config),
    )  # fmt: skip
    return s


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    seed: Tensor | None,
    dropout_p: float,
    save_s: bool,
    plan: Plan,
) -> tuple[Tensor, Tensor | None]:
    """y[M, N] and, if asked for, the scaled S[M, R], as the plan says."""
    assert plan.forward is not None and plan.shrink is not None
    scaling = kernel_scaling(scaling, x)
    if plan.method == "one_pass":
        return one_pass(x, weight, lora_a, lora_b, bias, scaling, plan.forward, save_s)
    s = shrink(x, lora_a, scaling, plan.shrink, seed, dropout_p)
    y = gemm_tail(x, weight, s, lora_b, plan.forward, bias)
    return y, s if save_s else None
