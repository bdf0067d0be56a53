"""What runs in each LoRA layer of a model: the implementation, the plan, and if not fused, why."""

from collections.abc import Iterable
from dataclasses import dataclass
from re import sub

from torch import nn

from lora_kernels.dispatch import requested, resolve, why_not_triton
from lora_kernels.layers import LoraLinear, lora_layers, projections_of
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
        group: the names of the layers that one operation serves together with this one and this
            one's, in order; empty where it runs alone.
        reason: why this implementation and not the fused kernel; empty where it is fused.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    adapters: str
    implementation: str
    plan: str
    reason: str
    group: tuple[str, ...] = ()


class Status(list[LayerStatus]):
    """The rows of all layers; printed, equal neighbours of repeated blocks are one line."""

    def __str__(self) -> str:
        if not self:
            return "no LoRA layers"
        rows: dict[tuple, list[LayerStatus]] = {}
        for row in self:
            pattern = sub(r"\.\d+\.", ".*.", row.name)
            rows.setdefault((pattern, *_content(row)), []).append(row)
        header = (
            "layer", "count", "out x in", "rank", "adapters", "runs", "in one op", "plan",
            "why not fused",
        )  # fmt: skip
        table = [header]
        for (pattern, *_), members in rows.items():
            row = members[0]
            name = pattern if len(members) > 1 else row.name
            count, shape = str(len(members)), f"{row.shape[0]} x {row.shape[1]}"
            group = " ".join(row.group) or "-"
            content = (row.adapters, row.implementation, group, row.plan, row.reason or "-")
            table.append((name, count, shape, str(row.rank), *content))
        return _aligned(table)


def status(model: nn.Module, tokens: int = 2048) -> Status:
    """Describes what each LoraLinear of a model would run now.

    Args:
        tokens: the number of rows of x that the plan is asked for (batch times sequence length).
    """
    groups = _groups(model)
    return Status(
        _layer_status(name, layer, tokens, groups.get(name, {}))
        for name, layer in lora_layers(model)
    )


def _groups(model: nn.Module) -> dict[str, dict[str, LoraLinear]]:
    """By layer's path: the layers with an adapter, by name, that one operation serves together.

    A module that calls `grouped_projection` names its children in `projection_groups`.
    """
    groups: dict[str, dict[str, LoraLinear]] = {}
    for path, module in model.named_modules():
        for names in getattr(module, "projection_groups", ()):
            children = [getattr(module, name) for name in names]
            together = projections_of(children)
            if together is None:
                continue
            members = {
                name: child
                for name, child, (_, lora_a, *_) in zip(names, children, together[0], strict=True)
                if lora_a is not None
            }
            prefix = f"{path}." if path else ""
            groups.update({f"{prefix}{name}": members for name in members if len(members) > 1})
    return groups


def _layer_status(
    name: str, layer: LoraLinear, tokens: int, group: dict[str, LoraLinear]
) -> LayerStatus:
    shape = (layer.out_features, layer.in_features)
    if layer.merged_adapters:
        return LayerStatus(
            name, shape, 0, f"merged: {', '.join(layer.merged_adapters)}", "base", "one GEMM", ""
        )
    if layer.disabled or not layer.active_adapters:
        state = "disabled" if layer.disabled else "none"
        return LayerStatus(name, shape, 0, state, "base", "one GEMM", "")
    device, dtype = layer.weight.device, layer.weight.dtype
    rank = _rank(layer)
    dropout = layer.training and any(layer.lora_dropout[a] for a in layer.active_adapters)
    several = dropout and len(layer.active_adapters) > 1
    adapters = " + ".join(layer.active_adapters)
    forced, obstacle = requested("auto"), why_not_triton(device, dtype)
    if forced == "triton" and obstacle is not None:
        return LayerStatus(name, shape, rank, adapters, "none", "-", obstacle)
    implementation = resolve(forced, device, dtype)
    plan, reason = "library GEMMs", ""
    if implementation == "triton":
        layers = list(group.values()) or [layer]
        n = tuple(member.out_features for member in layers)
        ranks = tuple(_rank(member) for member in layers)
        chosen = plan_for(tokens, n, layer.in_features, ranks, dtype, device, dropout)
        plan = str(chosen)
        if chosen.method == "library":
            implementation, reason = "eager", chosen.reason
        elif several:
            reason = "adapters after the first: their dropout masks differ"
    elif forced == "auto":
        reason = obstacle or "the interpreter runs only by name"
    else:
        reason = f"implementation({forced!r}) is open"
    together = tuple(group) if implementation != "reference" else ()
    return LayerStatus(name, shape, rank, adapters, implementation, plan, reason, together)


def _rank(layer: LoraLinear) -> int:
    return sum(layer.lora_A[adapter].shape[0] for adapter in layer.active_adapters)


def _content(row: LayerStatus) -> tuple:
    return row.shape, row.rank, row.adapters, row.implementation, row.plan, row.reason, row.group


def _aligned(table: Iterable[tuple[str, ...]]) -> str:
    rows = list(table)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
