"""One accelerated PEFT layer: what it fuses, what it leaves to PEFT, dropout, and dtypes."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.peft_linear import projection
from lora_kernels.testing import MAX_RATIO, compare


class Net(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(24, 20, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def layer_of(dtype: torch.dtype = torch.float64, with_bias: bool = True, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["proj"], "init_lora_weights": False}
    net = Net(with_bias).to(dtype)
    model = peft.get_peft_model(net, peft.LoraConfig(**{**settings, **changes}))
    layer = model.base_model.model.proj
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return layer


def fused_copy(layer: nn.Module) -> Any:
    return lk.accelerate(copy.deepcopy(layer))


def outputs_of(layer: nn.Module, x: Tensor, **arguments: Any) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x, **arguments)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    gradients = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients}


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_equal(plain: nn.Module, fused: nn.Module, x: Tensor, **arguments: Any) -> None:
    expected, outputs = outputs_of(plain, x, **arguments), outputs_of(fused, x, **arguments)
    assert list(expected) == list(outputs)
    for name, tensor in expected.items():
        torch.testing.assert_close(outputs[name], tensor, rtol=1e-10, atol=1e-10)


def why(layer: Any) -> str:
    """Why PEFT's forward runs; empty where it does not."""
    single = projection(layer)
    return single if isinstance(single, str) else ""


# Fused.


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"use_dora": True},
        {"r": 1},
        {"lora_dropout": 0.3},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*has no bias")
def test_what_is_fused(calls, changes, with_bias):
    plain = layer_of(with_bias=with_bias, **changes).eval()
    fused = fused_copy(plain)
    assert why(fused) == ""
    assert_equal(plain, fused, inputs())
    assert calls.of(fused, inputs()) == {"lora_linear": 1}


def test_several_adapters_with_and_without_a_bias(calls):
    plain = layer_of(lora_bias=True)
    plain.update_layer("b", 3, 5, config=peft.LoraConfig(r=3, init_lora_weights=False))
    plain.set_adapter(["default", "b"])
    plain.double()
    fused = fused_copy(plain)
    assert_equal(plain, fused, inputs())
    assert calls.of(fused, inputs()) == {"lora_linear": 1}


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (1, 1, 1, 24)])
def test_inputs_of_any_shape(shape):
    plain = layer_of()
    assert_equal(plain, fused_copy(plain), torch.ones(shape, dtype=torch.float64))


def test_a_scaling_that_is_a_tensor(calls):
    plain = layer_of()
    plain.scaling["default"] = torch.tensor(0.75)
    fused = fused_copy(plain)
    assert_equal(plain, fused, inputs())
    fused.scaling["default"].fill_(1.25), plain.scaling["default"].fill_(1.25)
    assert_equal(plain, fused, inputs())
    assert calls.of(fused, inputs()) == {"lora_linear": 1}


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_dtypes_of_outputs_and_gradients_are_pefts(calls, base, adapter):
    plain = layer_of(base)
    for name in ("lora_A", "lora_B"):
        getattr(plain, name).to(adapter)
    fused = fused_copy(plain)
    expected, outputs = outputs_of(plain, inputs(base)), outputs_of(fused, inputs(base))
    oracle = outputs_of(copy.deepcopy(plain).double(), inputs(base).double())
    # The operation's products are in x's dtype, so with a wider adapter its measure is PEFT with
    # everything in that dtype.
    measure = expected
    if adapter == torch.float32:
        measure = outputs_of(copy.deepcopy(plain).to(base), inputs(base))
    for name, tensor in expected.items():
        assert outputs[name].dtype == tensor.dtype, name
        assert compare(outputs[name], measure[name], oracle[name]).ratio <= MAX_RATIO, name
    assert calls.of(fused, inputs(base)) == {"lora_linear": 1}


