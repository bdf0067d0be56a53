"""Triton: the gradient of a column scale, in the pass that scales the incoming gradient.

    scaled[M, N] = c[N] * dy[M, N]        sums[N] = Σ_m dy y

Programs take BLOCK_M rows of a chunk at a time; the sums of each chunk go to memory and are added
in order afterwards: no atomics, the same bits every time. dy has any strides, y is contiguous.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.compile_cases import CompileCase
from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear.triton_common import (
    accumulator_dtype,
    needs_int64,
    offsets,
    partial_dtype,
)

BLOCK_M, BLOCK_N, NUM_WARPS = 32, 128, 4
# Rows of one program: enough programs for any GPU, and few sums to add afterwards.
CHUNK_M = 256


@triton.jit
def scale_gradient_kernel(
    dy_ptr, y_ptr, scale_ptr, scaled_ptr, sums_ptr, M, N, stride_dym, stride_dyn,
    CHUNK_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    offsets_n = offsets(tl.program_id(1), BLOCK_N, INT64)
    mask_n = offsets_n < N
    scale = tl.load(scale_ptr + offsets_n, mask=mask_n, other=0.0).to(ACC)
    sums = tl.zeros((BLOCK_N,), dtype=ACC)
    for block in range(0, CHUNK_M // BLOCK_M):
        offsets_m = offsets(chunk * (CHUNK_M // BLOCK_M) + block, BLOCK_M, INT64)
        mask = (offsets_m < M)[:, None] & mask_n[None, :]
        dy = tl.load(
            dy_ptr + offsets_m[:, None] * stride_dym + offsets_n[None, :] * stride_dyn,
            mask=mask, other=0.0,
        ).to(ACC)  # fmt: skip
        place = offsets_m[:, None] * N + offsets_n[None, :]
        y = tl.load(y_ptr + place, mask=mask, other=0.0).to(ACC)
        tl.store(
            scaled_ptr + place, (dy * scale[None, :]).to(scaled_ptr.dtype.element_ty), mask=mask
        )
        sums += tl.sum(dy * y, axis=0)
    tl.store(sums_ptr + chunk * N + offsets_n, sums, mask=mask_n)


def scale_gradient(dy: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """scale * dy [M, N] in dy's dtype, and Σ_m dy y [N] in the accumulator's dtype."""
    (m, n), y = dy.shape, y.contiguous()
    scaled = dy.new_empty(m, n)
    chunks = triton.cdiv(m, CHUNK_M)
    sums = dy.new_empty(chunks, n, dtype=partial_dtype(dy.dtype))
    scale_gradient_kernel[(chunks, triton.cdiv(n, BLOCK_N))](
        dy, y, scale, scaled, sums, m, n, *dy.stride(),
        CHUNK_M=CHUNK_M, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, ACC=accumulator_dtype(dy.dtype),
        INT64=needs_int64(dy, y),
        **({} if interpreting() else {"num_warps": NUM_WARPS}),
    )  # fmt: skip
    return scaled, sums.sum(0, dtype=torch.promote_types(sums.dtype, scale.dtype))


def compile_cases() -> Iterator[CompileCase]:
    """The kernel in typical configurations, for compiling it without a GPU."""
    pointers = ("dy_ptr", "y_ptr", "scale_ptr", "scaled_ptr", "sums_ptr")
    for dtype, even, int64 in (("bf16", True, False), ("fp32", True, False), ("bf16", False, True)):
        constexprs = {
            "stride_dyn": 1, "CHUNK_M": CHUNK_M, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N,
            "ACC": tl.float32, "INT64": int64,
        }  # fmt: skip
        yield CompileCase(
            f"scale_gradient {dtype}{'' if even else ' odd int64'}",
            scale_gradient_kernel,
            {
                **dict.fromkeys(pointers, f"*{dtype}"), "scale_ptr": "*fp32", "sums_ptr": "*fp32",
                **dict.fromkeys(("M", "N", "stride_dym"), "i32"),
                **dict.fromkeys(constexprs, "constexpr"),
            },
            constexprs, NUM_WARPS, 3, (*pointers, *(("N", "stride_dym") if even else ())),
        )  # fmt: skip
