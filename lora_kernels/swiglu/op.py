"""SwiGLU, the gated activation of Llama's MLP, in one operation.

    out    = silu(gate) * up                                silu(g) = g sigma(g)
    d_up   = dout * silu(gate)                              sigma(g) = 1 / (1 + exp(-g))
    d_gate = dout * up * sigma (1 + gate (1 - sigma))

This is `act_fn(gate) * up` of transformers (models/llama/modeling_llama.py) for the activation
"silu"; the gated unit is Shazeer's (arXiv:2002.05202). Nothing but gate and up is kept for the
backward pass, where sigma is computed again.

Shapes: gate, up and out [..., N].
"""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.dispatch import calls_directly, requested, resolve
from lora_kernels.swiglu import eager, reference

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _dense(like: Tensor) -> Tensor:
    """Uninitialised and contiguous, whatever the strides of `like`."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _forward(gate: Tensor, up: Tensor, impl: str) -> Tensor:
    out = _dense(gate)
    if out.numel() == 0:
        return out
    if resolve(impl, gate.device, gate.dtype) == "triton":
        from lora_kernels.swiglu import triton_kernel

        triton_kernel.forward(gate, up, out)
    else:
        eager.forward(gate, up, out)
    return out


_forward_op = torch.library.custom_op("lora_kernels::swiglu", _forward, mutates_args=())


@_forward_op.register_fake
def _(gate: Tensor, up: Tensor, impl: str) -> Tensor:
    return _dense(gate)


def _gradients(
    dout: Tensor, gate: Tensor, up: Tensor | None, need_gate: bool, need_up: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """d_gate and d_up; the one that is not needed is an empty tensor."""
    d_gate = _dense(gate) if need_gate else None
    d_up = _dense(gate) if need_up else None
    if gate.numel() > 0:
        if resolve(impl, gate.device, gate.dtype) == "triton":
            from lora_kernels.swiglu import triton_kernel

            triton_kernel.backward(dout, gate, up, d_gate, d_up)
        else:
            eager.backward(dout, gate, up, d_gate, d_up)
    return (
        gate.new_empty(0) if d_gate is None else d_gate,
        gate.new_empty(0) if d_up is None else d_up,
    )


_gradients_op = torch.library.custom_op(
    "lora_kernels::swiglu_backward", _gradients, mutates_args=()
)


@_gradients_op.register_fake
def _(
    dout: Tensor, gate: Tensor, up: Tensor | None, need_gate: bool, need_up: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return (
        _dense(gate) if need_gate else gate.new_empty(0),
        _dense(gate) if need_up else gate.new_empty(0),
    )


def _backward_op(dout: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    # A graph of the gradients is made (create_graph) by the custom op alone, which refuses it.
    direct = calls_directly(dout, *arguments[:2]) and not torch.is_grad_enabled()
    return (_gradients if direct else _gradients_op)(dout, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.impl = inputs
    # up is read for the gradient of gate alone.
    ctx.save_for_backward(gate, up if gate.requires_grad else None)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    need_gate, need_up, _ = ctx.needs_input_grad
    d_gate, d_up = _backward_op(dout, gate, up, need_gate, need_up, ctx.impl)
    return d_gate if need_gate else None, d_up if need_up else None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The custom op with its autograd, without torch.library."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out = _forward(*inputs)
        _setup_context(ctx, inputs, out)
        return out

    backward = staticmethod(_backward)


def _check(gate: Tensor, up: Tensor) -> None:
    for name, x in (("gate", gate), ("up", up)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected a dtype of {_DTYPES}, got {x.dtype}")
    if up.dtype != gate.dtype:
        raise TypeError(f"up: expected gate's dtype {gate.dtype}, got {up.dtype}")
    if up.device != gate.device:
        raise ValueError(f"up: expected gate's device {gate.device}, got {up.device}")
    if gate.dim() < 1:
        raise ValueError("gate: expected at least 1 dimension, got a scalar")
    if up.shape != gate.shape:
        raise ValueError(f"up: expected gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")


def swiglu(gate: Tensor, up: Tensor, impl: str = "auto") -> Tensor:
    """silu(gate) * up, the activation of Llama's MLP.

    Inputs may have any strides and are not written; the output is contiguous. "triton" computes in
    float32 and rounds once. "eager" and "reference" round silu(gate) to the dtype first, as
    transformers does, and give its bits.

    Args:
        gate: [..., N], float16, bfloat16, float32 or (outside the GPU kernels) float64.
        up: gate's shape and dtype.
        impl: "auto", "triton", "eager" or "reference".

    Returns:
        out, of gate's shape and dtype. Only "reference" can be differentiated twice.

    Raises:
        ValueError: shapes or devices differ, gate is a scalar, or `impl` is unknown or cannot run
            here.
        TypeError: an argument is not a tensor, a dtype is not float16, bfloat16, float32 or
            float64, or the two differ.
    """
    _check(gate, up)
    impl = requested(impl)
    if impl == "reference":
        return reference.swiglu(gate, up)
    return (_Direct.apply if calls_directly(gate, up) else _forward_op)(gate, up, impl)
