"""The table of reliability: each class of fault, the tests against it, and what they measured.

    python -m pytest -m "long or not long" -p bench.reliability     runs the tests, then the table
    python -m bench.reliability [FILE]                              the table of an earlier run

As a plugin it watches a run of the tests. A test belongs to every row whose pattern its name
matches, and gives figures by the fixture `figure` (tests/conftest.py). A row is

    held       a test of it passed, none failed, and no figure is beyond its limit
    failed     otherwise, where one ran
    not run    no test of it ran to its end; that is never counted as held

The table is printed as markdown and written to bench/results/reliability.json.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench.machine import ROOT, bench_device, describe

RESULT = ROOT / "bench" / "results" / "reliability.json"


@dataclass(frozen=True)
class FaultClass:
    """A row of the table.

    Attributes:
        tests: searched for in a test's name, which is "tests/file.py::function[parameters]".
        marker: tests with this marker belong to the row as well.
        elsewhere: what shows it where the tests cannot.
        counted: figures that are a number of tests of the row, passed of all: what they count, and
            a pattern.
    """

    number: int
    name: str
    tests: str
    marker: str = ""
    elsewhere: str = ""
    counted: tuple[tuple[str, str], ...] = ()


GPU = "python -m bench.verify_gpu, on a GPU"
FAULT_CLASSES = (
    FaultClass(1, "numeric error below a loose tolerance",
               r"accuracy|at_most_twice|low_precision|test_error_is", elsewhere=GPU),
    FaultClass(2, "tests that cannot fail",
               r"test_the_bound_sees|mutants_are_killed", elsewhere="python -m bench.mutants"),
    FaultClass(3, "wrong backward formula",
               r"gradcheck|requires_grad_pattern|needs_input_grad|what_is_required",
               counted=(("gradchecks in float64", r"gradcheck"),
                        ("patterns of requires_grad", r"pattern|needs_input|what_is_required"))),
    FaultClass(4, "strides", r"layout|strides|expanded|memory_order|_rows_may_lie",
               counted=(("cases", ""),)),
    FaultClass(5, "odd shapes, tails, ranks",
               r"any_shape|any_input|many_inputs|ranks|test_shapes|sizes_of"),
    FaultClass(6, "empty batch", r"no_rows|empty_inputs|nothing_to_score|launched_for_(no|em)",
               counted=(("empty inputs, forward and backward", r"test_(no_rows|empty|nothing_to)"),
                        ("without a launch", r"launched_for"))),
    FaultClass(7, "more than 2^31 elements", r"64_bit|int64|2_31|32_bit", elsewhere=GPU),
    FaultClass(8, "grid limit of 65,535", r"65_535|axis_0"),
    FaultClass(9, "uninitialised memory (kernel tests run poisoned)",
               r"every_element_is_written|nothing_beyond|lies_outside", marker="kernel",
               counted=(("tests on poisoned memory", ""),
                        ("guard bands intact", r"every_element|nothing_beyond|lies_outside"))),
    FaultClass(10, "NaN and infinity", r"_nan_|infinit|not_finite|non_finite"),
    FaultClass(11, "races, out of bounds", r"compute_sanitizer_finds", elsewhere=GPU),
    FaultClass(12, "nondeterminism",
               r"same_bits|bitwise|repeats|two_processes", elsewhere=GPU),
    FaultClass(13, "miscompilation", r"test_compile_report|compile_cases", elsewhere=GPU),
    FaultClass(14, "writes into what is given or saved",
               r"test_untouched|not_written|is_written_into|neither_written|backward_twice"),
    FaultClass(15, "wrong device or stream", r"two_gpus", elsewhere="two GPUs"),
    FaultClass(16, "dtypes, autocast", r"autocast|test_dtypes|dtypes_of|results_have_their"),
    FaultClass(17, "torch.compile", r"opcheck|compiles|torch_compile|compiled"),
    FaultClass(18, "activation checkpointing",
               r"checkpointing|checkpoint_replay|one_step_trains|step_moves"),
    FaultClass(19, "gradient accumulation, packing", r"accumulation|at_once_equal|packed"),
    FaultClass(20, "several processes", r"test_distributed|test_processes"),
    FaultClass(21, "convergence", r"hundred_steps"),
    FaultClass(22, "model parity",
               r"rope_type|far_positions_are|equal_peft|transformers_llama|equals_transformers"),
    FaultClass(23, "rotary embedding", r"tests/rope/|test_rotations"),
    FaultClass(24, "resuming", r"resum"),
    FaultClass(25, "a crash during a save", r"test_crashes|stops_half_way|checkpoint_store"),
    FaultClass(26, "an adapter that loads as nothing", r"test_adapter_files",
               counted=(("faulty adapters refused by key", r"are_refused|missing|corrupt"),)),
    FaultClass(27, "wrong scaling", r"rank_and_scaling|rslora|wrong_target|scaled_delta",
               counted=(("cases", ""),)),
    FaultClass(28, "rounding in a merge", r"merg"),
    FaultClass(29, "malicious or corrupt files",
               r"tests/hostile/|checkpoint_files|loads_a_pickle"),
    FaultClass(30, "configuration errors", r"test_config|invalid_options|test_cli"),
)  # fmt: skip


@dataclass
class Outcome:
    """What is known of one test."""

    status: str = ""
    markers: frozenset[str] = frozenset()
    figures: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Row:
    """One class of faults after a run.

    `figures` are, by name, {"value": ...} and the "limit" of it, or the number "of" which it is.
    """

    number: int
    name: str
    status: str
    passed: int
    failed: int
    skipped: int
    figures: dict[str, dict[str, float]]
    elsewhere: str = ""


class Recorder:
    """Follows a run where its reports arrive, and makes the rows of it."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = self.outcomes.setdefault(report.nodeid, Outcome())
        outcome.markers = frozenset(report.keywords)
        if report.failed:
            outcome.status = "failed"
        elif report.skipped or report.when == "call":
            outcome.status = outcome.status or report.outcome
        if report.when == "teardown":
            outcome.figures += [value for name, value in report.user_properties if name == "figure"]

    def rows(self, classes: Sequence[FaultClass] = FAULT_CLASSES) -> list[Row]:
        return [self._row(fault) for fault in classes]

    def _row(self, fault: FaultClass) -> Row:
        named = {
            name: outcome
            for name, outcome in self.outcomes.items()
            if re.search(fault.tests, name) or (fault.marker and fault.marker in outcome.markers)
        }
        outcomes = named.values()
        counts = {
            status: sum(outcome.status == status for outcome in outcomes)
            for status in ("passed", "failed", "skipped")
        }
        # A test may measure for another row than the one that its name is in.
        figures = combined(
            figure
            for outcome in self.outcomes.values()
            for figure in outcome.figures
            if figure["row"] == fault.number
        )
        for what, pattern in fault.counted:
            of = [outcome for name, outcome in named.items() if re.search(pattern, name)]
            if of:
                passed = sum(outcome.status == "passed" for outcome in of)
                figures[what] = {"value": passed, "of": len(of)}
        beyond = any(
            not figure["value"] <= figure["limit"]
            for figure in figures.values()
            if "limit" in figure
        )
        ran = counts["passed"] + counts["failed"]
        status = "not run" if not ran else "failed" if counts["failed"] or beyond else "held"
        return Row(fault.number, fault.name, status, **counts, figures=figures,
                   elsewhere=fault.elsewhere)  # fmt: skip


