"""accelerate and restore: the same numbers from the fused operations, in place, and back."""

import copy
import io
import pickle
import sys

import peft
import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.testing import MAX_RATIO, compare

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma"]
# By family: calls of lora_linear (o, down) and lora_linear_grouped (q k v, gate up), and of the
# other operations, in one forward of two layers in float32.
PER_LAYER = {"lora_linear": 2, "lora_linear_grouped": 2, "apply_rotary_pos_emb": 1, "swiglu": 1}
LLAMA = {**{name: 2 * count for name, count in PER_LAYER.items()}, "rms_norm": 5}
EXPECTED = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "rms_norm": 9},
    # 1 + weight and GELU are no operations here.
    "gemma": {name: LLAMA[name] for name in LLAMA if name not in ("rms_norm", "swiglu")},
}


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float64_model_and_its_gradients_are_equal(models, family):
    plain, fused = models.pair(family)
    outputs = models.assert_agree(plain, fused)
    assert len(outputs) == 1 + 2 * 2 * 7 and all(tensor.any() for tensor in outputs.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_operation_that_fits_is_called(models, calls, family):
    fused = lk.accelerate(models.peft_model(family, torch.float32))
    assert calls.of(fused, models.token_ids()) == EXPECTED[family]
    counts = lk.status(fused).modules
    for kind, name in (("RMSNorm", "rms_norm"), ("SwiGLU", "swiglu")):
        assert counts[kind][0] == EXPECTED[family].get(name, 0)
    assert counts["RoPE"] == (2, 2) and counts["SwiGLU"][1] == 2
    assert counts["RMSNorm"][1] == (9 if family == "qwen3" else 5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_near_to_float64_as_peft(models, family, dtype):
    """A bfloat16 base has float32 adapters, PEFT's default."""
    plain, fused = models.pair(family, dtype)
    lora_a = next(p for name, p in fused.named_parameters() if "lora_A" in name)
    assert lora_a.dtype == torch.float32
    oracle = models.outputs_of(copy.deepcopy(plain).double())
    expected, outputs = models.outputs_of(plain), models.outputs_of(fused)
    assert outputs["logits"].dtype == dtype
    assert_as_accurate(outputs, expected, oracle)


@pytest.mark.kernel
def test_the_kernels_are_as_near_to_float64_as_peft(models, device):
    plain = models.peft_model("qwen3", torch.float32).to(device)
    fused = lk.accelerate(copy.deepcopy(plain))
    oracle, expected = models.outputs_of(copy.deepcopy(plain).double()), models.outputs_of(plain)
    with lk.implementation("triton"):
        outputs = models.outputs_of(fused)
    assert_as_accurate(outputs, expected, oracle)


def assert_as_accurate(
    outputs: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    oracle: dict[str, torch.Tensor],
) -> None:
    assert all(outputs[name].dtype == tensor.dtype for name, tensor in expected.items())
    comparison = compare(outputs["logits"], expected["logits"], oracle["logits"])
    assert comparison.ratio <= MAX_RATIO, comparison
    # All together: what one rounding of the forward pass does to a single gradient is a matter of
    # luck, to all of them it is not.
    comparison = compare(*(gradients(found, oracle) for found in (outputs, expected, oracle)))
    assert comparison.ratio <= MAX_RATIO, comparison


def gradients(found: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]) -> torch.Tensor:
    """All gradients in one tensor, each in units of the length of the exact one."""
    return torch.cat(
        [found[name].flatten() / oracle[name].norm() for name in oracle if name != "logits"]
    )


def test_the_model_is_the_same_object_with_the_same_state(models):
    plain = models.peft_model()
    modules = list(plain.modules())
    state = {name: tensor.data_ptr() for name, tensor in plain.state_dict().items()}
    hook = plain.base_model.model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert lk.accelerate(plain) is plain
    assert list(plain.modules()) == modules
    assert {name: tensor.data_ptr() for name, tensor in plain.state_dict().items()} == state
    assert len(plain.base_model.model.model.layers[0].mlp._forward_hooks) == 1
    hook.remove()


def test_restore_gives_back_every_class_and_attribute(models, calls):
    model = models.peft_model(dtype=torch.float32)
    before = classes(model)
    attributes = [set(module.__dict__) for module in model.modules()]
    lk.accelerate(model)
    assert sum(old is not new for old, new in zip(before, classes(model), strict=True)) == 14 + 9
    assert all(isinstance(m, c) for m, c in zip(model.modules(), before, strict=True))
    assert calls.of(model, models.token_ids())
    assert lk.restore(model) is model
    assert classes(model) == before
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert calls.of(model, models.token_ids()) == {}
    assert lk.restore(model) is model and classes(model) == before


def test_it_can_be_called_again_and_the_last_options_hold(models, calls):
    model = lk.accelerate(models.peft_model(dtype=torch.float32))
    once = classes(model)
    assert classes(lk.accelerate(model)) == once
    lk.accelerate(model, grouped=False, rope=False, rms_norm=False, swiglu=False)
    assert calls.of(model, models.token_ids()) == {"lora_linear": 14}
    for option, name in (
        ("rope", "apply_rotary_pos_emb"),
        ("rms_norm", "rms_norm"),
        ("swiglu", "swiglu"),
        ("grouped", "lora_linear_grouped"),
    ):
        lk.accelerate(model, **{option: False})
        found = calls.of(model, models.token_ids())
        expected = {key: count for key, count in LLAMA.items() if key != name}
        assert found == (expected if option != "grouped" else {**expected, "lora_linear": 14})
    assert classes(lk.accelerate(model)) == once


def test_pefts_default_targets_group_q_and_v(models, calls):
    plain, fused = models.pair(target_modules=["q_proj", "v_proj"])
    models.assert_agree(plain, fused)
    found = calls.of(fused, models.token_ids())
    assert found["lora_linear_grouped"] == 2 and "lora_linear" not in found


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_transformers_own_adapters(models, calls, tmp_path):
    plain = models.base_model()
    torch.manual_seed(1)
    plain.add_adapter(models.lora_config(), "a")
    torch.manual_seed(3)
    plain.add_adapter(models.lora_config(r=3), "b")
    plain.set_adapter("a")
    fused = lk.accelerate(copy.deepcopy(plain))
    for name in ("a", "b"):
        plain.set_adapter(name), fused.set_adapter(name)
        models.assert_agree(plain, fused)
    assert calls.of(fused, models.token_ids())["lora_linear_grouped"] == 4
    plain.disable_adapters(), fused.disable_adapters()
    models.assert_agree(plain, fused)
    plain.enable_adapters(), fused.enable_adapters()
    plain.save_pretrained(tmp_path / "plain"), fused.save_pretrained(tmp_path / "fused")
    name = "adapter_model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()
    loaded = models.base_model()
    loaded.load_adapter(str(tmp_path / "fused"))
    models.assert_agree(loaded, lk.accelerate(copy.deepcopy(loaded)))


def test_a_copy_is_accelerated_and_independent(models, calls):
    plain, fused = models.pair(dtype=torch.float64)
    copied = copy.deepcopy(fused)
    assert classes(copied) == classes(fused)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    models.assert_agree(plain, copied)
    assert calls.of(copied, models.token_ids())["lora_linear_grouped"] == 4


def test_a_pickle_of_the_whole_model_is_accelerated(models):
    plain, fused = models.pair()
    restored = pickle.loads(pickle.dumps(fused))
    assert classes(restored) == classes(fused)
    models.assert_agree(plain, restored)
    assert classes(lk.restore(restored)) == classes(plain)


def test_the_state_dict_is_the_plain_models(models):
    plain, fused = models.pair()
    models.outputs_of(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    buffer = io.BytesIO()
    torch.save(fused.state_dict(), buffer)
    buffer.seek(0)
    fused.load_state_dict(torch.load(buffer, weights_only=True))
    models.assert_agree(plain, fused)


def test_recorded_hidden_states_and_attentions_are_equal(models):
    plain, fused = models.pair()
    for model in (plain, fused):
        model.base_model.model.set_attn_implementation("eager")
    expected, outputs = (
        model(models.token_ids(), output_hidden_states=True, output_attentions=True)
        for model in (plain, fused)
    )
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    for name in ("hidden_states", "attentions"):
        for a, b in zip(getattr(expected, name), getattr(outputs, name), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_generate_and_inference_mode(models, calls):
    plain, fused = models.pair(dtype=torch.float32)
    ids = models.token_ids(2, 5)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(plain.generate(ids, **settings), fused.generate(ids, **settings))
    with torch.inference_mode():
        assert calls.of(fused, ids) == LLAMA
        torch.testing.assert_close(plain(ids).logits, fused(ids).logits)


# Errors.


@pytest.mark.parametrize("function", [lk.accelerate, lk.restore])
def test_something_else_than_a_module_is_refused(function):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        function({})


def test_a_model_without_lora_layers_is_refused_and_unchanged(models):
    model = models.base_model()
    with pytest.raises(ValueError, match="got LlamaForCausalLM without any"):
        lk.accelerate(model)
    other = peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM"))
    before = classes(other)
    with pytest.raises(ValueError, match="got PeftModelForCausalLM with PEFT's Linear instead"):
        lk.accelerate(other)
    assert classes(other) == before


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", None)
    with pytest.raises(ImportError, match=r"pip install lora-kernels\[peft\]"):
        lk.accelerate(nn.Linear(2, 2))
