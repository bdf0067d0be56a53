"""Persistent Triton kernels that load through tensor descriptors (TMA): split forward, and dx.

    y_g[M, N_g] = c_g * (x[M, K] weight_g[N_g, K]ᵀ + S_g[M, R_g] lora_b_g[N_g, R_g]ᵀ) + bias_g
    dx[M, K] = Σ_g dy_g[M, N_g] weight_g[N_g, K] + P[M, R] lora_a[R, K]

What `expand_kernel` and `dx_kernel` compute, for GPUs from sm_90 on. One program per multiprocessor
takes tile after tile. A descriptor gives a tile's address without a register per row, fills what
lies outside the tensor with zeros, and its loads and stores need no thread: there are no masks, and
the K loop keeps more stages. The operands of rank R come by pointers after that loop. A tile is
stored in two halves, which takes half the shared memory.

A descriptor needs rows whose elements are adjacent and which start at multiples of 16 bytes
(`describable`); other tensors, and more than 3 projections, take the pointer kernels with the same
tiles. Descriptors are arguments of their own, one a projection: a launch takes no tuples of them.

Shapes, and what is a tuple over projections: `triton_common.py`. lora_a, lora_b, bias, S and P are
contiguous.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear.tables import TileConfig
from lora_kernels.lora_linear.triton_common import (
    accumulator_dtype,
    as_tuple,
    first_columns,
    input_precision,
    launch_options,
    needs_int64,
    offsets,
    tile_of,
)

MAX_PROJECTIONS = 3
ALIGNMENT_BYTES = 16
# So few that every program of a small test has several tiles.
INTERPRETED_PROGRAMS = 3


@triton.jit
def expand_descriptor_kernel(
    x, weight_0, weight_1, weight_2, y_0, y_1, y_2, s_ptr, lora_bs, biases, column_scales, first_r,
    M, N, K, R, stride_sm,
    PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """The projections one after the other, their tiles dealt out to the programs in one round."""
    dealt = project(
        0, 0, x, weight_0, y_0, s_ptr, lora_bs, biases, column_scales, first_r, M, N, K, R,
        stride_sm, PROGRAMS, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, ACC, PRECISION, INT64,
    )  # fmt: skip
    if weight_1 is not None:
        dealt = project(
            dealt, 1, x, weight_1, y_1, s_ptr, lora_bs, biases, column_scales, first_r, M, N, K, R,
            stride_sm, PROGRAMS, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, ACC, PRECISION, INT64,
        )  # fmt: skip
    if weight_2 is not None:
        project(
            dealt, 2, x, weight_2, y_2, s_ptr, lora_bs, biases, column_scales, first_r, M, N, K, R,
            stride_sm, PROGRAMS, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M, ACC, PRECISION, INT64,
        )  # fmt: skip


@triton.jit
def project(
    dealt, g: tl.constexpr, x, weight, y, s_ptr, lora_bs, biases, column_scales, first_r,
    M, N, K, R, stride_sm, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """This program's tiles of y_g, `dealt` tiles having been dealt out before; returns the sum."""
    row_blocks, column_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(N[g], BLOCK_N)
    tiles = row_blocks * column_blocks
    first_tile = (tl.program_id(0) + PROGRAMS - dealt % PROGRAMS) % PROGRAMS
    for tile in tl.range(first_tile, tiles, PROGRAMS, flatten=False):
        block_m, block_n = tile_of(tile, row_blocks, column_blocks, GROUP_M)
        row, column = block_m * BLOCK_M, block_n * BLOCK_N
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for k in range(0, K, BLOCK_K):
            accumulator = tl.dot(
                x.load([row, k]), weight.load([column, k]).T, accumulator,
                input_precision=PRECISION, out_dtype=ACC,
            )  # fmt: skip
        rows = tl.minimum(offsets(block_m, BLOCK_M, INT64), M - 1)
        offsets_n = offsets(block_n, BLOCK_N, INT64)
        mask_n = offsets_n < N[g]
        for r in tl.range(0, R[g], BLOCK_R, num_stages=1):
            offsets_r = r + tl.arange(0, BLOCK_R)
            mask_r = offsets_r < R[g]
            s = tl.load(
                s_ptr + rows[:, None] * stride_sm + (first_r[g] + offsets_r)[None, :],
                mask=mask_r[None, :], other=0.0,
            )  # fmt: skip
            lora_b = tl.load(
                lora_bs[g] + offsets_n[None, :] * R[g] + offsets_r[:, None],
                mask=mask_r[:, None] & mask_n[None, :], other=0.0,
            )  # fmt: skip
            accumulator = tl.dot(s, lora_b, accumulator, input_precision=PRECISION, out_dtype=ACC)
        if column_scales is not None:
            scale = tl.load(column_scales[g] + offsets_n, mask=mask_n, other=0.0)
            accumulator *= scale.to(ACC)[None, :]
        if biases is not None:
            bias = tl.load(biases[g] + offsets_n, mask=mask_n, other=0.0)
            accumulator += bias.to(ACC)[None, :]
        store_halves(y, accumulator, row, column, BLOCK_M, BLOCK_N)
    return dealt + tiles


