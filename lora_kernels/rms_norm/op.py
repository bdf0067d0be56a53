"""RMSNorm, with the addition of the residual stream before it, in one operation.

    total = x + residual                            (x, where there is no residual)
    rstd  = 1 / sqrt(mean(total²) + eps)            y = weight * (total rstd)

    g = weight * dy                                 d_weight = Σ_m dy * (total rstd)
    dx = d_residual = d_total + rstd (g - total rstd² mean(g * total))

The normalisation is Zhang and Sennrich's (arXiv:1910.07467), with the rounding of LlamaRMSNorm in
transformers (models/llama/modeling_llama.py): statistics in float32, the normalised value rounded
to x's dtype before weight multiplies it. Kept for the backward pass are total and rstd.

Shapes: x, residual, total and y [..., H], weight [H], rstd [...].
"""

from typing import Any, overload

import torch
from torch import Tensor

from lora_kernels.dispatch import calls_directly, requested, resolve
from lora_kernels.rms_norm import eager, reference

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _resolve(impl: str, x: Tensor, weight: Tensor) -> str:
    # "auto" can choose differently for each dtype; eager takes them all.
    fused = all(resolve(impl, x.device, dtype) == "triton" for dtype in {x.dtype, weight.dtype})
    return "triton" if fused else "eager"


def _outputs(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, total and rstd, contiguous and uninitialised; total is empty without a residual."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    statistics = torch.promote_types(x.dtype, torch.float32)
    return (
        torch.empty(x.shape, dtype=dtype, device=x.device),
        x.new_empty(0) if residual is None else x.new_empty(x.shape),
        torch.empty(x.shape[:-1], dtype=statistics, device=x.device),
    )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, rstd = _outputs(x, residual, weight)
    if x.numel() == 0:
        return y, total, rstd
    arguments = (
        _rows(x), None if residual is None else _rows(residual), weight, eps,
        _rows(y), total if residual is None else _rows(total), rstd.view(-1),
    )  # fmt: skip
    if _resolve(impl, x, weight) == "triton":
        from lora_kernels.rms_norm import triton_kernel

        triton_kernel.forward(*arguments)
    else:
        eager.forward(*arguments)
    return y, total, rstd


_forward_op = torch.library.custom_op("lora_kernels::rms_norm", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, residual, weight)


def _gradients(
    dy: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_x: bool,
    need_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """dx and d_weight; the one that is not needed is an empty tensor. `x` is the total."""
    if x.numel() == 0:
        dx, d_weight = _empty_gradients(x, weight, need_x, need_weight)
        return dx, d_weight.zero_()
    arguments = (
        _rows(dy), None if d_total is None else _rows(d_total), _rows(x), weight, rstd.view(-1),
        need_x, need_weight,
    )  # fmt: skip
    if _resolve(impl, x, weight) == "triton":
        from lora_kernels.rms_norm import triton_kernel

        gradients = triton_kernel.backward(*arguments)
    else:
        gradients = eager.backward(*arguments)
    return (
        x.new_empty(0) if gradients[0] is None else gradients[0].view(x.shape),
        weight.new_empty(0) if gradients[1] is None else gradients[1],
    )


def _empty_gradients(
    x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else x.new_empty(0)
    return dx, weight.new_empty(weight.shape if need_weight else 0)


_gradients_op = torch.library.custom_op(
    "lora_kernels::rms_norm_backward", _gradients, mutates_args=()
)


@_gradients_op.register_fake
def _(
    dy: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_x: bool,
    need_weight: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(x, weight, need_x, need_weight)


def _backward_op(dy: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    # A graph of the gradients is made (create_graph) by the custom op alone, which refuses it.
    direct = calls_directly(dy, *arguments[:3]) and not torch.is_grad_enabled()
    return (_gradients if direct else _gradients_op)(dy, *arguments)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, residual, weight, _, ctx.impl = inputs
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd, *([total] if residual is None else []))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else total, weight, rstd)


def _backward(ctx: Any, dy: Tensor | None, d_total: Tensor | None, _: None) -> tuple[Any, ...]:
    x, weight, rstd = ctx.saved_tensors
    need_x, need_residual, need_weight, *_ = ctx.needs_input_grad
    need_dx = need_x or need_residual
    # Where y is not used, the gradient of the total is all there is.
    dx, d_weight = d_total, None
    if dy is not None:
        dx, d_weight = _backward_op(
            dy, d_total if need_dx else None, x, weight, rstd, need_dx, need_weight, ctx.impl
        )
        d_weight = d_weight if need_weight else None
    return dx if need_x else None, dx if need_residual else None, d_weight, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The custom op with its autograd, without torch.library."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        outputs = _forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        return outputs

    backward = staticmethod(_backward)


def _check(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> None:
    tensors = {"x": x, "weight": weight}
    if residual is not None:
        tensors["residual"] = residual
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected a dtype of {_DTYPES}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., H] with H of at least 1, got shape {tuple(x.shape)}")
    if tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(
            f"weight: expected shape ({x.shape[-1]},), x's last dimension, got "
            f"{tuple(weight.shape)}"
        )
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps: expected a float, got {type(eps).__name__}")
    if not eps >= 0.0:
        raise ValueError(f"eps: expected a number that is not negative, got {eps}")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"residual: expected x's shape {tuple(x.shape)}, got {tuple(residual.shape)}"
            )
        if residual.dtype != x.dtype:
            raise TypeError(f"residual: expected x's dtype {x.dtype}, got {residual.dtype}")


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: None = None, impl: str = "auto"
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, impl: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """weight * x / rms(x) over the last dimension; with `residual`, of their sum.

    Inputs may have any strides and are not written; outputs are contiguous. Statistics are in
    float32 (float64 for float64 x). "eager" and "reference" give the bits of LlamaRMSNorm.

    Args:
        x: [..., H], float16, bfloat16, float32 or (outside the GPU kernels) float64.
        weight: [H], in any of these dtypes.
        eps: added to the mean square; not negative.
        residual: x's shape and dtype: the residual stream that x is added to first.
        impl: "auto", "triton", "eager" or "reference".

    Returns:
        y[..., H], in the wider of x's and weight's dtypes. With `residual`: y and the new residual
        x + residual in x's dtype, whose gradient joins that of y in the same kernel. Only
        "reference" can be differentiated twice.

    Raises:
        ValueError: shapes or devices do not fit, eps is negative, or `impl` is unknown or cannot
            run here.
        TypeError: an argument is not a tensor, a dtype is not float16, bfloat16, float32 or
            float64, residual's dtype is not x's, or eps is not a number.
    """
    _check(x, weight, eps, residual)
    impl = requested(impl)
    if impl == "reference":
        if residual is None:
            return reference.rms_norm(x, weight, eps)
        total = x + residual
        return reference.rms_norm(total, weight, eps), total
    run = _Direct.apply if calls_directly(x, residual, weight) else _forward_op
    y, total, _ = run(x, residual, weight, float(eps), impl)
    return y if residual is None else (y, total)
