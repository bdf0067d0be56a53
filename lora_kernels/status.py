"""What runs in each LoRA layer of a model: the implementation, the plan, and if not fused, why."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from re import sub
from typing import Any

from torch import nn

from lora_kernels.class_swap import recipe
from lora_kernels.dispatch import requested, resolve, why_not_triton
from lora_kernels.layers import LoraLinear, lora_layers, projections_of
from lora_kernels.lora_linear.op import plan_for
from lora_kernels.peft import peft_layers, peft_projection
from lora_kernels.peft_linear import shareable, shared_projections
from lora_kernels.peft_parents import counts, shared_groups


@dataclass(frozen=True)
class LayerStatus:
    """One layer's row.

    Attributes:
        name: the layer's path in the model.
        shape: (out_features, in_features).
        rank: the summed rank of the active adapters, 0 if none is.
        adapters: the active adapters, or what stands in their place ("merged: a", "disabled").
        implementation: "triton", "eager", "reference", "base" where the base alone runs, "peft"
            where PEFT's own forward does, or "none" where the implementation that is forced cannot
            run.
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
    """The rows of all layers; printed, equal neighbours of repeated blocks are one line.

    Attributes:
        modules: in a model that `accelerate` changed, by kind ("RMSNorm", "SwiGLU", "RoPE"): how
            many modules are fused, of how many that look like it.
    """

    def __init__(
        self, rows: Iterable[LayerStatus], modules: dict[str, tuple[int, int]] | None = None
    ) -> None:
        super().__init__(rows)
        self.modules = modules or {}

    def __str__(self) -> str:
        counted = [
            (kind, f"{fused} of {total} fused") for kind, (fused, total) in self.modules.items()
        ]
        return "\n".join([self._table(), *([_aligned(counted)] if counted else [])])

    def _table(self) -> str:
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
    """Describes what each LoRA layer of a model would run now.

    Args:
        model: one with LoraLinear layers, or a PEFT model, accelerated or not.
        tokens: the number of rows of x that the plan is asked for (batch times sequence length).
    """
    groups = _groups(model)
    rows = (_layer_status(name, layer, tokens, groups.get(name, {})) for name, layer in _all(model))
    accelerated = any(recipe(module) for module in model.modules())
    return Status(rows, counts(model) if accelerated else None)


@dataclass(frozen=True)
class _Layer:
    """What a row is made from, for LoraLinear and PEFT's layers alike.

    Attributes:
        alone: what stands for the adapters where the base alone runs, else empty.
        peft: why PEFT's forward runs, else empty.
        beside: what is computed beside the one operation, else empty.
    """

    weight: Any
    shape: tuple[int, int]
    rank: int
    adapters: str
    dropout: bool
    alone: str
    peft: str = ""
    beside: str = ""


def _all(model: nn.Module) -> Iterator[tuple[str, _Layer]]:
    for name, layer in lora_layers(model):
        yield name, _lora_linear(layer)
    for name, layer in peft_layers(model):
        yield name, _peft_layer(layer)


def _lora_linear(layer: LoraLinear) -> _Layer:
    active = layer.active_adapters
    dropout = layer.training and any(layer.lora_dropout[name] for name in active)
    why = "their dropout masks differ" if dropout else "DoRA scales what is before it"
    return _Layer(
        weight=layer.weight,
        shape=(layer.out_features, layer.in_features),
        rank=sum(layer.lora_A[name].shape[0] for name in active),
        adapters=" + ".join(active),
        dropout=dropout,
        alone=_base_alone(layer.merged_adapters, layer.disabled, active),
        beside=f"adapters after the first: {why}" if layer.projection() is None else "",
    )


def _peft_layer(layer: Any) -> _Layer:
    active = [name for name in layer.active_adapters if name in layer.r]
    single = peft_projection(layer)
    return _Layer(
        weight=getattr(layer.get_base_layer(), "weight", None),
        shape=(layer.out_features, layer.in_features),
        rank=sum(layer.r[name] for name in active),
        adapters=" + ".join(active),
        dropout=not isinstance(single, str) and single[1] > 0.0,
        alone=_base_alone(layer.merged_adapters, layer.disable_adapters, active),
        peft=single if isinstance(single, str) else "",
    )


def _base_alone(merged: list[str], disabled: bool, active: list[str]) -> str:
    if merged:
        return f"merged: {', '.join(merged)}"
    return "disabled" if disabled else "" if active else "none"


def _groups(model: nn.Module) -> dict[str, dict[str, _Layer]]:
    """By layer's path: the layers with an adapter, by name, that one operation serves together.

    A module that calls `grouped_projection` names its children in `projection_groups`.
    """
    groups: dict[str, dict[str, _Layer]] = {}
    for path, module in model.named_modules():
        together = [_together(module, names) for names in getattr(module, "projection_groups", ())]
        together += [_sharing(module, names) for names in shared_groups(module)]
        prefix = f"{path}." if path else ""
        for members in together:
            groups.update({f"{prefix}{name}": members for name in members if len(members) > 1})
    return groups


def _together(module: nn.Module, names: tuple[str, ...]) -> dict[str, _Layer]:
    children = [getattr(module, name) for name in names]
    found = projections_of(children)
    if found is None:
        return {}
    return {
        name: _lora_linear(child)
        for name, child, (_, lora_a, *_) in zip(names, children, found[0], strict=True)
        if lora_a is not None
    }


def _sharing(module: nn.Module, names: tuple[str, ...]) -> dict[str, _Layer]:
    """Likewise the children of an accelerated parent."""
    children = shareable(module, names)
    found = shared_projections(children) or []
    members = [child for child, single in zip(children, found, strict=False) if single is not None]
    return {
        name: _peft_layer(child)
        for name in names
        if any((child := getattr(module, name, None)) is member for member in members)
    }


def _layer_status(name: str, layer: _Layer, tokens: int, group: dict[str, _Layer]) -> LayerStatus:
    if layer.alone:
        return LayerStatus(name, layer.shape, 0, layer.alone, "base", "one GEMM", "")
    common = (name, layer.shape, layer.rank, layer.adapters)
    if layer.peft:
        return LayerStatus(*common, "peft", "-", layer.peft)
    device, dtype = layer.weight.device, layer.weight.dtype
    forced, obstacle = requested("auto"), why_not_triton(device, dtype)
    if forced == "triton" and obstacle is not None:
        return LayerStatus(*common, "none", "-", obstacle)
    implementation = resolve(forced, device, dtype)
    plan, reason = "library GEMMs", ""
    if implementation == "triton":
        layers = list(group.values()) or [layer]
        n = tuple(member.shape[0] for member in layers)
        ranks = tuple(member.rank for member in layers)
        chosen = plan_for(tokens, n, layer.shape[1], ranks, dtype, device, layer.dropout)
        plan, reason = str(chosen), layer.beside
        if chosen.method == "library":
            implementation, reason = "eager", chosen.reason
    elif forced == "auto":
        reason = obstacle or "the interpreter runs only by name"
    else:
        reason = f"implementation({forced!r}) is open"
    together = tuple(group) if implementation != "reference" else ()
    return LayerStatus(*common, implementation, plan, reason, together)


def _content(row: LayerStatus) -> tuple:
    return row.shape, row.rank, row.adapters, row.implementation, row.plan, row.reason, row.group


def _aligned(table: Iterable[tuple[str, ...]]) -> str:
    rows = list(table)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
