"""Every kernel configuration compiles for GPUs that are not here, within their limits."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_120"])
def test_every_configuration_compiles(arch, tmp_path):
    """The interpreter accepts code that the compiler refuses, so its tests alone prove nothing."""
    report = tmp_path / "report.json"
    run = subprocess.run(
        [sys.executable, "-m", "bench.compile_report", "--arch", arch, "--quiet", "--json", report],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(report.read_text())
    names = " ".join(result["name"] for result in results)
    for kernel in ("one_pass", "shrink", "split", "dx", "dy_b", "d_a", "rope"):
        assert kernel in names
    assert all(r["registers"] > 0 and not r["spills"] and not r["error"] for r in results)
    assert all(r["matrix"] > 0 for r in results if r["needs_matrix"])


def test_a_faulty_kernel_is_reported():
    spec = importlib.util.spec_from_file_location(
        "compile_report", ROOT / "bench/compile_report.py"
    )
    sys.modules["compile_report"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    Result = module.Result
    good = Result("sm_89", "k", None, 100, 0, 1000, 8, True)
    assert good.faults == []
    assert Result("sm_89", "k", "no such name").faults == ["no such name"]
    assert Result("sm_89", "k", None, 255, 3, 1000, 8, True).faults == ["3 spills"]
    assert "shared memory" in Result("sm_89", "k", None, 9, 0, 101_377, 8, True).faults[0]
    assert Result("sm_89", "k", None, 9, 0, 0, 0, True).faults == ["no matrix instruction"]
