"""Every supported option of PEFT's LoraConfig, and combinations, against PEFT itself.

The same weights in both: what trains, logits, every gradient and the saved files must agree. In
float64 to 1e-10, so that nothing but the mathematics can differ; in float32 and bfloat16 the error
against float64 is at most twice PEFT's own.
"""

import copy
import json
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import lora_kernels as lk
from lora_kernels import adapters

PREFIX = "base_model.model."
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(4, 28).reshape(2, 12) * 7 % 60

# Where PEFT only warns of what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore")


def randomised(model: nn.Module) -> nn.Module:
    """Biases and norms too: what is zero or one at first hides errors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=0.2)
    return model.eval()


@cache
def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=72, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15,
        attention_bias=True, mlp_bias=True, **options,
    )  # fmt: skip
    return randomised(LlamaForCausalLM(config))


@cache
def classifier() -> LlamaForSequenceClassification:
    return randomised(LlamaForSequenceClassification(llama(pad_token_id=0, num_labels=3).config))


@cache
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=60, n_embd=64, n_layer=2, n_head=4, n_positions=32, initializer_range=0.15,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return randomised(GPT2LMHeadModel(config))


QUERY_AND_DOWN = {"target_modules": ["q_proj", "down_proj"]}
CONV1D = {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
CASES = {
    "plain": (llama, QUERY_AND_DOWN),
    "default targets, rslora": (llama, {"use_rslora": True}),
    "all-linear": (llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "regex, alpha 2.5": (llama, {"target_modules": r".*\.1\..*(k|up)_proj", "lora_alpha": 2.5}),
    "layers, excluded": (
        llama,
        {
            "target_modules": ["q_proj", "o_proj", "gate_proj"],
            "exclude_modules": ["mlp.gate_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
        },
    ),
    "patterns, rslora": (
        llama,
        {
            **QUERY_AND_DOWN,
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 2},
            "alpha_pattern": {"down_proj": 9},
        },
    ),
    "bias of the adapted": (llama, {**QUERY_AND_DOWN, "bias": "lora_only"}),
    "all biases": (llama, {**QUERY_AND_DOWN, "bias": "all"}),
    "lora_bias": (llama, {**QUERY_AND_DOWN, "lora_bias": True}),
    "lora_bias, all biases": (llama, {**QUERY_AND_DOWN, "lora_bias": True, "bias": "all"}),
    "modules_to_save": (
        llama,
        {**QUERY_AND_DOWN, "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "a saved projection": (llama, {"target_modules": "all-linear", "modules_to_save": ["k_proj"]}),
    "a saved mlp, all biases": (
        llama,
        {"target_modules": "all-linear", "modules_to_save": ["0.mlp"], "bias": "all"},
    ),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "tied head": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["lm_head"]}),
    "tied head saved": (
        lambda: llama(tie_word_embeddings=True),
        {**QUERY_AND_DOWN, "modules_to_save": ["lm_head"]},
    ),
    "pissa": (llama, {**QUERY_AND_DOWN, "init_lora_weights": "pissa"}),
    "pissa, rslora, patterns": (
        llama,
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "target_modules": "all-linear",
            "rank_pattern": {"k_proj": 2},
        },
    ),
    "olora": (llama, {**QUERY_AND_DOWN, "init_lora_weights": "olora"}),
    "orthogonal": (llama, {**QUERY_AND_DOWN, "init_lora_weights": "orthogonal"}),
    "gaussian": (llama, {**QUERY_AND_DOWN, "init_lora_weights": "gaussian"}),
    "dora": (llama, {"target_modules": "all-linear", "use_dora": True}),
    "dora, rslora, patterns": (
        llama,
        {
            **QUERY_AND_DOWN,
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"q_proj": 11},
        },
    ),
    "dora, all biases, modules_to_save": (
        llama,
        {**QUERY_AND_DOWN, "use_dora": True, "bias": "all", "modules_to_save": ["lm_head"]},
    ),
    "dora, pissa": (llama, {**QUERY_AND_DOWN, "use_dora": True, "init_lora_weights": "pissa"}),
    "classifier": (classifier, {**QUERY_AND_DOWN, "task_type": "SEQ_CLS"}),
    "gpt2": (gpt2, CONV1D),
    "gpt2 by default": (gpt2, {"fan_in_fan_out": True}),
    "gpt2 by all-linear": (gpt2, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2 dora": (gpt2, {**CONV1D, "use_dora": True}),
    "gpt2 pissa": (gpt2, {**CONV1D, "init_lora_weights": "pissa"}),
    "gpt2 lora_bias": (gpt2, {**CONV1D, "lora_bias": True, "bias": "lora_only"}),
    "gpt2 saved norm, all biases": (gpt2, {**CONV1D, "bias": "all", "modules_to_save": ["ln_f"]}),
}


def settings_of(case: str) -> dict:
    return {"r": 4, "lora_alpha": 6, **CASES[case][1]}


def peft_model(base: nn.Module, settings: dict, seed: int = 2, **options) -> peft.PeftModel:
    """PEFT's model over a copy of `base`, its trained parameters moved away from their start."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(**copy.deepcopy(settings)), **options
    )
    moved(model, "default")
    return model.eval()


