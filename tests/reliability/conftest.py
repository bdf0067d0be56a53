"""Every operation behind one interface, in any size, layout and dtype; and figures that are kept.

A test that takes `operation` runs once for each of them, and one that takes `dropped` once for each
with dropout. `operation.draw(...)` gives a `Case`: the
inputs and the gradients of the outputs, and `case.results(impl)` gives the outputs and the
gradients of the inputs. Sizes are m (rows), n (outputs), k (features) and r (rank); each operation
makes of them what it has.

Numbers are normal, or "exact": from {-1, 0, 1} (or where a function of them is exact), so that
every product and sum is a number of every dtype, and any order of summation gives the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_kernels as lk

Inputs = Mapping[str, Tensor]
Sizes = tuple[int, int, int, int]
Normal = Callable[..., Tensor]

EPS = 1e-5
# Exact in every dtype. Another one for the second of two adapters.
SCALING, SECOND = 0.5, 2.0
NUM_ITEMS = 3.0


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other places; "expanded" has the first row's everywhere, at stride 0."""
    if layout == "expanded" and tensor.dim() > 0 and tensor.shape[0] > 1:
        return tensor[:1].expand_as(tensor)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced" and tensor.dim() > 0:
        # What lies between the values, before and after them, is NaN.
        *leading, last = tensor.shape
        around = tensor.new_full((*leading, 2 * last + 1), torch.nan)[..., 1::2]
        return around.copy_(tensor)
    return tensor.contiguous()


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        labels: what is no input with a gradient, by name; dropout_p among them, where it drops.
        layouts: taken in turn by the inputs and the gradients of the outputs.
    """

    operation: "Operation"
    inputs: Inputs
    labels: Inputs
    dys: tuple[Tensor, ...]
    layouts: tuple[str, ...]

    def to(self, dtype: torch.dtype) -> "Case":
        return replace(
            self,
            inputs={name: tensor.to(dtype) for name, tensor in self.inputs.items()},
            # The loss of 16-bit hidden states is float32, and so is its gradient.
            dys=tuple(dy if dy.dim() == 0 else dy.to(dtype) for dy in self.dys),
        )

    def placed(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The inputs as leaves and the gradients of the outputs, in their layouts."""
        tensors = [*self.inputs.values(), *self.dys]
        placed = [
            laid_out(tensor, self.layouts[i % len(self.layouts)])
            for i, tensor in enumerate(tensors)
        ]
        leaves = {
            name: tensor.detach().requires_grad_(name in self.operation.trained)
            for name, tensor in zip(self.inputs, placed, strict=False)
        }
        return leaves, placed[len(leaves) :]

    def call(self, leaves: Inputs, impl: str) -> tuple[Tensor, ...]:
        return self.operation.call({**leaves, **self.labels}, impl)

    def results(self, impl: str) -> dict[str, Tensor]:
        """Outputs "y0", ... and the gradients "d_x", ..."""
        leaves, dys = self.placed()
        outputs = self.call(leaves, impl)
        dys = [dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)]
        trained = self.operation.trained
        gradients = torch.autograd.grad(outputs, [leaves[name] for name in trained], dys)
        return {f"y{i}": y.detach() for i, y in enumerate(outputs)} | {
            f"d_{name}": gradient for name, gradient in zip(trained, gradients, strict=True)
        }

    def oracle(self) -> dict[str, Tensor]:
        """The reference in float64, on the very values of this case."""
        return self.to(torch.float64).results("reference")


