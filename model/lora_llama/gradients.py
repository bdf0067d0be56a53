"""Proof that an adapter learns: every gradient present, finite and non-zero; every weight moved.

With y = x Wᵀ + s (x Aᵀ) Bᵀ, d_A = s (dy B)ᵀ x is exactly zero while B is zero, which is how a new
adapter starts; d_B = s dyᵀ (x Aᵀ) is not. So a zero gradient of A is an error only where B is not
zero, and a zero gradient of anything else that an adapter trains always is.
"""

from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from lora_kernels.injection import is_adapter_parameter
from lora_kernels.layers import LoraLinear, lora_layers
from lora_kernels.saved_modules import saved_modules
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
        lora_bias: the 2-norm of lora_bias's gradient; None where there is none.
        magnitude: the 2-norm of the gradient of DoRA's magnitudes; None where there are none.
    """

    layer: str
    adapter: str
    lora_a: float
    lora_b: float
    b_is_zero: bool
    lora_bias: float | None = None
    magnitude: float | None = None


class GradientError(ValueError):
    """Gradients are missing, zero where they must not be, or not finite."""


def verify_gradients(model: nn.Module) -> list[GradientNorms]:
    """Checks the gradients of every active adapter after a backward pass.

    Everything that it trains: A, B, lora_bias, DoRA's magnitudes, and its copies of whole modules
    (`modules_to_save`). Those of a sharded model are gathered: every process calls this.

    Returns:
        The norms of the gradients, per layer and active adapter, in the model's order.

    Raises:
        GradientError: it names every tensor whose gradient is missing, non-finite, or zero where it
            must not be.
        ValueError: the model has no active adapter.
    """
    rows: list[GradientNorms] = []
    faults: dict[str, str | None] = {}
    for path, layer in lora_layers(model):
        for adapter in layer.active_adapters:
            row, found = _check(path, layer, adapter)
            rows.append(row)
            faults.update(found)
    if not rows:
        raise ValueError("model: expected an active adapter, found none")
    for path, module in saved_modules(model):
        if module.active_adapter is not None:
            copy = f"modules_to_save.{module.active_adapter}"
            for name, parameter in module.get_submodule(copy).named_parameters():
                if parameter.is_floating_point():
                    faults[f"{path}.{copy}.{name}"] = _norm_and_fault(parameter)[1]
    wrong = [f"{name}: {fault}" for name, fault in faults.items() if fault is not None]
    if wrong:
        raise GradientError(
            f"{len(wrong)} of {len(faults)} adapter gradients are wrong:\n  " + "\n  ".join(wrong)
        )
    return rows


def _check(
    path: str, layer: LoraLinear, adapter: str
) -> tuple[GradientNorms, dict[str, str | None]]:
    """The norms, and for each tensor what is wrong with its gradient, if anything is."""
    norms: dict[str, float] = {}
    faults: dict[str, str | None] = {}
    b_is_zero = not bool(whole(layer.lora_B[adapter].detach()).any())
    for kind in ("lora_A", "lora_B", "lora_bias", "lora_magnitude_vector"):
        parameters = getattr(layer, kind)
        if adapter in parameters:
            norms[kind], faults[f"{path}.{kind}.{adapter}"] = _norm_and_fault(
                parameters[adapter], may_be_zero=kind == "lora_A" and b_is_zero
            )
    row = GradientNorms(
        path, adapter, norms["lora_A"], norms["lora_B"], b_is_zero,
        norms.get("lora_bias"), norms.get("lora_magnitude_vector"),
    )  # fmt: skip
    return row, faults


def _norm_and_fault(parameter: nn.Parameter, may_be_zero: bool = False) -> tuple[float, str | None]:
    """The 2-norm of a parameter's gradient (NaN: it has none), and what is wrong with it."""
    if parameter.grad is None:
        reason = "" if parameter.requires_grad else " (requires_grad is False)"
        return float("nan"), f"no gradient{reason}"
    gradient = whole(parameter.grad.detach())
    norm = gradient.double().norm().item()
    if not torch.isfinite(gradient).all():
        return norm, "gradient has NaN or Inf"
    return norm, "gradient is zero" if norm == 0.0 and not may_be_zero else None


def capture_lora_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every adapter's parameters, by name ("<path>.lora_A.<adapter>", ...), on the CPU.

    Capture before and after training and compare: see `unchanged_weights`. A sharded model's are
    gathered: every process calls this.
    """
    return {
        name: whole(parameter.detach()).to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if is_adapter_parameter(name)
    }


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
    columns = {"lora_a": "d_lora_A", "lora_b": "d_lora_B"}
    for name, title in (("lora_bias", "d_lora_bias"), ("magnitude", "d_magnitude")):
        if any(getattr(row, name) is not None for row in rows):
            columns[name] = title
    titles = [f"|{title}| median (min .. max)" for title in columns.values()]
    lines = [_line("projection", "layers", titles)]
    for name, members in groups.items():
        spreads = [_spread([getattr(row, column) for row in members]) for column in columns]
        if all(row.b_is_zero for row in members):
            spreads[0] = "0, as it must be while B is 0"
        lines.append(_line(name, str(len(members)), spreads))
    return "\n".join(lines)


def _line(projection: str, layers: str, spreads: list[str]) -> str:
    *leading, last = spreads
    return f"{projection:<12} {layers:>6}  " + "".join(f"{text:<36}" for text in leading) + last


def _spread(norms: list[float | None]) -> str:
    found = [norm for norm in norms if norm is not None]
    if not found:
        return "-"
    return f"{median(found):.2e} ({min(found):.2e} .. {max(found):.2e})"
