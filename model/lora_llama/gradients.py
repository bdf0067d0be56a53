"""Proof that an adapter learns: every gradient present, finite and non-zero; every weight moved.

With y = x Wᵀ + s (x Aᵀ) Bᵀ, d_A = s (dy B)ᵀ x is exactly zero while B is zero, which is how a new
adapter starts; d_B = s dyᵀ (x Aᵀ) is not. So a zero gradient of A is an error only where B is not
zero, and a zero gradient of B always is (A is never zero).
"""

from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from lora_kernels.layers import LoraLinear, lora_layers
from lora_kernels.sharding import whole


@dataclass(frozen=True)
class GradientNorms:
    """One adapter of one layer, after a backward pass.

    Attributes:
        layer: the layer's path.
        adapter: the adapter's name.
        lora_a: the 2-norm of A's gradient; 0 is legitimate where `b_is_zero`.
        lora_b: the 2-norm of B's gradient.
        b_is_zero: B is all zeros, as before the first optimizer step.
    """

    layer: str
    adapter: str
    lora_a: float
    lora_b: float
    b_is_zero: bool


class GradientError(ValueError):
    """Gradients are missing, zero where they must not be, or not finite."""


def verify_gradients(model: nn.Module) -> list[GradientNorms]:
    """Checks the gradients of every active adapter after a backward pass.

    Those of a sharded model are gathered: every process calls this.

    Returns:
        The norms of A's and B's gradients, per layer and active adapter, in the model's order.

    Raises:
        GradientError: it names every tensor whose gradient is missing, non-finite, or zero where it
            must not be.
        ValueError: the model has no active adapter.
    """
    rows: list[GradientNorms] = []
    faults: list[str] = []
    for path, layer in lora_layers(model):
        for adapter in layer.active_adapters:
            row, found = _check(path, layer, adapter)
            rows.append(row)
            faults.extend(found)
    if not rows:
        raise ValueError("model: expected an active adapter, found none")
    if faults:
        raise GradientError(
            f"{len(faults)} of {2 * len(rows)} adapter gradients are wrong:\n  "
            + "\n  ".join(faults)
        )
    return rows


def _check(path: str, layer: LoraLinear, adapter: str) -> tuple[GradientNorms, list[str]]:
    norms = {}
    faults = []
    b_is_zero = not bool(whole(layer.lora_B[adapter].detach()).any())
    for kind, parameters in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
        name = f"{path}.{kind}.{adapter}"
        partial = parameters[adapter].grad
        gradient = None if partial is None else whole(partial.detach())
        norm = float("nan") if gradient is None else gradient.double().norm().item()
        norms[kind] = norm
        if gradient is None:
            reason = "" if parameters[adapter].requires_grad else " (requires_grad is False)"
            faults.append(f"{name}: no gradient{reason}")
        elif not torch.isfinite(gradient).all():
            faults.append(f"{name}: gradient has NaN or Inf")
        elif norm == 0.0 and not (kind == "lora_A" and b_is_zero):
            faults.append(f"{name}: gradient is zero")
    return GradientNorms(path, adapter, norms["lora_A"], norms["lora_B"], b_is_zero), faults


def capture_lora_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every adapter's A and B, by parameter name ("<path>.lora_A.<adapter>"), on the CPU.

    Capture before and after training and compare: see `unchanged_weights`. A sharded model's are
    gathered: every process calls this.
    """
    weights = {}
    for path, layer in lora_layers(model):
        for adapter in layer.lora_A:
            for kind, parameters in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                copy = whole(parameters[adapter].detach()).to("cpu", copy=True)
                weights[f"{path}.{kind}.{adapter}"] = copy
    return weights


def unchanged_weights(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """The names of the captured weights that are bit-identical before and after.

    Raises:
        ValueError: the two captures name different weights.
    """
    if before.keys() != after.keys():
        names = sorted(before.keys() ^ after.keys())
        raise ValueError(f"after: expected the weights captured before, differing in {names}")
    return [name for name, weight in before.items() if torch.equal(weight, after[name])]


def gradient_table(rows: list[GradientNorms]) -> str:
    """The norms by projection, over all layers: one line each for q_proj, k_proj, and so on."""
    groups: dict[str, list[GradientNorms]] = {}
    for row in rows:
        groups.setdefault(row.layer.rpartition(".")[2], []).append(row)
    header = f"{'projection':<12} {'layers':>6}  {'|d_lora_A| median (min .. max)':<36}"
    lines = [header + "|d_lora_B| median (min .. max)"]
    for name, members in groups.items():
        lora_a = _spread([row.lora_a for row in members])
        if all(row.b_is_zero for row in members):
            lora_a = "0, as it must be while B is 0"
        lora_b = _spread([row.lora_b for row in members])
        lines.append(f"{name:<12} {len(members):>6}  {lora_a:<36}{lora_b}")
    return "\n".join(lines)


def _spread(norms: list[float]) -> str:
    return f"{median(norms):.2e} ({min(norms):.2e} .. {max(norms):.2e})"
