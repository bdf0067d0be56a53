"""What the Triton forward and backward share: offsets, dropout, a GEMM with a rank-R tail.

    out[M, N] = left[M, K] right[N, K]ᵀ + bias + keep * (u[M, R] v[N, R]ᵀ)

With (x, weight, S, lora_b) this is the split forward; with (dy, weightᵀ, P, lora_aᵀ) it is dx. The
rank-R product comes after the K loop: it then shares the loop's shared memory instead of adding to
it (KERNELS: 4 stages still fit on sm_90), and any rank is a loop over BLOCK_R.

Shape legend: M tokens, N outputs, K inputs, R rank; `stride_lm` is the stride of `left` along m.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear.dropout import drop_threshold
from lora_kernels.lora_linear.plan import PassConfig, TileConfig

INT32_MAX = 2**31 - 1


def needs_int64(*tensors: Tensor) -> bool:
    """Whether the largest element offset of any of the tensors overflows 32 bits."""
    for tensor in tensors:
        last = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        if max(last, tensor.numel()) > INT32_MAX:
            return True
    return False


def accumulator_dtype(dtype: torch.dtype) -> Any:
    """float32, but float64 for float64 inputs, which only the interpreter takes."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def input_precision(dtype: torch.dtype) -> str:
    """float32 products follow torch's own switch (`torch.set_float32_matmul_precision`)."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def kernel_scaling(scaling: float | Tensor, like: Tensor) -> float | Tensor:
    """A float argument reaches a kernel in float32; float64 inputs take theirs by tensor, exact."""
    if like.dtype == torch.float64:
        return torch.as_tensor(scaling, dtype=torch.float64, device=like.device)
    return scaling


def launch_options(config: TileConfig | PassConfig) -> dict[str, int]:
    """What the compiler is told and the interpreter does not take."""
    if interpreting():
        return {}
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


@triton.jit
def tile_of(pid, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
            GROUP: tl.constexpr):  # fmt: skip
    """Row and column of a program's tile; GROUP row blocks share their columns in the L2 cache."""
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    column_blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    first = pid // (GROUP * column_blocks) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    inside = pid % (GROUP * column_blocks)
    return first + inside % height, inside // height


@triton.jit
def offsets(block, BLOCK: tl.constexpr, INT64: tl.constexpr):
    """The BLOCK indices of one block, 64 bits wide where an offset may pass 2³¹."""
    inside = tl.arange(0, BLOCK)
    if INT64:
        inside = inside.to(tl.int64)
    return block * BLOCK + inside


@triton.jit
def load_scaling(scaling, IS_TENSOR: tl.constexpr):
    """A float arrives by value, a 0-d tensor by pointer; neither is compiled into the kernel."""
    if IS_TENSOR:
        value = tl.load(scaling)
    else:
        value = scaling
    return value


@triton.jit
def dropout_keep(seed_ptr, threshold, inverse_keep, offsets_m, offsets_k, K):
    """The multiplier of one tile: 0 or 1/(1-p), one Philox draw per element of x[M, K]."""
    index = offsets_m.to(tl.int64)[:, None] * K + offsets_k.to(tl.int64)[None, :]
    bits, _, _, _ = tl.randint4x(tl.load(seed_ptr), index)
    return tl.where((bits.to(tl.uint32) >> 1).to(tl.int32) >= threshold, inverse_keep, 0.0)


