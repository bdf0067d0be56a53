"""What runs in each LoRA layer of a model: the implementation, the plan, and if not fused, why."""

from collections.abc import Iterable
from dataclasses import dataclass
from re import sub

from torch import nn

from lora_kernels.dispatch import requested, resolve, why_not_triton
from lora_kernels.layers import LoraLinear, lora_layers
from lora_kernels.lora_linear.op import plan_for


@dataclass(frozen=True)
class LayerStatus:
    """One layer's row.

    Attributes:
        name: the layer's path in the model.
        shape: (out_features, in_features).
        rank: the summed rank of the active adapters, 0 if none is.
        adapters: the active adapters, or what stands in their place ("merged: a", "disabled").
        implementation: "triton", "eager", "reference", "base" where the base alone runs, or "none"
            where the implementation that is forced cannot run.
        plan: the plan's method and tiles, or the library's GEMMs.
        reason: why this implementation and not the fused kernel; empty where it is fused.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    adapters: str
    implementation: str
    plan: str
    reason: str


class Status(list[LayerStatus]):
    """The rows of all layers; printed, equal neighbours of repeated blocks are one line."""

    def __str__(self) -> str:
        if not self:
            return "no LoRA layers"
        rows: dict[tuple, list[LayerStatus]] = {}
        for row in self:
            pattern = sub(r"\.\d+\.", ".*.", row.name)
            rows.setdefault((pattern, *_content(row)), []).append(row)
        header = ("layer", "count", "out x in", "rank", "adapters", "runs", "plan", "why not fused")
        table = [header]
        for (pattern, *_), members in rows.items():
            row = members[0]
            name = pattern if len(members) > 1 else row.name
            count, shape = str(len(members)), f"{row.shape[0]} x {row.shape[1]}"
            content = (row.adapters, row.implementation, row.plan, row.reason or "-")
            table.append((name, count, shape, str(row.rank), *content))
        return _aligned(table)


def status(model: nn.Module, tokens: int = 2048) -> Status:
    """Describes what each LoraLinear of a model would run now.

    Args:
        tokens: the number of rows of x that the plan is asked for (batch times sequence length).
    """
    return Status(_layer_status(name, layer, tokens) for name, layer in lora_layers(model))


def _layer_status(name: str, layer: LoraLinear, tokens: int) -> LayerStatus:
    shape = (layer.out_features, layer.in_features)
    if layer.merged_adapters:
        return LayerStatus(
            name, shape, 0, f"merged: {', '.join(layer.merged_adapters)}", "base", "one GEMM", ""
        )
    if layer.disabled or not layer.active_adapters:
        state = "disabled" if layer.disabled else "none"
        return LayerStatus(name, shape, 0, state, "base", "one GEMM", "")
    device, dtype = layer.weight.device, layer.weight.dtype
    rank = sum(layer.lora_A[adapter].shape[0] for adapter in layer.active_adapters)
    dropout = layer.training and any(layer.lora_dropout[a] for a in layer.active_adapters)
    several = dropout and len(layer.active_adapters) > 1
    adapters = " + ".join(layer.active_adapters)
    forced, obstacle = requested("auto"), why_not_triton(device, dtype)
    if forced == "triton" and obstacle is not None:
        return LayerStatus(name, shape, rank, adapters, "none", "-", obstacle)
    implementation = resolve(forced, device, dtype)
    plan, reason = "library GEMMs", ""
    if implementation == "triton":
        chosen = plan_for(tokens, *shape, rank, dtype, device, dropout)
        plan = str(chosen)
        if chosen.method == "library":
            implementation, reason = "eager", chosen.reason
        elif several:
            reason = "adapters after the first: their dropout masks differ"
    elif forced == "auto":
        reason = obstacle or "the interpreter runs only by name"
    else:
        reason = f"implementation({forced!r}) is open"
    return LayerStatus(name, shape, rank, adapters, implementation, plan, reason)


def _content(row: LayerStatus) -> tuple:
    return row.shape, row.rank, row.adapters, row.implementation, row.plan, row.reason


def _aligned(table: Iterable[tuple[str, ...]]) -> str:
    rows = list(table)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
