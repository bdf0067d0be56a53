"""Layers of one input as one operation while their parent runs: nothing depends on it, or stays."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels import peft_linear
from lora_kernels.peft_linear import SharedInput
from lora_kernels.peft_parents import shared_groups

X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in "abc":
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x) + self.c(x)


class SwitchedOff(Parent):
    def forward(self, x: Tensor) -> Tensor:
        enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        y = self.a(x)
        torch.set_grad_enabled(enabled)
        return y * self.b(x)


class Failing(Parent):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        assert y.shape[0] != 4, "stop"
        return y + self.b(x)


def double(module: nn.Module, inputs: tuple[Tensor]) -> None:
    inputs[0].mul_(2)


def test_one_operation(models, calls):
    fused = lk.accelerate(models.net_of(Parent))
    assert calls.of(fused, X) == {"lora_linear_grouped": 1}


def test_a_layer_asked_in_another_mode_is_computed_in_that_mode(models, calls):
    plain, fused = models.net_of(SwitchedOff), lk.accelerate(models.net_of(SwitchedOff))
    # The output and the gradient of x: the one that no one asked for has gradients of zero.
    models.assert_equal(models.results_of(fused, X)[:2], models.results_of(plain, X)[:2])
    assert calls.of(fused, X) == {"lora_linear_grouped": 2}
    with torch.no_grad():
        assert calls.of(fused, X) == {"lora_linear_grouped": 1}


def test_an_output_is_for_the_very_input_and_once(models, calls):
    parent = lk.accelerate(models.net_of(Parent)).base_model.model.parent
    shared = SharedInput([parent.a, parent.b])
    first, equal, other = X, X.clone(), X + 1
    assert torch.equal(shared.take(parent.a, first), parent.a(first))
    assert shared.take(parent.a, first) is None
    assert torch.equal(shared.take(parent.b, other), parent.b(other))
    assert torch.equal(shared.take(parent.a, other), parent.a(other))
    assert shared.take(parent.c, other) is None
    assert calls["lora_linear_grouped"] == 2
    assert torch.equal(shared.take(parent.a, equal), parent.a(equal))
    assert calls["lora_linear_grouped"] == 3


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_hook_that_writes_into_the_input_does_what_it_does_in_peft(models, calls, name):
    """On an accelerated layer, and on a plain linear layer between two of them."""
    plain, fused = (models.net_of(Parent, target_modules=["a", "c"]) for _ in range(2))
    lk.accelerate(fused)
    assert shared_groups(fused.base_model.model.parent) == (("a", "b", "c"),)
    assert calls.of(fused, X) == {"lora_linear_grouped": 1}
    before = plain(X)
    for model in (plain, fused):
        getattr(model.base_model.model.parent, name).register_forward_pre_hook(double)
    with torch.no_grad():
        torch.testing.assert_close(fused(X), plain(X))
        assert not torch.allclose(fused(X), before)


def test_hooks_of_the_layers_run(models, calls):
    fused = lk.accelerate(models.net_of(Parent))
    seen = []
    for name in "abc":
        getattr(fused.base_model.model.parent, name).register_forward_hook(
            lambda _, __, output: seen.append(output.shape)
        )
    assert calls.of(fused, X) == {"lora_linear": 3}
    assert seen == [(4, 8)] * 3


def test_different_dropout_rates_stay_apart(models, calls):
    model = lk.accelerate(models.net_of(Parent, lora_dropout=0.5).train())
    assert calls.of(model, X) == {"lora_linear_grouped": 1}
    model.base_model.model.parent.b.lora_dropout["default"].p = 0.25
    assert calls.of(model, X) == {"lora_linear": 3}
    model.eval()
    assert calls.of(model, X) == {"lora_linear_grouped": 1}


def test_a_layer_that_peft_runs_leaves_the_others_together(models, calls):
    plain, fused = models.net_of(Parent), lk.accelerate(models.net_of(Parent))
    for model in (plain, fused):
        model.base_model.model.parent.a.cast_input_dtype_enabled = False
    models.assert_equal(models.results_of(fused, X), models.results_of(plain, X))
    assert calls.of(fused, X) == {"lora_linear_grouped": 1}


def test_nothing_is_kept_where_the_forward_raises(models, monkeypatch):
    """The output that no one has asked for is let go of with the exception."""
    fused = lk.accelerate(models.net_of(Failing))
    parent = fused.base_model.model.parent
    assert shared_groups(parent) == (("a", "b"),)
    made: list[Any] = []
    original = peft_linear.lora_linear_grouped

    def recorded(*args: Any, **kwargs: Any) -> Any:
        ys = original(*args, **kwargs)
        made.extend(weakref.ref(y) for y in ys)
        return ys

    monkeypatch.setattr(peft_linear, "lora_linear_grouped", recorded)
    with pytest.raises(AssertionError, match="stop"):
        fused(X)
    gc.collect()
    assert len(made) == 2 and not any(reference() is not None for reference in made)
    assert parent.a._shared_input is parent.b._shared_input is None
    fused(X[:3])
    assert parent.a._shared_input is parent.b._shared_input is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint_the_masks_are_the_same(models, calls, reentrant):
    fused = lk.accelerate(models.net_of(Parent, lora_dropout=0.5).train())
    found = []
    for model in (fused, Checkpointed(fused, reentrant)):
        torch.manual_seed(3)
        found.append(models.results_of(model, X))
    models.assert_equal(*found)
    assert calls == {"lora_linear_grouped": 3}


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


def test_a_layer_called_by_another_than_its_parent_runs_alone(models, calls):
    plain, fused = models.net_of(Parent), lk.accelerate(models.net_of(Parent))
    torch.testing.assert_close(
        fused.base_model.model.parent.a(X), plain.base_model.model.parent.a(X)
    )
    assert calls == {"lora_linear": 1}