# One compiled kernel serves every dropout rate.
@triton.jit(do_not_specialize=["threshold", "inverse_keep"])
def gemm_tail_kernel(
    left_ptr, right_ptr, u_ptr, v_ptr, bias_ptr, out_ptr, seed_ptr, threshold, inverse_keep,
    M, N, K, R,
    stride_lm, stride_lk, stride_rn, stride_rk, stride_um, stride_ur, stride_vn, stride_vr,
    stride_b, stride_om, stride_on,
    DROPOUT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    block_m, block_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offsets_m = offsets(block_m, BLOCK_M, INT64)
    offsets_n = offsets(block_n, BLOCK_N, INT64)
    offsets_k = offsets(0, BLOCK_K, INT64)
    # Rows past the end read the last row and are never stored: no mask in the loop.
    rows = tl.minimum(offsets_m, M - 1)
    mask_n = offsets_n < N

    left_ptrs = left_ptr + rows[:, None] * stride_lm + offsets_k[None, :] * stride_lk
    right_ptrs = right_ptr + offsets_k[:, None] * stride_rk + offsets_n[None, :] * stride_rn
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            left = tl.load(left_ptrs)
        else:
            left = tl.load(left_ptrs, mask=offsets_k[None, :] < K - k, other=0.0)
        if EVEN_K and EVEN_N:
            right = tl.load(right_ptrs)
        elif EVEN_K:
            right = tl.load(right_ptrs, mask=mask_n[None, :], other=0.0)
        else:
            mask = (offsets_k[:, None] < K - k) & mask_n[None, :]
            right = tl.load(right_ptrs, mask=mask, other=0.0)
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION, out_dtype=ACC)
        left_ptrs += BLOCK_K * stride_lk
        right_ptrs += BLOCK_K * stride_rk

    # Without dropout the rank-R product lands in the same accumulator.
    if DROPOUT:
        tail = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    else:
        tail = accumulator
    for r in range(0, R, BLOCK_R):
        offsets_r = r + tl.arange(0, BLOCK_R)
        mask_r = offsets_r < R
        u = tl.load(
            u_ptr + rows[:, None] * stride_um + offsets_r[None, :] * stride_ur,
            mask=mask_r[None, :], other=0.0,
        )  # fmt: skip
        v = tl.load(
            v_ptr + offsets_r[:, None] * stride_vr + offsets_n[None, :] * stride_vn,
            mask=mask_r[:, None] & mask_n[None, :], other=0.0,
        )  # fmt: skip
        tail = tl.dot(u, v, tail, input_precision=PRECISION, out_dtype=ACC)
    if DROPOUT:
        keep = dropout_keep(seed_ptr, threshold, inverse_keep, offsets_m, offsets_n, N)
        accumulator += keep.to(ACC) * tail
    else:
        accumulator = tail

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offsets_n * stride_b, mask=mask_n, other=0.0)
        accumulator += bias.to(ACC)[None, :]
    tl.store(
        out_ptr + offsets_m[:, None] * stride_om + offsets_n[None, :] * stride_on,
        accumulator.to(out_ptr.dtype.element_ty),
        mask=(offsets_m < M)[:, None] & mask_n[None, :],
    )


def gemm_tail(
    left: Tensor,
    right: Tensor,
    u: Tensor,
    v: Tensor,
    config: TileConfig,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    force_int64: bool = False,
) -> Tensor:
    """out[M, N] = left[M, K] right[N, K]ᵀ + bias[N] + keep[M, N] * (u[M, R] v[N, R]ᵀ).

    All in one dtype, any strides; `keep` is 1 without a seed.
    """
    (m, k), n, r = left.shape, right.shape[0], u.shape[1]
    out = torch.empty((m, n), dtype=left.dtype, device=left.device)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    gemm_tail_kernel[grid](
        left, right, u, v, bias, out, seed, drop_threshold(dropout_p), 1.0 / (1.0 - dropout_p),
        m, n, k, r,
        *left.stride(), *right.stride(), *u.stride(), *v.stride(),
        0 if bias is None else bias.stride(0), *out.stride(),
        DROPOUT=seed is not None,
        EVEN_N=n % config.block_n == 0, EVEN_K=k % config.block_k == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=config.block_r, GROUP_M=config.group_m,
        ACC=accumulator_dtype(left.dtype), PRECISION=input_precision(left.dtype),
        INT64=force_int64 or needs_int64(left, right, u, v, out),
        **launch_options(config),
    )  # fmt: skip
    return out
