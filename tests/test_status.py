"""status: one row per layer that says what runs there and why, and the table of the rows."""

import importlib
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_kernels import (
    LoraConfig,
    LoraLinear,
    accelerate,
    dispatch,
    implementation,
    inject_lora,
    restore,
    status,
)
from lora_kernels.adapters import disable_adapter, merge_adapter, set_adapter
from lora_kernels.lora_linear.plan import plan

# `lora_kernels.status` is the function; the module of that name holds what it calls.
module = importlib.import_module("lora_kernels.status")


def config(**changes) -> LoraConfig:
    settings = {"r": 4, "target_modules": ["q", "v"], "init_lora_weights": False}
    return LoraConfig(**{**settings, **changes})


def net(**changes) -> nn.Module:
    blocks = nn.ModuleList(
        nn.ModuleDict({"q": nn.Linear(32, 16), "v": nn.Linear(32, 8), "o": nn.Linear(8, 8)})
        for _ in range(3)
    )
    model = nn.ModuleDict({"layers": blocks, "head": nn.Linear(32, 40)})
    return inject_lora(model, config(**changes))


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch):
    """What a GPU would answer, for a model that is on the CPU."""
    monkeypatch.setattr(module, "why_not_triton", lambda device, dtype: None)
    monkeypatch.setattr(module, "resolve", lambda impl, *_: "triton" if impl == "auto" else impl)

    def plan_for(m, n, k, r, dtype, device, dropout):
        return plan(m, n, k, r, dtype, "sm_90", dropout)

    monkeypatch.setattr(module, "plan_for", plan_for)


def columns(row: module.LayerStatus) -> tuple[int, str, str, str]:
    return row.rank, row.adapters, row.implementation, row.plan


def test_a_row_per_layer_on_the_cpu():
    rows = status(net())
    assert [row.name for row in rows] == [f"layers.{i}.{name}" for i in range(3) for name in "qv"]
    for row in rows:
        assert row.shape == ((16, 32) if row.name.endswith("q") else (8, 32))
        assert columns(row) == (4, "default", "eager", "library GEMMs")
        assert "'cpu'" in row.reason


def test_what_it_says_is_what_resolve_decides_for_each_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = net().to(dtype)
        for row in status(model):
            reason = dispatch.why_not_triton(torch.device("cpu"), dtype)
            assert row.implementation == dispatch.resolve("auto", torch.device("cpu"), dtype)
            assert row.reason == reason


def test_the_interpreter_is_not_chosen_by_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    monkeypatch.setattr(dispatch, "_triton_installed", lambda: True)
    row = status(net())[0]
    assert (row.implementation, row.reason) == ("eager", "the interpreter runs only by name")
    with implementation("triton"):
        row = status(net())[0]
        assert row.implementation == "triton" and row.reason == ""
        row = status(net().to(torch.bfloat16))[0]
        assert row.implementation == "none" and "bfloat16" in row.reason


@pytest.mark.parametrize("forced", ["eager", "reference"])
def test_a_forced_implementation_is_named_as_the_reason(forced: str):
    model = net()
    with implementation(forced):
        rows = status(model)
    assert {row.implementation for row in rows} == {forced}
    assert {row.reason for row in rows} == {f"implementation({forced!r}) is open"}
    assert status(model)[0].reason != rows[0].reason


def test_a_forced_implementation_that_cannot_run_is_told_not_raised():
    model = net()
    with implementation("triton"):
        for row in status(model):
            assert columns(row) == (4, "default", "none", "-")
            assert row.reason == dispatch.why_not_triton(torch.device("cpu"), torch.float32)
        with pytest.raises(ValueError, match="cannot run here"):
            model["layers"][0]["q"](torch.ones(2, 32))


def test_disabled_merged_and_inactive_layers_run_their_base():
    model = net()
    with disable_adapter(model):
        assert {columns(row) for row in status(model)} == {(0, "disabled", "base", "one GEMM")}
    inject_lora(model, config(target_modules=["head"], r=2), "second")
    assert columns(status(model)[-1]) == (0, "none", "base", "one GEMM")
    merge_adapter(model)
    rows = status(model)
    assert {columns(row) for row in rows[:-1]} == {(0, "merged: default", "base", "one GEMM")}
    assert columns(rows[-1]) == (0, "none", "base", "one GEMM")
    assert {row.reason for row in rows} == {""}


