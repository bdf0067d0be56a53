"""`lora_linear`: validates, plans, and runs one implementation behind a custom op with autograd.

    x[M, K]  weight[N, K] (frozen)  lora_a[R, K]  lora_b[N, R]  bias[N]  s = scaling
    y[M, N] = x weightᵀ + bias + s (dropout(x) lora_aᵀ) lora_bᵀ

The dtypes are settled here and nowhere else: below the custom ops every tensor has x's dtype
(autocast's, where it is on), and the gradients of the adapter come back in the adapter's dtype.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.dispatch import requested, resolve
from lora_kernels.lora_linear import eager, reference
from lora_kernels.lora_linear.dropout import draw_seed, generator_keep
from lora_kernels.lora_linear.plan import Plan, plan

# weight, lora_a, lora_b, scaling, bias. Without an adapter lora_a and lora_b are None.
Projection = tuple[Tensor, Tensor | None, Tensor | None, float | Tensor, Tensor | None]


@cache
def architecture(device: torch.device) -> str:
    """The plan's name of a device's architecture: "sm_90", "gfx942", or "cpu"."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def plan_for(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, device: torch.device, dropout: bool = False
) -> Plan:
    """The plan of the Triton kernels on `device`; on a CPU, the interpreter's."""
    arch = architecture(device)
    return plan(m, n, k, r, dtype, "interpreter" if arch == "cpu" else arch, dropout)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """A linear layer with a LoRA adapter: base product plus scaled low-rank product.

    Args:
        x: [..., K], float16, bfloat16, float32 or (outside the GPU kernels) float64.
        weight: [N, K], frozen, in x's dtype; under autocast any floating dtype.
        lora_a: [R, K], any floating dtype. The products run in x's dtype.
        lora_b: [N, R], any floating dtype.
        scaling: a float, or a tensor with one element (no gradient). A new value compiles nothing.
        bias: [N], in weight's dtype.
        dropout_p: probability, in [0, 1), of dropping an element of x in the low-rank branch alone.
            The mask comes from torch's generator on x's device.
        impl: "auto" (the plan decides), "triton", "eager" or "reference".

    Returns:
        y[..., N] in x's dtype; under autocast in autocast's. Gradients reach x, lora_a, lora_b and
        bias, those of lora_a and lora_b in their own dtypes. Only "reference" can be differentiated
        twice.

    Raises:
        ValueError: a shape, a device, dropout_p or impl does not fit; weight or scaling requires a
            gradient; or the implementation asked for cannot run here (the message says why).
        TypeError: an argument is not a tensor, not floating point, or weight's dtype is not x's.

    Source: Hu et al., "LoRA" (arXiv:2106.09685); PEFT's semantics (peft/tuners/lora/layer.py).
    """
    _validate(x, weight, lora_a, lora_b, scaling, bias, dropout_p)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif weight.dtype != x.dtype:
        raise TypeError(f"weight: expected x's dtype {x.dtype}, got {weight.dtype}")
    elif bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"bias: expected x's dtype {x.dtype}, got {bias.dtype}")

    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    impl = requested(impl)
    if impl == "reference":
        keep = None if seed is None else generator_keep(seed, dropout_p, x)
        frozen = weight.to(x.dtype)
        offset = None if bias is None else bias.to(x.dtype)
        return reference.lora_linear(x, frozen, lora_a, lora_b, scaling, offset, keep)

    rows = x.reshape(-1, x.shape[-1])
    value, tensor = (1.0, scaling) if isinstance(scaling, Tensor) else (float(scaling), None)
    save_s = torch.is_grad_enabled() and lora_b.requires_grad
    y, _ = _forward_op(
        rows, weight, lora_a, lora_b, bias, value, tensor, seed, dropout_p, impl, save_s
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])


