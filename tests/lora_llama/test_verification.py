"""`verify_model` accepts right gradients and refuses wrong ones: each mutant must be caught."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import LoraConfig
from lora_kernels.layers import lora_layers
from lora_kernels.lora_linear import eager
from lora_llama import cli
from lora_llama.gradients import GradientError
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import ALL_PROJECTIONS
from lora_llama.verification import MAX_DIFFERENCE, verify_model

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the mutants are of the CPU's path")


@pytest.fixture
def load(tiny_llama: Path) -> Callable[..., LoraLlamaForCausalLM]:
    def load_model(dtype: torch.dtype = torch.float32, **changes: Any) -> LoraLlamaForCausalLM:
        torch.manual_seed(0)
        lora = None
        if changes:
            settings = {"r": 4, "lora_alpha": 8, "target_modules": list(ALL_PROJECTIONS)}
            lora = LoraConfig(**settings | changes)
        return LoraLlamaForCausalLM.from_pretrained(tiny_llama, lora=lora, dtype=dtype)

    return load_model


@pytest.mark.parametrize("dtype", MAX_DIFFERENCE)
def test_right_gradients_pass(dtype, load, capsys):
    verify_model(load(dtype), r=4, tokens=48, seed=0)
    shown = capsys.readouterr().out
    assert shown.endswith("\nverified\n")
    # The plan and the norms of each projection, and the result.
    for projection in ALL_PROJECTIONS:
        assert f".{projection}  " in shown and f"\n{projection} " in shown
    assert "28 gradients, largest difference from the reference: " in shown
    assert f"for {dtype}" in shown


def test_float32_is_far_below_its_limit(load, capsys):
    verify_model(load(), r=8, tokens=100, seed=3)
    difference = float(capsys.readouterr().out.partition("from the reference: ")[2].split()[0])
    assert 0 < difference < 1e-2 * MAX_DIFFERENCE[torch.float32]


def test_an_adapter_of_the_model_is_what_is_verified(load, capsys):
    model = load(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    before = model.get_adapter_state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    verify_model(model, r=99, tokens=16, seed=0)
    assert "\n8 gradients, " in capsys.readouterr().out
    assert list(model.lora_configs) == ["default"]
    after = model.get_adapter_state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_new_adapter_with_b_zero_passes(load, capsys):
    verify_model(load(lora_dropout=0.5), r=4, tokens=16, seed=0)
    assert "0, as it must be while B is 0" in capsys.readouterr().out


def test_an_adapter_that_was_loaded_frozen_is_verified(load, tmp_path, capsys):
    load(init_lora_weights=False).save_pretrained(tmp_path)
    model = LoraLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    verify_model(model, r=4, tokens=16, seed=0)
    assert "\n28 gradients, " in capsys.readouterr().out


# dx and d_lora_a are tensors, d_lora_b and d_bias one tensor for each projection of a group.
Gradients = tuple[Any, ...]


def changed(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[Gradients], Gradients]:
    def mutate(gradients: Gradients) -> Gradients:
        mutated = list(gradients)
        if isinstance(gradient := mutated[index], list):
            mutated[index] = [change(one) for one in gradient]
        elif gradient is not None:
            mutated[index] = change(gradient)
        return tuple(mutated)

    return mutate


def without_last_row(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[-1] = 0
    return gradient


# (dx, d_lora_a, d_lora_b, d_bias)
MUTANTS = {
    "d_lora_a 2 % too large": changed(1, lambda gradient: gradient * 1.02),
    "d_lora_b 2 % too small": changed(2, lambda gradient: gradient * 0.98),
    "dx 2 % too large": changed(0, lambda gradient: gradient * 1.02),
    "d_lora_a halved": changed(1, lambda gradient: gradient / 2),
    "d_lora_b of the other sign": changed(2, torch.neg),
    "d_lora_a without its last row": changed(1, without_last_row),
    "d_lora_b without its last row": changed(2, without_last_row),
}


def mutate_backward(
    monkeypatch: pytest.MonkeyPatch, mutate: Callable[[Gradients], Gradients]
) -> None:
    backward = eager.backward
    monkeypatch.setattr(eager, "backward", lambda *args: mutate(backward(*args)))


@CPU_ONLY
@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_gradients_are_caught(mutant, load, monkeypatch, capsys):
    mutate_backward(monkeypatch, MUTANTS[mutant])
    with pytest.raises(GradientError, match="gradients differ from the reference's: ") as caught:
        verify_model(load(), r=4, tokens=48, seed=0)
    kinds = {"d_lora_a": ("lora_A",), "d_lora_b": ("lora_B",), "dx": ("lora_A", "lora_B")}
    for kind in ("lora_A", "lora_B"):
        assert (f".{kind}." in str(caught.value)) == (kind in kinds[mutant.split()[0]])
    assert "verified" not in capsys.readouterr().out


@CPU_ONLY
def test_a_dropped_term_of_dx_is_caught(load, monkeypatch, capsys):
    """dx without P lora_a: the layers above look right, those below do not."""

    def backward(dys, x, weights, *args: Any) -> Gradients:
        _, *rest = original(dys, x, weights, *args)
        return sum(torch.mm(dy, weight) for dy, weight in zip(dys, weights, strict=True)), *rest

    original = eager.backward
    monkeypatch.setattr(eager, "backward", backward)
    with pytest.raises(GradientError) as caught:
        verify_model(load(), r=4, tokens=48, seed=0)
    assert "model.layers.0.self_attn.q_proj.lora_A.default" in str(caught.value)
    assert "model.layers.1.mlp.down_proj.lora_A.default" not in str(caught.value)


@CPU_ONLY
def test_a_wrong_forward_is_caught(load, monkeypatch, capsys):
    def forward(*args: Any) -> tuple[list[Tensor], Tensor]:
        ys, s = original(*args)
        return [y * 1.01 for y in ys], s

    original = eager.forward
    monkeypatch.setattr(eager, "forward", forward)
    with pytest.raises(GradientError):
        verify_model(load(), r=4, tokens=48, seed=0)


@CPU_ONLY
def test_zero_and_missing_gradients_are_named(load, monkeypatch, capsys):
    mutate_backward(monkeypatch, changed(2, torch.zeros_like))
    with pytest.raises(GradientError, match="14 of 28 adapter gradients are wrong"):
        verify_model(load(), r=4, tokens=48, seed=0)


def test_a_layer_that_is_cut_is_named(load, capsys):
    model = load(init_lora_weights=False)
    path, layer = list(lora_layers(model))[-1]
    assert path == "model.layers.1.mlp.down_proj"
    layer.register_forward_hook(lambda module, args, output: args[0] @ module.weight.T)
    with pytest.raises(GradientError, match=rf"{path}.lora_A.default: no gradient"):
        verify_model(model, r=4, tokens=16, seed=0)


@CPU_ONLY
def test_the_command_fails_with_the_gradients(tiny_llama, monkeypatch, capsys):
    command = ["verify", f"--model={tiny_llama}", "--tokens=32"]
    assert cli.main(command) == 0
    mutate_backward(monkeypatch, MUTANTS["d_lora_a 2 % too large"])
    capsys.readouterr()
    assert cli.main(command) == 1
    shown = capsys.readouterr()
    assert "verified" not in shown.out
    assert shown.err.startswith("lora-llama: error: gradients differ from the reference's: ")
    assert shown.err.count("\n") == 1
