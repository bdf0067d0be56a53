"""LoraLlama with every kind of adapter: against PEFT, through files, merged, and resumed."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lora_kernels import LoraConfig
from lora_kernels.layers import lora_layers
from lora_kernels.saved_modules import ModulesToSave
from lora_llama import LoraLlama, cli
from lora_llama.resuming import load_checkpoint

IDS = torch.arange(6, 46).reshape(2, 20) * 5 % 250

# The base is tied, and its layers have no biases.
OPTIONS = {
    "plain": {},
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "lora_bias": {"lora_bias": True},
    "head and norms": {"modules_to_save": ["lm_head", "norm"], "use_dora": True},
    "embeddings": {"modules_to_save": ["embed_tokens"], "bias": "all"},
    "a projection": {"modules_to_save": ["1.self_attn.v_proj"], "target_modules": "all-linear"},
    "an mlp": {"modules_to_save": ["0.mlp"], "target_modules": "all-linear"},
    "pissa": {"init_lora_weights": "pissa", "use_rslora": True},
    "olora": {"init_lora_weights": "olora", "target_modules": "all-linear"},
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*shared with", "ignore:Model with `tie", "ignore:.*lora_bias=True"
)


def settings(kind: str) -> dict:
    options = {"target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"], **OPTIONS[kind]}
    return {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **options}


def moved(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                size = parameter.abs().mean().clamp_min(0.1) * 0.5
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model.eval()


@pytest.fixture(params=OPTIONS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def adapter(kind: str, tiny_llama: Path, tmp_path: Path) -> Path:
    """A directory with a trained adapter of ours."""
    trained(kind, tiny_llama).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def trained(kind: str, path: Path) -> LoraLlama:
    torch.manual_seed(0)
    return moved(LoraLlama.from_pretrained(path, lora=LoraConfig(**settings(kind))))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (got - expected).norm() <= tolerance * expected.norm()


def test_training_is_that_of_peft(adapter: Path, tiny_llama: Path):
    ours = LoraLlama.from_pretrained(tiny_llama)
    ours.load_adapter(adapter, is_trainable=True)
    base = LlamaForCausalLM.from_pretrained(tiny_llama)
    theirs = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    assert_near(logits(ours.eval()), logits(theirs.eval()), 1e-5)
    ours.train()(input_ids=IDS, labels=IDS).loss.backward()
    theirs.train()(input_ids=IDS, labels=IDS).loss.backward()
    expected = [p.grad for p in theirs.parameters() if p.requires_grad]
    got = [p.grad for p in ours.parameters() if p.requires_grad]
    assert len(got) == len(expected) > 4
    # Sorted, for the two name and order them differently; `test_peft_parity.py` compares each.
    norms = sorted(gradient.norm().item() for gradient in got)
    assert norms == pytest.approx(sorted(gradient.norm().item() for gradient in expected), rel=1e-4)


def test_saved_and_loaded_it_computes_the_same(kind: str, adapter: Path, tiny_llama: Path):
    made = trained(kind, tiny_llama)
    read = LoraLlama.from_pretrained(adapter)
    assert torch.equal(logits(read.eval()), logits(made))
    assert not any(parameter.requires_grad for parameter in read.parameters())
    base = logits(LlamaForCausalLM.from_pretrained(tiny_llama))
    assert (logits(made) - base).norm() > 0.02 * base.norm()


def test_merge_writes_a_plain_checkpoint_of_equal_logits(
    kind: str, adapter: Path, tiny_llama: Path, tmp_path: Path
):
    expected = logits(LoraLlama.from_pretrained(adapter).eval())
    output = str(tmp_path / "merged")
    if kind == "lora_bias":
        with pytest.raises(ValueError, match="the layer no bias to merge it into"):
            cli.merge(str(adapter), output)
        assert not Path(output).exists()
        return
    cli.merge(str(adapter), output)
    plain, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert type(plain) is LlamaForCausalLM and not any(info.values())
    assert_near(logits(plain.eval()), expected, 1e-5)
    untied = kind in ("head and norms", "embeddings")
    assert plain.config.tie_word_embeddings is not untied
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is not untied


def test_a_checkpoint_of_a_training_is_read_back(kind: str, adapter: Path, tiny_llama: Path):
    expected = logits(LoraLlama.from_pretrained(adapter).eval())
    model = LoraLlama.from_pretrained(tiny_llama, lora=LoraConfig(**settings(kind))).eval()
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    load_checkpoint(model, str(adapter))
    assert torch.equal(logits(model), expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before


@pytest.mark.parametrize("kind", ["pissa", "olora", "dora"], indirect=True)
def test_a_new_adapter_begins_with_the_loaded_weights(kind: str, tiny_llama: Path):
    """As the base computes, whatever it begins with; also given to the constructor."""
    base = LlamaForCausalLM.from_pretrained(tiny_llama).eval()
    model = LoraLlama.from_pretrained(tiny_llama, lora=LoraConfig(**settings(kind))).eval()
    assert_near(logits(model), logits(base), 1e-5)
    _, layer = next(lora_layers(model))
    assert layer.lora_A["default"].any()
    torch.manual_seed(0)
    made = LoraLlama(base.config, LoraConfig(**settings(kind))).eval()
    expected = logits(made)
    with made.disable_adapter():
        # DoRA begins with the base; the others have taken a part of it.
        assert (kind == "dora") == torch.allclose(logits(made), expected, atol=1e-4)


def test_a_trained_head_learns_and_the_base_keeps_its_own(tiny_llama: Path):
    config = LoraConfig(r=2, modules_to_save=["lm_head", "embed_tokens"])
    model = LoraLlama.from_pretrained(tiny_llama, lora=config).train()
    assert isinstance(model.lm_head, ModulesToSave)
    assert model.get_output_embeddings().weight is model.lm_head.modules_to_save["default"].weight
    model.gradient_checkpointing_enable()
    before = model.lm_head.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[2] + 0.01
    assert not torch.equal(model.lm_head.weight, before)
    assert torch.equal(model.lm_head.original_module.weight, before)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["quary", "norm.weight"])
def test_a_module_that_is_not_there_is_named_before_a_weight_is_read(name: str, tiny_llama: Path):
    with pytest.raises(ValueError, match=rf"modules_to_save: .*\['{name}'\]"):
        LoraLlama.from_pretrained(tiny_llama, lora=LoraConfig(modules_to_save=[name]))


def test_a_weighted_sum_of_adapters(tiny_llama: Path):
    configs = {name: LoraConfig(r=3, init_lora_weights=False) for name in ("a", "b")}
    model = LoraLlama.from_pretrained(tiny_llama, lora=configs).eval()
    model.set_adapter(["a", "b"])
    expected = logits(model)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    assert model.active_adapters() == ["a", "b"]
    model.set_adapter("sum")
    assert_near(logits(model), expected, 1e-5)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "svd", svd_rank=6)
    model.set_adapter("svd")
    assert_near(logits(model), expected, 1e-5)


def test_disabling_and_deleting_leave_the_base(tiny_llama: Path):
    base = logits(LlamaForCausalLM.from_pretrained(tiny_llama).eval())
    model = trained("head and norms", tiny_llama)
    other = copy.deepcopy(model)
    model.disable_adapters()
    assert_near(logits(model), base, 1e-6)
    model.enable_adapters()
    assert torch.equal(logits(model), logits(other))
    model.delete_adapter("default")
    assert_near(logits(model), base, 1e-6)
    assert type(model.lm_head) is nn.Linear
