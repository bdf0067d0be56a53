"""The report and the targets of a small run: what is printed, what is left out, what is drawn."""

import copy
import json
import os
import sys

import pytest

from bench.plots import draw, step_parts
from bench.report import main, markdown, newest
from bench.targets import TARGETS, verdicts


def spread(median):
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "count": 5}


def peer(seconds, base, ours, **extra):
    return {
        "seconds": spread(seconds),
        "tokens_per_s": 512 / seconds,
        "floor_share": 0.5,
        "over_base": spread(seconds / base),
        "over_ours": spread(seconds / ours),
        "peak_bytes": None,
        "gradient_norms": {"least": 0.125, "median": 1.0, "largest": 8.0},
        "error_ratio": 1.25,
    } | extra


def case(op, part, seconds, **extra):
    """A case whose peers took these seconds."""
    base = next(iter(seconds.values()))
    return {
        "id": f"SmolLM2-135M-{part}-512",
        "model": "SmolLM2-135M",
        "op": op,
        "part": part,
        "tokens": 512,
        "dtype": "float32",
        "r": 16,
        "direction": "forward+backward",
        "graph": False,
        "plan": "eager (no GPU)",
        "floor": {"flops": 1, "bytes": 1, "seconds": 0.5, "bound": "FLOPs"},
        "peers": {name: peer(s, base, seconds["ours"]) for name, s in seconds.items()},
    } | extra


@pytest.fixture
def results():
    """A CPU run: one step, two operations, memory at one length."""
    return {
        "machine": {
            "name": "Some CPU 2 cores",
            "device": "cpu",
            "threads": 2,
            "cores": 2,
            "packages": {"torch": "2.13.0"},
            "commit": "abc1234",
            "date": "2026-01-31",
            "load_before": 0.25,
        },
        "ceilings": {"matmul": {"float32": 1e11, "bfloat16": 1e10}, "copy": 1e10},
        "cases": [
            case(
                "step", "step", {"frozen": 2.0, "peft": 3.0, "addmm": 2.5, "ours": 2.1}, layers=30
            ),
            case("lora_linear_grouped", "qkv", {"frozen": 0.01, "peft": 0.02, "ours": 0.0125}),
            case("swiglu", "swiglu", {"transformers": 0.004, "ours": 0.002}),
        ],
        "memory": [
            {"peer": name, "model": "SmolLM2-135M", "dtype": "float32", "tokens": 512}
            | {"peak_bytes": mib * 2**20}
            for name, mib in (("frozen", 900), ("peft", 1200), ("ours", 1000))
        ],
        "not_measured": ["SmolLM2-135M-bfloat16: would take about 90 s, 20 s are left"],
    }


def row_of(text, *cells):
    """The cells of the one table row that begins with `cells`."""
    start = "| " + " | ".join(cells) + " |"
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_hold_the_runs_figures(results):
    text = markdown(results)
    assert "Some CPU 2 cores" in text
    assert "abc1234" in text
    assert "matmul 100 GFLOP/s float32, 10 GFLOP/s bfloat16; copy 10.0 GB/s" in text
    assert row_of(text, "PEFT default")[1:] == [
        "3 s (2.7 .. 3.3)",
        "171",
        "1.50 (1.35 .. 1.65)",
        "1.43 (1.29 .. 1.57)",
        "50%",
        "1,200 MiB",
        "1.2e-01 .. 8.0e+00",
        "1.25",
    ]
    assert row_of(text, "ours")[6] == "1,000 MiB"
    assert row_of(text, "addmm_ Function")[6] == "-"
    projection = row_of(text, "SmolLM2-135M", "qkv", "512")
    assert projection[5:7] == ["10 ms (9 .. 11)", "2.00 (1.80 .. 2.20)"]
    assert projection[-2] == "1.25 (1.12 .. 1.38)"
    assert row_of(text, "SmolLM2-135M", "swiglu")[6] == "0.50 (0.45 .. 0.55)"
    assert row_of(text, "SmolLM2-135M", "float32", "512")[3:] == [
        "900 MiB",
        "1,200 MiB",
        "1,000 MiB",
    ]
    assert "### Not measured\n\n- SmolLM2-135M-bfloat16: would take about 90 s" in text
    assert "This CPU emulates bfloat16" in text
    assert "The machine was busy" not in text
    results["machine"]["load_before"] = 0.75
    assert "The machine was busy" in markdown(results)
    assert "- eager (no GPU): SmolLM2-135M qkv x 512, SmolLM2-135M swiglu x 512" in text


