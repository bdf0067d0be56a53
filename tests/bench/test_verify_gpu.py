"""The GPU verification, on the CPU: every check runs, can fail, and never passes what it skipped.

The checks run at tiny sizes through Triton's interpreter, as --dry-run does.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lora_kernels as lk
from bench import (
    verify_commands,
    verify_gpu,
    verify_large,
    verify_limit,
    verify_plans,
    verify_properties,
)
from bench import verify_ratios as ratios
from bench.machine import ROOT
from bench.report import RESULTS
from bench.verify_commands import Finished, TestCounts, row_of_benchmarks, row_of_tests, run_program
from bench.verify_rows import (
    Check,
    Row,
    Setting,
    Timer,
    as_json,
    run_checks,
    summary,
    table,
    verdict,
    within,
)
from lora_kernels import testing
from lora_kernels.lora_linear.op import plan_for
from lora_kernels.swiglu import triton_kernel as swiglu_kernel

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(CUDA, reason="the dry run is the interpreter's")
TINY = Setting(torch.device("cpu"), True, 10**9)
LONG = 600.0


@pytest.fixture
def few(monkeypatch):
    """Two operations in place of nine, and one shape."""
    monkeypatch.setattr(verify_properties, "PARTS", ("o", "swiglu"))
    monkeypatch.setattr(ratios, "PARTS", ("o", "swiglu"))
    monkeypatch.setattr(ratios, "GROUPS", {"o": ratios.GROUPS["o"]})
    monkeypatch.setattr(ratios, "TINY", ratios.ODD_TINY)


CHECKS = {
    "poisoned": (verify_properties.poisoned, 3),
    "repeated": (verify_properties.repeated, 3),
    "opcheck": (verify_properties.checked_by_torch, 2),
    "compiled": (verify_properties.compiled, 2),
    "captured": (verify_properties.captured, 2),
    "ranks": (ratios.ranks, 5),
    "operations": (ratios.operations, 16),
    "decoding": (ratios.decoding, 2),
    "tables": (verify_plans.tables, 4),
    "large": (verify_large.large, 6),
}


@pytest.mark.kernel
@pytest.mark.parametrize("name", CHECKS)
def test_check_runs(few, name):
    check, count = CHECKS[name]
    rows = list(check(TINY, Timer(LONG)))
    assert len(rows) == count
    assert not [row for row in rows if row.status == "failed"]
    assert any(row.status == "passed" for row in rows)
    skipped = [row for row in rows if row.status == "skipped"]
    # What the interpreter's plans rule out is not passed over in silence.
    assert all(row.detail.startswith("the plan is ") for row in skipped)
    assert bool(skipped) == (name in ("operations", "tables"))
    json.dumps(as_json(rows))


def broken_forward(how):
    """The SwiGLU kernel with a fault."""
    original, calls = swiglu_kernel.forward, []

    def forward(gate, up, out, int64=None):
        original(gate, up, out, int64)
        calls.append(1)
        rows = out.view(-1, out.shape[-1])
        if how == "2 % off":
            out.mul_(1.02)
        elif how == "a row is not written":
            rows[-1] = torch.empty_like(rows[-1])
        elif how == "differs from call to call":
            out.add_(1e-3 * len(calls))
        elif how == "writes into gate":
            gate.add_(1.0)

    return forward


@pytest.mark.kernel
@pytest.mark.parametrize(
    "name, how",
    (
        ("poisoned", "a row is not written"),
        ("repeated", "differs from call to call"),
        ("opcheck", "writes into gate"),
        ("compiled", "differs from call to call"),
        ("captured", "differs from call to call"),
        ("operations", "2 % off"),
        ("large", "2 % off"),
    ),
)
def test_check_can_fail(few, monkeypatch, name, how):
    """A fault in one operation fails its rows and no others."""
    monkeypatch.setattr(swiglu_kernel, "forward", broken_forward(how))
    if name == "operations":
        monkeypatch.setattr(ratios, "PARTS", ("swiglu",))
    if name == "large":
        for slow in ("_lora_linear", "_rope", "_cross_entropy", "_rms_norm"):
            monkeypatch.setattr(verify_large, slow, lambda *a, **k: {"y": perfect()})
    rows = list(CHECKS[name][0](TINY, Timer(LONG)))
    failed = {row.name for row in rows if row.status == "failed"}
    assert failed and all("swiglu" in one for one in failed)


def perfect():
    return testing.Comparison(0.0, 1.0, 0.0, 1.0, 1.0)


@pytest.mark.kernel
@pytest.mark.parametrize("check", (ratios.ranks, ratios.decoding, verify_plans.tables))
def test_wrong_projections_fail(few, monkeypatch, check):
    from lora_kernels.lora_linear import triton_forward

    original = triton_forward.forward

    def forward(*arguments):
        ys, s = original(*arguments)
        return [y * 1.02 for y in ys], s

    monkeypatch.setattr(triton_forward, "forward", forward)
    rows = [row for row in check(TINY, Timer(LONG)) if row.status != "skipped"]
    assert rows and all(row.status == "failed" for row in rows)
    assert all(row.detail.startswith("y") for row in rows)


def test_a_graph_break_fails(few, monkeypatch):
    swiglu = lk.swiglu

    def breaking(*arguments, **options):
        torch._dynamo.graph_break()
        return swiglu(*arguments, **options)

    monkeypatch.setattr(lk, "swiglu", breaking)
    statuses = {row.name: row.status for row in verify_properties.compiled(TINY, Timer(LONG))}
    assert statuses == {"o": "passed", "swiglu": "failed"}


def test_poison_that_does_not_work_is_no_passed_check(few, monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *a, **k: None)
    rows = list(verify_properties.poisoned(TINY, Timer(LONG)))
    assert [row.status for row in rows] == ["failed"]


@pytest.mark.kernel
def test_forced_methods_and_entries_are_what_runs():
    def plan(r):
        return plan_for(19, 64, 48, r, torch.float32, TINY.device)

    before = plan(5)
    entries = verify_plans.entries_here(TINY)
    assert [entry.r for entry in entries] == [5, 20]
    for method, entry in (("one_pass", entries[0]), ("split", entries[1])):
        marked = verify_plans.replace(entry, dy_b=verify_plans.replace(entry.dy_b, chunk=96))
        with verify_plans.forced(method, marked):
            from lora_kernels.lora_linear import op

            assert op.plan_for(19, 64, 48, entry.r, torch.float32, TINY.device).dy_b.chunk == 96
    with verify_plans.forced("split"), pytest.raises(verify_plans.PlanIsAnother, match="one_pass"):
        x = torch.zeros(3, 48)
        lk.lora_linear(
            x, x.new_zeros(64, 48), x.new_zeros(5, 48), x.new_zeros(64, 5), impl="triton"
        )
    assert plan(5) == before


def test_rows_of_cases_out_of_time_or_with_errors():
    def broken():
        raise RuntimeError("first line\nsecond line")

    cases = [("good", lambda: [verdict("c", "good", True, "")]), ("bad", broken)]
    rows = list(within(Timer(LONG), "c", cases))
    assert [(row.name, row.status) for row in rows] == [("good", "passed"), ("bad", "failed")]
    assert rows[1].detail == "RuntimeError: first line"
    (row,) = within(Timer(0), "c", cases)
    assert row.status == "skipped" and row.figures["left_out"] == ["good", "bad"]


def test_run_of_checks(capsys):
    """Unused time goes on, an error is a failed row, no row is a skipped one, dry rows are dry."""
    left = {}

    def check(name, *rows):
        def run(setting, timer):
            left[name] = timer.left
            yield from rows

        return Check(name, 10.0, run)

    def broken(setting, timer):
        yield Row("broken", "before", "passed")
        raise ValueError("no")

    checks = [
        check("a", Row("a", "1", "passed"), Row("a", "2", "failed")),
        check("b", Row("b", "1", "skipped", "why")),
        check("empty"),
        Check("broken", 10.0, broken),
    ]
    seen = []
    rows = run_checks(checks, TINY, seen.append)
    assert rows == seen
    statuses = [(row.check, row.status) for row in rows]
    assert statuses == [
        ("a", "dry"), ("a", "failed"), ("b", "skipped"), ("empty", "skipped"), ("broken", "dry"),
        ("broken", "failed"),
    ]  # fmt: skip
    assert 9 < left["a"] <= 10 and 19 < left["b"] <= 20
    assert summary(rows) == "2 dry, 2 failed, 2 skipped"
    lines = table(rows).splitlines()
    assert lines[0].startswith("check") and lines[-1] == summary(rows)
    assert lines[2].startswith("a       1 dry, 1 failed")
    assert [line.split()[0] for line in lines[7:11]] == ["skipped"] * 2 + ["failed"] * 2
    real = Setting(torch.device("cpu"), False, 10**9)
    assert (
        run_checks([check("a", Row("a", "1", "passed"))], real, seen.append)[0].status == "passed"
    )


JUNIT = """<testsuites><testsuite>
<testcase classname="t" name="one[torch.bfloat16]"/>
<testcase classname="t" name="two[torch.float16]"><skipped message="no GPU"/></testcase>
<testcase classname="t" name="three[torch.float32]"/>
{more}
</testsuite></testsuites>"""


def counts_of(tmp_path, more=""):
    path = tmp_path / "tests.xml"
    path.write_text(JUNIT.format(more=more))
    return TestCounts.read(path)


def test_outcomes_of_the_kernel_tests(tmp_path):
    counts = counts_of(tmp_path)
    row = row_of_tests("c", "n", Finished(0, "", False), counts)
    by_dtype = "bfloat16 1, float16 0, float32 1"
    detail = f"2 passed, 0 failed, 1 skipped (passed by dtype: {by_dtype})"
    assert (row.status, row.detail) == ("passed", detail)
    assert row.figures["skips"] == {"no GPU": 1}
    assert row.figures["by_dtype"] == {
        "bfloat16": {"passed": 1}, "float16": {"skipped": 1}, "float32": {"passed": 1}
    }  # fmt: skip
    assert row_of_tests("c", "n", Finished(2, "", True), counts).status == "skipped"
    assert row_of_tests("c", "n", Finished(1, "usage\nerror", False), counts).status == "failed"
    failing = '<testcase classname="t" name="four"><failure/></testcase>'
    row = row_of_tests("c", "n", Finished(1, "", True), counts_of(tmp_path, failing))
    assert row.status == "failed" and row.detail.endswith("first: t::four")
    none = TestCounts(Counter(), {}, [], Counter())
    assert row_of_tests("c", "n", Finished(0, "", False), none).status == "failed"
    assert TestCounts.read(tmp_path / "no.xml") == none


def test_outcomes_of_the_benchmarks():
    good = {"id": "a", "peers": {"ours": {}, "peft": {"fault": "out of memory"}}}
    bad = {"id": "b", "peers": {"ours": {"fault": "wrong: y"}}}
    ended = Finished(0, "", False)
    assert row_of_benchmarks("c", ended, [good]).status == "passed"
    assert row_of_benchmarks("c", ended, []).status == "failed"
    assert row_of_benchmarks("c", Finished(1, "", True), [good]).status == "skipped"
    row = row_of_benchmarks("c", ended, [good, bad])
    assert row.status == "failed" and row.detail.endswith("ours: b: wrong: y")


def test_a_program_is_interrupted_at_its_limit():
    """It can still write what it has."""
    program = """
