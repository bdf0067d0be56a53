"""LoraLlama against transformers' Llama and against PEFT on the same weights; loss, generation."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

import lora_kernels
from lora_kernels import LoraConfig, LoraLinear
from lora_llama import LoraLlama, verify_gradients
from lora_llama import model as model_module

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The same sums in another order, through two layers and back: 3e-6 was the largest difference
# seen in float32, 1e-14 in float64.
FLOAT32 = 1e-5
TOLERANCE = {torch.float32: FLOAT32, torch.float64: 1e-12}

SHAPES = {
    "two-kv-heads": {},
    "one-kv-head": {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "wide-heads": {"head_dim": 24},
}
ROPE = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [1.5 + 0.5 * i for i in range(8)],
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def tiny_config(**changes) -> LlamaConfig:
    settings = {
        "vocab_size": 89,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**settings, **changes})


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights of the size that keeps activations near 1, so that no part of the model is idle."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.2 * noise
        elif parameter.dim() == 1:
            value = 0.2 * noise
        else:
            value = noise if "embed" in name else noise * parameter.shape[1] ** -0.5
        parameter.data.copy_(value)


class Float64RMSNorm(LlamaRMSNorm):
    """transformers' own rounds float64 to float32 within."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * (mean + self.variance_epsilon).rsqrt())


def base_model(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    model = LlamaForCausalLM(copy.deepcopy(config))
    randomize(model)
    if dtype == torch.float64:
        for module in model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.__class__ = Float64RMSNorm
    return model.to(dtype).eval()


def lora_llama(base: LlamaForCausalLM, *adapters: LoraConfig) -> LoraLlama:
    """A LoraLlama over copies of `base`'s weights, with adapters "default", "second", ..."""
    torch.manual_seed(2)
    model = LoraLlama(copy.deepcopy(base.config)).to(base.dtype)
    model.load_state_dict(base.state_dict())
    for name, config in zip(("default", "second", "third"), adapters, strict=False):
        model.add_adapter(name, config)
    return model.eval()


def peft_model(base: LlamaForCausalLM, model: LoraLlama) -> peft.PeftModel:
    """PEFT on a copy of `base` with the adapters of `model`, their A and B copied."""
    wrapped = None
    for name, config in model.lora_configs.items():
        fields = {
            key: value
            for key, value in config.to_dict().items()
            if key != "peft_type" and value is not None
        }
        if wrapped is None:
            wrapped = peft.get_peft_model(
                copy.deepcopy(base), peft.LoraConfig(**fields), adapter_name=name
            )
        else:
            wrapped.add_adapter(name, peft.LoraConfig(**fields))
    assert wrapped is not None
    theirs = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            theirs[peft_name(name)].copy_(parameter)
    assert sum("lora_" in name for name in theirs) == len(adapter_parameters(model))
    return wrapped.eval()


def peft_name(name: str) -> str:
    return f"base_model.model.{name}.weight"


def adapter_parameters(model: LoraLlama) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def tokens(*shape: int, seed: int = 1, vocab: int = 89) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, shape, generator=generator)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def assert_is_transformers(model: LoraLlama, base: LlamaForCausalLM, ids: Tensor, **inputs) -> None:
    """Every bit with RoPE's reference; 1e-6 with the fast RoPE, which rounds less often."""
    with torch.no_grad():
        expected = base(ids, **inputs).logits
        with lora_kernels.implementation("reference"):
            assert torch.equal(model(ids, **inputs).logits, expected)
        assert relative_error(model(ids, **inputs).logits, expected) <= 1e-6


def adapter_gradients(model: nn.Module, **inputs: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if "lora_" in name}