@dataclass(frozen=True)
class Operation:
    """An operation of the package.

    Attributes:
        make: the inputs of given sizes by a function that draws, and what is no number.
        rows: the inputs of which row i of dimension -2 belongs to token i.
        integers: whether ternary inputs give results without any rounding.
    """

    name: str
    make: Callable[[Normal, Sizes], tuple[dict[str, Tensor], dict[str, Tensor]]]
    function: Callable[[Inputs, str], Any]
    trained: tuple[str, ...]
    rows: tuple[str, ...]
    integers: bool = True

    def call(self, tensors: Inputs, impl: str) -> tuple[Tensor, ...]:
        outputs = self.function(tensors, impl)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def draw(
        self,
        m: int,
        n: int,
        k: int,
        r: int,
        *,
        exact: bool = False,
        layouts: Sequence[str] = ("contiguous",),
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> Case:
        """A case in float64."""
        generator = torch.Generator().manual_seed(seed)

        def number(*shape: int, scale: float = 1.0, spread: float = 1.0) -> Tensor:
            """`scale` is of the normal numbers, `spread` of the exact ones."""
            if exact:
                drawn = torch.randint(-1, 2, shape, generator=generator).double() * spread
            else:
                drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            return drawn.to(device)

        inputs, labels = self.make(number, (m, n, k, r))
        labels = {name: tensor.to(device) for name, tensor in labels.items()}
        case = Case(self, inputs, labels, (), tuple(layouts))
        outputs = case.call(inputs, "reference")
        return replace(case, dys=tuple(number(*y.shape) for y in outputs))


def _scale(size: int) -> float:
    return max(size, 1) ** -0.5


def _projection(number: Normal, n: int, k: int, r: int, suffix: str = "") -> dict[str, Tensor]:
    return {
        f"weight{suffix}": number(n, k, scale=_scale(k)),
        f"lora_a{suffix}": number(r, k, scale=_scale(k)),
        f"lora_b{suffix}": number(n, r, scale=_scale(r)),
    }


def _linear(number: Normal, sizes: Sizes):
    m, n, k, r = sizes
    return {"x": number(m, k), **_projection(number, n, k, r), "bias": number(n)}, {}


def _dora(number: Normal, sizes: Sizes):
    m, n, k, r = sizes
    # The norm of a row without elements is zero, and the scale not defined.
    inputs, _ = _linear(number, (m, n, max(k, 1), r))
    # Norms far from zero, and magnitudes of their size, as in training: where W + s B A nearly
    # vanishes the scale has no bound, and what it multiplies no digits.
    inputs["weight"][:, 0] = 8 + inputs["weight"][:, 0].abs()
    return {**inputs, "magnitude": 8 * number(n)}, {}


def _grouped(number: Normal, sizes: Sizes):
    _, n, k, _ = sizes
    inputs, _ = _linear(number, sizes)
    return {**inputs, **_projection(number, n // 2 + 1, k, 3, "2")}, {}


def _mixed(number: Normal, sizes: Sizes):
    m, n, k, _ = sizes
    inputs, _ = _linear(number, sizes)
    second = _projection(number, n, k, 3, "2")
    del second["weight2"]
    return {**inputs, **second}, {"row_adapters": torch.arange(m) * 7 % 5 % 3 - 1}


def _rope(number: Normal, sizes: Sizes):
    m, n, k, r = sizes
    half = max(1, k // 4)
    head_dim = 2 * half + k % 3
    tables = {name: number(1, m, 2 * half) for name in ("cos", "sin")}
    return {"q": number(1, n % 10, m, head_dim), "k": number(1, r % 3, m, head_dim), **tables}, {}


def _norm(number: Normal, sizes: Sizes):
    m, _, k, _ = sizes
    return {"x": number(m, max(k, 1)), "weight": number(max(k, 1))}, {}


def _norm_residual(number: Normal, sizes: Sizes):
    m, _, k, _ = sizes
    inputs, _ = _norm(number, sizes)
    return {**inputs, "residual": number(m, max(k, 1))}, {}


def _swiglu(number: Normal, sizes: Sizes):
    m, n, _, _ = sizes
    # The sigmoid of 128 is 1, and that of -128 is 0, in float32 too.
    return {"gate": number(m, n, spread=128.0), "up": number(m, n)}, {}


def _loss(number: Normal, sizes: Sizes):
    m, n, k, _ = sizes
    vocab = max(n, 1)
    labels = torch.where(torch.arange(m) % 3 == 1, -100, torch.arange(m) * 5 % vocab)
    return (
        {"hidden": number(m, k), "weight": number(vocab, k, scale=2 * _scale(k))},
        {"labels": labels},
    )


def _dropout(t: Inputs) -> float:
    return t["dropout_p"].item() if "dropout_p" in t else 0.0


def _call_linear(t: Inputs, impl: str) -> Tensor:
    return lk.lora_linear(
        t["x"], t["weight"], t["lora_a"], t["lora_b"], SCALING, t["bias"], impl=impl,
        magnitude=t.get("magnitude"), dropout_p=_dropout(t),
    )  # fmt: skip


def _call_grouped(t: Inputs, impl: str) -> tuple[Tensor, ...]:
    projections = [
        (t["weight"], t["lora_a"], t["lora_b"], SCALING, t["bias"]),
        (t["weight2"], t["lora_a2"], t["lora_b2"], SECOND, None),
    ]
    return lk.lora_linear_grouped(t["x"], projections, impl=impl, dropout_p=_dropout(t))


def _call_mixed(t: Inputs, impl: str) -> Tensor:
    return lk.lora_linear_mixed(
        t["x"], t["weight"], [t["lora_a"], t["lora_a2"]], [t["lora_b"], t["lora_b2"]],
        [SCALING, SECOND], t["row_adapters"], t["bias"], impl=impl, dropout_p=_dropout(t),
    )  # fmt: skip


def _call_loss(t: Inputs, impl: str) -> Tensor:
    return lk.linear_cross_entropy(
        t["hidden"], t["weight"], t["labels"], num_items=NUM_ITEMS, impl=impl, shift=False
    )


FACTORS = ("x", "lora_a", "lora_b", "bias")
SECOND_FACTORS = ("lora_a2", "lora_b2")
OPERATIONS = (
    Operation("lora_linear", _linear, _call_linear, FACTORS, ("x",)),
    Operation("grouped", _grouped, _call_grouped, FACTORS + SECOND_FACTORS, ("x",)),
    Operation("mixed", _mixed, _call_mixed, FACTORS + SECOND_FACTORS, ("x",)),
    Operation("dora", _dora, _call_linear, (*FACTORS, "magnitude"), ("x",), integers=False),
    Operation(
        "rope", _rope, lambda t, impl: lk.apply_rotary_pos_emb(
            t["q"], t["k"], t["cos"], t["sin"], impl=impl
        ), ("q", "k"), ("q", "k"),
    ),
    Operation(
        "rms_norm", _norm, lambda t, impl: lk.rms_norm(t["x"], t["weight"], EPS, impl=impl),
        ("x", "weight"), ("x",), integers=False,
    ),
    Operation(
        "rms_norm_residual", _norm_residual, lambda t, impl: lk.rms_norm(
            t["x"], t["weight"], EPS, t["residual"], impl=impl
        ), ("x", "residual", "weight"), ("x", "residual"), integers=False,
    ),
    Operation(
        "swiglu", _swiglu, lambda t, impl: lk.swiglu(t["gate"], t["up"], impl=impl),
        ("gate", "up"), ("gate", "up"),
    ),
    Operation("loss", _loss, _call_loss, ("hidden",), ("hidden",), integers=False),
)  # fmt: skip
# Those with dropout: `labels` may hold a dropout_p.
DROPPED = tuple(one for one in OPERATIONS if "lora_a" in one.trained)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    named = {"operation": OPERATIONS, "dropped": DROPPED}
    for fixture, operations in named.items():
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, operations, ids=lambda operation: operation.name)
