"""Forward and backward of a LoRA linear layer out of library GEMMs.

The CPU path, and the GPU path wherever the plan finds it faster. All tensors have one dtype
(`op.py` sees to that) and two dimensions:

    x[M, K]  weight[N, K]  lora_a[R, K]  lora_b[N, R]  bias[N]  dy[M, N]
    S[M, R] = s x_lora lora_aᵀ         y  = x weightᵀ + bias + S lora_bᵀ
    P[M, R] = s dy lora_b              dx = dy weight + keep * (P lora_a)
    d_lora_b = dyᵀ S                   d_lora_a = Pᵀ x_lora           d_bias = Σ_m dy

The delta is accumulated into the base product by the second GEMM itself (`addmm_` into a tensor
made here), so no [M, N] temporary exists.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.lora_linear.dropout import generator_keep


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Returns y[M, N] and the scaled S[M, R], both in x's dtype."""
    branch_input = x if seed is None else x * generator_keep(seed, dropout_p, x)
    s = torch.mm(branch_input, lora_a.t()).mul_(scaling)
    y = F.linear(x, weight, bias)
    return y.addmm_(s, lora_b.t()), s


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor | None,
    scaling: float | Tensor,
    seed: Tensor | None,
    dropout_p: float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Returns dx, d_lora_a, d_lora_b, d_bias, each None where `needs` says so.

    x is needed for d_lora_a alone, S for d_lora_b alone.
    """
    need_dx, need_da, need_db, need_dbias = needs
    dx = d_lora_a = d_lora_b = None
    if need_dx or need_da:
        p = torch.mm(dy, lora_b).mul_(scaling)
        keep = None
        if seed is not None:
            like = dy.new_empty(dy.shape[0], lora_a.shape[1])
            keep = generator_keep(seed, dropout_p, like)
        if need_dx:
            dx = torch.mm(dy, weight)
            if keep is None:
                dx.addmm_(p, lora_a)
            else:
                dx.add_(torch.mm(p, lora_a).mul_(keep))
        if need_da:
            assert x is not None
            d_lora_a = torch.mm(p.t(), x if keep is None else x * keep)
    if need_db:
        assert s is not None
        d_lora_b = torch.mm(dy.t(), s)
    return dx, d_lora_a, d_lora_b, dy.sum(0) if need_dbias else None