def assert_equals_peft(base: LlamaForCausalLM, model: LoraLlama, theirs: peft.PeftModel) -> None:
    """Logits and every gradient of A and B."""
    tolerance = TOLERANCE[base.dtype]
    ids = tokens(2, 11)
    with torch.no_grad():
        ours_logits, their_logits = model(ids).logits, theirs(input_ids=ids).logits
        base_logits = base(ids).logits
    assert relative_error(ours_logits, their_logits) <= tolerance
    # The adapters do something, or the comparison would be of two base models.
    assert relative_error(ours_logits, base_logits) > 0.01
    ours = adapter_gradients(model, input_ids=ids, labels=ids)
    expected = adapter_gradients(theirs, input_ids=ids, labels=ids)
    assert ours.keys() == {n for n in adapter_parameters(model)}
    for name, gradient in ours.items():
        their_gradient = expected[peft_name(name)]
        assert (gradient is None) == (their_gradient is None), name
        if gradient is not None and their_gradient is not None:
            assert their_gradient.abs().max() > 0, name
            assert relative_error(gradient, their_gradient) <= tolerance, name


# Without adapters: transformers' Llama.


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tied", [False, True])
def test_without_adapters_it_is_transformers_llama(shape: str, attention: str, tied: bool):
    config = tiny_config(**SHAPES[shape], tie_word_embeddings=tied, attn_implementation=attention)
    base = base_model(config)
    model = lora_llama(base)
    assert model.config._attn_implementation == attention
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_is_transformers(model, base, tokens(2, 13))


@pytest.mark.parametrize("biased", ["attention_bias", "mlp_bias"])
def test_biases_are_transformers_biases(biased: str):
    base = base_model(tiny_config(**{biased: True}))
    model = lora_llama(base)
    ids = tokens(2, 9)
    assert_is_transformers(model, base, ids)
    with torch.no_grad():
        layer = model.model.layers[0]
        part = layer.self_attn.k_proj if biased == "attention_bias" else layer.mlp.up_proj
        part.bias.add_(1.0)
        assert relative_error(model(ids).logits, base(ids).logits) > 0.01


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("offset", [0, 8192 + 100])
def test_every_rope_type_is_transformers(rope: str, offset: int):
    """`offset` is beyond every original context length, 8,192 for llama3, and beyond 64."""
    config = tiny_config(rope_parameters={"rope_theta": 10000.0, **ROPE[rope]})
    base = base_model(config)
    model = lora_llama(base)
    ids = tokens(2, 12)
    # Scaled distances within the sequence: the first positions are 0, 3, 6, ...
    positions = offset + 3 * torch.arange(12).expand(2, -1)
    assert_is_transformers(model, base, ids, position_ids=positions)
    # Dynamic scaling begins beyond max_position_embeddings.
    if rope != "default" and (rope, offset) != ("dynamic", 0):
        with torch.no_grad():
            logits = model(ids, position_ids=positions).logits
            plain = base_model(tiny_config())(ids, position_ids=positions).logits
        assert relative_error(logits, plain) > 1e-4


def test_the_activation_is_the_configs():
    base = base_model(tiny_config(hidden_act="gelu_pytorch_tanh"))
    assert_is_transformers(lora_llama(base), base, tokens(2, 9))


def test_bfloat16_is_transformers_to_bfloat16s_accuracy():
    """Only RoPE differs: here it is computed in float32 and rounded once."""
    base = base_model(tiny_config(), torch.bfloat16)
    exact = copy.deepcopy(base).float()
    model = lora_llama(base)
    ids = tokens(4, 16)
    with torch.no_grad():
        expected = exact(ids).logits
        ours = (model(ids).logits.float() - expected).norm()
        theirs = (base(ids).logits.float() - expected).norm()
    assert 0 < ours <= 1.1 * theirs


def test_without_adapters_every_weight_gets_transformers_gradient():
    base = base_model(tiny_config())
    model = lora_llama(base)
    ids = tokens(2, 10)
    model(ids, labels=ids).loss.backward()
    base(ids, labels=ids).loss.backward()
    gradients = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, gradients[name].grad) <= FLOAT32, name


