"""Triton backward of a LoRA linear layer: dy is read twice in all, x once, nothing by atomics.

    P[M, R] = s dy[M, N] lora_b[N, R]   d_lora_b[N, R] = dyᵀ S[M, R]   d_bias[N] = Σ_m dy
        one pass over dy (`dy_b`): each tile feeds both products and the sum
    dx[M, K] = dy weight[N, K] + keep * (P lora_a[R, K])
        one GEMM with a rank-R tail (`gemm_tail`)
    d_lora_a[R, K] = Pᵀ x_lora[M, K]
        one pass over x (`d_a`)

A program of the two passes covers a chunk and leaves one partial result in float32; the partial
results are added by `torch.sum` over their first dimension, in the same order every time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.lora_linear.dropout import drop_threshold
from lora_kernels.lora_linear.plan import PassConfig, Plan
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
)


@triton.jit(do_not_specialize=["scaling"])
def dy_b_kernel(
    dy_ptr, lora_b_ptr, s_ptr, p_ptr, db_ptr, dbias_ptr, scaling,
    M, N, R,
    stride_dym, stride_dyn, stride_bn, stride_br, stride_sm, stride_sr,
    stride_pc, stride_pm, stride_pr, stride_dbc, stride_dbn, stride_dbr,
    stride_dbiasc, stride_dbiasn,
    SCALING_IS_TENSOR: tl.constexpr, CHUNK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Rows block_m of dy, columns of one chunk: P over the chunk, d_lora_b over the rows."""
    block_m = tl.program_id(0)
    chunk_n = tl.program_id(1)
    if INT64:
        block_m = block_m.to(tl.int64)
        chunk_n = chunk_n.to(tl.int64)
    offsets_m = offsets(block_m, BLOCK_M, INT64)
    offsets_r = offsets(tl.program_id(2), BLOCK_R, INT64)
    mask_m = offsets_m < M
    mask_r = offsets_r < R
    p = tl.zeros((BLOCK_M, BLOCK_R), dtype=ACC)
    if db_ptr is not None:
        s = tl.load(
            s_ptr + offsets_m[:, None] * stride_sm + offsets_r[None, :] * stride_sr,
            mask=mask_m[:, None] & mask_r[None, :], other=0.0,
        )  # fmt: skip
    for step in range(0, CHUNK_N // BLOCK_N):
        offsets_n = offsets(chunk_n * (CHUNK_N // BLOCK_N) + step, BLOCK_N, INT64)
        mask_n = offsets_n < N
        dy = tl.load(
            dy_ptr + offsets_m[:, None] * stride_dym + offsets_n[None, :] * stride_dyn,
            mask=mask_m[:, None] & mask_n[None, :], other=0.0,
        )  # fmt: skip
        if p_ptr is not None:
            lora_b = tl.load(
                lora_b_ptr + offsets_n[:, None] * stride_bn + offsets_r[None, :] * stride_br,
                mask=mask_n[:, None] & mask_r[None, :], other=0.0,
            )  # fmt: skip
            p = tl.dot(dy, lora_b, p, input_precision=PRECISION, out_dtype=ACC)
        if db_ptr is not None:
            db = tl.dot(tl.trans(dy), s, input_precision=PRECISION, out_dtype=ACC)
            tl.store(
                db_ptr + block_m * stride_dbc + offsets_n[:, None] * stride_dbn
                + offsets_r[None, :] * stride_dbr,
                db, mask=mask_n[:, None] & mask_r[None, :],
            )  # fmt: skip
        if dbias_ptr is not None:
            if tl.program_id(2) == 0:
                tl.store(
                    dbias_ptr + block_m * stride_dbiasc + offsets_n * stride_dbiasn,
                    tl.sum(dy.to(ACC), axis=0), mask=mask_n,
                )  # fmt: skip
    if p_ptr is not None:
        tl.store(
            p_ptr + chunk_n * stride_pc + offsets_m[:, None] * stride_pm
            + offsets_r[None, :] * stride_pr,
            p * load_scaling(scaling, SCALING_IS_TENSOR),
            mask=mask_m[:, None] & mask_r[None, :],
        )  # fmt: skip


@triton.jit(do_not_specialize=["threshold", "inverse_keep"])
def d_a_kernel(
    p_ptr, x_ptr, da_ptr, seed_ptr, threshold, inverse_keep,
    M, K, R,
    stride_pm, stride_pr, stride_xm, stride_xk, stride_dac, stride_dar, stride_dak,
    DROPOUT: tl.constexpr, CHUNK_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Columns block_k of x, rows of one chunk: d_lora_a over the chunk."""
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
            p_ptr + offsets_m[:, None] * stride_pm + offsets_r[None, :] * stride_pr,
            mask=mask_m[:, None] & mask_r[None, :], other=0.0,
        )  # fmt: skip
        da = tl.dot(tl.trans(x), p, da, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        da_ptr + chunk_m * stride_dac + offsets_k[:, None] * stride_dak
        + offsets_r[None, :] * stride_dar,
        da, mask=mask_k[:, None] & mask_r[None, :],
    )  # fmt: skip


def _partials(shape: tuple[int, ...], like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=like.device)


def _strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions if tensor is None else tensor.stride()


def dy_b(
    dy: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    scaling: float | Tensor,
    config: PassConfig,
    needs: tuple[bool, bool, bool],
    force_int64: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """P[M, R] in dy's dtype, d_lora_b[N, R] and d_bias[N] in the accumulator's, by one pass.

    `needs` says which of the three are made; d_lora_b needs S.
    """
    (m, n), r = dy.shape, lora_b.shape[1]
    chunks_n, blocks_m = triton.cdiv(n, config.chunk), triton.cdiv(m, config.block_rows)
    p = _partials((chunks_n, m, r), dy) if needs[0] else None
    db = _partials((blocks_m, n, r), dy) if needs[1] else None
    dbias = _partials((blocks_m, n), dy) if needs[2] else None
    if m and n:
        ranks = triton.cdiv(r, config.block_r) if needs[0] or needs[1] else 1
        largest = [t for t in (dy, lora_b, s, p, db) if t is not None]
        dy_b_kernel[(blocks_m, chunks_n, ranks)](
            dy, lora_b, s, p, db, dbias, scaling,
            m, n, r,
            *dy.stride(), *lora_b.stride(), *_strides(s, 2),
            *_strides(p, 3), *_strides(db, 3), *_strides(dbias, 2),
            SCALING_IS_TENSOR=isinstance(scaling, Tensor), CHUNK_N=config.chunk,
            BLOCK_M=config.block_rows, BLOCK_N=config.block_columns, BLOCK_R=config.block_r,
            ACC=accumulator_dtype(dy.dtype), PRECISION=input_precision(dy.dtype),
            INT64=force_int64 or needs_int64(*largest),
            **launch_options(config),
        )  # fmt: skip
    return (
        None if p is None else p.sum(0).to(dy.dtype),
        None if db is None else db.sum(0),
        None if dbias is None else dbias.sum(0),
    )


def d_a(
    p: Tensor,
    x: Tensor,
    config: PassConfig,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    force_int64: bool = False,
) -> Tensor:
    """d_lora_a[R, K] = P[M, R]ᵀ dropout(x)[M, K] in the accumulator's dtype, by one pass over x."""
    (m, k), r = x.shape, p.shape[1]
    chunks_m = triton.cdiv(m, config.chunk)
    da = _partials((chunks_m, r, k), x)
    if da.numel():
        grid = (chunks_m, triton.cdiv(k, config.block_columns), triton.cdiv(r, config.block_r))
        d_a_kernel[grid](
            p, x, da, seed, drop_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
            m, k, r, *p.stride(), *x.stride(), *da.stride(),
            DROPOUT=seed is not None, CHUNK_M=config.chunk,
            BLOCK_M=config.block_rows, BLOCK_K=config.block_columns, BLOCK_R=config.block_r,
            ACC=accumulator_dtype(x.dtype), PRECISION=input_precision(x.dtype),
            INT64=force_int64 or needs_int64(p, x, da),
            **launch_options(config),
        )  # fmt: skip
    return da.sum(0)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    scaling: float | Tensor,
    seed: Tensor | None,
    dropout_p: float,
    needs: tuple[bool, bool, bool, bool],
    plan: Plan,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Returns dx, d_lora_a, d_lora_b, d_bias, each None where `needs` says so."""
    assert plan.dx is not None and plan.dy_b is not None and plan.d_a is not None
    need_dx, need_da, need_db, need_dbias = needs
    dx = d_lora_a = None
    scaling = kernel_scaling(scaling, dy)
    p: Any
    p, d_lora_b, d_bias = dy_b(
        dy, lora_b, s, scaling, plan.dy_b, (need_dx or need_da, need_db, need_dbias)
    )
    if need_dx:
        dx = gemm_tail(dy, weight.t(), p, lora_a.t(), plan.dx, seed=seed, dropout_p=dropout_p)
    if need_da:
        assert x is not None
        d_lora_a = d_a(p, x, plan.d_a, seed, dropout_p)
    return dx, d_lora_a, d_lora_b, d_bias
