"""The rotary kernel: q and k rotated in one launch, out of place, forward and backward.

    out1 = x1 cos1 + x2 a1              forward:     a1 = -sin1    a2 =  sin2
    out2 = x2 cos2 + x1 a2              transposed:  a1 =  sin2    a2 = -sin1

The backward pass is the transposed rotation of the incoming gradient. With equal halves of sin,
the usual case, that is the rotation by -theta.

Shapes: q [B, HEADS_Q, T, D], k [B, HEADS_K, T, D], cos and sin [B or 1, T, 2 * HALF],
D = 2 * HALF + TAIL. A program handles one token: all its heads share one row of cos and sin.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.compile_cases import CompileCase

_INT32_MAX = 2**31 - 1

# Elements of the first half rows that a program holds at a time, and how many of them a thread
# does: one 16-byte load in 16 bits, so that 32 heads of 128 take 8 warps and no loop. Twice as
# many per thread spilled in one configuration (sm_90, partial rotary, 64-bit offsets).
_TILE = 2048
_PER_THREAD = 8


@triton.jit
def _rotate_heads(
    x_ptr,
    out_ptr,
    stride_xh,
    stride_xd,
    stride_oh,
    cos1,
    cos2,
    a1,
    a2,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
):
    offsets_d = tl.arange(0, BLOCK_HALF)[None, :]
    offsets_tail = tl.arange(0, BLOCK_TAIL)[None, :]
    offsets_block = tl.arange(0, BLOCK_H)[:, None]
    if INT64:
        offsets_d = offsets_d.to(tl.int64)
        offsets_tail = offsets_tail.to(tl.int64)
        offsets_block = offsets_block.to(tl.int64)

    for start in range(0, HEADS, BLOCK_H):
        offsets_h = start + offsets_block
        mask = (offsets_h < HEADS) & (offsets_d < HALF)
        x_row_ptr = x_ptr + offsets_h * stride_xh
        out_row_ptr = out_ptr + offsets_h * stride_oh
        x1 = tl.load(x_row_ptr + offsets_d * stride_xd, mask=mask, other=0.0).to(ACC)
        x2 = tl.load(x_row_ptr + (HALF + offsets_d) * stride_xd, mask=mask, other=0.0).to(ACC)
        out1 = x1 * cos1 + x2 * a1
        out2 = x2 * cos2 + x1 * a2
        tl.store(out_row_ptr + offsets_d, out1.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_row_ptr + HALF + offsets_d, out2.to(out_ptr.dtype.element_ty), mask=mask)
        if TAIL > 0:
            mask_tail = (offsets_h < HEADS) & (offsets_tail < TAIL)
            rest = tl.load(
                x_row_ptr + (2 * HALF + offsets_tail) * stride_xd, mask=mask_tail, other=0.0
            )
            tl.store(out_row_ptr + 2 * HALF + offsets_tail, rest, mask=mask_tail)


# seq_len changes from call to call; specialising on it would only compile the kernel again.
@triton.jit(do_not_specialize=["seq_len"])
def _rotate_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    seq_len,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_cosb,
    stride_cost,
    stride_cosd,
    stride_sinb,
    stride_sint,
    stride_sind,
    stride_qob,
    stride_qoh,
    stride_qot,
    stride_kob,
    stride_koh,
    stride_kot,
    HEADS_Q: tl.constexpr,
    HEADS_K: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
):
    token = tl.program_id(0)
    offsets_d = tl.arange(0, BLOCK_HALF)
    if INT64:
        token = token.to(tl.int64)
        offsets_d = offsets_d.to(tl.int64)
    b = token // seq_len
    t = token % seq_len

    mask_d = offsets_d < HALF
    cos_ptr += b * stride_cosb + t * stride_cost
    sin_ptr += b * stride_sinb + t * stride_sint
    cos1 = tl.load(cos_ptr + offsets_d * stride_cosd, mask=mask_d, other=0.0).to(ACC)
    cos2 = tl.load(cos_ptr + (HALF + offsets_d) * stride_cosd, mask=mask_d, other=0.0).to(ACC)
    sin1 = tl.load(sin_ptr + offsets_d * stride_sind, mask=mask_d, other=0.0).to(ACC)
    sin2 = tl.load(sin_ptr + (HALF + offsets_d) * stride_sind, mask=mask_d, other=0.0).to(ACC)
    if TRANSPOSE:
        a1 = sin2
        a2 = -sin1
    else:
        a1 = -sin1
        a2 = sin2

    _rotate_heads(
        q_ptr + b * stride_qb + t * stride_qt,
        q_out_ptr + b * stride_qob + t * stride_qot,
        stride_qh,
        stride_qd,
        stride_qoh,
        cos1[None, :],
        cos2[None, :],
        a1[None, :],
        a2[None, :],
        HEADS_Q,
        HALF,
        TAIL,
        BLOCK_H,
        BLOCK_HALF,
        BLOCK_TAIL,
        ACC,
        INT64,
    )
    _rotate_heads(
        k_ptr + b * stride_kb + t * stride_kt,
        k_out_ptr + b * stride_kob + t * stride_kot,
        stride_kh,
        stride_kd,
        stride_koh,
        cos1[None, :],
        cos2[None, :],
        a1[None, :],
        a2[None, :],
        HEADS_K,
        HALF,
        TAIL,
        BLOCK_H,
        BLOCK_HALF,
        BLOCK_TAIL,
        ACC,
        INT64,
    )


def needs_int64(*tensors: Tensor) -> bool:
    """Whether 32-bit offsets could overflow in one of the tensors.

    Masked lanes compute offsets too. Blocks are the next power of two, so these reach less than
    twice as far as the tensor does.
    """
    return any(
        2 * sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        > _INT32_MAX
        for x in tensors
    )


def _shape_arguments(
    heads_q: int, heads_k: int, head_dim: int, rotary_dim: int
) -> tuple[dict[str, Any], int]:
    """The constexpr arguments that follow from the shapes, and the number of warps."""
    half, tail = rotary_dim // 2, head_dim - rotary_dim
    block_half = triton.next_power_of_2(half)
    block_tail = triton.next_power_of_2(max(1, tail))
    width = max(block_half, block_tail)
    # One block for q and k, so that cos and sin need not change layout in between.
    block_h = min(triton.next_power_of_2(max(heads_q, heads_k)), max(1, _TILE // width))
    arguments = {
        "HEADS_Q": heads_q,
        "HEADS_K": heads_k,
        "HALF": half,
        "TAIL": tail,
        "BLOCK_H": block_h,
        "BLOCK_HALF": block_half,
        "BLOCK_TAIL": block_tail,
    }
    return arguments, min(16, max(1, block_h * width // (32 * _PER_THREAD)))


def _accumulator(q_dtype: torch.dtype, k_dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if torch.float64 in (q_dtype, k_dtype) else tl.float32


def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    transpose: bool,
    int64: bool | None = None,
) -> None:
    """Writes q and k rotated (or rotated back, if `transpose`) into `q_out` and `k_out`.

    Args:
        q, k: [B, heads, T, D], any strides. Either may have no heads.
        cos, sin: [B or 1, T, rotary_dim], any strides.
        q_out, k_out: of q's and k's shape, their last dimension contiguous.
        int64: whether offsets are computed in 64 bits. None: when they need it.
    """
    assert q_out.stride(3) == 1 and k_out.stride(3) == 1
    batch, heads_q, seq_len, head_dim = q.shape
    if int64 is None:
        int64 = needs_int64(q, k, cos, sin, q_out, k_out)
    shape_arguments, num_warps = _shape_arguments(heads_q, k.shape[1], head_dim, cos.shape[-1])
    # A table of one row serves the whole batch.
    cos_strides, sin_strides = (
        (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1), x.stride(2)) for x in (cos, sin)
    )
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        # Tokens are on axis 0, the only one that takes more than 65,535 programs.
        _rotate_kernel[(batch * seq_len,)](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            seq_len,
            *q.stride(),
            *k.stride(),
            *cos_strides,
            *sin_strides,
            *q_out.stride()[:3],
            *k_out.stride()[:3],
            **shape_arguments,
            TRANSPOSE=transpose,
            ACC=_accumulator(q.dtype, k.dtype),
            INT64=int64,
            num_warps=num_warps,
            num_stages=1,
        )


def compile_cases() -> Iterator[CompileCase]:
    """The kernel in typical configurations, for compiling it without a GPU."""
    pointers = ("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr")
    strides = tuple(name for name in _rotate_kernel.arg_names if name.startswith("stride_"))
    # Strides of 1 are compiled in, as a launch does it.
    unit_strides = ("stride_qd", "stride_kd", "stride_cosd", "stride_sind")
    configurations = (
        # name, dtype, HEADS_Q, HEADS_K, head_dim, rotary_dim, TRANSPOSE, INT64
        ("smollm2_hd64", "bf16", 9, 3, 64, 64, False, False),
        ("llama1b_hd64", "fp16", 32, 8, 64, 64, True, False),
        ("llama8b_hd128", "bf16", 32, 8, 128, 128, False, False),
        ("llama8b_hd128", "bf16", 32, 8, 128, 128, True, False),
        ("llama8b_hd128", "bf16", 32, 8, 128, 128, False, True),
        ("llama8b_hd128", "fp32", 32, 8, 128, 128, False, False),
        ("llama8b_hd128_only_dq", "bf16", 32, 0, 128, 128, True, False),
        ("llama70b_hd128", "bf16", 64, 8, 128, 128, True, False),
        ("hd80", "fp16", 32, 32, 80, 80, False, False),
        ("hd80_partial32", "bf16", 32, 32, 80, 32, True, False),
        ("hd96", "bf16", 32, 32, 96, 96, True, False),
        ("hd128_partial64", "bf16", 32, 2, 128, 64, False, False),
        ("hd256_one_kv_head", "bf16", 8, 1, 256, 256, True, False),
    )
    for name, dtype, heads_q, heads_k, head_dim, rotary_dim, transpose, int64 in configurations:
        shape_arguments, num_warps = _shape_arguments(heads_q, heads_k, head_dim, rotary_dim)
        constexprs = {
            **shape_arguments,
            **dict.fromkeys(unit_strides, 1),
            "TRANSPOSE": transpose,
            "ACC": tl.float32,
            "INT64": int64,
        }
        direction = "backward" if transpose else "forward"
        yield CompileCase(
            name=f"rope_{name}_{dtype}_{direction}{'_int64' if int64 else ''}",
            kernel=_rotate_kernel,
            signature={
                **dict.fromkeys(pointers, f"*{dtype}"),
                "seq_len": "i32",
                **dict.fromkeys(strides, "i32"),
                **dict.fromkeys(constexprs, "constexpr"),
            },
            constexprs=constexprs,
            num_warps=num_warps,
            num_stages=1,
            divisible=(*pointers, *(s for s in strides if s not in unit_strides)),
        )