def test_hidden_states_and_attentions_are_recorded_as_in_transformers():
    base = base_model(tiny_config(attn_implementation="eager"))
    model = lora_llama(base)
    ids = tokens(2, 7)
    with torch.no_grad():
        ours = model(ids, output_hidden_states=True, output_attentions=True)
        theirs = base(ids, output_hidden_states=True, output_attentions=True)
    assert len(ours.hidden_states) == 3 and len(ours.attentions) == 2
    for got, expected in zip(
        ours.hidden_states + ours.attentions, theirs.hidden_states + theirs.attentions, strict=True
    ):
        assert relative_error(got, expected) <= 1e-6
    assert ours.attentions[0].shape == (2, 4, 7, 7)
    inner = model.model(ids, output_hidden_states=True)
    assert torch.equal(inner.hidden_states[1], ours.hidden_states[1])


def test_attention_can_be_switched_after_loading():
    model = lora_llama(base_model(tiny_config(attn_implementation="sdpa")))
    ids = tokens(1, 6)
    with torch.no_grad():
        sdpa = model(ids).logits
        model.set_attn_implementation("eager")
        assert model(ids, output_attentions=True).attentions[0] is not None
        assert relative_error(model(ids).logits, sdpa) <= FLOAT32


def test_an_attention_implementation_is_given_what_transformers_gives_it():
    """Among it position_ids and the lengths of packed sequences, which flash attention reads."""
    given = []

    def recording(module, q, k, v, mask, dropout=0.0, **options):
        shapes = [tuple(tensor.shape) for tensor in (q, k, v)]
        traits = (module.is_causal, module.num_key_value_groups)
        given.append((shapes, mask, dropout, traits, options))
        return eager_attention_forward(module, q, k, v, mask, dropout=dropout, **options)

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", eager_mask)
    base = base_model(tiny_config(attn_implementation="recording", attention_dropout=0.25))
    model = lora_llama(base)
    inputs = {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 5]),
        "max_length_q": 3,
        "use_cache": False,
    }
    for training in (False, True):
        for either in (model, base):
            either.train(training)(tokens(1, 5), **inputs)
    half = len(given) // 4
    for start, dropout in ((0, 0.0), (2 * half, 0.25)):
        ours, theirs = given[start : start + half], given[start + half : start + 2 * half]
        assert len(ours) == len(theirs) == 2
        for got, expected in zip(ours, theirs, strict=True):
            assert got[0] == expected[0] == [(1, 4, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16)]
            assert torch.equal(got[1], expected[1]) and got[2] == expected[2] == dropout
            assert got[3] == expected[3] and got[4].keys() == expected[4].keys()
            assert {"position_ids", "cu_seq_lens_q", "max_length_q", "scaling"} <= got[4].keys()
            assert got[4]["position_ids"] is inputs["position_ids"]


# With adapters: PEFT.

ADAPTERS = {
    "all seven": {"target_modules": PROJECTIONS},
    "subset": {"target_modules": ["v_proj", "up_proj"]},
    "default targets": {},
    "rslora": {"target_modules": PROJECTIONS, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 5, "layers.1.mlp.down_proj": 1},
        "alpha_pattern": {"q_proj": 3, "layers.0.self_attn.v_proj": 40},
    },
    "one layer": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "all-linear": {"target_modules": "all-linear"},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
}


def adapter(**changes) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **changes})


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_adapters_equal_peft(case: str, shape: str, dtype: torch.dtype):
    base = base_model(tiny_config(**SHAPES[shape]), dtype)
    model = lora_llama(base, adapter(**ADAPTERS[case]))
    assert_equals_peft(base, model, peft_model(base, model))


