"""Every state that PEFT can bring an accelerated model into: the numbers and files are PEFT's."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import lora_kernels as lk

FUSED = ("lora_linear", "lora_linear_grouped")


@pytest.fixture
def two(models) -> tuple[PeftModel, PeftModel]:
    """Plain and accelerated, each with a second adapter, of another rank and scaling."""
    plain, fused = models.pair()
    return add_second(models, plain), add_second(models, fused)


def add_second(models, model: PeftModel, **changes: Any) -> PeftModel:
    torch.manual_seed(3)
    settings = {"r": 6, "lora_alpha": 3, "use_rslora": True, **changes}
    model.add_adapter("b", models.lora_config(**settings))
    return model


def fused_calls(calls, model: nn.Module, *arguments: Any, **keywords: Any) -> dict[str, int]:
    found = calls.of(model, *arguments, **keywords)
    return {name: found[name] for name in FUSED if name in found}


ALL = {"lora_linear": 4, "lora_linear_grouped": 4}


def test_switched(models, calls, two):
    outputs = {}
    for name in ("default", "b", "default"):
        for model in two:
            model.set_adapter(name)
        outputs[name] = models.assert_agree(*two)
        assert {key.split(".")[-2] for key in outputs[name] if key != "logits"} == {name}
        assert fused_calls(calls, two[1], models.token_ids()) == ALL
    assert not torch.allclose(outputs["default"]["logits"], outputs["b"]["logits"])


def test_disabled(models, calls, two):
    enabled = models.assert_agree(*two)["logits"]
    with two[0].disable_adapter(), two[1].disable_adapter():
        disabled = models.assert_agree(*two)["logits"]
        assert fused_calls(calls, two[1], models.token_ids()) == {}
        assert {row.adapters for row in lk.status(two[1])} == {"disabled"}
    assert not torch.allclose(enabled, disabled)
    torch.testing.assert_close(models.assert_agree(*two)["logits"], enabled)


def test_two_active(models, calls, two):
    for model in two:
        model.base_model.set_adapter(["default", "b"])
    outputs = models.assert_agree(*two)
    assert len(outputs) == 1 + 2 * 2 * 14
    assert fused_calls(calls, two[1], models.token_ids()) == ALL
    row = lk.status(two[1])[0]
    assert (row.rank, row.adapters, row.group) == (
        10,
        "default + b",
        ("q_proj", "k_proj", "v_proj"),
    )


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
def test_merged_and_unmerged(models, calls, two):
    before = models.assert_agree(*two)["logits"]
    for model in two:
        model.merge_adapter()
    merged = models.assert_agree(*two)["logits"]
    torch.testing.assert_close(merged, before)
    assert fused_calls(calls, two[1], models.token_ids()) == {}
    assert {row.adapters for row in lk.status(two[1])} == {"merged: default"}
    # The merged weight of another adapter.
    for model in two:
        model.set_adapter("b")
    with two[0].disable_adapter(), two[1].disable_adapter():
        models.assert_agree(*two)
    for model in two:
        model.set_adapter("default")
        if model.base_model.model.model.layers[0].mlp.up_proj.merged:
            model.unmerge_adapter()
    torch.testing.assert_close(models.assert_agree(*two)["logits"], before)
    assert fused_calls(calls, two[1], models.token_ids()) == ALL


def test_deleted(models, calls, two):
    for model in two:
        model.set_adapter("b")
        model.delete_adapter("default")
    models.assert_agree(*two)
    assert fused_calls(calls, two[1], models.token_ids()) == ALL


@pytest.mark.parametrize("target_rank", [None, 9])
def test_hot_swapped(models, calls, two, tmp_path: Path, target_rank):
    """Prepared for compilation, scalings are tensors and ranks are padded with zeros."""
    for model in two:
        model.save_pretrained(tmp_path, selected_adapters=["default", "b"])
        model.delete_adapter("b")
        if target_rank is not None:
            prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
            layer = model.base_model.model.model.layers[0].mlp.up_proj
            assert isinstance(layer.scaling["default"], torch.Tensor)
    first = models.assert_agree(*two)["logits"]
    add_b = {"lora_alpha": 6, "r": 4, "use_rslora": False}
    other = add_second(models, models.peft_model(), **add_b)
    other.save_pretrained(tmp_path / "other", selected_adapters=["b"])
    for model in two:
        hotswap_adapter(model, tmp_path / "other" / "b", "default")
    second = models.assert_agree(*two)["logits"]
    assert not torch.allclose(first, second)
    other.set_adapter("b")
    torch.testing.assert_close(second, other(models.token_ids()).logits)
    assert fused_calls(calls, two[1], models.token_ids()) == ALL


def test_a_mixed_batch_is_pefts(models, calls, two):
    names = ["default", "b", "__base__"]
    ids = models.token_ids(3)
    plain, fused = (model(ids, adapter_names=names).logits for model in two)
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-10)
    assert fused_calls(calls, two[1], ids, adapter_names=names) == {}
    assert fused_calls(calls, two[1], ids) == ALL


def test_rescaled(models, two):
    for model in two:
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 0.25)
    models.assert_agree(*two)


def test_an_adapter_of_other_layers_comes_later(models, calls):
    """What PEFT adds to accelerated layers is fused at once, new layers at the next call."""
    plain, fused = models.pair(target_modules=["q_proj", "v_proj"])
    for model in (plain, fused):
        torch.manual_seed(4)
        model.add_adapter("b", models.lora_config(target_modules="all-linear"))
        model.set_adapter("b")
    models.assert_agree(plain, fused)
    assert fused_calls(calls, fused, models.token_ids()) == {"lora_linear_grouped": 2}
    reasons = {row.name.split(".")[-1]: row.reason for row in lk.status(fused)}
    assert reasons["k_proj"] == "not accelerated" != reasons["q_proj"]
    lk.accelerate(fused)
    assert fused_calls(calls, fused, models.token_ids()) == ALL
    models.assert_agree(plain, fused)
    # Of the first adapter k, o and the MLP have nothing.
    for model in (plain, fused):
        model.set_adapter("default")
    models.assert_agree(plain, fused)
    assert fused_calls(calls, fused, models.token_ids()) == {"lora_linear_grouped": 2}


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_unloaded(models, two, method):
    expected, plain = (getattr(model, method)() for model in reversed(two))
    torch.testing.assert_close(
        expected(models.token_ids()).logits, plain(models.token_ids()).logits, rtol=0, atol=1e-10
    )
    assert list(expected.state_dict()) == list(plain.state_dict())
    lk.restore(expected)
    assert [type(m) for m in expected.modules()] == [type(m) for m in plain.modules()]
    assert not any("lora" in name for name in expected.state_dict())


def test_saved_files_are_the_same_and_load(models, two, tmp_path: Path):
    for model, name in zip(two, ("plain", "fused"), strict=True):
        model.save_pretrained(tmp_path / name)
    found = {}
    for name in ("plain", "fused"):
        for adapter in (".", "b"):
            folder = tmp_path / name / adapter
            config = json.loads((folder / "adapter_config.json").read_text())
            # PEFT keeps a set there.
            config["target_modules"].sort()
            tensors = (folder / "adapter_model.safetensors").read_bytes()
            found[name, adapter] = config, tensors
    assert found["plain", "."] == found["fused", "."]
    assert found["plain", "b"] == found["fused", "b"] and len(found["fused", "b"][1]) > 10_000
    loaded = PeftModel.from_pretrained(models.base_model(), str(tmp_path / "fused"))
    loaded.load_adapter(str(tmp_path / "fused" / "b"), "b")
    fused = lk.accelerate(copy.deepcopy(loaded))
    for name in ("default", "b"):
        for model in (two[0], loaded, fused):
            model.set_adapter(name)
        logits = models.outputs_of(loaded)["logits"]
        torch.testing.assert_close(logits, two[0](models.token_ids()).logits)
        models.assert_agree(loaded, fused)


def test_a_weighted_adapter(models, calls, two):
    for model in two:
        model.add_weighted_adapter(["default", "b"], [0.7, 0.4], "c", combination_type="cat")
        model.set_adapter("c")
    models.assert_agree(*two)
    assert fused_calls(calls, two[1], models.token_ids()) == ALL
