"""The figures this project promises, and whether a run has met them.

A target whose measurement the run does not have is "not measured", with the reason; nothing is
carried over from another run. Ratios are medians of the rounds' paired ratios.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any, Literal

from bench.shapes import GROUPS

Results = Mapping[str, Any]
Case = Mapping[str, Any]
# A number, or the median of some with their quartiles.
Value = float | Mapping[str, float]


@dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        relation: how `limit` bounds the measured value.
        device: where it is promised.
        value: the values of a run by what distinguishes them (a dtype, a shape); none if the run
            has none.
        absent: why there may be none.
        gpu: a pattern of the GPU's name, where the promise depends on its class.
    """

    name: str
    relation: Literal["<=", ">="]
    limit: float
    device: Literal["cpu", "cuda"]
    value: Callable[[Results], Mapping[str, Value]]
    absent: str = "the run has no such case"
    gpu: str = ""


@dataclass(frozen=True)
class Verdict:
    name: str
    limit: str
    measured: str
    verdict: Literal["met", "missed", "not measured"]


def verdicts(results: Results, targets: Sequence[Target] | None = None) -> list[Verdict]:
    """One line for each target and each value that the run has of it."""
    lines = []
    for target in TARGETS if targets is None else targets:
        limit = f"{target.relation} {target.limit:g}"
        if target.device != results["machine"]["device"]:
            where = "a CUDA GPU" if target.device == "cuda" else "a CPU run"
            lines.append(Verdict(target.name, limit, f"needs {where}", "not measured"))
            continue
        if not re.search(target.gpu, results["machine"]["name"]):
            lines.append(Verdict(target.name, limit, "another class of GPU", "not measured"))
            continue
        values = target.value(results)
        if not values:
            lines.append(Verdict(target.name, limit, target.absent, "not measured"))
        for what, value in values.items():
            number = value if isinstance(value, float) else value["median"]
            measured = f"{number:.3f}"
            if not isinstance(value, float):
                measured += f" ({value['q1']:.3f} .. {value['q3']:.3f})"
            met = number <= target.limit if target.relation == "<=" else number >= target.limit
            name = f"{target.name} ({what})"
            lines.append(Verdict(name, limit, measured, "met" if met else "missed"))
    return lines


def _cases(results: Results, **wanted: Any) -> Iterator[Case]:
    for case in results["cases"]:
        if all(case[key] == value for key, value in wanted.items()):
            yield case


def _step_ratio(model: str, peer: str, of_ours: bool, **wanted: Any) -> Callable[..., Any]:
    """A peer's time over ours, or ours over the frozen floor, by dtype."""

    def value(results: Results) -> dict[str, Value]:
        key = "over_ours" if of_ours else "over_base"
        return {
            f"{case['dtype']}, {case['tokens']} tokens": case["peers"][peer][key]
            for case in _cases(results, op="step", model=model, graph=False, **wanted)
            if key in case["peers"].get(peer, {})
        }

    return value


def _op_ratio(peer: str, key: str, of_all: bool = False, **wanted: Any) -> Callable[..., Any]:
    """The ratios of all projections of the matching cases, or their geometric mean."""

    def value(results: Results) -> dict[str, Value]:
        ratios = {
            f"{case['part']}, {case['tokens']} tokens": case["peers"][peer][key]
            for case in _cases(results, **wanted)
            if case["part"] in GROUPS and key in case["peers"].get(peer, {})
        }
        if of_all and ratios:
            mean = geometric_mean(ratio["median"] for ratio in ratios.values())
            return {f"geometric mean of {len(ratios)}": mean}
        return ratios

    return value


def _memory_ratio(model: str) -> Callable[..., Any]:
    """Our peak over PEFT's, by dtype and number of tokens."""

    def value(results: Results) -> dict[str, Value]:
        peaks = {
            (entry["dtype"], entry["tokens"], entry["peer"]): entry["peak_bytes"]
            for entry in results["memory"]
            if entry["model"] == model and "peak_bytes" in entry
        }
        return {
            f"{dtype}, {tokens} tokens": peak / peaks[dtype, tokens, "peft"]
            for (dtype, tokens, peer), peak in peaks.items()
            if peer == "ours" and (dtype, tokens, "peft") in peaks
        }

    return value