def test_adapters_over_biases_equal_peft():
    base = base_model(tiny_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=True))
    model = lora_llama(base, adapter(target_modules="all-linear"))
    assert_equals_peft(base, model, peft_model(base, model))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_several_active_adapters_equal_peft(dtype: torch.dtype):
    base = base_model(tiny_config(), dtype)
    model = lora_llama(
        base,
        adapter(target_modules=PROJECTIONS),
        adapter(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
        adapter(r=2, target_modules=["v_proj"]),
    )
    theirs = peft_model(base, model)
    for active in (["default", "second"], ["second", "third"], ["default", "second", "third"]):
        model.set_adapter(active)
        theirs.base_model.set_adapter(active)
        assert model.active_adapters() == active
        assert_equals_peft(base, model, theirs)


def test_switching_and_disabling_equal_peft():
    base = base_model(tiny_config())
    model = lora_llama(
        base, adapter(target_modules=PROJECTIONS), adapter(r=2, target_modules=["o_proj"])
    )
    theirs = peft_model(base, model)
    for active in ("default", "second", "default"):
        model.set_adapter(active)
        theirs.set_adapter(active)
        assert_equals_peft(base, model, theirs)
    ids = tokens(2, 8)
    with torch.no_grad(), model.disable_adapter(), theirs.disable_adapter():
        assert_is_transformers(model, base, ids)
        assert relative_error(model(ids).logits, theirs(input_ids=ids).logits) <= 1e-6
    assert_equals_peft(base, model, theirs)


def test_an_untrained_adapter_changes_nothing():
    base = base_model(tiny_config())
    model = lora_llama(base, adapter(target_modules=PROJECTIONS, init_lora_weights=True))
    assert_is_transformers(model, base, tokens(2, 8))


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)],
)
def test_16_bits_below_or_around_float32_adapters_are_as_accurate_as_in_peft(
    dtype: torch.dtype, autocast: bool
):
    """The yardstick is PEFT's own error against the same numbers in float32."""
    base = base_model(tiny_config(), dtype)
    model = lora_llama(base, adapter(target_modules=PROJECTIONS))
    exact = lora_llama(copy.deepcopy(base).float(), adapter(target_modules=PROJECTIONS))
    exact.load_state_dict(model.state_dict())
    theirs = peft_model(base, model)
    ids = tokens(4, 16)
    expected = adapter_gradients(exact, input_ids=ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours_logits, their_logits = model(ids).logits, theirs(input_ids=ids).logits
        ours = adapter_gradients(model, input_ids=ids, labels=ids)
        peft_gradients = adapter_gradients(theirs, input_ids=ids, labels=ids)
    assert ours_logits.dtype == their_logits.dtype == torch.bfloat16
    exact_logits = exact(ids).logits
    error, yardstick = (
        (logits.float() - exact_logits).norm() for logits in (ours_logits, their_logits)
    )
    assert 0 < error <= 1.5 * yardstick
    for kind in ("lora_A", "lora_B"):
        names = [name for name in ours if kind in name]
        assert {ours[name].dtype for name in names} == {torch.float32}
        assert {peft_gradients[peft_name(name)].dtype for name in names} == {torch.float32}
        error, yardstick = (
            torch.stack([(got - expected[name]).norm() for name, got in gradients]).norm()
            for gradients in (
                [(name, ours[name]) for name in names],
                [(name, peft_gradients[peft_name(name)]) for name in names],
            )
        )
        assert 0 < error <= 1.5 * yardstick, kind


@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("triton", marks=pytest.mark.kernel)]
)
def test_every_implementation_gives_the_same_logits_and_gradients(implementation: str, device):
    config = tiny_config(**SHAPES["one-kv-head"], num_hidden_layers=1, vocab_size=40)
    model = lora_llama(base_model(config), adapter(target_modules=PROJECTIONS)).to(device)
    ids = tokens(1, 5, vocab=40).to(device)
    with lora_kernels.implementation("eager"), torch.no_grad():
        expected_logits = model(ids).logits
    with lora_kernels.implementation("eager"):
        expected = adapter_gradients(model, input_ids=ids, labels=ids)
    with lora_kernels.implementation(implementation):
        gradients = adapter_gradients(model, input_ids=ids, labels=ids)
        assert relative_error(model(ids).logits, expected_logits) <= FLOAT32
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) <= FLOAT32, name


# The loss covers the whole sequence.


def training_gradients(model: LoraLlama, **inputs) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in adapter_parameters(model).items()}