def test_autocast_is_linears(calls):
    plain = layer_of(torch.float32)
    fused = fused_copy(plain)
    oracle = outputs_of(copy.deepcopy(plain).double(), inputs())
    for x in (inputs(torch.float32), inputs(torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            expected, outputs = outputs_of(plain, x), outputs_of(fused, x)
            assert calls.of(fused, x) == {"lora_linear": 1}
        for name, tensor in expected.items():
            assert outputs[name].dtype == tensor.dtype, name
            assert compare(outputs[name], tensor, oracle[name]).ratio <= MAX_RATIO, name
    assert outputs["y"].dtype == torch.bfloat16


# Left to PEFT.


def hook(*_: Any) -> None:
    """A hook that changes nothing."""


class LinearOfAnotherKind(nn.Linear):
    """As quantised layers are."""


def with_base(layer: Any) -> None:
    base = LinearOfAnotherKind(24, 20).double()
    base.load_state_dict(layer.base_layer.state_dict())
    layer.base_layer = base.requires_grad_(False)


def with_casting_off(layer: Any) -> None:
    layer.cast_input_dtype_enabled = False


def with_another_forward(layer: Any) -> None:
    own = layer.base_layer.forward
    layer.base_layer.forward = lambda x: own(x) + 1


def with_second(layer: Any) -> None:
    config = peft.LoraConfig(r=3, init_lora_weights=False, lora_dropout=0.5)
    layer.update_layer("b", 3, 5, config=config)
    layer.set_adapter(["default", "b"])
    layer.double()


def with_second_of_dora(layer: Any) -> None:
    layer.update_layer("b", 3, 5, config=peft.LoraConfig(r=3, use_dora=True))
    with torch.no_grad():
        for parameter in layer.lora_magnitude_vector.parameters():
            parameter.add_(1.0)
    layer.set_adapter(["default", "b"])
    layer.double()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_base, "the base layer is a LinearOfAnotherKind"),
        (with_casting_off, "the cast of the input's dtype"),
        (with_another_forward, "has hooks"),
        (lambda layer: layer.base_layer.register_forward_hook(hook), "has hooks"),
        (lambda layer: layer.lora_A["default"].register_forward_pre_hook(hook), "has hooks"),
        (lambda layer: layer.lora_B["default"].register_full_backward_hook(hook), "has hooks"),
        (lambda layer: layer.lora_dropout["default"].register_forward_hook(hook), "has hooks"),
        (lambda layer: layer.base_layer.weight.requires_grad_(), "the base weight is trained"),
        (lambda layer: layer.lora_A["default"].float(), "lora_A and lora_B differ in dtype"),
        (lambda layer: layer.set_adapter("absent"), "no adapter is active"),
        (lambda layer: layer.enable_adapters(False), "no adapter is active"),
        (lambda layer: layer.merge(), "no adapter is active"),
        (with_second, "several adapters with dropout"),
        (with_second_of_dora, "several adapters, of which DoRA"),
        (
            lambda layer: layer.scaling.update(default=torch.full((20,), 0.5)),
            "its scaling is more than a number",
        ),
        (
            lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.5)}),
            "its dropout is of another kind",
        ),
        (
            lambda layer: layer.lora_dropout.update({"default": nn.Dropout(1.0)}),
            "its dropout drops everything",
        ),
    ],
)
def test_what_is_left_to_peft(calls, change, reason):
    plain = layer_of()
    change(plain)
    fused = fused_copy(plain)
    assert reason in why(fused)
    assert calls.of(why, fused) == {}
    if "differ" in reason:
        return
    found = []
    for layer in (plain, fused):
        torch.manual_seed(2)
        found.append(outputs_of(layer, inputs()))
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name
    assert calls == {}
    row = lk.status(fused)[0]
    assert row.implementation == ("base" if reason == "no adapter is active" else "peft")


def test_a_base_that_is_trained_has_its_gradient_and_one_mask_in_both_grad_modes(calls):
    fused = fused_copy(layer_of(lora_dropout=0.5)).train()
    fused.base_layer.weight.requires_grad_()
    torch.manual_seed(3)
    y = outputs_of(fused, inputs())["y"]
    assert fused.base_layer.weight.grad is not None
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(fused(inputs()), y)
    assert calls == {}


def test_an_input_of_another_dtype_is_an_error_as_in_peft():
    plain = layer_of(torch.float32)
    for layer in (plain, fused_copy(plain)):
        with pytest.raises(RuntimeError, match="dtype"):
            layer(inputs(torch.float64))


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
@pytest.mark.parametrize("variant", ["dora", "kasa", "alora"])
def test_variants_other_than_dora_run_in_peft(calls, variant):
    changes = {
        "dora": {"use_dora": True},
        "alora": {"alora_invocation_tokens": [1, 2]},
    }.get(variant)
    if variant == "kasa":
        if not hasattr(peft, "KasaConfig"):
            pytest.skip("this PEFT has no KaSA")
        changes = {"kasa_config": peft.KasaConfig()}
    plain = layer_of(**changes)
    fused = fused_copy(plain)
    assert_equal(plain, fused, inputs())
    assert calls.of(fused, inputs()) == ({"lora_linear": 1} if variant == "dora" else {})


# Dropout: other draws of the same distribution.


def test_dropout_is_off_in_eval_mode_and_on_in_training(calls):
    plain = layer_of(lora_dropout=0.5)
    fused = fused_copy(plain)
    assert_equal(plain.eval(), fused.eval(), inputs())
    fused.train()
    assert not torch.equal(fused(inputs()), fused(inputs()))
    assert calls["lora_linear"] == 3
    torch.manual_seed(5)
    first = fused(inputs())
    torch.manual_seed(5)
    assert torch.equal(first, fused(inputs()))


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=str)
def test_dropout_has_pefts_mean_and_variance(changes):
    plain = layer_of(lora_dropout=0.3, **changes)
    fused = fused_copy(plain)
    x, draws = inputs()[:1, :1], 2000
    with torch.no_grad():
        samples = [layer.train()(x.expand(draws, 1, 24)) for layer in (plain, fused)]
    (mean, deviation), (fused_mean, fused_deviation) = (
        (sample.mean(0), sample.std(0)) for sample in samples
    )
    assert ((mean - fused_mean).abs() < 6 * deviation * (2 / draws) ** 0.5).all()
    torch.testing.assert_close(fused_deviation, deviation, rtol=0.15, atol=0)


def test_forward_and_backward_have_the_same_mask():
    """x - dropped shows in y, and the same elements are missing in dx."""
    layer = layer_of(lora_dropout=0.5, r=24, with_bias=False)
    fused = fused_copy(layer).train()
    with torch.no_grad():
        fused.base_layer.weight.zero_()
        fused.lora_A["default"].weight.copy_(torch.eye(24))
        fused.lora_B["default"].weight.copy_(torch.eye(20, 24))
        fused.scaling["default"] = 1.0
    x = torch.ones(6, 24, dtype=torch.float64, requires_grad=True)
    y = fused(x)
    y.sum().backward()
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(x.grad[:, :20], y.detach()) and not x.grad[:, 20:].any()