@triton.jit
def dx_descriptor_kernel(
    dy_0, dy_1, dy_2, weight_0, weight_1, weight_2, dx, p_ptr, lora_a_ptr,
    M, N, K, R, stride_pm,
    PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_M, BLOCK_K] of dx; the reduction walks along each N_g, BLOCK_N at a time."""
    row_blocks, column_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    tiles = row_blocks * column_blocks
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=False):
        block_m, block_k = tile_of(tile, row_blocks, column_blocks, GROUP_M)
        row, column = block_m * BLOCK_M, block_k * BLOCK_K
        accumulator = reduce(
            tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC), dy_0, weight_0, row, column, N[0], BLOCK_N,
            ACC, PRECISION,
        )  # fmt: skip
        if dy_1 is not None:
            accumulator = reduce(
                accumulator, dy_1, weight_1, row, column, N[1], BLOCK_N, ACC, PRECISION
            )
        if dy_2 is not None:
            accumulator = reduce(
                accumulator, dy_2, weight_2, row, column, N[2], BLOCK_N, ACC, PRECISION
            )
        rows = tl.minimum(offsets(block_m, BLOCK_M, INT64), M - 1)
        offsets_k = offsets(block_k, BLOCK_K, INT64)
        mask_k = offsets_k < K
        for r in tl.range(0, R, BLOCK_R, num_stages=1):
            offsets_r = r + tl.arange(0, BLOCK_R)
            mask_r = offsets_r < R
            p = tl.load(
                p_ptr + rows[:, None] * stride_pm + offsets_r[None, :],
                mask=mask_r[None, :], other=0.0,
            )  # fmt: skip
            lora_a = tl.load(
                lora_a_ptr + offsets_r[:, None] * K + offsets_k[None, :],
                mask=mask_r[:, None] & mask_k[None, :], other=0.0,
            )  # fmt: skip
            accumulator = tl.dot(p, lora_a, accumulator, input_precision=PRECISION, out_dtype=ACC)
        store_halves(dx, accumulator, row, column, BLOCK_M, BLOCK_K)


@triton.jit
def reduce(
    accumulator, dy, weight, row, column, N,
    BLOCK_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """accumulator + dy weight of one tile and one projection."""
    for n in range(0, N, BLOCK_N):
        accumulator = tl.dot(
            dy.load([row, n]), weight.load([n, column]), accumulator,
            input_precision=PRECISION, out_dtype=ACC,
        )  # fmt: skip
    return accumulator


@triton.jit
def store_halves(out, accumulator, row, column, BLOCK_M: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """`out` describes blocks of half as many columns."""
    halves = tl.reshape(accumulator, (BLOCK_M, 2, BLOCK_COLUMNS // 2))
    left, right = tl.split(tl.permute(halves, (0, 2, 1)))
    out.store([row, column], left.to(out.dtype))
    out.store([row, column + BLOCK_COLUMNS // 2], right.to(out.dtype))


def describable(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can name them: two dimensions, not empty, adjacent elements in
    rows that do not overlap and start at multiples of 16 bytes."""
    return all(
        tensor.numel() > 0
        and tensor.stride(1) == 1
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.stride(0) * tensor.itemsize % ALIGNMENT_BYTES == 0
        and tensor.data_ptr() % ALIGNMENT_BYTES == 0
        for tensor in tensors
    )