def combined(figures: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """One value for each name, by the rule that its figures state."""
    rules = {"max": max, "min": min, "sum": lambda values: sum(values)}
    values: dict[str, list[float]] = {}
    rule: dict[str, str] = {}
    limits: dict[str, float] = {}
    for figure in figures:
        name = figure["name"]
        values.setdefault(name, []).append(figure["value"])
        rule[name] = figure["combine"]
        if "limit" in figure:
            limits[name] = min(figure["limit"], limits.get(name, figure["limit"]))
    return {
        name: {"value": rules[rule[name]](found)}
        | ({"limit": limits[name]} if name in limits else {})
        for name, found in sorted(values.items())
    }


def number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e12 else f"{value:.2g}"


def markdown(content: Mapping[str, Any]) -> str:
    """The table, and a line of what it was measured on."""
    lines = ["| # | fault class | | tests | measured |", "|--:|---|---|---|---|"]
    for row in content["rows"]:
        counts = ", ".join(
            f"{row[kind]:,} {kind}" for kind in ("passed", "failed", "skipped") if row[kind]
        )
        figures = "; ".join(
            f"{name}: {number(figure['value'])}"
            + (f" (≤ {number(figure['limit'])})" if "limit" in figure else "")
            + (f" of {figure['of']:,}" if "of" in figure else "")
            for name, figure in row["figures"].items()
        )
        if row["elsewhere"]:
            figures += ("; " if figures else "") + f"not here: {row['elsewhere']}"
        lines.append(
            f"| {row['number']} | {row['name']} | {row['status']} | {counts} | {figures} |"
        )
    counts = [row["status"] for row in content["rows"]]
    summary = ", ".join(
        f"{counts.count(status)} {status}" for status in ("held", "failed", "not run")
    )
    machine = content["machine"]
    versions = ", ".join(
        f"{name} {machine['packages'][name]}"
        for name in ("torch", "triton", "transformers")
        if name in machine["packages"]
    )
    lines += [
        "",
        f"{summary}. {content['tests']:,} tests ran on {machine['name']} ({machine['device']}), "
        f"{versions}, commit {machine['commit']}, {machine['date']}.",
    ]
    return "\n".join(lines)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reliability", type=Path, default=RESULT, help="where the table's JSON is written"
    )


class Plugin(Recorder):
    """Writes the table at the end of a run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        content = {
            "machine": describe(bench_device()),
            "tests": sum(o.status in ("passed", "failed") for o in self.outcomes.values()),
            "rows": [asdict(row) for row in self.rows()],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        terminalreporter.section("reliability")
        terminalreporter.write_line(markdown(content))
        terminalreporter.write_line(f"written: {self.path}")


def pytest_configure(config: pytest.Config) -> None:
    # Under xdist the reports come together in the process that has no worker's input.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Plugin(config.getoption("--reliability")))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=RESULT, help="a run's JSON")
    options = parser.parse_args(arguments)
    try:
        print(markdown(json.loads(options.file.read_text())))
    except (OSError, ValueError) as error:
        print(f"bench.reliability: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
