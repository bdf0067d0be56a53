"""The tables and plots of a benchmark run, from its JSON.

    python -m bench.report [FILE] [--only SECTION] [--plots DIRECTORY]

Prints markdown: the machine, whole steps, operations, memory, targets, plans. Without FILE it takes
the newest of bench/results. A ratio is the median of the rounds' paired ratios, with the quartiles.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.machine import ROOT, native_16bit
from bench.targets import verdicts

RESULTS = ROOT / "bench" / "results"
PEER_NAMES = {
    "frozen": "frozen floor",
    "transformers": "transformers",
    "peft": "PEFT default",
    "peft_autocast": "PEFT under autocast",
    "peft_bf16": "PEFT, 16-bit adapters",
    "accelerated": "PEFT, accelerated",
    "addmm": "addmm_ Function",
    "addmm_liger": "addmm_ Function + Liger",
    "liger": "Liger",
    "ours": "ours",
}
EMULATED = "This CPU emulates bfloat16: its products are slower than float32's."
BUSY = (
    "**The machine was busy when this run began, or shortly before: its times may not be sound.**"
)
BUSY_LOAD = 0.25
Results = Mapping[str, Any]


def markdown(results: Results, only: str | None = None) -> str:
    """All tables of a run, or one section of them (a key of SECTIONS), without its heading."""
    if only is not None:
        return SECTIONS[only][1](results) + "\n"
    parts = []
    for title, render in SECTIONS.values():
        text = render(results)
        if text:
            parts.append(f"### {title}\n\n{text}" if title else text)
    return "\n\n".join(parts) + "\n"


def machine_lines(results: Results) -> str:
    """What was measured on, and its two rates."""
    machine, rates = results["machine"], results["ceilings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    gpu = machine.get("gpu")
    driver = f", driver {gpu['driver']}, CUDA {gpu['cuda']}" if gpu else ""
    matmul = ", ".join(
        f"{rate / 1e9:,.0f} GFLOP/s {name}" for name, rate in rates["matmul"].items()
    )
    return (
        f"{machine['name']}{driver}; {machine['threads']} threads; {versions}; commit "
        f"{machine['commit']}, {machine['date']}; load {machine['load_before']} at the start.  \n"
        f"Measured ceilings: matmul {matmul}; copy {rates['copy'] / 1e9:,.1f} GB/s."
        + ("" if machine["device"] != "cpu" or native_16bit(rates) else f"  \n{EMULATED}")
        + (f"  \n{BUSY}" if machine["load_before"] > BUSY_LOAD * machine["cores"] else "")
    )


def step_tables(results: Results) -> str:
    """A table for each step case: every peer a row."""
    tables = []
    for case in results["cases"]:
        if case["op"] != "step":
            continue
        layers = f", {case['layers']} layers" if "layers" in case else ""
        graph = ", CUDA graph" if case["graph"] else ""
        weights = ", random weights" if case.get("weights") == "random" else ""
        what = f"{case['model']}{layers}{weights}"
        title = f"**{what}, {case['tokens']} tokens, {case['dtype']}{graph}**"
        header = ["", "time", "tokens/s", "over floor", "over ours", "share of roofline"]
        rows = [[*header, "peak memory", "gradient norms", "error over PEFT's"]]
        for name, peer in case["peers"].items():
            rows.append([PEER_NAMES[name], *_step_cells(peer, _peak(results, case, name))])
        tables.append(f"{title}\n\n{_table(rows)}")
    return "\n\n".join(tables) or "none"


def _peak(results: Results, case: Mapping[str, Any], name: str) -> float | None:
    """A step's peak memory: its own, or on a CPU that of the same step in a process of its own."""
    own = case["peers"][name].get("peak_bytes")
    same = (
        entry.get("peak_bytes")
        for entry in results["memory"]
        if entry["peer"] == name
        and all(entry.get(key) == case[key] for key in ("model", "dtype", "tokens"))
    )
    return own or next(same, None)


def _step_cells(peer: Mapping[str, Any], peak: float | None) -> list[str]:
    if "fault" in peer:
        return [peer["fault"], *["-"] * 7]
    norms = peer["gradient_norms"]
    return [
        _seconds(peer["seconds"]),
        f"{peer['tokens_per_s']:,.0f}",
        _ratio(peer.get("over_base")),
        _ratio(peer.get("over_ours")),
        f"{peer['floor_share']:.0%}",
        _bytes(peak),
        f"{norms['least']:.1e} .. {norms['largest']:.1e}",
        f"{peer['error_ratio']:.2f}" if "error_ratio" in peer else "-",
    ]