import sys, time
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("ended")
    sys.exit(3)
"""
    finished = run_program(["-c", program], 1.5)
    assert finished == Finished(3, "begun\nended\n", True)
    limited = "import os; print(os.environ['LORA_KERNELS_MEMORY_BYTES'])"
    assert run_program(["-c", limited], 30, 123) == Finished(0, "123\n", False)


@pytest.fixture
def large_gpu(monkeypatch):
    """A GPU of 80 GB as far as memory is asked for; what is set is recorded."""
    fractions = []
    properties = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (70 * 10**9, 80 * 10**9))
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda *arguments: fractions.append(arguments),
    )
    return fractions


def test_memory_is_capped(large_gpu):
    verify_limit.limit_memory(14 * 10**9)
    assert large_gpu == [(0.175, None)]
    assert torch.cuda.mem_get_info() == (14 * 10**9, 80 * 10**9)


def test_large_tensors_need_their_memory(large_gpu):
    setting = Setting(torch.device("cuda", 0), False, 12 * 10**9)
    (row,) = verify_large.large(setting, Timer(LONG))
    assert (row.status, row.detail) == ("skipped", "needs 13.5 GB, 12.0 GB are free")


def test_kernel_tests_share_the_memory(monkeypatch):
    """All processes and their contexts together stay below the cap; the largest tests run alone."""
    runs = []

    def run(arguments, seconds, memory_bytes=None):
        runs.append((arguments, seconds, memory_bytes))
        return Finished(0, "", False)

    monkeypatch.setattr(verify_commands, "run_program", run)
    setting = Setting(torch.device("cuda", 0), False, 14 * 10**9)
    rows = list(verify_commands.kernel_tests(setting, Timer(100)))
    assert [row.status for row in rows] == ["failed", "failed"]
    (most, seconds, share), (largest, _, alone) = runs
    count = int(most[most.index("-n") + 1])
    assert count * (share + verify_commands.CONTEXT_BYTES) <= setting.memory_bytes
    assert alone + verify_commands.CONTEXT_BYTES == setting.memory_bytes and seconds < 100
    assert most[most.index("-k") + 1] == f"not ({largest[largest.index('-k') + 1]})"
    assert "-n" not in largest and all("kernel and not long" in arguments for arguments, *_ in runs)


def test_packages_that_are_missing_skip_their_check(monkeypatch, tmp_path):
    monkeypatch.setattr(verify_commands.importlib.util, "find_spec", lambda name: None)
    rows = [
        *verify_commands.kernel_tests(TINY, Timer(LONG)),
        *verify_commands.benchmarks(TINY, Timer(LONG), tmp_path),
    ]
    assert [row.status for row in rows] == ["skipped"] * 2
    assert all("not installed" in row.detail for row in rows)


def test_results_join_those_of_the_benchmarks(tmp_path):
    path = tmp_path / "results" / "gpu.json"
    verify_gpu.write(path, {"name": "gpu"}, {"rows": [1]})
    assert json.loads(path.read_text()) == {
        "machine": {"name": "gpu"},
        "verification": {"rows": [1]},
    }
    path.write_text(json.dumps({"machine": {"name": "other"}, "cases": [2]}))
    verify_gpu.write(path, {"name": "gpu"}, {"rows": [3]})
    assert json.loads(path.read_text()) == {
        "machine": {"name": "other"}, "cases": [2], "verification": {"rows": [3]}
    }  # fmt: skip


def run_command(*arguments):
    command = [sys.executable, "-m", "bench.verify_gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))


def test_without_a_gpu_it_says_so():
    done = run_command()
    assert done.returncode == 2
    assert done.stdout.startswith("bench.verify_gpu: no CUDA GPU here") and not done.stderr
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("option", ("--minutes", "--memory-gb", "--tune"))
def test_impossible_options(option, capsys):
    with pytest.raises(SystemExit) as ended:
        verify_gpu.main([option, "0"])
    assert ended.value.code == 2
    assert f"{option}: expected more than 0, got 0.0" in capsys.readouterr().err


def test_dry_run_marks_its_rows_and_writes_nothing():
    def written() -> set[Path]:
        return set(RESULTS.glob("*")) if RESULTS.exists() else set()

    before = written()
    done = run_command("--dry-run", "--only", "CUDA graph")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].endswith(": 11 dry")
    assert sum(line.startswith("dry ") and "CUDA graph" in line for line in lines) == 11
    assert any(line.startswith("CUDA graph  11 dry") for line in lines)
    assert written() == before
