"""DoRA: a LoRA linear layer whose weight's rows have trained lengths, never making that weight.

    c[N] = magnitude / n      n = ‖weight + s lora_b lora_a‖ of each row, without gradient
    y = c * (x weightᵀ + s (x lora_aᵀ) lora_bᵀ) + bias          z = y / c, the unscaled products

    n² = ‖weight‖² + 2 s Σ_r (weight lora_aᵀ) lora_b + s² Σ_r (lora_b (lora_a lora_aᵀ)) lora_b

The norm takes products of rank R alone. In backward the incoming gradient is scaled by c and goes
the way of a layer without a magnitude; in the same pass over it dc = Σ_m dy z.

Source: Liu et al., "DoRA" (arXiv:2402.09353, section 4.3 on the detached norm), with PEFT's
semantics (peft/tuners/lora/dora.py).
"""

import torch
from torch import Tensor

from lora_kernels.dispatch import calls_directly, resolve

# What a scale of exactly zero is replaced by, so that z can be had from y. Far below rounding.
_NEARLY_ZERO = 2.0**-60


def weight_norm(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor = 1.0
) -> Tensor:
    """‖weight + scaling lora_b lora_a‖ of each row, [N], without gradient.

    Sums are in float32 (float64 where an argument is); of a 16-bit weight the product with lora_a
    is rounded to the weight's dtype, as the layer's own products are.

    Args:
        weight: [N, K]. lora_a: [R, K]. lora_b: [N, R]. Any floating dtypes.
    """
    exact = torch.promote_types(torch.promote_types(weight.dtype, lora_a.dtype), torch.float32)
    with torch.no_grad():
        a, b = lora_a.to(exact), lora_b.to(exact)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=exact).square()
        # A 16-bit weight is not copied to a wider one, which would take twice its memory.
        product_dtype = exact if weight.element_size() >= 4 else weight.dtype
        cross = torch.mm(weight.to(product_dtype), lora_a.to(product_dtype).t()).to(exact)
        crosses = (cross * b).sum(1)
        update = (torch.mm(b, torch.mm(a, a.t())) * b).sum(1)
        total = squares + scaling * (2.0 * crosses + scaling * update)
        return total.clamp_min_(0.0).sqrt_()


def column_scale(
    magnitude: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float | Tensor = 1.0
) -> Tensor:
    """c[N] = magnitude / norm, in float32 or wider; its gradient reaches magnitude alone."""
    norm = weight_norm(weight, lora_a, lora_b, scaling)
    scale = magnitude.to(torch.promote_types(magnitude.dtype, norm.dtype)) / norm
    return scale + (scale == 0) * _NEARLY_ZERO


def _scale_gradient(dy: Tensor, y: Tensor, scale: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """(scale * dy)[M, N] in dy's dtype, and d_scale[N] in scale's: Σ_m dy y / scale."""
    if resolve(impl, dy.device, dy.dtype) == "triton" and dy.numel() > 0:
        from lora_kernels.lora_linear import triton_dora

        with torch.cuda.device_of(dy):
            scaled, sums = triton_dora.scale_gradient(dy, y, scale)
    else:
        scaled = (dy * scale).to(dy.dtype).contiguous()
        sums = (dy.to(scale.dtype) * y).sum(0)
    return scaled, sums / scale


_scale_gradient_op = torch.library.custom_op(
    "lora_kernels::lora_linear_scale_backward", _scale_gradient, mutates_args=()
)


@_scale_gradient_op.register_fake
def _(dy: Tensor, y: Tensor, scale: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), scale.new_empty(scale.shape)


def scale_gradient(dy: Tensor, y: Tensor, scale: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """One pass over an incoming gradient: what the products get of it, and the scale's gradient.

    Args:
        dy: [M, N] of y, any strides. y: [M, N] without a bias. scale: [N], not zero.

    Returns:
        scale * dy [M, N], contiguous, in dy's dtype, and d_scale [N] in scale's.
    """
    direct = calls_directly(dy, y, scale) and not torch.is_grad_enabled()
    return (_scale_gradient if direct else _scale_gradient_op)(dy, y, scale, impl)