def _step_peak_ratio(model: str) -> Callable[..., Any]:
    def value(results: Results) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for case in _cases(results, op="step", model=model, graph=False):
            ours, peft = (
                case["peers"].get(name, {}).get("peak_bytes") for name in ("ours", "peft")
            )
            if ours and peft:
                values[f"{case['dtype']}, {case['tokens']} tokens"] = ours / peft
        return values

    return value


_8B, _SMALL = "Llama-3.1-8B", "SmolLM2-135M"
_TRAINING: dict[str, Any] = {"model": _8B, "tokens": 8192, "graph": False}

TARGETS = [
    Target(
        "CPU, SmolLM2-135M, whole step: PEFT default over ours",
        ">=",
        1.35,
        "cpu",
        _step_ratio(_SMALL, "peft", True),
    ),
    Target(
        "CPU, SmolLM2-135M, whole step: ours over the frozen floor",
        "<=",
        1.10,
        "cpu",
        _step_ratio(_SMALL, "ours", False),
    ),
    Target(
        "CPU, SmolLM2-135M, peak memory: ours over PEFT default",
        "<=",
        1.0,
        "cpu",
        _memory_ratio(_SMALL),
    ),
    Target(
        "GPU, 8B shapes, forward: ours over frozen, data-centre card",
        "<=",
        1.02,
        "cuda",
        _op_ratio("ours", "over_base", direction="forward", **_TRAINING),
        gpu="^(?!.*RTX)",
    ),
    Target(
        "GPU, 8B shapes, forward: ours over frozen, RTX card",
        "<=",
        1.00,
        "cuda",
        _op_ratio("ours", "over_base", direction="forward", **_TRAINING),
        gpu="RTX",
    ),
    Target(
        "GPU, 8B shapes, forward and backward: ours over frozen",
        "<=",
        1.05,
        "cuda",
        _op_ratio("ours", "over_base", direction="forward+backward", **_TRAINING),
    ),
    Target(
        "GPU, DRAM traffic of 8192 x 4096 x 4096, forward and backward, GiB",
        "<=",
        0.55,
        "cuda",
        lambda results: {},
        absent="needs Nsight Compute's counters",
    ),
    Target(
        "GPU, 8B block stack, whole step: PEFT default over ours",
        ">=",
        1.5,
        "cuda",
        _step_ratio(_8B, "peft", True),
    ),
    Target(
        "GPU, 8B block stack, whole step: PEFT with bf16 adapters over ours",
        ">=",
        1.35,
        "cuda",
        _step_ratio(_8B, "peft_bf16", True),
    ),
    Target(
        "GPU, 8B block stack, whole step: addmm_ Function over ours",
        ">=",
        1.12,
        "cuda",
        _step_ratio(_8B, "addmm", True),
    ),
    Target(
        "GPU, 8B block stack, whole step: addmm_ Function with Liger over ours",
        ">=",
        1.12,
        "cuda",
        _step_ratio(_8B, "addmm_liger", True),
        absent="needs liger-kernel",
    ),
    Target(
        "GPU, 8B block stack, whole step: ours over the frozen floor",
        "<=",
        1.03,
        "cuda",
        _step_ratio(_8B, "ours", False),
    ),
    Target(
        "GPU, 8B block stack, peak memory: ours over PEFT default",
        "<=",
        0.7,
        "cuda",
        _step_peak_ratio(_8B),
    ),
    Target(
        "GPU, 8B shapes, decode under CUDA graphs: ours over frozen",
        "<=",
        1.02,
        "cuda",
        _op_ratio("ours", "over_base", model=_8B, direction="decode", graph=True),
    ),
    Target(
        "GPU, SmolLM2-135M, a projection forward and backward: PEFT default over ours",
        ">=",
        4.0,
        "cuda",
        _op_ratio(
            "peft", "over_ours", True, model=_SMALL, direction="forward+backward", graph=False
        ),
    ),
]