def test_a_fault_stands_in_place_of_a_figure(results):
    results["cases"][0]["peers"]["addmm"] = {"fault": "wrong: loss 2.0, expected 1.0"}
    results["cases"][1]["peers"]["peft"] = {"fault": "d_x: gradient is zero"}
    text = markdown(results)
    assert row_of(text, "addmm_ Function")[1:3] == ["wrong: loss 2.0, expected 1.0", "-"]
    assert row_of(text, "SmolLM2-135M", "qkv", "512")[6] == "d_x: gradient is zero"


def found(results, text):
    return [(v.measured, v.verdict) for v in verdicts(results) if text in v.name]


def test_targets_are_met_or_missed_by_the_runs_ratios(results):
    assert found(results, "whole step: PEFT default over ours (float32, 512 tokens)") == [
        ("1.429 (1.286 .. 1.571)", "met")
    ]
    assert found(results, "whole step: ours over the frozen floor (float32, 512 tokens)") == [
        ("1.050 (0.945 .. 1.155)", "met")
    ]
    assert found(results, "peak memory: ours over PEFT default (float32, 512 tokens)") == [
        ("0.833", "met")
    ]
    slower = case("step", "step", {"frozen": 2.0, "peft": 3.0, "ours": 2.25}, layers=30)
    results["cases"][0] = slower
    assert found(results, "whole step: PEFT default over ours (float32, 512 tokens)") == [
        ("1.333 (1.200 .. 1.467)", "missed")
    ]
    assert found(results, "whole step: ours over the frozen floor (float32, 512 tokens)") == [
        ("1.125 (1.012 .. 1.238)", "missed")
    ]


def test_without_a_gpu_its_targets_are_not_measured(results):
    lines = [v for v in verdicts(results) if v.name.startswith("GPU")]
    assert len(lines) == sum(target.device == "cuda" for target in TARGETS) > 8
    assert {(v.measured, v.verdict) for v in lines} == {("needs a CUDA GPU", "not measured")}


def test_a_peer_with_a_fault_meets_no_target(results):
    results["cases"][0]["peers"]["ours"] = {"fault": "d: gradient is zero"}
    for entry in results["cases"][0]["peers"].values():
        entry.pop("over_ours", None)
    assert (
        found(results, "CPU, SmolLM2-135M, whole step")
        == [("the run has no such case", "not measured")] * 2
    )


def gpu_run(results, name):
    gpu = copy.deepcopy(results)
    gpu["machine"] |= {"name": name, "device": "cuda"}
    gpu["machine"]["gpu"] = {"driver": "600.1", "cuda": "13.0"}
    shape = {"model": "Llama-3.1-8B", "tokens": 8192, "dtype": "bfloat16"}
    gpu["cases"] = [
        case("lora_linear", "o", {"frozen": 1.0, "ours": 1.01}, direction="forward", **shape),
        case("lora_linear", "o", {"frozen": 1.0, "ours": 1.06}, **shape),
        case("step", "step", {"frozen": 1.0, "peft": 1.6, "ours": 1.02}, layers=8, **shape),
        case(
            "lora_linear",
            "o",
            {"frozen": 1.0, "ours": 1.03},
            **{**shape, "tokens": 1, "direction": "decode", "graph": True},
        ),
    ]
    for name, peak in (("peft", 100.0), ("ours", 65.0)):
        gpu["cases"][2]["peers"][name]["peak_bytes"] = peak
    return gpu


