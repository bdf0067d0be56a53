"""Launching the RMSNorm kernels: how rows are divided among programs, and what is compiled.

    total = x + residual                            rstd = 1 / sqrt(mean(total²) + eps)
    y = weight * round(total rstd)                  n = total rstd,  g = weight * dy
    dx = d_total + rstd (g - n mean(g * n))         d_weight = Σ_m dy * round(n)

Shapes: x, residual, total, y, dy, d_total and dx [M, H], weight and d_weight [H], rstd [M]. Forward
and backward are one launch each, and d_weight is then the sum of its [programs, H] parts.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.compile_cases import CompileCase
from lora_kernels.rms_norm.triton_backward import backward_kernel
from lora_kernels.rms_norm.triton_forward import forward_kernel

_INT32_MAX = 2**31 - 1

# The widest rows that a program holds in registers. Backward at 16,384 in float32 takes all 128
# registers of a thread without d_weight, and spills with it. At 8,192 no rows spill but float32
# rows with strides in H and d_weight, whose loads are slower than that.
_WIDEST_FORWARD = 16_384
_WIDEST_BACKWARD = 8_192
# Elements of a tile where rows are narrower, and where they are wider than the widest.
_TILE_NARROW = 2_048
_TILE_WIDE = 4_096
# Elements of a tile that a thread holds, as long as that takes no more than 16 warps.
_PER_THREAD = 16
# With a gradient of weight: rows that a program takes at the least, which keeps its part of
# d_weight small beside what it reads, and programs at the most.
_MIN_ROWS = 8
_MAX_PROGRAMS = 512


@dataclass(frozen=True)
class Launch:
    """How a pass is divided: a program takes `tiles` tiles of block_m rows by block_h columns."""

    block_m: int
    block_h: int
    tiles: int
    programs: int

    @property
    def num_warps(self) -> int:
        return min(16, max(1, self.block_m * self.block_h // (32 * _PER_THREAD)))

    @property
    def padded_rows(self) -> int:
        return self.programs * self.tiles * self.block_m


def forward_launch(rows: int, columns: int) -> Launch:
    if columns <= _WIDEST_FORWARD:
        block_h = triton.next_power_of_2(columns)
        block_m = max(1, _TILE_NARROW // block_h)
    else:
        block_m, block_h = 1, _TILE_WIDE
    return Launch(block_m, block_h, 1, triton.cdiv(rows, block_m))


def backward_launch(rows: int, columns: int, need_weight: bool) -> Launch:
    tiles = 1
    if columns <= _WIDEST_BACKWARD:
        block_h = triton.next_power_of_2(columns)
        block_m = max(1, _TILE_NARROW // block_h)
        if need_weight:
            all_tiles = triton.cdiv(rows, block_m)
            tiles = max(triton.cdiv(_MIN_ROWS, block_m), triton.cdiv(all_tiles, _MAX_PROGRAMS))
    else:
        block_m = _MIN_ROWS if need_weight else 1
        block_h = _TILE_WIDE // block_m
    return Launch(block_m, block_h, tiles, triton.cdiv(rows, block_m * tiles))


def needs_int64(launch: Launch, *tensors: Tensor) -> bool:
    """Whether 32-bit offsets could overflow in a tensor [M, H], masked lanes included."""
    return any(
        (launch.padded_rows - 1) * x.stride(0) + (x.shape[1] + launch.block_h - 2) * x.stride(1)
        > _INT32_MAX
        for x in tensors
    )


def _accumulator(x: Tensor, weight: Tensor) -> tl.dtype:
    return tl.float64 if torch.float64 in (x.dtype, weight.dtype) else tl.float32


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    y: Tensor,
    total: Tensor,
    rstd: Tensor,
    int64: bool | None = None,
) -> None:
    """Writes y, rstd and, where there is a residual, total.

    Args:
        x, residual: [M, H], any strides, not empty.
        weight: [H], any stride.
        y, total: [M, H], contiguous. Without a residual, total is not written.
        rstd: [M], contiguous, float32, or float64 for float64 x.
        int64: whether offsets are computed in 64 bits. None: when they need it.
    """
    assert y.is_contiguous() and total.is_contiguous() and rstd.is_contiguous()
    rows, columns = x.shape
    launch = forward_launch(rows, columns)
    # What is absent is represented by x, and its pointer is not followed.
    added = x if residual is None else residual
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        forward_kernel[(launch.programs,)](
            x,
            added,
            weight,
            y,
            x if residual is None else total,
            rstd,
            rows,
            *x.stride(),
            *added.stride(),
            weight.stride(0),
            EPS=eps,
            H=columns,
            HAS_RESIDUAL=residual is not None,
            BLOCK_M=launch.block_m,
            BLOCK_H=launch.block_h,
            ACC=_accumulator(x, weight),
            INT64=needs_int64(launch, x, added, y) if int64 is None else int64,
            num_warps=launch.num_warps,
            num_stages=1,
        )


def backward(
    dy: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_x: bool,
    need_weight: bool,
    int64: bool | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx[M, H], contiguous in x's dtype, and d_weight[H] in weight's; None where not needed.

    Args:
        dy, x: [M, H], any strides, not empty. x is the total.
        d_total: [M, H], any strides: the gradient of the total itself, added to dx. None: zero.
        weight: [H], any stride.
        rstd: [M], as the forward pass wrote it.
        int64: whether offsets are computed in 64 bits. None: when they need it.
    """
    assert rstd.is_contiguous()
    rows, columns = x.shape
    launch = backward_launch(rows, columns, need_weight)
    added = x if d_total is None else d_total
    # What is not needed is represented by x, and its pointer is not followed.
    dx = torch.empty(rows, columns, dtype=x.dtype, device=x.device) if need_x else x
    partial = x
    if need_weight:
        dtype = torch.promote_types(rstd.dtype, weight.dtype)
        partial = torch.empty(launch.programs, columns, dtype=dtype, device=x.device)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        backward_kernel[(launch.programs,)](
            dy,
            added,
            x,
            weight,
            rstd,
            dx,
            partial,
            rows,
            launch.tiles,
            *dy.stride(),
            *added.stride(),
            *x.stride(),
            weight.stride(0),
            H=columns,
            HAS_D_TOTAL=d_total is not None,
            NEED_X=need_x,
            NEED_WEIGHT=need_weight,
            BLOCK_M=launch.block_m,
            BLOCK_H=launch.block_h,
            ACC=_accumulator(x, weight),
            INT64=needs_int64(launch, dy, added, x, dx) if int64 is None else int64,
            num_warps=launch.num_warps,
            num_stages=1,
        )
    return dx if need_x else None, partial.sum(0).to(weight.dtype) if need_weight else None