def _per_projection(
    name: str, tensors: Sequence[Tensor], block_shape: list[int]
) -> dict[str, TensorDescriptor | None]:
    """The arguments name_0, name_1, name_2."""
    descriptors = [TensorDescriptor.from_tensor(tensor, block_shape) for tensor in tensors]
    absent = [None] * (MAX_PROJECTIONS - len(tensors))
    return {f"{name}_{g}": value for g, value in enumerate([*descriptors, *absent])}


def _programs(device: torch.device) -> int:
    """One per multiprocessor."""
    if interpreting():
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def expand(
    x: Tensor,
    weights: list[Tensor],
    s: Tensor,
    lora_bs: list[Tensor],
    biases: list[Tensor] | None,
    column_scales: list[Tensor] | None,
    config: TileConfig,
) -> list[Tensor] | None:
    """y_g[M, N_g], by one kernel; None where descriptors cannot name the tensors."""
    (m, k), n = x.shape, tuple(weight.shape[0] for weight in weights)
    ranks = tuple(lora_b.shape[1] for lora_b in lora_bs)
    ys = [x.new_empty(m, size) for size in n]
    if len(weights) > MAX_PROJECTIONS or not describable(x, *weights, *ys):
        return None
    programs = _programs(x.device)
    expand_descriptor_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        **_per_projection("weight", weights, [config.block_n, config.block_k]),
        **_per_projection("y", ys, [config.block_m, config.block_n // 2]),
        s_ptr=s, lora_bs=tuple(lora_bs), biases=as_tuple(biases),
        column_scales=as_tuple(column_scales),
        first_r=first_columns(ranks), M=m, N=n, K=k, R=ranks, stride_sm=s.stride(0),
        PROGRAMS=programs, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=config.block_r, GROUP_M=config.group_m,
        ACC=accumulator_dtype(x.dtype), PRECISION=input_precision(x.dtype),
        INT64=needs_int64(s, *lora_bs),
        **launch_options(config),
    )  # fmt: skip
    return ys


def dx(
    dys: list[Tensor],
    weights: list[Tensor],
    p: Tensor,
    lora_a: Tensor,
    config: TileConfig,
) -> Tensor | None:
    """dx[M, K] without dropout, by one kernel; None where descriptors cannot name the tensors.

    `config.block_n` tiles K, the columns of dx, and `config.block_k` the reduction along N.
    """
    (m, k), n = (dys[0].shape[0], lora_a.shape[1]), tuple(dy.shape[1] for dy in dys)
    out = dys[0].new_empty(m, k)
    if len(dys) > MAX_PROJECTIONS or not describable(out, *dys, *weights):
        return None
    programs = _programs(out.device)
    dx_descriptor_kernel[(programs,)](
        **_per_projection("dy", dys, [config.block_m, config.block_k]),
        **_per_projection("weight", weights, [config.block_k, config.block_n]),
        dx=TensorDescriptor.from_tensor(out, [config.block_m, config.block_n // 2]),
        p_ptr=p, lora_a_ptr=lora_a, M=m, N=n, K=k, R=p.shape[1], stride_pm=p.stride(0),
        PROGRAMS=programs, BLOCK_M=config.block_m, BLOCK_N=config.block_k, BLOCK_K=config.block_n,
        BLOCK_R=config.block_r, GROUP_M=config.group_m,
        ACC=accumulator_dtype(out.dtype), PRECISION=input_precision(out.dtype),
        INT64=needs_int64(p, lora_a),
        **launch_options(config),
    )  # fmt: skip
    return out