@pytest.mark.parametrize("option", ["", "num_items_in_batch", "shift_labels"])
def test_a_training_step_has_no_logits_and_the_same_loss_and_gradients(option: str):
    model = lora_llama(base_model(tiny_config()), adapter(target_modules=PROJECTIONS))
    ids = tokens(3, 10)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 7:] = -100
    inputs: dict[str, Tensor] = {"input_ids": ids, "labels": labels}
    if option == "num_items_in_batch":
        inputs[option] = torch.tensor(100)
    elif option == "shift_labels":
        inputs[option] = labels.roll(-2, dims=1)
    expected_loss, expected = training_gradients(model.eval(), **inputs)
    model.train()
    assert model(**inputs).logits is None
    assert model(**{**inputs, "labels": None}).logits.shape == (3, 10, 89)
    loss, gradients = training_gradients(model, **inputs)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) <= FLOAT32, name
    assert isinstance(model(**inputs, return_dict=False), tuple)


def test_a_head_that_is_not_plainly_frozen_keeps_its_logits():
    """It trains, has an adapter or a hook, or the loss is the user's own."""
    inputs = {"input_ids": tokens(2, 6), "labels": tokens(2, 6)}
    model = lora_llama(base_model(tiny_config()), adapter(target_modules=PROJECTIONS)).train()
    assert model(**inputs).logits is None
    model.lm_head.weight.requires_grad_(True)
    assert model(**inputs).logits is not None
    model.lm_head.weight.requires_grad_(False)
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert model(**inputs).logits is not None
    handle.remove()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    output = model(**inputs)
    assert torch.equal(output.loss, output.logits.sum())
    adapted = lora_llama(base_model(tiny_config()), adapter(target_modules=["lm_head", "q_proj"]))
    assert adapted.train()(**inputs).logits is not None


HEADS = {
    "frozen": {},
    "trained": {},
    "with an adapter": {"target_modules": ["lm_head", "q_proj"]},
    "a copy": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shifted", [False, True])
def test_losses_by_row_need_no_logits(head: str, shifted: bool, monkeypatch):
    settings = {"target_modules": PROJECTIONS, **HEADS[head]}
    model = lora_llama(base_model(tiny_config()), adapter(**settings)).eval()
    if head == "trained":
        model.lm_head.weight.requires_grad_(True)
    monkeypatch.setattr(model_module, "_SCORED_AT_ONCE", 4)
    ids = tokens(3, 10)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1] = -100
    targets = labels if shifted else F.pad(labels[:, 1:], (0, 1), value=-100)
    inputs = {"input_ids": ids, "labels": labels}
    if shifted:
        inputs["shift_labels"] = targets
    with torch.no_grad():
        logits = model(ids).logits
        output = model(**inputs, loss_per_row=True)
    assert output.logits is None and output.loss.shape == (3,) and output.loss[1] == 0
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
    assert relative_error(output.loss, expected) <= FLOAT32


def test_a_cache_is_made_where_there_is_something_to_go_on_with():
    model = lora_llama(base_model(tiny_config()), adapter(target_modules=PROJECTIONS)).eval()
    ids = tokens(1, 6)
    assert model(ids).past_key_values.get_seq_length() == 6
    assert model(ids, labels=ids).past_key_values is None
    assert model(ids, labels=ids, use_cache=True).past_key_values is not None
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None


def test_the_loss_is_the_cross_entropy_of_every_unmasked_label():
    model = lora_llama(base_model(tiny_config()), adapter(target_modules=PROJECTIONS))
    ids = tokens(3, 10)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 7:] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
    log_p = output.logits[:, :-1].double().log_softmax(-1)
    total, count = 0.0, 0
    for row in range(3):
        for position in range(1, 10):
            if labels[row, position] != -100:
                total -= log_p[row, position - 1, labels[row, position]].item()
                count += 1
    assert count == 6 + 6 + 9
    assert output.loss.item() == pytest.approx(total / count, rel=1e-6)
    with torch.no_grad():
        accumulated = model(ids, labels=labels, num_items_in_batch=torch.tensor(100))
    assert accumulated.loss.item() == pytest.approx(total / 100, rel=1e-6)