def compile_cases() -> Iterator[CompileCase]:
    """The kernels in typical configurations, for compiling them without a GPU."""
    forward_configurations = (
        # dtypes of x and weight, H, residual, INT64
        ("bf16", "bf16", 64, False, False),
        ("bf16", "fp32", 576, True, False),
        ("fp16", "fp16", 2048, True, False),
        ("bf16", "bf16", 4096, True, True),
        ("bf16", "bf16", 8192, True, False),
        ("fp32", "fp32", 5120, False, False),
        ("bf16", "bf16", 16_384, True, False),
        ("fp32", "fp32", 16_384, True, True),
        ("bf16", "bf16", 20_480, True, True),
        ("fp32", "fp32", 20_480, True, False),
    )
    for dtype, weight, columns, flag, int64 in forward_configurations:
        constexprs = {"EPS": 1e-5, "HAS_RESIDUAL": flag, "INT64": int64}
        launch = forward_launch(2048, columns)
        name = f"rms_norm_forward{'_residual' if flag else ''}"
        yield _case(name, forward_kernel, dtype, weight, columns, launch, constexprs)
    backward_configurations = (
        # dtypes of x and weight, H, d_total, dx, d_weight, INT64
        ("bf16", "bf16", 64, False, True, True, False),
        ("bf16", "fp32", 576, True, True, True, False),
        ("fp16", "fp16", 2048, True, True, False, False),
        ("bf16", "bf16", 4096, True, True, False, True),
        ("bf16", "bf16", 4096, True, True, True, False),
        ("fp32", "fp32", 5120, False, False, True, False),
        ("bf16", "bf16", 8192, True, True, True, True),
        ("fp32", "fp32", 8192, True, True, True, False),
        ("fp32", "fp32", 8192, True, True, False, False),
        ("bf16", "bf16", 16_384, True, True, False, False),
        ("fp32", "fp32", 16_384, True, True, True, True),
        ("bf16", "bf16", 16_384, True, True, True, False),
    )
    for dtype, weight, columns, flag, need_x, need_weight, int64 in backward_configurations:
        constexprs = {
            "HAS_D_TOTAL": flag, "NEED_X": need_x, "NEED_WEIGHT": need_weight, "INT64": int64,
        }  # fmt: skip
        launch = backward_launch(2048, columns, need_weight)
        name = (
            f"rms_norm_backward{'_d_total' if flag else ''}{'_dx' if need_x else ''}"
            f"{'_d_weight' if need_weight else ''}"
        )
        yield _case(name, backward_kernel, dtype, weight, columns, launch, constexprs)


def _case(
    name: str,
    kernel: Any,
    dtype: str,
    weight_dtype: str,
    columns: int,
    launch: Launch,
    constexprs: dict[str, Any],
) -> CompileCase:
    pointers = [s for s in kernel.arg_names if s.endswith("_ptr")]
    types = dict.fromkeys(pointers, f"*{dtype}") | {"weight_ptr": f"*{weight_dtype}"}
    y_dtype = "fp32" if "fp32" in (dtype, weight_dtype) else dtype
    types |= {
        s: f"*{t}"
        for s, t in (("y_ptr", y_dtype), ("dy_ptr", y_dtype), ("rstd_ptr", "fp32"),
                     ("partial_ptr", "fp32"))
        if s in types
    }  # fmt: skip
    constexprs = constexprs | {
        "H": columns,
        "BLOCK_M": launch.block_m,
        "BLOCK_H": launch.block_h,
        "ACC": tl.float32,
    }
    # Strides of 1, and a single tile, are compiled in, as a launch does it.
    constexprs |= {s: 1 for s in kernel.arg_names if s.startswith("stride_") and s[-1] == "h"}
    if "tiles" in kernel.arg_names and launch.tiles == 1:
        constexprs["tiles"] = 1
    integers = [s for s in kernel.arg_names if s not in pointers and s not in constexprs]
    suffix = "_int64" if constexprs["INT64"] else ""
    return CompileCase(
        name=f"{name}_h{columns}_{dtype}{suffix}",
        kernel=kernel,
        signature={
            **types,
            **dict.fromkeys(integers, "i32"),
            **dict.fromkeys(constexprs, "constexpr"),
        },
        constexprs=constexprs,
        num_warps=launch.num_warps,
        num_stages=1,
        divisible=(*pointers, *(s for s in integers if s.startswith("stride_"))),
    )
