"""Three plots of a run: a step's time by part, the ratios by shape, the memory by length.

A step's parts are the operations that were measured alone at the step's own size, each times its
count in the model; what is left of the measured step is attention, residual additions, Python, and
whatever the operations take longer with cold caches.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.report import PEER_NAMES
from bench.shapes import GROUPS, SMOLLM2, TINY

Results = Mapping[str, Any]
COLOURS = {
    "frozen": "#9aa5b1",
    "transformers": "#9aa5b1",
    "peft": "#d1495b",
    "peft_autocast": "#e07a5f",
    "peft_bf16": "#edae49",
    "accelerated": "#3d9aa1",
    "addmm": "#7a5195",
    "addmm_liger": "#9d7bb8",
    "liger": "#66a182",
    "ours": "#00798c",
}
# How often each part is in a step, by the number of layers.
COUNTS = {
    "qkv": lambda layers: layers,
    "o": lambda layers: layers,
    "gate_up": lambda layers: layers,
    "down": lambda layers: layers,
    "rope": lambda layers: layers,
    "rms_norm": lambda layers: layers + 1,
    "rms_norm_residual": lambda layers: layers,
    "swiglu": lambda layers: layers,
    "head": lambda layers: 1,
}


def draw(results: Results, directory: Path, stem: str) -> list[Path]:
    """Writes the plots that the run has figures for, as <stem>-<plot>.png; their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, plot in (
        ("step", _step_by_part),
        ("ratios", _ratios_by_shape),
        ("memory", _memory_by_length),
    ):
        figure = pyplot.figure(figsize=(9, 5), layout="constrained")
        if plot(results, figure.add_subplot()):
            path = directory / f"{stem}-{name}.png"
            figure.savefig(path, dpi=120)
            drawn.append(path)
        pyplot.close(figure)
    return drawn


def step_parts(results: Results, step: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By peer of a step, the seconds of each part that was measured at the step's size."""
    layers = step["layers"]
    ops = {
        case["part"]: case["peers"]
        for case in results["cases"]
        if case["direction"] == "forward+backward"
        and all(case[key] == step[key] for key in ("model", "tokens", "dtype", "graph"))
        and case["op"] != "step"
    }
    parts: dict[str, dict[str, float]] = {}
    for name, peer in step["peers"].items():
        if "seconds" not in peer:
            continue
        seconds: dict[str, float] = {}
        for part, count in COUNTS.items():
            source = name if name == "ours" or part in GROUPS else "transformers"
            measured = ops.get(part, {}).get(source, {}).get("seconds")
            if measured:
                seconds[part] = count(layers) * measured["median"]
        seconds["rest"] = max(0.0, peer["seconds"]["median"] - sum(seconds.values()))
        parts[name] = seconds
    return parts


def _step_by_part(results: Results, axes: Any) -> bool:
    steps = [
        case
        for case in results["cases"]
        if case["op"] == "step" and case["model"] in (SMOLLM2.name, TINY.name)
    ]
    candidates = [(step, step_parts(results, step)) for step in steps]
    candidates = [(s, p) for s, p in candidates if any(len(parts) > 1 for parts in p.values())]
    if not candidates:
        return False
    step, parts = candidates[0]
    # A peer whose projections were not measured alone would be all rest.
    parts = {name: seconds for name, seconds in parts.items() if "qkv" in seconds}
    labels = [PEER_NAMES[name] for name in parts]
    bottom = [0.0] * len(parts)
    for part in (*COUNTS, "rest"):
        heights = [seconds.get(part, 0.0) for seconds in parts.values()]
        axes.bar(labels, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    whole = [step["peers"][name]["seconds"]["median"] for name in parts]
    ends = [[index + side for index in range(len(whole))] for side in (-0.4, 0.4)]
    axes.hlines(whole, *ends, colors="black", label="the step, measured")
    axes.set_ylabel("seconds")
    axes.set_title(f"{step['model']}, {step['tokens']} tokens, {step['dtype']}: a step by part")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def _ratios_by_shape(results: Results, axes: Any) -> bool:
    cases = [
        case
        for case in results["cases"]
        if case["part"] in GROUPS and case["direction"] == "forward+backward" and not case["graph"]
    ]
    names = [
        name
        for name in COLOURS
        if name != "frozen" and any("over_base" in c["peers"].get(name, {}) for c in cases)
    ]
    if not names:
        return False
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = [
            (position, case["peers"][name]["over_base"])
            for position, case in enumerate(cases)
            if "over_base" in case["peers"].get(name, {})
        ]
        medians = [ratio["median"] for _, ratio in found]
        errors = [
            [ratio["median"] - ratio["q1"] for _, ratio in found],
            [ratio["q3"] - ratio["median"] for _, ratio in found],
        ]
        places = [position + (index - (len(names) - 1) / 2) * width for position, _ in found]
        axes.bar(places, medians, width, yerr=errors, label=PEER_NAMES[name], color=COLOURS[name])
    axes.axhline(1.0, color="black", linewidth=1)
    labels = [f"{case['model']}\n{case['part']} x {case['tokens']}" for case in cases]
    axes.set_xticks(range(len(cases)), labels, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("time over the frozen layer's")
    axes.set_title(f"Forward and backward with an adapter, {cases[0]['dtype']}")
    axes.legend()
    return True


def _memory_by_length(results: Results, axes: Any) -> bool:
    entries = [entry for entry in results["memory"] if "peak_bytes" in entry]
    if not entries:
        return False
    first = entries[0]
    same = [e for e in entries if all(e[key] == first[key] for key in ("model", "dtype"))]
    for name in dict.fromkeys(entry["peer"] for entry in same):
        points = [(e["tokens"], e["peak_bytes"] / 2**20) for e in same if e["peer"] == name]
        axes.plot(*zip(*points, strict=True), "o-", label=PEER_NAMES[name], color=COLOURS[name])
    axes.set_xlabel("tokens")
    axes.set_ylabel("peak memory of a step, MiB")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{first['model']}, {first['dtype']}")
    axes.legend()
    return True
