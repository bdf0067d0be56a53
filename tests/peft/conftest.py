"""Tiny random models of five families with PEFT adapters, and what of two of them must agree."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import lora_kernels as lk
from lora_kernels import peft_linear, peft_parents

FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(family: str = "llama", dtype: torch.dtype = torch.float64) -> nn.Module:
    """Weights large enough for every part to count, biases and norms not at their start values."""
    config = FAMILIES[family](
        vocab_size=72,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape)).requires_grad_(True)
            assert parameter.any(), name
    return model.to(dtype)


def lora_config(**changes: Any) -> peft.LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "init_lora_weights": False}
    return peft.LoraConfig(**{**settings, **changes}, task_type="CAUSAL_LM")


def peft_model(
    family: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any
) -> peft.PeftModel:
    torch.manual_seed(1)
    return peft.get_peft_model(base_model(family, dtype), lora_config(**changes)).eval()


def pair(
    family: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any
) -> tuple[Any, Any]:
    """A plain PEFT model and its accelerated copy."""
    plain = peft_model(family, dtype, **changes)
    return plain, lk.accelerate(copy.deepcopy(plain))


def token_ids(rows: int = 3, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(2, 72, (rows, length), generator=generator)


def outputs_of(model: nn.Module, **arguments: Any) -> dict[str, Tensor]:
    """The logits and the gradient of every adapter parameter that is trained."""
    ids = token_ids().to(next(model.parameters()).device)
    model.zero_grad()
    logits = model(input_ids=ids, **arguments).logits
    if logits.requires_grad:
        logits.float().log_softmax(-1)[..., 3].mean().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"logits": logits.detach(), **gradients}


def assert_agree(plain: nn.Module, fused: nn.Module, **arguments: Any) -> dict[str, Tensor]:
    """In float64: equal to 1e-10 in the logits and in the same gradients."""
    expected, outputs = outputs_of(plain, **arguments), outputs_of(fused, **arguments)
    assert list(outputs) == list(expected)
    for name, tensor in expected.items():
        assert tensor.dtype == outputs[name].dtype
        assert (tensor - outputs[name]).abs().max() < 1e-10, name
    return outputs


class Net(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent = parent

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        return self.parent(x + 0, **arguments)


def net_of(parent: Callable[[], nn.Module], **changes: Any) -> Any:
    """A PEFT model in float64 of one module with linear children a, b and c of one size."""
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["a", "b", "c"], "init_lora_weights": False}
    return peft.get_peft_model(Net(parent()).double(), peft.LoraConfig(**{**settings, **changes}))


def results_of(model: Any, x: Tensor, **arguments: Any) -> list[Tensor]:
    """The output, and the gradients of x and of what is trained."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, **arguments)
    y.sin().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class Calls(Counter):
    """How often each operation has been called since the last `of`."""

    def of(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> dict[str, int]:
        self.clear()
        function(*arguments, **keywords)
        return dict(self)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counter = Calls()

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counter[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for name in ("lora_linear", "lora_linear_grouped"):
        count(peft_linear, name)
    for name in ("rms_norm", "swiglu", "apply_rotary_pos_emb"):
        count(peft_parents, name)
    return counter


class Models:
    """The functions of this file, for tests to call by name."""

    base_model = staticmethod(base_model)
    lora_config = staticmethod(lora_config)
    peft_model = staticmethod(peft_model)
    pair = staticmethod(pair)
    token_ids = staticmethod(token_ids)
    outputs_of = staticmethod(outputs_of)
    assert_agree = staticmethod(assert_agree)
    net_of = staticmethod(net_of)
    results_of = staticmethod(results_of)
    assert_equal = staticmethod(assert_equal)


@pytest.fixture
def models() -> type[Models]:
    return Models