def test_several_active_adapters_are_one_of_the_summed_rank():
    model = inject_lora(net(), config(target_modules=["v"], r=3), "second")
    set_adapter(model, ["default", "second"])
    rows = {row.name: columns(row)[:2] for row in status(model)}
    assert rows["layers.0.q"] == (4, "default") and rows["layers.2.v"] == (7, "default + second")


def test_a_gpu_shows_its_plan(on_h100):
    model = net().to(torch.bfloat16)
    for tokens in (1, 2048):
        for row in status(model, tokens=tokens):
            chosen = plan(tokens, *row.shape, 4, torch.bfloat16, "sm_90", False)
            expected = "eager" if chosen.method == "library" else "triton"
            assert (row.implementation, row.plan) == (expected, str(chosen))
            assert row.reason == (chosen.reason if expected == "eager" else "")


def test_a_plan_that_prefers_the_library_gives_its_reason(on_h100, monkeypatch):
    chosen = module.plan_for(8, 8, 8, 4, torch.bfloat16, None, False)
    library = type(chosen)("library", "measured faster")
    monkeypatch.setattr(module, "plan_for", lambda *_: library)
    row = status(net())[0]
    assert row.implementation == "eager" and row.reason == "measured faster"
    assert row.plan == "library GEMMs (measured faster)"


def test_dropout_reaches_the_plan_and_several_masks_are_told(on_h100, monkeypatch):
    asked = []
    original = module.plan_for
    monkeypatch.setattr(module, "plan_for", lambda *args: asked.append(args[-1]) or original(*args))
    model = net(lora_dropout=0.1)
    status(model.train())
    status(model.eval())
    assert asked == [True] * 6 + [False] * 6
    inject_lora(model.train(), config(target_modules=["v"]), "second")
    set_adapter(model, ["default", "second"])
    reasons = {row.name[-1]: row.reason for row in status(model)}
    assert reasons["q"] == "" and "dropout masks differ" in reasons["v"]
    assert {row.reason for row in status(model.eval())} == {""}


def test_the_table_has_one_line_for_equal_layers_of_repeated_blocks():
    model = net()
    model["layers"][1]["v"].set_adapter([])
    lines = str(status(model)).splitlines()
    header = ["layer", "count", "out x in", "rank", "adapters", "runs", "in one op", "plan"]
    header.append("why not fused")
    starts = [lines[0].index(title) for title in header]
    cells = [
        [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        for line in lines
    ]
    assert cells[0] == header
    reason = status(model)[0].reason
    common = ["4", "default", "eager", "-", "library GEMMs", reason]
    assert cells[1:] == [
        ["layers.*.q", "3", "16 x 32", *common],
        ["layers.*.v", "2", "8 x 32", *common],
        ["layers.1.v", "1", "8 x 32", "0", "none", "base", "-", "one GEMM", "-"],
    ]
    assert not any(line.endswith(" ") for line in lines)


def test_a_model_without_lora_layers_says_so():
    assert str(status(nn.Linear(2, 2))) == "no LoRA layers" and status(nn.Linear(2, 2)) == []


def test_a_single_layer_and_a_meta_model_have_a_status():
    layer = LoraLinear.from_linear(nn.Linear(8, 4), config())
    assert columns(status(layer)[0])[:3] == (4, "default", "eager")
    assert "'meta'" in status(net().to("meta"))[0].reason


class Attention(nn.Module):
    projection_groups = (("q", "v"), ("o",))

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o = nn.Linear(32, 16), nn.Linear(32, 8), nn.Linear(8, 8)


def test_a_group_is_shown_with_the_plan_of_all_its_outputs(on_h100):
    model = inject_lora(nn.ModuleList([Attention()]), config(target_modules=["q", "v", "o"]))
    rows = {row.name: row for row in status(model.to(torch.bfloat16), tokens=64)}
    assert rows["0.q"].group == rows["0.v"].group == ("q", "v")
    assert rows["0.o"].group == ()
    together = plan(64, (16, 8), 32, (4, 4), torch.bfloat16, "sm_90", False)
    assert rows["0.q"].plan == str(together)
    assert "q v" in str(status(model)).splitlines()[1]
    # A layer that the one call cannot serve leaves each to itself.
    handle = model[0].v.register_forward_hook(lambda *_: None)
    assert status(model)[0].group == ()
    handle.remove()
    with implementation("reference"):
        assert status(model)[0].group == ()
    model[0].v.delete_adapter("default")
    assert status(model)[0].group == ()


# PEFT's layers.


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.float() * rstd).to(x.dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm()
        self.q, self.k, self.v = nn.Linear(32, 16), nn.Linear(32, 8), nn.Linear(32, 8)
        self.o = nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.o(self.q(x)[..., :8] + self.k(x) * self.v(x)))


