"""The parts of a verification that are programs of their own: kernel tests, tuner, benchmarks.

Each runs in a process with a time limit. At its limit it is interrupted as by Ctrl-C, so that it
still writes what it has; the row then is no passed one.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from bench.machine import ROOT
from bench.verify_limit import VARIABLE
from bench.verify_rows import Row, Setting, Timer, verdict

# Processes that compile kernels side by side; each holds a CUDA context of this many bytes.
WORKERS = 8
CONTEXT_BYTES = 600_000_000
# Tests with one tensor of several GB run alone.
LARGE_TESTS = "2_31 or beyond_32"
GRACE_SECONDS = 30


@dataclass(frozen=True)
class Finished:
    """A process that ended by itself, or was interrupted at its time limit."""

    code: int
    output: str
    interrupted: bool


def run_program(
    arguments: Sequence[str], seconds: float, memory_bytes: int | None = None
) -> Finished:
    """Runs Python with `arguments` in the repository, its output kept."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if memory_bytes is not None:
        environment[VARIABLE] = str(memory_bytes)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(seconds, 1))
        return Finished(process.returncode, output, False)
    except subprocess.TimeoutExpired:
        pass
    output = ""
    for how in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=GRACE_SECONDS)
            break
    return Finished(process.returncode, output, True)


@dataclass
class TestCounts:
    """What a pytest run reports, from its JUnit file."""

    outcomes: Counter[str]
    by_dtype: dict[str, Counter[str]]
    failures: list[str]
    skips: Counter[str]

    __test__ = False

    @classmethod
    def read(cls, path: Path) -> "TestCounts":
        counts = cls(Counter(), {}, [], Counter())
        if not path.exists():
            return counts
        for case in ElementTree.parse(path).iter("testcase"):
            name = f"{case.get('classname', '')}::{case.get('name', '')}"
            kinds = {child.tag: child for child in case}
            outcome = "passed"
            if "failure" in kinds or "error" in kinds:
                outcome = "failed"
                counts.failures.append(name)
            elif "skipped" in kinds:
                outcome = "skipped"
                counts.skips[kinds["skipped"].get("message", "")] += 1
            counts.outcomes[outcome] += 1
            for dtype in ("bfloat16", "float16", "float32"):
                if f"torch.{dtype}" in name:
                    counts.by_dtype.setdefault(dtype, Counter())[outcome] += 1
        return counts


def kernel_tests(setting: Setting, timer: Timer) -> Iterator[Row]:
    """Every test marked `kernel`, on this device; those with very large tensors one by one."""
    check = "kernel tests"
    missing = [name for name in ("pytest", "hypothesis") if not importlib.util.find_spec(name)]
    if missing:
        yield Row(check, "pytest", "skipped", f"{' and '.join(missing)} not installed")
        return
    if setting.tiny:
        few = "tests/swiglu/test_forward.py::test_float64_is_exact"
        yield _tests(check, "a few", [few], timer.left, None)
        return
    workers: list[str] = []
    count = 1
    if importlib.util.find_spec("xdist"):
        count = min(WORKERS, os.cpu_count() or 1)
        workers = ["-n", str(count), "--dist", "worksteal"]
    share = (setting.memory_bytes - count * CONTEXT_BYTES) // count
    seconds = timer.left * 0.85
    yield _tests(
        check, "all but the largest", ["-k", f"not ({LARGE_TESTS})", *workers], seconds, share
    )
    share = setting.memory_bytes - CONTEXT_BYTES
    yield _tests(check, "more than 2^31 elements", ["-k", LARGE_TESTS], timer.left, share)


def _tests(
    check: str, name: str, selection: list[str], seconds: float, memory_bytes: int | None
) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        options = [
            "-m",
            "kernel and not long",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "bench.verify_limit",
        ]
        finished = run_program(
            ["-m", "pytest", *options, f"--junitxml={report}", *selection], seconds, memory_bytes
        )
        counts = TestCounts.read(report)
    return row_of_tests(check, name, finished, counts)