def moved(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad or f".{name}" in key:
                size = parameter.abs().mean().clamp_min(0.2)
                parameter.add_(torch.randn_like(parameter) * size * 0.5)


def ours_of(theirs: peft.PeftModel, base: nn.Module, directory: Path, **options) -> nn.Module:
    theirs.save_pretrained(directory)
    model = copy.deepcopy(base)
    adapters.load_adapter_into(model, directory, is_trainable=True, **options)
    return model


def name_of(parameter: str) -> str:
    """One name for a parameter of either: PEFT's lora_B.<adapter>.bias is our lora_bias.<adapter>.

    And its lora_A.<adapter>.weight is our lora_A.<adapter>.
    """
    name = parameter.removeprefix(PREFIX).replace(".base_layer.", ".")
    if ".lora_" in name:
        if name.endswith(".bias"):
            name = name.removesuffix(".bias").replace(".lora_B.", ".lora_bias.")
        name = name.removesuffix(".weight")
    return name


def kind_of(name: str) -> str:
    *_, last = name.split(".")
    return next((part for part in name.split(".") if part.startswith("lora_")), last)


def logits_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    """By one name in both models; the gradients are those of all that trains."""
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    weights = torch.sin(torch.arange(logits.numel()).view_as(logits) * 0.7)
    (logits * weights.to(logits.dtype)).sum().backward()
    found = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            found[name_of(name)] = parameter.grad
    return found


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert tensor.norm() > 0, name
        assert (got[name] - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.mark.parametrize("case", CASES)
def test_training_in_float64(case: str, tmp_path: Path):
    """Made in float32, which PEFT's SVDs want, and run in float64."""
    base = CASES[case][0]()
    theirs = peft_model(base, settings_of(case))
    ours = ours_of(theirs, base, tmp_path).double()
    expected = logits_and_gradients(theirs.double())
    assert_close(logits_and_gradients(ours), expected, 1e-10)
    with lk.implementation("reference"):
        assert_close(logits_and_gradients(ours), expected, 1e-10)
    theirs.train()
    ours.train()
    assert_close(logits_and_gradients(ours), expected, 1e-10)
    with torch.no_grad(), theirs.disable_adapter(), adapters.disable_adapter(ours):
        disabled = {"logits": theirs(input_ids=IDS).logits}
        assert_close({"logits": ours(input_ids=IDS).logits}, disabled, 1e-10)
    assert (disabled["logits"] - expected["logits"]).norm() > 0.02 * expected["logits"].norm()


def by_kind(tensors: dict[str, Tensor], oracle: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of one kind (logits, every d_lora_A, ...) in one, each of norm 1 in the oracle.

    Errors of one layer reach all others: one tensor's ratio alone is the luck of its roundings.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        scaled = tensor.double().flatten() / oracle[name].norm()
        parts.setdefault(kind_of(name), []).append(scaled)
    return {kind: torch.cat(part) for kind, part in parts.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_in_low_precision(case: str, dtype: torch.dtype, tmp_path: Path):
    """float32, and bfloat16 under float32 adapters, against PEFT with the same weights."""
    base = copy.deepcopy(CASES[case][0]()).to(dtype)
    theirs = peft_model(base, settings_of(case))
    ours = ours_of(theirs, base, tmp_path)
    got, expected = logits_and_gradients(ours), logits_and_gradients(theirs)
    assert {k: t.dtype for k, t in got.items()} == {k: t.dtype for k, t in expected.items()}
    assert_within_twice(got, expected, logits_and_gradients(theirs.double()))


@pytest.mark.parametrize("case", ["plain", "lora_bias, all biases", "dora, rslora, patterns"])
def test_training_under_autocast(case: str, tmp_path: Path):
    base = CASES[case][0]()
    theirs = peft_model(base, settings_of(case))
    ours = ours_of(theirs, base, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = logits_and_gradients(ours), logits_and_gradients(theirs)
    assert {k: t.dtype for k, t in got.items()} == {k: t.dtype for k, t in expected.items()}
    assert_within_twice(got, expected, logits_and_gradients(theirs.double()))


def assert_within_twice(
    got: dict[str, Tensor], expected: dict[str, Tensor], oracle: dict[str, Tensor]
) -> None:
    """Of every kind of tensor, our error against float64 is at most twice PEFT's."""
    got, expected, exact = (by_kind(tensors, oracle) for tensors in (got, expected, oracle))
    for kind, tensor in exact.items():
        error, their_error = (got[kind] - tensor).norm(), (expected[kind] - tensor).norm()
        assert error <= 2 * their_error, kind


def raw(directory: Path) -> dict[str, tuple[torch.dtype, list]]:
    """A file's tensors, in a form that compares bit by bit."""
    tensors = load_file(directory / TENSORS)
    return {key: (tensor.dtype, tensor.tolist()) for key, tensor in tensors.items()}


@pytest.mark.parametrize("case", CASES)
def test_files_go_to_and_fro_unchanged(case: str, tmp_path: Path):
    base = copy.deepcopy(CASES[case][0]()).bfloat16()
    theirs = peft_model(base, settings_of(case))
    ours = ours_of(theirs, base, tmp_path / "theirs")
    adapters.save_adapters(ours, tmp_path / "ours")
    assert raw(tmp_path / "ours") == raw(tmp_path / "theirs")
    read = [peft.LoraConfig.from_pretrained(tmp_path / name) for name in ("theirs", "ours")]
    assert read[0] == read[1]
    written = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours")]
    assert written[0].keys() == written[1].keys()

    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    again.save_pretrained(tmp_path / "again")
    assert raw(tmp_path / "again") == raw(tmp_path / "theirs")


def is_mergeable(case: str) -> bool:
    """A head that is the embedding too has no weight of its own to merge into."""
    return case != "tied head"


@pytest.mark.parametrize("case", filter(is_mergeable, CASES))
def test_merged_and_unmerged(case: str, tmp_path: Path):
    base = CASES[case][0]()
    ours = ours_of(peft_model(base, settings_of(case)), base, tmp_path).double()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with torch.no_grad():
        expected = ours(input_ids=IDS).logits
        adapters.merge_adapter(ours)
        assert_close({"": ours(input_ids=IDS).logits}, {"": expected}, 1e-12)
        adapters.unmerge_adapter(ours)
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        adapters.merge_adapter(ours)
        plain = adapters.base_state_dict(ours)
        adapters.unload(ours)
        assert_close({"": ours(input_ids=IDS).logits}, {"": expected}, 1e-12)
    assert [type(module) for module in ours.modules()] == [type(m) for m in base.modules()]
    assert {name: id(tensor) for name, tensor in plain.items()} == {
        name: id(tensor) for name, tensor in ours.state_dict(keep_vars=True).items()
    }
    assert plain.keys() == base.state_dict().keys()


@pytest.mark.parametrize("case", ["plain", "dora", "lora_bias", "gpt2 dora", "gpt2 lora_bias"])
def test_merged_weights_are_those_of_peft(case: str, tmp_path: Path):
    base = CASES[case][0]()
    theirs = peft_model(base, settings_of(case))
    ours = ours_of(theirs, base, tmp_path).double()
    adapters.merge_adapter(ours)
    merged = theirs.double().merge_and_unload(safe_merge=True)
    assert_close(adapters.base_state_dict(ours), merged.state_dict(), 1e-10)


def test_a_layer_that_is_not_transposed_corrects_the_flag():
    for build, given in ((llama, True), (gpt2, False)):
        settings = {"target_modules": ["down_proj" if given else "c_attn"], "r": 2}
        with pytest.warns(UserWarning, match=f"fan_in_fan_out is (set to )?{given}"):
            theirs = peft.get_peft_model(
                copy.deepcopy(build()), peft.LoraConfig(**settings, fan_in_fan_out=given)
            )
        config = lk.LoraConfig(**settings, fan_in_fan_out=given)
        with pytest.warns(UserWarning, match=f"fan_in_fan_out is {given}"):
            ours = lk.inject_lora(copy.deepcopy(build()), config)
        assert theirs.peft_config["default"].fan_in_fan_out is (not given)
        assert ours.lora_configs["default"].fan_in_fan_out is (not given)
        assert config.fan_in_fan_out is given


@pytest.mark.parametrize(
    ("kinds", "dropout"),
    [
        (("dora", "plain"), 0.0),
        (("plain", "dora"), 0.0),
        (("lora_bias", "dora"), 0.0),
        (("dora", "dora"), 0.0),
        (("plain", "lora_bias"), 0.0),
        (("dora", "plain", "dora"), 0.0),
        (("dora",), 0.3),
        (("dora", "lora_bias"), 0.3),
        (("dora", "dora"), 0.3),
    ],
)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_several_active_adapters(build, kinds: tuple[str, ...], dropout: float, tmp_path: Path):
    """In their order: DoRA scales what the adapters before it have made."""
    base = build()
    options = {"plain": {}, "dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}
    targets = CONV1D if build is gpt2 else QUERY_AND_DOWN
    settings = [
        {**targets, **options[kind], "r": 3 + i, "lora_dropout": dropout}
        for i, kind in enumerate(kinds)
    ]
    theirs = peft_model(base, settings[0])
    names = ["default", *(f"other{i}" for i in range(1, len(kinds)))]
    for name, more in zip(names[1:], settings[1:], strict=True):
        theirs.add_adapter(name, peft.LoraConfig(**more))
        moved(theirs, name)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    for name in names:
        directory = tmp_path if name == "default" else tmp_path / name
        adapters.load_adapter_into(ours, directory, name, is_trainable=True)
    theirs.eval().base_model.set_adapter(names)
    adapters.set_adapter(ours, names)
    low = logits_and_gradients(ours), logits_and_gradients(theirs)
    theirs, ours = theirs.double(), ours.double()
    assert_within_twice(*low, logits_and_gradients(theirs))
    if dropout:
        # DoRA's mask, and that of what follows it, is torch's own: the same from the same seed.
        theirs.train()
        ours.train()
        torch.manual_seed(3)
        expected = logits_and_gradients(theirs)
        torch.manual_seed(3)
        assert_close(logits_and_gradients(ours), expected, 1e-10)
        theirs.eval()
        ours.eval()
    expected = logits_and_gradients(theirs)
    assert_close(logits_and_gradients(ours), expected, 1e-10)
    with torch.no_grad():
        adapters.merge_adapter(ours)
        assert_close({"": ours(input_ids=IDS).logits}, {"": expected["logits"]}, 1e-12)
