"""What `lora_linear_mixed` accepts: every error names the argument, what it should be, what it is.

x[..., K]  weight[N, K]  lora_as[a][R_a, K]  lora_bs[a][N, R_a]  bias[N]  scalings[A]
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from lora_kernels.lora_linear.checks import check_tensors
from lora_kernels.lora_linear_mixed.rows import MixedRows


def check_arguments(
    x: Tensor,
    weight: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float] | Tensor,
    bias: Tensor | None,
    dropout_p: float | Sequence[float],
) -> list[float]:
    """Returns the dropout probability of each adapter."""
    count = len(lora_as)
    if count < 1:
        raise ValueError("lora_as: expected at least one adapter, got none")
    if len(lora_bs) != count:
        raise ValueError(f"lora_bs: expected {count} adapters, as lora_as has, got {len(lora_bs)}")
    named = {"x": x, "weight": weight}
    named |= {f"lora_as[{a}]": lora_a for a, lora_a in enumerate(lora_as)}
    named |= {f"lora_bs[{a}]": lora_b for a, lora_b in enumerate(lora_bs)}
    if bias is not None:
        named["bias"] = bias
    check_tensors(named)
    if x.dim() < 1:
        raise ValueError("x: expected at least 1 dimension, got a scalar")
    for name, tensor in named.items():
        if name not in ("x", "bias") and tensor.dim() != 2:
            raise ValueError(f"{name}: expected 2 dimensions, got {tuple(tensor.shape)}")
    n, k = weight.shape
    expected: dict[str, tuple[int, ...]] = {"x": (*x.shape[:-1], k), "bias": (n,)}
    for a, lora_a in enumerate(lora_as):
        r = lora_a.shape[0]
        if r < 1:
            raise ValueError(
                f"lora_as[{a}]: expected a rank of at least 1, got shape {tuple(lora_a.shape)}"
            )
        expected |= {f"lora_as[{a}]": (r, k), f"lora_bs[{a}]": (n, r)}
    for name, tensor in named.items():
        if name != "weight" and tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name}: expected shape {expected[name]} for weight {(n, k)}, "
                f"got {tuple(tensor.shape)}"
            )
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError(
            "weight: expected requires_grad=False (the base weight is frozen and gets no "
            "gradient), got requires_grad=True"
        )
    _check_scalings(scalings, count, x)
    dropouts = [dropout_p] * count if isinstance(dropout_p, int | float) else list(dropout_p)
    if len(dropouts) != count:
        raise ValueError(f"dropout_p: expected a float or {count} of them, got {len(dropouts)}")
    for p in dropouts:
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout_p: expected a probability in [0, 1), got {p}")
    return [float(p) for p in dropouts]


def _check_scalings(scalings: Sequence[float] | Tensor, count: int, x: Tensor) -> None:
    if isinstance(scalings, Tensor):
        if tuple(scalings.shape) != (count,) or not scalings.is_floating_point():
            raise ValueError(
                f"scalings: expected {count} floats or a floating-point tensor of shape "
                f"{(count,)}, got {scalings.dtype} of shape {tuple(scalings.shape)}"
            )
        if scalings.device != x.device:
            raise ValueError(f"scalings: expected x's device {x.device}, got {scalings.device}")
        if torch.is_grad_enabled() and scalings.requires_grad:
            raise ValueError("scalings: expected requires_grad=False, got requires_grad=True")
        return
    if len(scalings) != count:
        raise ValueError(f"scalings: expected {count}, one for each adapter, got {len(scalings)}")
    for scaling in scalings:
        if not isinstance(scaling, int | float):
            raise TypeError(f"scalings: expected floats or a tensor, got {type(scaling).__name__}")


def rows_of(row_adapters: Tensor | MixedRows, x: Tensor, adapters: int) -> MixedRows:
    """The sorted rows; ValueError, TypeError where they are not x's, or of other adapters."""
    m = prod(x.shape[:-1])
    if isinstance(row_adapters, MixedRows):
        rows, shape = row_adapters, tuple(row_adapters.row_adapters.shape)
        if rows.adapters != adapters:
            raise ValueError(
                f"row_adapters: expected rows of {adapters} adapters, as lora_as has, "
                f"got MixedRows of {rows.adapters}"
            )
    else:
        rows = MixedRows.of(row_adapters, adapters)
        shape = tuple(row_adapters.shape)
    if shape not in (tuple(x.shape[:-1]), (m,)):
        raise ValueError(
            f"row_adapters: expected one entry for each row of x, shape {tuple(x.shape[:-1])} or "
            f"{(m,)}, got {shape}"
        )
    if rows.order.device != x.device:
        raise ValueError(f"row_adapters: expected x's device {x.device}, got {rows.order.device}")
    return rows