def row_of_tests(check: str, name: str, finished: Finished, counts: TestCounts) -> Row:
    """Passed where every test that was chosen ran and none failed."""
    detail = ", ".join(
        f"{counts.outcomes[kind]} {kind}" for kind in ("passed", "failed", "skipped")
    )
    figures = {
        **counts.outcomes,
        "by_dtype": {dtype: dict(found) for dtype, found in counts.by_dtype.items()},
        "failures": counts.failures,
        "skips": dict(counts.skips),
    }
    by_dtype = [f"{dtype} {found['passed']}" for dtype, found in counts.by_dtype.items()]
    if by_dtype:
        detail += f" (passed by dtype: {', '.join(by_dtype)})"
    if counts.outcomes["failed"]:
        return Row(check, name, "failed", f"{detail}; first: {counts.failures[0]}", figures)
    if finished.interrupted:
        return Row(check, name, "skipped", f"no time was left for all: {detail}", figures)
    if finished.code != 0 or not counts.outcomes["passed"]:
        last = finished.output.strip().splitlines()[-1:]
        return Row(check, name, "failed", f"exit code {finished.code}: {' '.join(last)}", figures)
    return Row(check, name, "passed", detail, figures)


def tuning(setting: Setting, timer: Timer) -> Iterator[Row]:
    """The regeneration of this GPU's table of tiles."""
    check = "tables' regeneration"
    if setting.tiny:
        arguments = ["-m", "bench.tune", "--help"]
    else:
        # No shape is begun later; the last one still ends.
        minutes = max(0.1, (timer.left - GRACE_SECONDS) / 60)
        arguments = ["-m", "bench.tune", "--minutes", f"{minutes:.2f}"]
    finished = run_program(arguments, timer.left + GRACE_SECONDS)
    lines = finished.output.strip().splitlines() or [""]
    if finished.interrupted:
        yield Row(check, "bench.tune", "skipped", f"no time was left: {lines[-1]}")
        return
    yield verdict(
        check, "bench.tune", finished.code == 0, lines[-1], output=finished.output[-4000:]
    )


def benchmarks(setting: Setting, timer: Timer, results: Path) -> Iterator[Row]:
    """The benchmark suite; it writes its JSON and plots into `results`."""
    check = "benchmarks"
    missing = [
        package
        for package, module in (("pytest-benchmark", "pytest_benchmark"), ("peft", "peft"))
        if not importlib.util.find_spec(module)
    ]
    if missing:
        yield Row(check, "bench", "skipped", f"{' and '.join(missing)} not installed")
        return
    options = ["-q", "-p", "no:cacheprovider", "-p", "bench.verify_limit"]
    chosen = ["bench"]
    if setting.tiny:
        chosen = ["bench/test_ops.py", "--bench-sizes", "tiny", "-k", "tiny-o-48"]
    begin = time.time()
    finished = run_program(
        ["-m", "pytest", *chosen, *options, "--bench-results", str(results)],
        timer.left - GRACE_SECONDS,
        None if setting.tiny else setting.memory_bytes - CONTEXT_BYTES,
    )
    written = [path for path in results.glob("*.json") if path.stat().st_mtime >= begin]
    content = json.loads(written[0].read_text()) if written else {}
    yield row_of_benchmarks(check, finished, content.get("cases", []))


def row_of_benchmarks(check: str, finished: Finished, cases: list[dict]) -> Row:
    """Passed where the suite ran to its end and ours has no fault in any case."""
    faults = {
        case["id"]: case["peers"]["ours"]["fault"]
        for case in cases
        if "fault" in case["peers"].get("ours", {})
    }
    measured = f"{len(cases)} cases measured"
    figures = {"cases": len(cases), "faults": faults}
    if faults:
        first = next(iter(faults.items()))
        return Row(check, "bench", "failed", f"{measured}; ours: {first[0]}: {first[1]}", figures)
    if finished.interrupted:
        return Row(check, "bench", "skipped", f"no time was left for all: {measured}", figures)
    if finished.code != 0 or not cases:
        last = " ".join(finished.output.strip().splitlines()[-1:])
        return Row(
            check, "bench", "failed", f"{measured}; exit code {finished.code}: {last}", figures
        )
    return Row(check, "bench", "passed", measured, figures)
