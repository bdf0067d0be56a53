"""Which layers surely have one input, as the source of their parent's forward tells."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.peft_parents import shared_groups
from lora_kernels.shared_calls import shared_calls

X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Parent(nn.Module):
    """Children of one size, in all but the forward."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abc":
            setattr(self, name, nn.Linear(8, 8))


class AllOfOne(Parent):
    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        return (self.a(x) * self.b(x) + self.c(x)).view(shape)


class OutOfOrder(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(x) - self.a(x)


class Chained(Parent):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x)
        return self.c(x)


class CrossAttention(Parent):
    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = x + 1 if memory is None else memory
        return self.a(x) @ (self.b(y) + self.c(y)).mT


class WrittenByAMethod(Parent):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x.mul_(2)
        return y + self.b(x)


class WrittenByAnIndex(Parent):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x[..., 0] = 0
        return y + self.b(x)


class WrittenInAnExpression(Parent):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x *= 2
        return y + self.b(x)


class WrittenByAFunction(Parent):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        torch.relu_(x)
        return y + self.b(x)


class WrittenByAHelper(Parent):
    def double(self, x: Tensor) -> None:
        x.mul_(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.double(x)
        return y + self.b(x)


class WrittenUnderAnotherName(Parent):
    def forward(self, x: Tensor) -> Tensor:
        y, z = self.a(x), x
        z.mul_(2)
        return y + self.b(x)


class Twice(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.a(x) * self.b(x)


class PartlyWithoutGradient(Parent):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.a(x)
        return y * self.b(x)


class OneOfTwo(Parent):
    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        y = self.a(x)
        if both:
            y = y + self.b(x)
        return y


class TwoBranches(Parent):
    def forward(self, x: Tensor, first: bool = False) -> Tensor:
        if first:
            y = self.a(x)
        else:
            y = self.b(x)
        return y


class OneBranch(Parent):
    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        if both:
            y = self.a(x) + self.b(x)
        else:
            y = self.c(x)
        return y


class OneExpression(Parent):
    def forward(self, x: Tensor, first: bool = False) -> Tensor:
        return self.a(x) if first else self.b(x)


class OneOrTheOther(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return (x.dim() < 5 and self.a(x)) if x.dim() > 5 or self.c is None else self.b(x)


class Lazily(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) or self.b(x)


class Compared(Parent):
    def forward(self, x: Tensor) -> bool:
        return x.shape[0] < self.b(x) < self.c(x)


class Foreign(Parent):
    def forward(self, x: Tensor, other: Any = None) -> Tensor:
        return other.a(x) + self.b(x)


class Returning(Parent):
    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        y = self.a(x)
        if not both:
            return y
        return y + self.b(x)


class Caught(Parent):
    def forward(self, x: Tensor) -> Tensor:
        try:
            raise TypeError
        except ValueError:
            y = self.a(x)
        except TypeError:
            y = self.b(x)
        return y


class Matched(Parent):
    def forward(self, x: Tensor, which: int = 1) -> Tensor:
        match which:
            case 0:
                y = self.a(x)
            case _:
                y = self.b(x)
        return y


class Keyword(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(input=x) + self.b(x)


SHARED: list[tuple[type[Parent], tuple[tuple[str, ...], ...]]] = [
    (AllOfOne, (("a", "b", "c"),)),
    (OutOfOrder, (("c", "a"),)),
    (OneBranch, (("a", "b"),)),
]
NOT_SHARED = [
    Chained, CrossAttention, Twice, PartlyWithoutGradient, OneOfTwo, TwoBranches, OneExpression,
    OneOrTheOther, Returning, Caught, Matched,
]  # fmt: skip
WRITERS = [
    WrittenByAMethod, WrittenByAnIndex, WrittenInAnExpression, WrittenByAFunction,
    WrittenByAHelper, WrittenUnderAnotherName,
]  # fmt: skip


def groups_of(parent: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    return shared_calls(parent.forward, frozenset("abc"))


@pytest.mark.parametrize(("parent", "groups"), SHARED)
def test_what_surely_has_one_input(models, calls, parent, groups):
    assert groups_of(parent) == groups
    plain, fused = models.net_of(parent), lk.accelerate(models.net_of(parent))
    assert shared_groups(fused.base_model.model.parent) == groups
    models.assert_equal(models.results_of(fused, X), models.results_of(plain, X))
    assert calls == {"lora_linear_grouped": 1}


@pytest.mark.parametrize("parent", NOT_SHARED)
def test_what_may_run_without_the_other_or_on_something_else(models, calls, parent):
    """A gradient that is None stays None, so each layer must run by itself."""
    assert groups_of(parent) == ()
    plain, fused = models.net_of(parent), lk.accelerate(models.net_of(parent))
    models.assert_equal(models.results_of(fused, X), models.results_of(plain, X))
    assert set(calls) == {"lora_linear"}


@pytest.mark.parametrize("parent", [Lazily, Compared, Foreign, Keyword])
def test_expressions_that_are_not_seen_through(parent):
    assert groups_of(parent) == ()


@pytest.mark.parametrize("parent", WRITERS)
def test_an_input_that_is_written_in_between(models, parent):
    assert groups_of(parent) == ()
    plain, fused = models.net_of(parent), lk.accelerate(models.net_of(parent))
    with torch.no_grad():
        torch.testing.assert_close(fused(X), plain(X))


def test_only_the_children_that_count():
    assert shared_calls(AllOfOne.forward, frozenset("ac")) == ()
    assert shared_calls(OneBranch.forward, frozenset("ab")) == ()


def test_a_decorated_forward_is_read_through():
    @functools.wraps(AllOfOne.forward)
    def forward(*args: Any) -> Any:
        return AllOfOne.forward(*args)

    assert shared_calls(forward, frozenset("abc")) == (("a", "b", "c"),)


def test_a_forward_without_source_has_no_groups(models, calls):
    namespace: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.a(x) + self.b(x)", namespace)
    parent = type("WithoutSource", (Parent,), {"forward": namespace["forward"]})
    plain, fused = models.net_of(parent), lk.accelerate(models.net_of(parent))
    models.assert_equal(models.results_of(fused, X), models.results_of(plain, X))
    assert set(calls) == {"lora_linear"}
