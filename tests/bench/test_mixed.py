"""The benchmark of mixed batches: its peers agree, a wrong one has no figures, its table."""

import importlib

import pytest
import torch

from bench import mixed

CPU = torch.device("cpu")


def tiny_cases():
    return mixed.mixed_cases(CPU, "float32", "tiny")


def test_cases_have_rows_for_every_adapter():
    for dtype, device in (("float32", CPU), ("bfloat16", torch.device("cuda"))):
        for case in mixed.mixed_cases(device, dtype):
            assert case.tokens % case.batch == 0
            assert len(set(case.names)) == case.adapters <= len(case.names) == case.batch


@pytest.mark.parametrize("case", tiny_cases(), ids=lambda case: case.id)
def test_peers_agree(case):
    """Every peer is checked against the float64 specification, outputs and gradients."""
    record = mixed.measure(case, CPU, 0.01)
    assert set(record["peers"]) == set(mixed.PEERS)
    for name, peer in record["peers"].items():
        assert "fault" not in peer, f"{name}: {peer}"
        assert peer["over_one"]["median"] > 0
        if name != "one":
            gradients = {f"d_lora_{ab}{a}" for a in range(case.adapters) for ab in "ab"}
            assert set(peer["gradient_norms"]) == {"d_x", *gradients}


def test_a_wrong_result_has_no_figures(monkeypatch):
    lk = importlib.import_module("lora_kernels")
    original = lk.lora_linear_mixed
    monkeypatch.setattr(mixed.lk, "lora_linear_mixed", lambda *given: original(*given) * 1.01)
    record = mixed.measure(tiny_cases()[0], CPU, 0.01)
    assert record["peers"]["ours"]["fault"].startswith("wrong: ")
    assert "seconds" not in record["peers"]["ours"]
    text = mixed.lines([record])
    assert "wrong: " in text[2] and text[-1].endswith("not measured: a fault")


@pytest.mark.parametrize(("ratio", "verdict"), [(1.09, "met"), (1.11, "missed")])
def test_the_target_is_judged(ratio, verdict):
    spread = {"median": ratio, "q1": ratio, "q3": ratio, "count": 3}
    peer = {"seconds": {**spread, "median": 0.002}, "over_one": spread}
    text = mixed.lines([{"id": "case", "peers": dict.fromkeys(mixed.PEERS, peer)}])
    assert text[2].startswith(f"| case | 2 ms | {ratio:.2f} ({ratio:.2f} .. {ratio:.2f}) |")
    assert f"<= 1.10: {verdict}, the worst is {ratio:.2f}" in text[-1]


def test_command(tmp_path, capsys, monkeypatch):
    rates = {"matmul": {"float32": 1e12, "bfloat16": 1e11}, "copy": 1e11}
    monkeypatch.setattr(mixed, "ceilings", lambda device, dtypes: rates)
    monkeypatch.setattr(mixed, "bench_device", lambda: CPU)
    file = tmp_path / "mixed.json"
    assert mixed.main(["--sizes", "tiny", "--seconds", "0.01", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "no GPU: small sizes" in printed and "Target, ours over one adapter <= 1.10" in printed
    assert file.read_text().count('"over_one"') == len(tiny_cases()) * len(mixed.PEERS)