def test_gpu_targets(results):
    gpu = gpu_run(results, "NVIDIA H200")
    assert found(gpu, "forward: ours over frozen, data-centre card") == [
        ("1.010 (0.909 .. 1.111)", "met")
    ]
    assert found(gpu, "forward: ours over frozen, RTX") == [
        ("another class of GPU", "not measured")
    ]
    assert found(gpu, "forward and backward: ours over frozen") == [
        ("1.060 (0.954 .. 1.166)", "missed")
    ]
    assert found(gpu, "stack, whole step: PEFT default over ours") == [
        ("1.569 (1.412 .. 1.725)", "met")
    ]
    assert found(gpu, "stack, whole step: PEFT with bf16") == [
        ("the run has no such case", "not measured")
    ]
    assert found(gpu, "with Liger") == [("needs liger-kernel", "not measured")]
    assert found(gpu, "stack, peak memory") == [("0.650", "met")]
    assert found(gpu, "decode") == [("1.030 (0.927 .. 1.133)", "missed")]
    assert found(gpu, "DRAM traffic") == [("needs Nsight Compute's counters", "not measured")]
    assert {v.verdict for v in verdicts(gpu) if v.name.startswith("CPU")} == {"not measured"}
    rtx = gpu_run(results, "NVIDIA GeForce RTX 5090")
    assert found(rtx, "forward: ours over frozen, RTX") == [("1.010 (0.909 .. 1.111)", "missed")]
    assert "driver 600.1, CUDA 13.0" in markdown(rtx)


def test_a_steps_parts_are_counted_by_the_models_layers(results):
    parts = step_parts(results, results["cases"][0])
    # 30 blocks have 30 x 10 ms of q, k, v and 30 x 4 ms of SwiGLU; the rest was not measured.
    assert parts["frozen"] == pytest.approx({"qkv": 0.3, "swiglu": 0.12, "rest": 1.58})
    assert parts["ours"] == pytest.approx({"qkv": 0.375, "swiglu": 0.06, "rest": 1.665})
    # The addmm_ Function's projections were not measured alone.
    assert "qkv" not in parts["addmm"]


def test_plots_are_drawn_from_what_the_run_has(results, tmp_path):
    names = ["run-step.png", "run-ratios.png", "run-memory.png"]
    assert [path.name for path in draw(results, tmp_path, "run")] == names
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    results |= {"memory": [], "cases": results["cases"][:1]}
    assert draw(results, tmp_path / "empty", "run") == []


def test_the_command_prints_the_tables_of_a_run(results, tmp_path, monkeypatch, capsys):
    for name, commit in (("a", "old1111"), ("b", "new2222")):
        results["machine"]["commit"] = commit
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    os.utime(tmp_path / "a.json", (0, 0))
    (tmp_path / "verify.json").write_text("[]")
    assert newest(tmp_path) == tmp_path / "b.json"
    run_file, broken = tmp_path / "b.json", tmp_path / "broken.json"
    monkeypatch.setattr(sys, "argv", ["report", str(run_file), "--plots", str(tmp_path)])
    assert main() == 0
    printed = capsys.readouterr()
    assert printed.out == markdown(results)
    assert "new2222" in printed.out
    assert str(tmp_path / "b-memory.png") in printed.err
    monkeypatch.setattr(sys, "argv", ["report", str(run_file), "--only", "memory"])
    assert main() == 0
    memory = capsys.readouterr().out
    assert memory.startswith("| model |") and memory in printed.out
    broken.write_text("{")
    for path in (broken, tmp_path / "none.json"):
        monkeypatch.setattr(sys, "argv", ["report", str(path)])
        assert main() == 1
        assert capsys.readouterr().err.startswith("bench.report: error: ")


def test_no_run_at_all_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="make bench writes one"):
        newest(tmp_path)
