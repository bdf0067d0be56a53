"""verify_gradients passes after a real backward pass and names every tensor that is wrong."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from lora_kernels import LoraConfig, inject_lora
from lora_llama import LoraLlama, capture_lora_weights, verify_gradients
from lora_llama.gradients import (
    GradientError,
    GradientNorms,
    gradient_table,
    unchanged_weights,
)

IDS = torch.arange(3, 14)[None]
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"


def trained(init: bool = False, **changes) -> LoraLlama:
    """A tiny Llama after one backward pass; `init` leaves B zero, as a new adapter has it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    lora = LoraConfig(r=4, init_lora_weights=init, target_modules=["q_proj", "v_proj"], **changes)
    model = LoraLlama(config, lora=lora)
    model(IDS, labels=IDS).loss.backward()
    return model


def part(model: nn.Module, path: str, half: str) -> nn.Parameter:
    return getattr(model.get_submodule(path), half)["default"]


def test_a_real_backward_pass_is_right_and_its_norms_are_reported():
    model = trained()
    rows = verify_gradients(model)
    assert [row.layer for row in rows] == [
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"
    ]
    for row in rows:
        assert row == GradientNorms(
            row.layer,
            "default",
            pytest.approx(part(model, row.layer, "lora_A").grad.norm().item(), rel=1e-6),
            pytest.approx(part(model, row.layer, "lora_B").grad.norm().item(), rel=1e-6),
            False,
        )
        assert row.lora_a > 0 and row.lora_b > 0


def test_a_new_adapter_has_a_zero_gradient_for_a_and_that_is_right():
    model = trained(init=True)
    for row in verify_gradients(model):
        assert row.b_is_zero and row.lora_a == 0.0 and row.lora_b > 0


def change(path: str, half: str, edit: Callable[[nn.Parameter], None]) -> Callable:
    return lambda model: edit(part(model, path, half))


def forget(parameter: nn.Parameter) -> None:
    parameter.grad = None


def fill(value: float) -> Callable[[nn.Parameter], None]:
    def edit(parameter: nn.Parameter) -> None:
        parameter.grad[0, 1] = value

    return edit


def zero(parameter: nn.Parameter) -> None:
    parameter.grad.zero_()


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (forget, "no gradient"),
        (zero, "gradient is zero"),
        (fill(math.nan), "gradient has NaN or Inf"),
        (fill(math.inf), "gradient has NaN or Inf"),
        (fill(-math.inf), "gradient has NaN or Inf"),
    ],
)
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
@pytest.mark.parametrize("path", [Q, V])
def test_every_fault_is_an_error_that_names_the_tensor(edit, reason: str, half: str, path: str):
    model = trained()
    edit(part(model, path, half))
    with pytest.raises(GradientError) as caught:
        verify_gradients(model)
    message = str(caught.value)
    assert message.startswith("1 of 8 ") and f"{path}.{half}.default: {reason}" in message
    assert message.count("\n") == 1 and isinstance(caught.value, ValueError)


EXTRAS = {
    f"{Q}.lora_magnitude_vector.default": {"use_dora": True},
    f"{Q}.lora_bias.default": {"lora_bias": True},
    "lm_head.modules_to_save.default.weight": {"modules_to_save": ["lm_head"]},
    "model.norm.modules_to_save.default.weight": {"modules_to_save": ["norm"], "use_dora": True},
}


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
@pytest.mark.parametrize("name", EXTRAS)
def test_all_that_an_adapter_trains_is_checked(name: str):
    model = trained(**EXTRAS[name])
    rows, parameter = verify_gradients(model), model.get_parameter(name)
    assert isinstance(parameter, nn.Parameter)
    norm = parameter.grad.norm().item()
    if name.startswith(Q):
        reported = {"lora_bias": rows[0].lora_bias, "magnitude": rows[0].magnitude}
        assert [value for value in reported.values() if value is not None] == [
            pytest.approx(norm, rel=1e-6)
        ]
    trainable = sum(p.requires_grad for p in model.parameters())
    for edit, reason in (
        (forget, "no gradient"),
        (zero, "gradient is zero"),
        (lambda p: p.grad.fill_(math.nan), "gradient has NaN or Inf"),
    ):
        model = trained(**EXTRAS[name])
        edit(model.get_parameter(name))
        with pytest.raises(GradientError) as caught:
            verify_gradients(model)
        assert str(caught.value) == (
            f"1 of {trainable} adapter gradients are wrong:\n  {name}: {reason}"
        )


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
def test_the_table_has_what_the_adapters_have():
    rows = verify_gradients(trained(init=True))
    assert gradient_table(rows).splitlines()[0].split("  ")[-1] == "|d_lora_B| median (min .. max)"
    assert gradient_table(rows).count("0, as it must be while B is 0") == 2
    dora = gradient_table(verify_gradients(trained(use_dora=True)))
    header, *lines = dora.splitlines()
    assert "d_magnitude" in header and "d_lora_bias" not in header and len(lines) == 2
    assert "as it must be" not in dora and all(line.count("e-") >= 9 for line in lines)
    mixed = rows + verify_gradients(trained(lora_bias=True))[:1]
    header, first, second = gradient_table(mixed).splitlines()
    # Of two adapters one has it; v_proj's has none.
    assert "d_lora_bias" in header and first.count("e-") >= 6 and second.endswith(" -")


