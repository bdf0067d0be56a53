"""SwiGLU out of torch operations: the CPU path.

    out  = silu(gate) * up
    d_up = dout * silu(gate)        d_gate = (dout * up) * silu'(gate)

Every result is made in its own memory, without a temporary: silu(gate) becomes out or d_up in
place, and dout * up becomes d_gate. That is six passes over [M, N] against the five of autograd,
which keeps silu(gate) from the forward pass instead of making it again, but three allocations
against five, and fresh memory is dearer than a pass over warm memory. Passes over blocks of rows
that stay in the cache were not faster: what is left is the arithmetic of silu.

Shapes: all tensors [..., N].
"""

import torch
from torch import Tensor

_silu_out = torch.ops.aten.silu.out
_silu_backward_out = torch.ops.aten.silu_backward.grad_input


def forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Writes silu(gate) * up into `out`."""
    _silu_out(gate, out=out)
    out.mul_(up)


def backward(
    dout: Tensor, gate: Tensor, up: Tensor | None, d_gate: Tensor | None, d_up: Tensor | None
) -> None:
    """Writes the gradients that are not None; `up` is read for d_gate alone."""
    if d_up is not None:
        _silu_out(gate, out=d_up)
        d_up.mul_(dout)
    if d_gate is not None:
        assert up is not None
        torch.mul(dout, up, out=d_gate)
        _silu_backward_out(d_gate, gate, grad_input=d_gate)
