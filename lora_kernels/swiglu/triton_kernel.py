"""The SwiGLU kernels: forward, and both gradients in one launch.

    out    = g sigma u                          sigma = 1 / (1 + exp(-g))
    d_up   = dout g sigma                       g = gate, u = up
    d_gate = dout u sigma (1 + g (1 - sigma))

Shapes: gate, up, dout, out, d_gate and d_up [M, N]; what is written is contiguous. Tensors that are
all contiguous are one row, [1, M * N]. A program handles BLOCK elements of a row.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.compile_cases import CompileCase

_INT32_MAX = 2**31 - 1

# Four warps of eight elements a thread: a 16-byte load each in 16 bits, two in float32.
_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def _position(columns, BLOCK: tl.constexpr, INT64: tl.constexpr):
    """The row of this program, and its columns."""
    blocks = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    m = program // blocks
    block = program % blocks
    if INT64:
        m = m.to(tl.int64)
        block = block.to(tl.int64)
    return m, block * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    columns,
    stride_gm,
    stride_gn,
    stride_um,
    stride_un,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
):
    m, offsets_n = _position(columns, BLOCK, INT64)
    mask = offsets_n < columns
    gate = tl.load(gate_ptr + m * stride_gm + offsets_n * stride_gn, mask=mask, other=0.0).to(ACC)
    up = tl.load(up_ptr + m * stride_um + offsets_n * stride_un, mask=mask, other=0.0).to(ACC)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + m * columns + offsets_n, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dout_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    columns,
    stride_dm,
    stride_dn,
    stride_gm,
    stride_gn,
    stride_um,
    stride_un,
    NEED_GATE: tl.constexpr,
    NEED_UP: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
):
    m, offsets_n = _position(columns, BLOCK, INT64)
    mask = offsets_n < columns
    dout = tl.load(dout_ptr + m * stride_dm + offsets_n * stride_dn, mask=mask, other=0.0).to(ACC)
    gate = tl.load(gate_ptr + m * stride_gm + offsets_n * stride_gn, mask=mask, other=0.0).to(ACC)
    sigma = tl.sigmoid(gate)
    offsets = m * columns + offsets_n
    if NEED_GATE:
        up = tl.load(up_ptr + m * stride_um + offsets_n * stride_un, mask=mask, other=0.0).to(ACC)
        d_gate = dout * up * sigma * (1.0 + gate * (1.0 - sigma))
        tl.store(d_gate_ptr + offsets, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
    if NEED_UP:
        d_up = dout * gate * sigma
        tl.store(d_up_ptr + offsets, d_up.to(d_up_ptr.dtype.element_ty), mask=mask)


def needs_int64(*tensors: Tensor) -> bool:
    """Whether 32-bit offsets could overflow in one of the tensors [M, N], masked lanes included."""
    return any(
        (x.shape[0] - 1) * x.stride(0) + (x.shape[1] - 1 + _BLOCK) * x.stride(1) > _INT32_MAX
        for x in tensors
    )


def _as_rows(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors as [M, N]: one row where all are contiguous, else rows of the last dimension."""
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    return [x.reshape(-1, x.shape[-1]) for x in tensors]


def _block(columns: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(columns))


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def forward(gate: Tensor, up: Tensor, out: Tensor, int64: bool | None = None) -> None:
    """Writes silu(gate) * up into `out`.

    Args:
        gate, up: [..., N], any strides, not empty.
        out: their shape, contiguous.
        int64: whether offsets are computed in 64 bits. None: when they need it.
    """
    assert out.is_contiguous()
    gate, up, out = _as_rows([gate, up, out])
    rows, columns = out.shape
    block = _block(columns)
    with torch.cuda.device(gate.device) if gate.is_cuda else nullcontext():
        # All on axis 0, the only one that takes more than 65,535 programs.
        _forward_kernel[(rows * triton.cdiv(columns, block),)](
            gate,
            up,
            out,
            columns,
            *gate.stride(),
            *up.stride(),
            BLOCK=block,
            ACC=_accumulator(gate.dtype),
            INT64=needs_int64(gate, up, out) if int64 is None else int64,
            num_warps=_NUM_WARPS,
            num_stages=1,
        )