def test_all_faults_are_named_at_once():
    model = trained()
    forget(part(model, Q, "lora_A"))
    zero(part(model, V, "lora_B"))
    fill(math.nan)(part(model, V, "lora_A"))
    with pytest.raises(GradientError, match="3 of 8") as caught:
        verify_gradients(model)
    for name in (f"{Q}.lora_A", f"{V}.lora_B", f"{V}.lora_A"):
        assert f"{name}.default: " in str(caught.value)


def test_a_zero_b_excuses_only_as_zero_gradient():
    for half, edit in (("lora_B", zero), ("lora_A", forget), ("lora_A", fill(math.nan))):
        model = trained(init=True)
        edit(part(model, Q, half))
        with pytest.raises(GradientError, match=rf"{Q}\.{half}\.default"):
            verify_gradients(model)


def test_one_nonzero_element_of_b_is_enough_to_expect_a_gradient_of_a():
    model = trained(init=True)
    with torch.no_grad():
        part(model, Q, "lora_B")[0, 0] = 1e-30
    with pytest.raises(GradientError, match=rf"{Q}\.lora_A\.default: gradient is zero"):
        verify_gradients(model)


def test_the_smallest_gradient_counts_as_one():
    model = trained()
    gradient = part(model, Q, "lora_A").grad
    gradient.zero_()[0, 0] = 1e-45
    assert gradient.any() and verify_gradients(model)[0].lora_a > 0


def test_an_adapter_that_was_frozen_disabled_or_unused_is_found():
    model = trained()
    model.zero_grad()
    with pytest.raises(GradientError, match="8 of 8"):
        verify_gradients(model)
    with model.disable_adapter():
        embeddings = model.get_input_embeddings()(IDS).requires_grad_()
        model(inputs_embeds=embeddings, labels=IDS).loss.backward()
    with pytest.raises(GradientError, match="8 of 8"):
        verify_gradients(model)
    part(model, Q, "lora_B").requires_grad_(False)
    model(IDS, labels=IDS).loss.backward()
    with pytest.raises(GradientError, match=r"1 of 8 .*\n.*requires_grad is False"):
        verify_gradients(model)


def test_a_broken_branch_is_found(monkeypatch: pytest.MonkeyPatch):
    """A backward pass that forgets the early layer, as detached activations do."""
    model = trained()
    model.zero_grad()
    model.model.layers[0].register_forward_hook(lambda module, args, output: output.detach())
    model(IDS, labels=IDS).loss.backward()
    with pytest.raises(GradientError, match="4 of 8") as caught:
        verify_gradients(model)
    assert "layers.1" not in str(caught.value)


def test_only_active_adapters_are_looked_at():
    model = trained()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    assert len(verify_gradients(model)) == 4
    model.set_adapter(["default", "second"])
    with pytest.raises(GradientError, match="8 of 16"):
        verify_gradients(model)
    model.set_adapter([])
    with pytest.raises(ValueError, match="expected an active adapter"):
        verify_gradients(model)
    with pytest.raises(ValueError, match="expected an active adapter"):
        verify_gradients(nn.Linear(2, 2))


def test_it_works_on_any_model_and_dtype():
    model = inject_lora(
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).bfloat16(),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )
    model(torch.ones(5, 4, dtype=torch.bfloat16)).float().square().sum().backward()
    assert [row.layer for row in verify_gradients(model)] == ["0", "2"]


def test_captured_weights_are_copies_of_every_adapter():
    model = trained()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"]))
    before = capture_lora_weights(model)
    names = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert before.keys() == names and len(names) == 12
    assert not any(tensor.requires_grad for tensor in before.values())
    assert sorted(unchanged_weights(before, capture_lora_weights(model))) == sorted(names)
    with torch.no_grad():
        part(model, Q, "lora_A")[0, 0] += 1
        part(model, V, "lora_B").mul_(2)
    changed = {f"{Q}.lora_A.default", f"{V}.lora_B.default"}
    assert set(unchanged_weights(before, capture_lora_weights(model))) == names - changed


def test_captured_are_magnitudes_biases_and_whole_modules():
    model = trained(use_dora=True, modules_to_save=["lm_head"])
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert capture_lora_weights(model).keys() == names and len(names) == 13


def test_an_optimizer_step_moves_every_adapter():
    model = trained(init=True)
    before = capture_lora_weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer.step()
    # A has no gradient yet, and weight decay alone moves it.
    assert unchanged_weights(before, capture_lora_weights(model)) == []
    optimizer.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    assert all(row.lora_a > 0 and not row.b_is_zero for row in verify_gradients(model))
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_captures_of_different_adapters_cannot_be_compared():
    model = trained()
    before = capture_lora_weights(model)
    model.delete_adapter("default")
    model.add_adapter("other", LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.other"):
        unchanged_weights(before, capture_lora_weights(model))