def test_every_unmasked_label_counts_and_no_masked_one():
    model = lora_llama(base_model(tiny_config()), adapter(target_modules=PROJECTIONS))
    ids = tokens(1, 8)
    labels = ids.clone()
    labels[0, 3] = -100
    with torch.no_grad():
        loss = model(ids, labels=labels).loss
        for position in range(8):
            changed = labels.clone()
            changed[0, position] = 3 + (ids[0, position] - 3 + 1) % 80
            # Nothing predicts the first token.
            expect_change = position != 0
            if position == 3:
                changed[0, position] = -100
                expect_change = False
            assert (model(ids, labels=changed).loss != loss) == expect_change, position


def test_early_tokens_train_every_adapter():
    """One label alone, the second token's: all of A and B get a gradient from the first token."""
    model = lora_llama(base_model(tiny_config()), adapter(target_modules=PROJECTIONS))
    ids = tokens(2, 12)
    for position in (1, 2, 11):
        labels = torch.full_like(ids, -100)
        labels[:, position] = ids[:, position]
        gradients = adapter_gradients(model, input_ids=ids, labels=labels)
        for name, gradient in gradients.items():
            # The first token attends to itself alone: its q and k have no effect.
            if position == 1 and ("q_proj" in name or "k_proj" in name):
                assert gradient.abs().max() <= 1e-6, name
            else:
                assert gradient.abs().max() > 1e-4, name


# The delta belongs to the projections, on top of the base.


def test_every_projection_is_its_base_plus_the_scaled_delta():
    model = lora_llama(base_model(tiny_config()), adapter(target_modules=PROJECTIONS))
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            module.register_forward_hook(
                lambda module, args, output, name=name: seen.update({name: (args[0], output)})
            )
    ids = tokens(1, 6)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        assert len(seen) == 14
        for name, (x, y) in seen.items():
            layer = model.get_submodule(name)
            base = F.linear(x, layer.weight, layer.bias)
            delta = 1.5 * (x @ layer.lora_A["default"].T) @ layer.lora_B["default"].T
            assert relative_error(y, base + delta) <= FLOAT32, name
            assert min(base.norm(), delta.norm()) > 0.1, name
        # No adapter touches the head: the logits are the plain head of the last hidden state.
        assert type(model.lm_head) is nn.Linear
        assert torch.equal(output.logits, model.lm_head(output.hidden_states[-1]))


# Generation.


def generating_model() -> LoraLlama:
    model = lora_llama(base_model(tiny_config()), adapter(target_modules=PROJECTIONS))
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_generation_with_a_cache_equals_generation_without(cache: str | None):
    model = generating_model()
    ids = tokens(2, 5)
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, use_cache=False, **options)
    assert expected.shape == (2, 17) and len(set(expected[0].tolist())) > 4
    with model.disable_adapter():
        assert not torch.equal(model.generate(ids, use_cache=False, **options), expected)
    choice = {} if cache is None else {"cache_implementation": cache}
    assert torch.equal(model.generate(ids, use_cache=True, **choice, **options), expected)


def test_left_padded_batches_generate_what_each_prompt_alone_does():
    model = generating_model()
    prompts = [tokens(1, length, seed=length) for length in (3, 7, 5)]
    alone = [model.generate(p, max_new_tokens=8, do_sample=False)[0, -8:] for p in prompts]
    assert len({tuple(a.tolist()) for a in alone}) == 3
    padded = torch.zeros(3, 7, dtype=torch.long)
    mask = torch.zeros(3, 7, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, 7 - prompt.shape[1] :] = prompt
        mask[row, 7 - prompt.shape[1] :] = 1
    together = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(together[:, -8:], torch.stack(alone))