def backward(
    dout: Tensor,
    gate: Tensor,
    up: Tensor | None,
    d_gate: Tensor | None,
    d_up: Tensor | None,
    int64: bool | None = None,
) -> None:
    """Writes the gradients that are not None.

    Args:
        dout, gate: [..., N], any strides, not empty.
        up: as gate. It is read for d_gate alone, and may be None without it.
        d_gate, d_up: their shape, contiguous.
        int64: whether offsets are computed in 64 bits. None: when they need it.
    """
    assert all(x is None or x.is_contiguous() for x in (d_gate, d_up))
    assert up is not None or d_gate is None
    written = [x for x in (d_gate, d_up) if x is not None]
    # What is not read or written is represented by gate, and its pointer is not followed.
    read = [dout, gate, gate if up is None else up]
    rows_of = _as_rows([*read, *written])
    dout, gate, up_rows = rows_of[:3]
    rows, columns = gate.shape
    block = _block(columns)
    with torch.cuda.device(gate.device) if gate.is_cuda else nullcontext():
        _backward_kernel[(rows * triton.cdiv(columns, block),)](
            dout,
            gate,
            up_rows,
            gate if d_gate is None else d_gate,
            gate if d_up is None else d_up,
            columns,
            *dout.stride(),
            *gate.stride(),
            *up_rows.stride(),
            NEED_GATE=d_gate is not None,
            NEED_UP=d_up is not None,
            BLOCK=block,
            ACC=_accumulator(gate.dtype),
            INT64=needs_int64(*rows_of) if int64 is None else int64,
            num_warps=_NUM_WARPS,
            num_stages=1,
        )


def compile_cases() -> Iterator[CompileCase]:
    """The kernels in typical configurations, for compiling them without a GPU."""
    both, only_gate, only_up = (True, True), (True, False), (False, True)
    configurations = (
        # dtype, layout, INT64, what is needed by the backward pass (None: the forward pass)
        ("bf16", "contiguous", False, None),
        ("bf16", "contiguous", True, None),
        ("fp16", "rows", False, None),
        ("fp32", "contiguous", False, None),
        ("fp32", "strided", True, None),
        ("bf16", "contiguous", False, both),
        ("bf16", "contiguous", False, only_gate),
        ("bf16", "contiguous", False, only_up),
        ("bf16", "rows", True, both),
        ("fp16", "strided", False, both),
        ("fp32", "contiguous", False, both),
        ("fp32", "strided", True, both),
    )
    for dtype, layout, int64, needs in configurations:
        kernel = _forward_kernel if needs is None else _backward_kernel
        constexprs = {"BLOCK": _BLOCK, "ACC": tl.float32, "INT64": int64}
        direction = "forward"
        if needs is not None:
            constexprs |= {"NEED_GATE": needs[0], "NEED_UP": needs[1]}
            direction = {both: "backward", only_gate: "only_d_gate", only_up: "only_d_up"}[needs]
        if layout != "strided":
            # Strides of 1 are compiled in, as a launch does it.
            unit_strides = [s for s in kernel.arg_names if s.startswith("stride_") and s[-1] == "n"]
            constexprs |= dict.fromkeys(unit_strides, 1)
        pointers = [s for s in kernel.arg_names if s.endswith("_ptr")]
        integers = [s for s in kernel.arg_names if s not in pointers and s not in constexprs]
        yield CompileCase(
            name=f"swiglu_{direction}_{layout}_{dtype}{'_int64' if int64 else ''}",
            kernel=kernel,
            signature={
                **dict.fromkeys(pointers, f"*{dtype}"),
                **dict.fromkeys(integers, "i32"),
                **dict.fromkeys(constexprs, "constexpr"),
            },
            constexprs=constexprs,
            num_warps=_NUM_WARPS,
            num_stages=1,
            divisible=(*pointers, *(integers if layout != "strided" else ())),
        )
