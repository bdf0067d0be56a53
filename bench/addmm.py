"""The honest baseline: a LoRA linear layer of library GEMMs in one autograd Function per layer.

    forward    y  = x weightᵀ;   y += s (x lora_aᵀ) lora_bᵀ          (addmm_ into y)
    backward   dx = dy weight;   dx += s (dy lora_b) lora_a          (addmm_ into dx)
               d_lora_a = s (dy lora_b)ᵀ x      d_lora_b = s dyᵀ (x lora_aᵀ)

    x[M, K]  weight[N, K]  lora_a[R, K]  lora_b[N, R]  dy[M, N]

This is the method that Unsloth (kernels/fast_lora.py) and Axolotl (kernels/lora.py) use: the base
product is the library's, the low-rank product is accumulated onto it, and backward saves x alone
and recomputes x lora_aᵀ and dy lora_b. It is written here from that description.
"""

from typing import Any

import torch
from torch import Tensor, nn


class AddmmLora(torch.autograd.Function):
    """y[M, N] of x[M, K]; the adapter is cast to x's dtype, its gradients come back in its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scaling = scaling
        y = x @ weight.t()
        branch = x @ lora_a.to(x.dtype).t()
        return y.addmm_(branch, lora_b.to(x.dtype).t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b = ctx.saved_tensors
        a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
        branch_gradient = dy @ b
        d_lora_a = (branch_gradient.t() @ x).mul_(ctx.scaling).to(lora_a.dtype)
        d_lora_b = (dy.t() @ (x @ a.t())).mul_(ctx.scaling).to(lora_b.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(branch_gradient, a, alpha=ctx.scaling)
        return dx, None, d_lora_a, d_lora_b, None


class AddmmLinear(nn.Module):
    """A frozen linear layer without bias with an adapter: x[..., K] -> y[..., N]."""

    def __init__(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(lora_a), nn.Parameter(lora_b)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = AddmmLora.apply(rows, self.weight, self.lora_A, self.lora_B, self.scaling)
        return y.view(*x.shape[:-1], self.weight.shape[0])
