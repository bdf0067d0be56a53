"""Every kernel configuration compiles for GPUs that are not here, within their limits."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]
KERNELS = (
    "one_pass", "decode", "shrink", "split", "dx", "dy_b", "reduce_p", "d_a", "scale_gradient",
    "rope", "rms_norm", "swiglu", "linear_cross_entropy", "lora_linear_mixed",
)  # fmt: skip


@pytest.fixture
def report(monkeypatch):
    """bench/compile_report.py, which is in no package."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.compile_report")


def run_report(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench.compile_report", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    # A minute each: of AMD's two the short tier has one.
    [pytest.param(a, marks=pytest.mark.long if a == "gfx950" else ()) for a in TARGETS],
)
def test_every_configuration_compiles(arch, tmp_path, figure):
    """The interpreter accepts code that the compiler refuses, so its tests alone prove nothing.

    About 130 kernels a target, without a GPU: 20 to 45 seconds on two cores with an empty Triton
    cache, and a few with a full one.
    """
    file = tmp_path / "report.json"
    run = run_report("--arch", arch, "--quiet", "--json", file)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(file.read_text())
    names = " ".join(result["name"] for result in results)
    for kernel in KERNELS:
        assert kernel in names
    for result in results:
        assert result["registers"] > 0 and result["blocks"] > 0 and not result["error"]
        assert not result["spills"] and not result["stack"]
        assert result["matrix"] or not result["needs_matrix"]
    figure(13, "kernels compiled", len(results), combine="sum")
    figure(13, "architectures", 1, combine="sum")
    figure(13, "registers spilled", sum(result["spills"] for result in results), 0.0)
    # On NVIDIA's the smallest tiles may take an older architecture's.
    tiles = "lora_linear split bf16 128" if arch.startswith("sm_") else "lora_linear split bf16"
    kinds = {
        kind for result in results if result["name"].startswith(tiles) for kind in result["matrix"]
    }
    # Large tiles take the architecture's own instructions, not those of an older one.
    expected = {"sm_90": {"wgmma"}, "sm_100": {"tcgen05"}, "gfx942": {"mfma"}, "gfx950": {"mfma"}}
    assert kinds == expected.get(arch, {"mma"})


def test_faults_are_named(report):
    def faults(**values):
        good = {"registers": 100, "shared": 1000, "blocks": 2, "matrix": {"mma": 8}}
        return report.Result("sm_89", "k", needs_matrix=True, **{**good, **values}).faults

    assert faults() == []
    assert faults(error="no such name") == ["no such name"]
    assert faults(spills=3, stack=8) == ["3 spills, a stack of 8 bytes"]
    assert faults(stack=8) == ["0 spills, a stack of 8 bytes"]
    assert faults(shared=101_377) == ["shared memory 101377 > 101376"]
    assert faults(shared=101_376) == []
    assert faults(blocks=0) == ["no block fits a multiprocessor"]
    assert faults(tensor_memory=1024) == ["tensor memory 1024 > 512 columns"]
    assert faults(matrix={}) == ["no matrix instruction"]


def test_resident_blocks(report):
    """By registers, shared memory, warps and blocks; figures of NVIDIA's occupancy calculator."""
    blocks = {arch: machine.resident_blocks for arch, machine in report.MULTIPROCESSORS.items()}
    assert blocks["sm_80"](128, 0, 4) == 4
    assert blocks["sm_80"](129, 0, 4) == 3
    assert blocks["sm_80"](32, 0, 4) == 16
    assert blocks["sm_80"](32, 0, 1) == 32
    assert blocks["sm_80"](32, 48 * 1024, 4) == 3
    assert blocks["sm_89"](255, 65_536, 8) == 1
    assert blocks["sm_89"](40, 0, 8) == 6
    assert blocks["sm_90"](168, 229_408, 8) == 1
    assert blocks["sm_90"](255, 229_408, 16) == 0
    # Four SIMDs of 512 registers a lane: 4 waves each at 128, 3 at 136.
    assert blocks["gfx942"](128, 0, 4) == 4
    assert blocks["gfx942"](136, 0, 4) == 3
    assert blocks["gfx942"](64, 32_768, 8) == 2


def test_which_dots_take_matrix_instructions(report):
    dot = "%3 = tt.dot %0, %1, %2{} : tensor<64x32x{}> * tensor<32x64x{}> -> tensor<64x64xf32>"
    assert report.needs_matrix(dot.format("", "bf16", "bf16"))
    assert report.needs_matrix(dot.format("", "f16", "f16"))
    assert report.needs_matrix(dot.format(", inputPrecision = tf32", "f32", "f32"))
    assert not report.needs_matrix(dot.format("", "f32", "f32"))
    assert not report.needs_matrix("%3 = arith.addf %0, %1 : tensor<64x32xbf16>")


@pytest.mark.compile
def test_a_kernel_is_reported_as_json_and_as_a_line():
    arguments = ("--arch", "sm_90", "gfx942", "--filter", "one_pass bf16 64x64x64 r16 w4")
    run = run_report(*arguments, "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(run.stdout)
    assert {result["arch"] for result in results} == {"sm_90", "gfx942"}
    matrix = {kind for result in results for kind in result["matrix"]}
    assert matrix == {"wgmma", "mfma"}
    run = run_report(*arguments)
    assert run.returncode == 0
    assert "registers   0 spills" in run.stdout and run.stdout.count(" ok\n") == len(results)


@pytest.mark.compile
def test_a_kernel_that_does_not_compile_is_a_fault(report):
    """A case with an argument missing, and one with more shared memory than there is."""
    script = (
        "from dataclasses import replace\n"
        "from bench.compile_report import compile_case\n"
        "from lora_kernels.lora_linear.compile_cases import USUAL, kernel_case\n"
        "from lora_kernels.lora_linear.tables import TileConfig\n"
        "case = kernel_case('split', TileConfig(64, 64, 64, 16, 4, 3), USUAL)\n"
        "constexprs = {k: v for k, v in case.constexprs.items() if k != 'BLOCK_M'}\n"
        "print(compile_case('sm_89', replace(case, constexprs=constexprs)).faults)\n"
        "deep = kernel_case('split', TileConfig(128, 128, 128, 16, 8, 3), USUAL)\n"
        "print(compile_case('sm_89', deep).faults)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    missing, deep = run.stdout.splitlines()
    assert "CompilationError" in missing
    assert "shared memory" in deep and "> 101376" in deep


def test_nothing_to_compile_is_no_success():
    assert run_report("--arch", "sm_80", "--filter", "no such kernel").returncode == 1
