"""A run as `make bench` does it, at sizes that only check the suite itself."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import run as bench_run
from bench.cases import emulated_step
from bench.machine import result_stem
from bench.measure import Measurement, needed_op_seconds, needed_step_seconds
from bench.memory import memory_by_length
from bench.run import BenchRun
from bench.shapes import TINY, OpCase, StepCase, floor_seconds, op_work, step_work

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_suite_writes_what_it_measured(tmp_path):
    raw = tmp_path / "raw.json"
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "bench", "--bench-sizes", "tiny", "-q"),
            *("-p", "no:cacheprovider", "-p", "no:xdist", f"--benchmark-json={raw}"),
            *("--bench-results", str(tmp_path / "results"), "-k", "o-48 or float32-step"),
        ],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "results").glob("*.json")
    results = json.loads(path.read_text())
    assert path.stem == result_stem(results["machine"])
    assert results["machine"]["commit"] in path.stem
    for name in ("load_before", "packages", "python", "threads"):
        assert name in results["machine"]
    assert results["ceilings"]["matmul"]["float32"] > 1e9
    step, operation = results["cases"]
    assert (operation["op"], step["op"]) == ("lora_linear", "step")
    assert operation["peers"]["ours"]["seconds"]["count"] >= 3
    for measured in results["cases"]:
        assert not any("fault" in peer for peer in measured["peers"].values())
    # pytest-benchmark read the interleaved samples off the recorded clock.
    reported = {b["name"]: b["stats"]["median"] for b in json.loads(raw.read_text())["benchmarks"]}
    for name, peer in operation["peers"].items():
        found = reported[f"test_operation[{operation['id']}-{name}]"]
        assert found == pytest.approx(peer["seconds"]["median"], rel=1e-9)
    assert "needs a CUDA GPU" in done.stdout
    assert f"written: {path}" in done.stdout
    assert [target["verdict"] for target in results["targets"]].count("met") == 0


SLOW = {"matmul": {"float32": 2e9, "bfloat16": 1e9}, "copy": 1e9}


def test_needed_time_follows_the_machines_rates():
    case = emulated_step("bfloat16", "tiny")
    # Three peers in three rounds and one check each, ours checked twice.
    step = floor_seconds(step_work(case), 1e9, 1e9) / 0.6
    reference = floor_seconds(step_work(case), 2e9, 1e9) / 0.6
    assert needed_step_seconds(case, SLOW, 3, 0) == pytest.approx(13 * step + reference)
    assert needed_step_seconds(case, SLOW, 3, 60) == pytest.approx(4 * step + 60 + reference)
    operation = OpCase(TINY, "o", 48, "float32")
    call = op_work(operation).seconds(2e9, 1e9) / 0.5
    assert needed_op_seconds(operation, SLOW, 4, 0) == pytest.approx((12 + 12) * call)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU run's limit")
def test_what_does_not_fit_the_time_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(bench_run, "ceilings", lambda device, dtypes: SLOW)
    run = BenchRun("tiny")
    assert (run.dtype, run.emulated) == ("float32", "bfloat16")
    run.require_time_for("a", 100)
    run.deadline -= bench_run.CPU_SECONDS - 50
    run.require_time_for("a", 40)
    for _ in range(2):
        with pytest.raises(pytest.skip.Exception):
            run.require_time_for("a", 100)
    (line,) = run.results["not_measured"]
    assert line.startswith("a: would take about 100 s, ")
    with pytest.raises(pytest.skip.Exception):
        run.measure_op(replace(run.op_cases[0], tokens=1 << 22))
    assert run.results["cases"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's products always are")
def test_native_16_bit_products_are_the_working_dtype(monkeypatch):
    fast = {"matmul": {"float32": 1e9, "bfloat16": 8e9}, "copy": 1e9}
    monkeypatch.setattr(bench_run, "ceilings", lambda device, dtypes: fast)
    run = BenchRun("tiny")
    assert (run.dtype, run.emulated, run.emulated_cases) == ("bfloat16", None, [])
    assert {case.dtype for case in [*run.op_cases, *run.step_cases]} == {"bfloat16"}


def test_a_fault_fails_the_peers_test_and_a_refusal_is_said():
    run = BenchRun.__new__(BenchRun)
    run.results = {"not_measured": []}
    measured = Measurement(
        {"id": "case", "peers": {}},
        {"frozen": [1.0]},
        {"addmm": "d_lora_a0: gradient is zero"},
        {"liger": "no CUDA graph: capture failed"},
    )
    with pytest.raises(pytest.fail.Exception, match="case: addmm: d_lora_a0: gradient is zero"):
        run.replay(measured, "addmm", None)
    assert run.results["not_measured"] == []
    with pytest.raises(pytest.skip.Exception):
        run.replay(measured, "liger", None)
    assert run.results["not_measured"] == ["case: liger: no CUDA graph: capture failed"]


def test_a_files_name_says_machine_date_and_commit():
    machine = {"name": "Intel(R) Xeon(R) 2 cores", "date": "2026-01-31", "commit": "abc-dirty"}
    assert result_stem(machine) == "intel-xeon-2-cores-2026-01-31-abc-dirty"


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_memory_grows_with_the_length():
    case = StepCase(TINY, 2, 1, 24, "float32")
    lengths = [32, 4096]
    few, many = memory_by_length(case, lengths, CPU, ["ours"])
    assert (few["peer"], few["tokens"], many["tokens"]) == ("ours", 32, 4096)
    # The logits of 4096 tokens in float32 alone are 2 MiB; the hidden states of a block 1 MiB each.
    assert many["peak_bytes"] - few["peak_bytes"] > 8 * 2**20


def test_a_process_that_fails_is_a_fault(tmp_path, monkeypatch):
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho Traceback >&2\necho MemoryError: too large >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    entries = memory_by_length(StepCase(TINY, 2, 1, 24, "float32"), [32], CPU, ["peft", "ours"])
    assert [(e["peer"], e["fault"]) for e in entries] == [
        ("peft", "MemoryError: too large"),
        ("ours", "MemoryError: too large"),
    ]
