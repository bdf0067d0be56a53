"""RMSNorm, SwiGLU and RoPE by what a module computes; other modules and other libraries' stay."""

import copy
import types
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import lora_kernels as lk
from lora_kernels import class_swap
from lora_kernels.peft_parents import (
    eps_attribute,
    is_rms_norm,
    is_swiglu,
    parent_module,
    rms_norm_module,
    rotates_halves,
)
from lora_kernels.testing import MAX_RATIO, compare


def norm_of(cls: type[nn.Module], *arguments: Any) -> Any:
    module = cls(*arguments)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-1.0, 2.0, module.weight.numel()))
    return module


class RoundsOnce(LlamaRMSNorm):
    """weight in float32 too, and one rounding at the end: other bits in bfloat16 alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * x).to(hidden_states.dtype)


class WithoutEps(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))
        return self.weight * x.to(hidden_states.dtype)


class WithBias(LlamaRMSNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))


# RMSNorm.


@pytest.mark.parametrize("cls", [LlamaRMSNorm, Qwen3RMSNorm])
def test_an_rms_norm_is_known_by_its_bits(cls):
    for eps in (1e-6, 1e-5, 0.25):
        module = norm_of(cls, 24, eps)
        assert eps_attribute(module) == "variance_epsilon"
        assert is_rms_norm(module, "variance_epsilon")
        # Whatever its own weights are and wherever they lie.
        assert is_rms_norm(module.to("meta").bfloat16(), "variance_epsilon")


@pytest.mark.parametrize("cls", [GemmaRMSNorm, RoundsOnce, WithoutEps, WithBias, nn.RMSNorm])
def test_other_norms_are_left_alone(cls):
    module = cls(24)
    name = eps_attribute(module)
    assert name is None or not is_rms_norm(module, name)
    before = type(module)
    model = nn.ModuleList([module, lora_model()])
    lk.accelerate(model)
    assert type(module) is before


def lora_model() -> Any:
    return peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"])
    )


def test_an_eps_that_is_too_small_to_show_in_ones_is_seen():
    assert not is_rms_norm(WithoutEps(24, 1e-10), "variance_epsilon")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_swapped_norm_gives_the_modules_own_bits(calls, dtype):
    module = norm_of(LlamaRMSNorm, 24).to(dtype)
    fused = copy.deepcopy(module)
    class_swap.swap(fused, rms_norm_module, "variance_epsilon")
    x = torch.randn(5, 24, dtype=dtype)
    assert torch.equal(fused(x), module(x)) and torch.equal(fused(hidden_states=x), module(x))
    # Of float64 the module keeps float32 statistics, and keeps its forward.
    assert calls == ({} if dtype == torch.float64 else {"rms_norm": 1})
    fused.variance_epsilon = module.variance_epsilon = 0.5
    assert torch.equal(fused(x), module(x))


def test_probing_leaves_torchs_generator_and_the_module_alone(models):
    model = models.peft_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with torch.device("meta"):
        lk.accelerate(model)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(fused == total for fused, total in lk.status(model).modules.values())


# SwiGLU.


class Scaled(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class WithDropout(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class TwoInputs(LlamaMLP):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


def mlp_of(cls: type[nn.Module] = LlamaMLP, activation: str = "silu", **changes: Any) -> Any:
    config = modeling_llama.LlamaConfig(
        hidden_size=8, num_attention_heads=2, intermediate_size=12, hidden_act=activation
    )
    module = cls(config)
    for name, value in changes.items():
        delattr(module, name)
        setattr(module, name, value)
    return module


def test_a_swiglu_is_known_by_what_it_computes():
    assert is_swiglu(mlp_of()) and is_swiglu(mlp_of(activation="swish"))
    assert is_swiglu(mlp_of().eval()) and is_swiglu(mlp_of().to("meta").bfloat16())
    assert is_swiglu(mlp_of(act_fn=torch.nn.functional.silu))
    for other in (
        mlp_of(activation="gelu"),
        mlp_of(activation="relu"),
        mlp_of(Scaled),
        mlp_of(WithDropout).eval(),
        mlp_of(TwoInputs),
    ):
        assert not is_swiglu(other)


def test_a_swapped_mlp_runs_hooks_and_the_activation_where_it_is_hooked(calls):
    module = mlp_of()
    fused = copy.deepcopy(module)
    class_swap.swap(fused, parent_module, (), True, False)
    x = torch.randn(3, 8)
    assert torch.equal(fused(x), module(x)) and torch.equal(fused(x=x), module(x))
    assert calls == {"swiglu": 1}
    seen = []
    for name in ("gate_proj", "up_proj", "act_fn"):
        getattr(fused, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    assert torch.equal(fused(x), module(x))
    assert sorted(seen) == ["act_fn", "gate_proj", "up_proj"] and calls == {"swiglu": 1}


# RoPE.


def attention_of(cls: type[nn.Module] = LlamaAttention) -> Any:
    config = modeling_llama.LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa"
    )
    return cls(config, 0)


def with_rope(function: Any) -> type[nn.Module]:
    """An attention in whose module apply_rotary_pos_emb is `function`."""
    original = LlamaAttention.forward
    scope = {**original.__globals__, "apply_rotary_pos_emb": function}
    forward = types.FunctionType(original.__code__, scope, "forward", original.__defaults__)
    return type("Attention", (LlamaAttention,), {"forward": forward})


def without_sine(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    cos = cos.unsqueeze(unsqueeze_dim)
    return q * cos, k * cos


def on_a_gpu_alone(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    raise RuntimeError("expected a CUDA tensor")


def by_position(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Any:
    return modeling_llama.apply_rotary_pos_emb(q, k, cos[position_ids], sin[position_ids])


def from_another_library(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> Any:
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


def test_a_rotation_is_known_by_what_it_computes():
    own = modeling_llama.apply_rotary_pos_emb
    assert rotates_halves(attention_of()) and rotates_halves(attention_of(with_rope(own)))
    for function in (without_sine, on_a_gpu_alone, by_position):
        # As if it were the package's own.
        function.__module__ = own.__module__
        assert not rotates_halves(attention_of(with_rope(function)))
    assert not rotates_halves(attention_of(with_rope(interleaved)))
    # The same numbers, but put there by someone else.
    assert not rotates_halves(attention_of(with_rope(from_another_library)))
    assert not rotates_halves(attention_of(with_rope(None)))


def test_a_decorated_forward_keeps_its_rotation():
    class Decorated(LlamaAttention):
        @torch.no_grad()
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert not rotates_halves(attention_of(Decorated))


def test_an_unusual_call_is_left_to_the_original_function(calls):
    own = modeling_llama.apply_rotary_pos_emb
    like = parent_module(LlamaAttention, (), False, True)["forward"]
    rotate = like.__globals__["apply_rotary_pos_emb"]
    q, tables = torch.randn(2, 5, 3, 8), torch.randn(2, 2, 5, 8)
    expected = own(q, q, *tables, unsqueeze_dim=-2)
    for a, b in zip(rotate(q, q, *tables, unsqueeze_dim=-2), expected, strict=True):
        assert torch.equal(a, b)
    trained = tables.clone().requires_grad_()
    rotate(q, q, *trained, 2)[0].sum().backward()
    assert trained.grad.any() and calls == {}
    rotate(q, q, *tables, 2)
    assert calls == {"apply_rotary_pos_emb": 1}


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_swapped_attention_has_the_original_dtypes(calls, dtype, table):
    """The wider dtype of k and the table, as under autocast."""
    seen: list[Tensor] = []

    class Cache:
        def update(self, k: Tensor, v: Tensor, index: int) -> tuple[Tensor, Tensor]:
            seen.append(k)
            raise InterruptedError

    plain = attention_of().to(dtype)
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    class_swap.swap(fused, parent_module, (), False, True)
    x = torch.randn(2, 5, 32).to(dtype)
    cos, sin = torch.randn(2, 2, 5, 8).to(table)
    for module in (plain, fused, exact):
        to = torch.float64 if module is exact else None
        with pytest.raises(InterruptedError):
            module(x.to(to), (cos.to(to), sin.to(to)), past_key_values=Cache())
    assert calls == {"apply_rotary_pos_emb": 1}
    k, fused_k, exact_k = seen
    assert fused_k.dtype == k.dtype == torch.promote_types(dtype, table)
    comparison = compare(fused_k, k, exact_k)
    assert comparison.ratio <= MAX_RATIO, comparison


def test_the_modules_global_function_stays(models):
    own = modeling_llama.apply_rotary_pos_emb
    forward = LlamaAttention.forward
    lk.accelerate(models.peft_model())
    assert modeling_llama.apply_rotary_pos_emb is own and LlamaAttention.forward is forward


# Next to a library that has put its own forwards there.


def patched(module: nn.Module, factor: float) -> None:
    """As Liger patches an instance: a forward of its own, bound."""
    original = type(module).forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return factor * original(self, *args, **kwargs)

    module.forward = types.MethodType(forward, module)


def test_forwards_that_were_replaced_before_stay(models, calls):
    model = models.peft_model(dtype=torch.float32)
    layer = model.base_model.model.model.layers[0]
    for module in (layer.input_layernorm, layer.mlp, layer.self_attn.o_proj):
        patched(module, 1.0)
    before = type(layer.mlp)
    expected = model(models.token_ids()).logits
    lk.accelerate(model)
    assert type(layer.mlp) is before and "forward" in layer.mlp.__dict__
    found = calls.of(model, models.token_ids())
    torch.testing.assert_close(model(models.token_ids()).logits, expected)
    # Without the sharing of the patched MLP, its gate and up run alone; its o_proj runs in PEFT.
    assert found["rms_norm"] == 4 and found["swiglu"] == 1 and found["lora_linear_grouped"] == 3
    assert found["lora_linear"] == 2 + 1 + 2
    rows = {row.name: row.reason for row in lk.status(model)}
    assert rows["base_model.model.model.layers.0.self_attn.o_proj"] == "it has a forward of its own"
    assert lk.status(model).modules == {"RMSNorm": (4, 5), "SwiGLU": (1, 2), "RoPE": (2, 2)}


def test_forwards_that_are_replaced_afterwards_win(models):
    model = lk.accelerate(models.peft_model())
    expected = model(models.token_ids()).logits
    layers = model.base_model.model.model.layers
    for module in (layers[0].mlp, layers[1].input_layernorm):
        patched(module, 3.0)
    changed = model(models.token_ids()).logits
    assert not torch.allclose(changed, expected)
    lk.restore(model)
    torch.testing.assert_close(model(models.token_ids()).logits, changed, rtol=0, atol=1e-10)
