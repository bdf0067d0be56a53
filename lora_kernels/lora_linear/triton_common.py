"""What the Triton kernels of a LoRA linear layer share: offsets, precision, dropout, launches.

The kernels take a group of projections of one x (q, k, v; gate, up; or one alone). What differs
from projection to projection is a tuple of arguments, and everything of rank R is stacked:

    x[M, K]  weight_g[N_g, K]  bias_g[N_g]  y_g[M, N_g]  lora_b_g[N_g, R_g]
    lora_a[R, K] = all lora_a_g one below the other      S[M, R], P[M, R] likewise, R = Σ R_g

`first_r[g]` is the column of S and P, and the row of lora_a, at which projection g begins.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear.dropout import Dropout, drop_threshold
from lora_kernels.lora_linear.tables import DecodeConfig, PassConfig, TileConfig

INT32_MAX = 2**31 - 1


def needs_int64(*tensors: Tensor | None) -> bool:
    """Whether the largest element offset of any of the tensors overflows 32 bits."""
    for tensor in tensors:
        if tensor is None:
            continue
        last = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        if max(last, tensor.numel()) > INT32_MAX:
            return True
    return False


def accumulator_dtype(dtype: torch.dtype) -> Any:
    """float32, but float64 for float64 inputs, which only the interpreter takes."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial results in memory: the accumulator's."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def input_precision(dtype: torch.dtype) -> str:
    """float32 products follow torch's own switch (`torch.set_float32_matmul_precision`).

    On AMD they are always float32's own: its compiler knows no tf32 on some architectures.
    """
    allowed = torch.version.hip is None and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def launch_options(config: TileConfig | PassConfig | DecodeConfig) -> dict[str, int]:
    """What the compiler is told and the interpreter does not take."""
    if interpreting():
        return {}
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def dropout_arguments(dropout: Dropout | None) -> tuple[Tensor | None, int, float]:
    """seeds_ptr, threshold, inverse_keep."""
    if dropout is None:
        return None, 0, 1.0
    return dropout.seeds, drop_threshold(dropout.p), 1.0 / (1.0 - dropout.p)


def scaling_arguments(
    scalings: list[float], tensor: Tensor | None, dtype: torch.dtype, device: torch.device
) -> tuple[float, ...] | tuple[Tensor, ...]:
    """One scaling per projection, by value or by pointer; no value is compiled into a kernel.

    A float argument reaches a kernel in float32; float64 inputs take theirs by pointer, exactly.
    """
    if tensor is None and dtype == torch.float64:
        tensor = torch.tensor(scalings, dtype=torch.float64, device=device)
    return tuple(scalings) if tensor is None else tensor.unbind()


def first_columns(sizes: Sequence[int]) -> tuple[int, ...]:
    """Where each projection begins, in what is stacked of the given sizes."""
    return tuple(sum(sizes[:g]) for g in range(len(sizes)))


def as_tuple(tensors: list[Tensor] | None) -> tuple[Tensor, ...] | None:
    """An optional argument, one a projection."""
    return None if tensors is None else tuple(tensors)


@triton.jit
def tile_of(pid, row_blocks, column_blocks, GROUP: tl.constexpr):
    """Row and column of a program's tile; GROUP row blocks share their columns in the L2 cache."""
    first = pid // (GROUP * column_blocks) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    inside = pid % (GROUP * column_blocks)
    return first + inside % height, inside // height


@triton.jit
def count_blocks(sizes, BLOCK: tl.constexpr):
    """How many blocks all the projections have together."""
    total = tl.cdiv(sizes[0], BLOCK)
    for g in tl.static_range(1, len(sizes)):
        total += tl.cdiv(sizes[g], BLOCK)
    return total


@triton.jit
def projection_of(block, sizes, BLOCK: tl.constexpr):
    """The projection to which a block of the concatenated outputs belongs, and its first block."""
    projection = 0
    first = 0
    start = tl.cdiv(sizes[0], BLOCK)
    for g in tl.static_range(1, len(sizes)):
        projection = tl.where(block >= start, g, projection)
        first = tl.where(block >= start, start, first)
        start += tl.cdiv(sizes[g], BLOCK)
    return projection, first


@triton.jit
def pick(values, projection):
    """values[projection], of pointers or floats: a tuple takes no index known only at run time."""
    value = values[0]
    for g in tl.static_range(1, len(values)):
        if projection == g:
            value = values[g]
    return value


@triton.jit
def pick_size(values, projection):
    """As `pick`, of integers, some of which may be compiled in."""
    value = values[0]
    for g in tl.static_range(1, len(values)):
        value = tl.where(projection == g, values[g], value)
    return value


@triton.jit
def load_operands(left_ptrs, right_ptrs, mask_n, left_k, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
                  BLOCK_K: tl.constexpr):  # fmt: skip
    """left[BLOCK_M, BLOCK_K] and right[BLOCK_K, BLOCK_N], of which `left_k` along k are left."""
    offsets_k = tl.arange(0, BLOCK_K)
    if EVEN_K:
        left = tl.load(left_ptrs)
    else:
        left = tl.load(left_ptrs, mask=(offsets_k < left_k)[None, :], other=0.0)
    if EVEN_K and EVEN_N:
        right = tl.load(right_ptrs)
    elif EVEN_K:
        right = tl.load(right_ptrs, mask=mask_n[None, :], other=0.0)
    else:
        mask = (offsets_k < left_k)[:, None] & mask_n[None, :]
        right = tl.load(right_ptrs, mask=mask, other=0.0)
    return left, right


@triton.jit
def offsets(block, BLOCK: tl.constexpr, INT64: tl.constexpr):
    """The BLOCK indices of one block, 64 bits wide where an offset may pass 2³¹."""
    inside = tl.arange(0, BLOCK)
    if INT64:
        inside = inside.to(tl.int64)
    return block * BLOCK + inside


@triton.jit
def load_scaling(scaling, IS_TENSOR: tl.constexpr):
    """A float arrives by value, a 0-d tensor by pointer."""
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