def lora_linear_grouped(
    x: Tensor,
    projections: Sequence[Projection],
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Several LoRA linear layers of one input: q, k, v of an attention, gate and up of an MLP.

    Args:
        x: [..., K], as for `lora_linear`.
        projections: (weight[N, K], lora_a[R, K], lora_b[N, R], scaling, bias[N] or None) each; N, R
            and scaling may differ. lora_a = lora_b = None is a projection without an adapter.
        dropout_p: as for `lora_linear`; every projection draws its own mask.
        impl: as for `lora_linear`.

    Returns:
        One y[..., N] per projection.

    Raises:
        ValueError, TypeError: as `lora_linear`; projections is empty, or an entry has one of lora_a
            and lora_b without the other.
    """
    if not projections:
        raise ValueError("projections: expected at least one, got none")
    outputs = []
    for index, (weight, lora_a, lora_b, scaling, bias) in enumerate(projections):
        if lora_a is None and lora_b is None:
            outputs.append(F.linear(x, weight, bias))
        elif lora_a is None or lora_b is None:
            missing = "lora_a" if lora_a is None else "lora_b"
            raise ValueError(f"projections[{index}]: {missing} is None and its counterpart is not")
        else:
            outputs.append(lora_linear(x, weight, lora_a, lora_b, scaling, bias, dropout_p, impl))
    return tuple(outputs)


def _validate(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None,
    dropout_p: float,
) -> None:
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")
    for name in ("weight", "lora_a", "lora_b"):
        if tensors[name].dim() != 2:
            raise ValueError(f"{name}: expected 2 dimensions, got {tuple(tensors[name].shape)}")
    if x.dim() < 1:
        raise ValueError("x: expected at least 1 dimension, got a scalar")
    n, k = weight.shape
    r = lora_a.shape[0]
    if r < 1:
        raise ValueError(f"lora_a: expected a rank of at least 1, got shape {tuple(lora_a.shape)}")
    expected = {"x": (*x.shape[:-1], k), "lora_a": (r, k), "lora_b": (n, r), "bias": (n,)}
    for name, tensor in tensors.items():
        if name != "weight" and tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name}: expected shape {tuple(expected[name])} for weight {(n, k)} and rank {r}, "
                f"got {tuple(tensor.shape)}"
            )
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError(
            "weight: expected requires_grad=False (the base weight is frozen and gets no "
            "gradient), got requires_grad=True"
        )
    if isinstance(scaling, Tensor):
        if scaling.numel() != 1 or not scaling.is_floating_point():
            raise ValueError(
                f"scaling: expected a float or a floating-point tensor with one element, got "
                f"{scaling.dtype} of shape {tuple(scaling.shape)}"
            )
        if scaling.device != x.device:
            raise ValueError(f"scaling: expected x's device {x.device}, got {scaling.device}")
        if torch.is_grad_enabled() and scaling.requires_grad:
            raise ValueError("scaling: expected requires_grad=False, got requires_grad=True")
    elif not isinstance(scaling, int | float):
        raise TypeError(f"scaling: expected a float or a tensor, got {type(scaling).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")


def _plan(x: Tensor, weight: Tensor, lora_a: Tensor, dropout: bool, impl: str) -> Plan | None:
    """The Triton plan, or None for library GEMMs. Forward and backward come to the same."""
    if resolve(impl, x.device, x.dtype) != "triton":
        return None
    n, k = weight.shape
    chosen = plan_for(x.shape[0], n, k, lora_a.shape[0], x.dtype, x.device, dropout)
    return None if chosen.method == "library" else chosen


def _in_dtype_of(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(x.dtype) for tensor in tensors]


@torch.library.custom_op("lora_kernels::lora_linear", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float,
    scaling_tensor: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    impl: str,
    save_s: bool,
) -> tuple[Tensor, Tensor]:
    """y[M, N] and the scaled S[M, R], which has no rows where backward does not need it."""
    scale: float | Tensor = scaling if scaling_tensor is None else scaling_tensor
    w, a, b, offset = _in_dtype_of(x, weight, lora_a, lora_b, bias)
    assert w is not None and a is not None and b is not None
    chosen = _plan(x, weight, lora_a, seed is not None, impl)
    s: Tensor | None
    if chosen is None:
        y, s = eager.forward(x, w, a, b, offset, scale, seed, dropout_p)
    else:
        from lora_kernels.lora_linear import triton_forward

        with torch.cuda.device_of(x):
            y, s = triton_forward.forward(
                x, w, a, b, offset, scale, seed, dropout_p, save_s, chosen
            )
    return y, s if save_s and s is not None else x.new_empty(0, lora_a.shape[0])


@_forward_op.register_fake
def _(x, weight, lora_a, lora_b, bias, scaling, scaling_tensor, seed, dropout_p, impl, save_s):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, x.new_empty(x.shape[0] if save_s else 0, lora_a.shape[0])


@torch.library.custom_op("lora_kernels::lora_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    scaling: float,
    scaling_tensor: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    impl: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, d_lora_a, d_lora_b, d_bias; one that is not needed is an empty tensor."""
    scale: float | Tensor = scaling if scaling_tensor is None else scaling_tensor
    w, a, b = _in_dtype_of(dy, weight, lora_a, lora_b)
    assert w is not None and a is not None and b is not None
    need_dx, need_da, need_db, need_dbias = needs
    flags = (need_dx, need_da, need_db, need_dbias)
    chosen = _plan(dy, weight, lora_a, seed is not None, impl)
    if chosen is None:
        gradients = eager.backward(dy, x, w, a, b, s, scale, seed, dropout_p, flags)
    else:
        from lora_kernels.lora_linear import triton_backward

        with torch.cuda.device_of(dy):
            gradients = triton_backward.backward(
                dy, x, w, a, b, s, scale, seed, dropout_p, flags, chosen
            )
    dtypes = (dy.dtype, lora_a.dtype, lora_b.dtype, dy.dtype)
    dx, d_lora_a, d_lora_b, d_bias = (
        dy.new_empty(0) if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    )
    return dx, d_lora_a, d_lora_b, d_bias


@_backward_op.register_fake
def _(dy, x, weight, lora_a, lora_b, s, scaling, scaling_tensor, seed, dropout_p, impl, needs):
    need_dx, need_da, need_db, need_dbias = needs
    n, k = weight.shape
    return (
        dy.new_empty(dy.shape[0], k) if need_dx else dy.new_empty(0),
        torch.empty_like(lora_a, memory_format=torch.contiguous_format)
        if need_da
        else dy.new_empty(0),
        torch.empty_like(lora_b, memory_format=torch.contiguous_format)
        if need_db
        else dy.new_empty(0),
        dy.new_empty(n) if need_dbias else dy.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    x, weight, lora_a, lora_b, _, scaling, scaling_tensor, seed, dropout_p, impl, _ = inputs
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    need_da, need_db = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
    # x is saved for d_lora_a alone and S for d_lora_b alone; the rest are references.
    ctx.save_for_backward(
        x if need_da else None,
        weight,
        lora_a,
        lora_b,
        s if need_db else None,
        scaling_tensor,
        seed,
    )
    ctx.scaling, ctx.dropout_p, ctx.impl = scaling, dropout_p, impl


def _backward(ctx, dy, _):
    x, weight, lora_a, lora_b, s, scaling_tensor, seed = ctx.saved_tensors
    needs_grad = ctx.needs_input_grad
    needs = [needs_grad[0], needs_grad[2], needs_grad[3], needs_grad[4]]
    gradients: list[Tensor | None] = [None] * 4
    if dy is not None and any(needs):
        computed = _backward_op(
            dy, x, weight, lora_a, lora_b, s, ctx.scaling, scaling_tensor, seed, ctx.dropout_p,
            ctx.impl, needs,
        )  # fmt: skip
        gradients = [g if need else None for g, need in zip(computed, needs, strict=True)]
    dx, d_lora_a, d_lora_b, d_bias = gradients
    return dx, None, d_lora_a, d_lora_b, d_bias, None, None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
