"""Forward and backward of LoRA linear layers that share x, out of library GEMMs.

The CPU path, and the GPU path wherever the plan finds it faster. All tensors have one dtype
(`op.py` sees to that) and two dimensions; g numbers the projections, and lora_a[R, K], S and P hold
those of all of them, one beside the other:

    S[M, R] = s_g x_lora lora_aᵀ       y_g = c_g * (x weight_gᵀ + S_g lora_b_gᵀ) + bias_g
    P[M, R] = s_g dy_g lora_b_g        dx  = Σ_g dy_g weight_g + Σ_g keep_g * (P_g lora_a_g)
    d_lora_b_g = dy_gᵀ S_g             d_lora_a = Pᵀ x_lora           d_bias_g = Σ_m dy_g

Every sum is accumulated by the GEMM itself (`addmm_` into a tensor made here), so no [M, N]
temporary exists, and without dropout x is read once for all the S and once for all the d_lora_a.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.lora_linear.dropout import Dropout, generator_keep


def forward(
    x: Tensor,
    weights: list[Tensor],
    lora_a: Tensor,
    lora_bs: list[Tensor],
    biases: list[Tensor] | None,
    column_scales: list[Tensor] | None,
    scalings: list[float],
    scaling_tensor: Tensor | None,
    dropout: Dropout | None,
) -> tuple[list[Tensor], Tensor]:
    """Returns y_g[M, N_g] and the scaled S[M, R], all in x's dtype."""
    ranks = [lora_b.shape[1] for lora_b in lora_bs]
    if dropout is None:
        s = torch.mm(x, lora_a.t())
    else:
        s = x.new_empty(x.shape[0], lora_a.shape[0])
        for s_g, a_g, seed in zip(
            s.split(ranks, 1), lora_a.split(ranks), dropout.seeds.split(1), strict=True
        ):
            torch.mm(x * generator_keep(seed, dropout.p, x), a_g.t(), out=s_g)
    _scale(s, ranks, scalings, scaling_tensor)
    ys = []
    for g, (weight, s_g, lora_b) in enumerate(
        zip(weights, s.split(ranks, 1), lora_bs, strict=True)
    ):
        if column_scales is None:
            y = F.linear(x, weight, None if biases is None else biases[g])
            ys.append(y.addmm_(s_g, lora_b.t()))
            continue
        y = F.linear(x, weight).addmm_(s_g, lora_b.t()).mul_(column_scales[g])
        ys.append(y if biases is None else y.add_(biases[g]))
    return ys, s


def backward(
    dys: list[Tensor],
    x: Tensor | None,
    weights: list[Tensor],
    lora_a: Tensor,
    lora_bs: list[Tensor],
    s: Tensor | None,
    scalings: list[float],
    scaling_tensor: Tensor | None,
    dropout: Dropout | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor] | None, list[Tensor] | None]:
    """dx, d_lora_a (stacked), d_lora_b and d_bias per projection; None where `needs` says so.

    x is needed for d_lora_a alone, S for d_lora_b alone.
    """
    need_dx, need_da, need_db, need_dbias = needs
    ranks = [lora_b.shape[1] for lora_b in lora_bs]
    dx = d_lora_a = d_lora_bs = d_biases = None
    if need_dx or need_da:
        m, k = dys[0].shape[0], lora_a.shape[1]
        p = dys[0].new_empty(m, sum(ranks))
        for dy, lora_b, p_g in zip(dys, lora_bs, p.split(ranks, 1), strict=True):
            torch.mm(dy, lora_b, out=p_g)
        _scale(p, ranks, scalings, scaling_tensor)
        if need_dx:
            dx = torch.mm(dys[0], weights[0])
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)
        if need_da:
            d_lora_a = lora_a.new_empty(lora_a.shape)
        if dropout is None:
            if dx is not None:
                dx.addmm_(p, lora_a)
            if d_lora_a is not None:
                assert x is not None
                torch.mm(p.t(), x, out=d_lora_a)
        else:
            like = dys[0].new_empty(m, k)
            for g, (p_g, a_g) in enumerate(
                zip(p.split(ranks, 1), lora_a.split(ranks), strict=True)
            ):
                keep = generator_keep(dropout.seeds[g], dropout.p, like)
                if dx is not None:
                    dx.addcmul_(torch.mm(p_g, a_g), keep)
                if d_lora_a is not None:
                    assert x is not None
                    torch.mm(p_g.t(), keep.mul_(x), out=d_lora_a.split(ranks)[g])
    if need_db:
        assert s is not None
        d_lora_bs = [torch.mm(dy.t(), s_g) for dy, s_g in zip(dys, s.split(ranks, 1), strict=True)]
    if need_dbias:
        d_biases = [dy.sum(0) for dy in dys]
    return dx, d_lora_a, d_lora_bs, d_biases


def _scale(
    stacked: Tensor, ranks: list[int], scalings: list[float], scaling_tensor: Tensor | None
) -> None:
    """Multiplies each projection's columns by its scaling, in place."""
    if scaling_tensor is None and len(set(scalings)) == 1:
        stacked.mul_(scalings[0])
        return
    factors = scalings if scaling_tensor is None else scaling_tensor.unbind()
    for part, factor in zip(stacked.split(ranks, 1), factors, strict=True):
        part.mul_(factor)