def test_beam_search_equals_transformers_on_the_merged_model():
    model = generating_model()
    ids = tokens(2, 5)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    ours = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    plain = copy.deepcopy(model).merge_and_unload()
    plain.generation_config.eos_token_id = None
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_sequences_equal_separate_ones(attention: str):
    config = tiny_config(attn_implementation=attention)
    model = lora_llama(base_model(config), adapter(target_modules=PROJECTIONS))
    parts = [tokens(1, length, seed=length) for length in (5, 1, 8)]
    packed = torch.cat(parts, dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    with torch.no_grad():
        separate = torch.cat([model(part).logits for part in parts], dim=1)
        # With a cache, transformers does not look for packed sequences.
        together = model(packed, position_ids=positions, use_cache=False).logits
        mixed = model(packed, use_cache=False).logits
    assert relative_error(together, separate) <= FLOAT32
    assert relative_error(mixed, separate) > 0.01


# Gradient checkpointing.


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_leaves_every_gradient_bit_as_it_is(reentrant: bool, dropout: float):
    base = base_model(tiny_config())
    model = lora_llama(base, adapter(target_modules=PROJECTIONS, lora_dropout=dropout)).train()
    ids = tokens(2, 10)

    def gradients() -> dict[str, Tensor | None]:
        torch.manual_seed(7)
        return adapter_gradients(model, input_ids=ids, labels=ids)

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_activation_checkpointing
    calls = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    got = gradients()
    handle.remove()
    assert len(calls) == 2, "the block did not run again in the backward pass"
    assert verify_gradients(model)
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name
    if dropout:
        torch.manual_seed(8)
        other = adapter_gradients(model, input_ids=ids, labels=ids)
        assert any(not torch.equal(other[name], expected[name]) for name in other)


# torch.compile.


@pytest.mark.slow
def test_the_whole_model_compiles_to_one_graph():
    model = lora_llama(base_model(tiny_config()), adapter(target_modules=PROJECTIONS)).train()
    ids = tokens(2, 10)
    expected = adapter_gradients(model, input_ids=ids, labels=ids)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in adapter_parameters(model).items():
        assert relative_error(parameter.grad, expected[name]) <= FLOAT32, name


# The object itself.


def test_a_deep_copy_is_independent_and_equal():
    model = lora_llama(base_model(tiny_config()), adapter(target_modules=["q_proj"]))
    ids = tokens(1, 6)
    with torch.no_grad():
        before = model(ids).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids).logits, before)
        for parameter in adapter_parameters(twin).values():
            parameter.add_(1.0)
        twin.delete_adapter("default")
        assert torch.equal(model(ids).logits, before)
    assert list(model.lora_configs) == ["default"]


def test_only_adapters_are_trainable_and_counted(capsys: pytest.CaptureFixture[str]):
    base = base_model(tiny_config())
    model = lora_llama(base, adapter(target_modules=["q_proj", "down_proj"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_parameters(model)) and len(trainable) == 8
    expected = 2 * (4 * (64 + 64) + 4 * (96 + 64))
    assert model.get_nb_trainable_parameters() == (expected, base.num_parameters() + expected)
    model.print_trainable_parameters()
    ours = capsys.readouterr().out
    peft_model(base, model).print_trainable_parameters()
    assert ours == capsys.readouterr().out


def test_its_name_is_known_to_the_loss_and_the_trainer():
    model = LoraLlama(tiny_config())
    assert model.loss_type == "ForCausalLM"
    assert type(model).__name__.endswith("ForCausalLM")


def test_transformers_own_adapter_methods_answer_for_our_adapters():
    model = lora_llama(base_model(tiny_config()), adapter(target_modules=["q_proj"]), adapter(r=2))
    assert model.active_adapter() == "default" and model.active_adapters() == ["default"]
    assert set(model.get_adapter_state_dict("second")) == {
        f"model.layers.{layer}.self_attn.{name}.lora_{half}.weight"
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
        for half in "AB"
    }
    ids = tokens(1, 6)
    with torch.no_grad():
        adapted = model(ids).logits
        model.disable_adapters()
        plain = model(ids).logits
        assert not torch.equal(adapted, plain)
        model.enable_adapters()
        assert torch.equal(model(ids).logits, adapted)
    with pytest.raises(ValueError, match="enable_peft_hotswap"):
        model.enable_peft_hotswap()
    model.set_adapter([])
    with pytest.raises(ValueError, match="active_adapter"):
        model.active_adapter()


def test_adapters_can_be_given_by_name():
    model = LoraLlama(tiny_config(), lora={"b": adapter(), "c": adapter(r=2)})
    assert list(model.lora_configs) == ["b", "c"] and model.active_adapters() == ["b"]