def peft_net(**changes: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q", "v", "o"], "init_lora_weights": False}
    model = nn.Sequential(*(Block() for _ in range(3)))
    return peft.get_peft_model(model, peft.LoraConfig(**{**settings, **changes}))


def test_a_peft_model_before_and_after_accelerate():
    model = peft_net()
    rows = status(model)
    assert [row.name for row in rows][:3] == [f"base_model.model.0.{name}" for name in "qvo"]
    assert {columns(row) for row in rows} == {(4, "default", "peft", "-")}
    assert {row.reason for row in rows} == {"not accelerated"} and rows.modules == {}
    accelerate(model)
    rows = status(model)
    assert {columns(row) for row in rows} == {(4, "default", "eager", "library GEMMs")}
    assert [row.group for row in rows][:3] == [("q", "v"), ("q", "v"), ()]
    assert rows.modules == {"RMSNorm": (3, 3), "SwiGLU": (0, 0), "RoPE": (0, 0)}
    restore(model)
    assert {row.reason for row in status(model)} == {"not accelerated"}


@pytest.mark.filterwarnings("ignore:Already unmerged")
def test_the_states_of_an_accelerated_layer():
    model = accelerate(peft_net(lora_dropout=0.1).eval())
    model.add_adapter("b", peft.LoraConfig(r=3, target_modules=["q", "k"]))
    accelerate(model)
    layer = model.base_model.model[0].q
    rows = {row.name[-1]: row for row in status(model)}
    assert columns(rows["k"]) == (0, "none", "base", "one GEMM")
    model.base_model.set_adapter(["default", "b"])
    rows = {row.name[-1]: row for row in status(model)}
    assert columns(rows["q"])[:3] == (7, "default + b", "eager")
    assert rows["q"].group == ("q", "k", "v")
    rows = {row.name[-1]: row for row in status(model.train())}
    assert columns(rows["q"])[:3] == (7, "default + b", "peft")
    assert "their masks differ" in rows["q"].reason and rows["v"].reason != rows["q"].reason
    with model.disable_adapter():
        assert {columns(row) for row in status(model)} == {(0, "disabled", "base", "one GEMM")}
    model.eval().set_adapter("default")
    model.merge_adapter()
    assert columns(status(model)[0]) == (0, "merged: default", "base", "one GEMM")
    model.unmerge_adapter()
    layer.base_layer.register_forward_hook(lambda *_: None)
    row = status(model)[0]
    assert (row.implementation, row.reason) == ("peft", "a module inside it has hooks")


def test_a_peft_layer_of_another_kind_is_named():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    model = accelerate(peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"])))
    embedding, linear = status(model)
    assert columns(embedding) == (8, "default", "peft", "-")
    assert embedding.reason == "PEFT's Embedding is not of the kind that is fused"
    assert linear.implementation == "eager"


def test_a_gpu_shows_the_plan_of_an_accelerated_group(on_h100, monkeypatch):
    asked = []
    original = module.plan_for
    monkeypatch.setattr(module, "plan_for", lambda *args: asked.append(args[-1]) or original(*args))
    status(accelerate(peft_net(lora_dropout=0.1)).train())
    assert asked == [True] * 9
    model = accelerate(peft_net().to(torch.bfloat16))
    rows = {row.name[-1]: row for row in status(model, tokens=64)}
    together = plan(64, (16, 8), 32, (4, 4), torch.bfloat16, "sm_90", False)
    assert rows["q"].plan == rows["v"].plan == str(together)
    assert rows["o"].plan == str(plan(64, 32, 8, 4, torch.bfloat16, "sm_90", False))


def test_below_the_table_is_a_line_for_each_kind_of_module():
    model = accelerate(peft_net(r=2))
    lines = str(status(model)).splitlines()
    assert len(lines) == 1 + 3 + 3
    assert "q v" in lines[1] and lines[1].startswith("base_model.model.*.q")
    assert lines[4:] == ["RMSNorm  3 of 3 fused", "SwiGLU   0 of 0 fused", "RoPE     0 of 0 fused"]