def op_tables(results: Results) -> str:
    """Projections against the frozen layer, everything else against transformers."""
    tables = []
    for base, title in (
        ("frozen", "Projections with an adapter, time over the frozen layer's"),
        ("transformers", "Other operations, time over transformers'"),
    ):
        cases = [c for c in results["cases"] if c["op"] != "step" and base in c["peers"]]
        if not cases:
            continue
        names = [name for name in PEER_NAMES if any(name in c["peers"] for c in cases)]
        others = [name for name in names if name != base]
        header = ["model", "part", "tokens", "direction", "dtype", PEER_NAMES[base]]
        rows = [[*header, *(PEER_NAMES[name] for name in others), "ours, share of roofline"]]
        for case in cases:
            peers = case["peers"]
            direction = case["direction"] + (", CUDA graph" if case["graph"] else "")
            rows.append(
                [
                    case["model"],
                    case["part"],
                    str(case["tokens"]),
                    direction,
                    case["dtype"],
                    _seconds(peers[base].get("seconds")),
                    *(_op_cell(peers.get(name)) for name in others),
                    f"{peers['ours']['floor_share']:.0%}" if "seconds" in peers["ours"] else "-",
                ]
            )
        tables.append(f"**{title}**\n\n{_table(rows)}")
    return "\n\n".join(tables) or "none"


def _op_cell(peer: Mapping[str, Any] | None) -> str:
    if peer is None:
        return "-"
    return peer["fault"] if "fault" in peer else _ratio(peer.get("over_base"))


def memory_table(results: Results) -> str:
    """Peak bytes: one row for each number of tokens, one column for each peer."""
    entries = results["memory"]
    if not entries:
        return "none"
    names = list(dict.fromkeys(entry["peer"] for entry in entries))
    peaks = {
        (e["model"], e["dtype"], e["tokens"], e["peer"]): e["peak_bytes"]
        for e in entries
        if "peak_bytes" in e
    }
    rows = [["model", "dtype", "tokens", *(PEER_NAMES[name] for name in names)]]
    for key in dict.fromkeys(key[:3] for key in peaks):
        rows.append([*map(str, key), *(_bytes(peaks.get((*key, name))) for name in names)])
    faults = [f"- {PEER_NAMES[e['peer']]}: {e['fault']}" for e in entries if "fault" in e]
    return "\n".join([_table(rows), *faults])


def target_table(results: Results) -> str:
    rows = [["target", "limit", "measured", ""]]
    rows += [[v.name, v.limit, v.measured, v.verdict] for v in verdicts(results)]
    return _table(rows)


def plan_lines(results: Results) -> str:
    """The plans of the operations, one line for each that is different, then of the steps."""
    cases: dict[str, list[str]] = {}
    for case in results["cases"]:
        if case["op"] != "step":
            name = f"{case['model']} {case['part']} x {case['tokens']}"
            cases.setdefault(case["plan"], []).append(name)
    lines = [f"- {plan}: {', '.join(dict.fromkeys(names))}" for plan, names in cases.items()]
    steps: dict[str, list[str]] = {}
    for case in results["cases"]:
        if case["op"] == "step":
            steps.setdefault(case["plan"], []).append(f"`{case['id']}`")
    lines += [f"\n{', '.join(names)}:\n\n```\n{plan}\n```" for plan, names in steps.items()]
    return "\n".join(lines) or "none"


def absent_lines(results: Results) -> str:
    """What the run left out, and why."""
    return "\n".join(f"- {line}" for line in results["not_measured"])


def _table(rows: Iterable[list[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _seconds(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return "-"
    unit, scale = ("s", 1) if spread["median"] >= 1 else ("ms", 1e3)
    values = [spread[key] * scale for key in ("median", "q1", "q3")]
    mid, low, high = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in values)
    return f"{mid} {unit} ({low} .. {high})"


def _ratio(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return "-"
    return f"{spread['median']:.2f} ({spread['q1']:.2f} .. {spread['q3']:.2f})"


def _bytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"


SECTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "machine": ("", machine_lines),
    "step": ("Whole training step", step_tables),
    "ops": ("Operations", op_tables),
    "memory": ("Peak memory of a step", memory_table),
    "targets": ("Targets", target_table),
    "plans": ("What lora_kernels ran", plan_lines),
    "absent": ("Not measured", absent_lines),
}


def newest(directory: Path = RESULTS) -> Path:
    """FileNotFoundError: there is no run."""
    files = [
        path for path in directory.glob("*.json") if "ceilings" in json.loads(path.read_text())
    ]
    if not files:
        raise FileNotFoundError(f"{directory}: no benchmark run there; make bench writes one")
    return max(files, key=lambda path: path.stat().st_mtime)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="a run's JSON; the newest without it")
    parser.add_argument("--only", choices=list(SECTIONS), help="one section, without its heading")
    parser.add_argument("--plots", type=Path, help="also draw the plots into this directory")
    arguments = parser.parse_args()
    try:
        path = arguments.file or newest()
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        print(f"bench.report: error: {error}", file=sys.stderr)
        return 1
    print(markdown(results, arguments.only), end="")
    if arguments.plots:
        from bench.plots import draw

        for drawn in draw(results, arguments.plots, path.stem):
            print(drawn, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
