"""Gradients: gradcheck of every implementation, every requires_grad pattern, strided gradients."""

from itertools import product

import pytest
import torch

from lora_kernels import testing
from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear.op import lora_linear

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float64 kernels run in the interpreter alone"
)
IMPLS = [
    pytest.param("triton", marks=[pytest.mark.kernel, interpreted]),
    "eager",
    "reference",
]


def leaves(m, n, k, r, dtype=torch.float64, device="cpu", pattern=(True,) * 4):
    inputs = testing.lora_linear_inputs(m, n, k, r, dtype, device)
    for name, needed in zip(testing.TRAINED, pattern, strict=True):
        inputs[name].requires_grad_(needed)
    return inputs


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape", [(5, 53, 37, 1), (5, 53, 37, 5), (18, 53, 37, 16), (3, 7, 10, 2)], ids=str
)
def test_gradcheck(impl, shape):
    """float64 numerical derivatives, of the Triton kernels themselves through the interpreter.

    Random directions for the larger shapes, every element for the smallest.
    """
    t = leaves(*shape)

    def function(x, lora_a, lora_b, bias):
        return lora_linear(x, t["weight"], lora_a, lora_b, 1.3, bias, impl=impl)

    inputs = [t[name] for name in testing.TRAINED]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=shape[0] > 3)


@pytest.mark.kernel
@interpreted
@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_gradcheck_with_dropout(impl):
    """The same mask in forward and backward: the derivative of what forward computed."""
    t = leaves(6, 18, 11, 3)

    def function(x, lora_a, lora_b):
        torch.manual_seed(7)
        return lora_linear(x, t["weight"], lora_a, lora_b, 1.3, dropout_p=0.4, impl=impl)

    inputs = [t[name] for name in ("x", "lora_a", "lora_b")]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_reference_gradgradcheck():
    t = leaves(3, 5, 4, 2)

    def function(x, lora_a, lora_b, bias):
        return lora_linear(x, t["weight"], lora_a, lora_b, 1.3, bias, impl="reference")

    assert torch.autograd.gradgradcheck(function, [t[name] for name in testing.TRAINED])


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=pytest.mark.kernel), "eager"])
def test_second_derivative_is_refused(impl, device):
    t = leaves(4, 5, 6, 2, torch.float32, device)
    y = lora_linear(t["x"], t["weight"], t["lora_a"], t["lora_b"], 1.3, impl=impl)
    (dx,) = torch.autograd.grad(y.sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear_backward"):
        dx.sum().backward()


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=pytest.mark.kernel), "eager"])
@pytest.mark.parametrize("pattern", list(product([True, False], repeat=4)), ids=str)
def test_every_requires_grad_pattern(impl, pattern, device):
    """The gradients that are asked for are right, and no other exists."""
    full = leaves(17, 33, 20, 5, torch.float32, device)
    part = leaves(17, 33, 20, 5, torch.float32, device, pattern)
    for t in (full, part):
        y = lora_linear(t["x"], t["weight"], t["lora_a"], t["lora_b"], 1.3, t["bias"], impl=impl)
        if y.requires_grad:
            y.backward(t["dy"])
    assert y.requires_grad == any(pattern)
    for name, needed in zip(testing.TRAINED, pattern, strict=True):
        assert (part[name].grad is not None) == needed
        if needed:
            assert torch.equal(part[name].grad, full[name].grad)


def strided_variants(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values with other strides."""
    wide = t.new_zeros(t.shape[0] * 2, t.shape[1] * 3 + 1)
    wide[::2, 1::3] = t
    offset = t.new_zeros(t.numel() + 5)
    offset[5:] = t.flatten()
    return {
        "transposed": t.t().contiguous().t(),
        "sliced": wide[::2, 1::3],
        "offset": offset[5:].view(t.shape),
        "huge stride": t.new_zeros(t.shape[0], 1000)[:, : t.shape[1]].copy_(t),
    }


@pytest.mark.kernel
@pytest.mark.parametrize("variant", ["transposed", "sliced", "offset", "huge stride"])
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "dy"])
def test_strides_change_nothing(name, variant, device):
    """Bitwise: every argument, and the gradient that arrives, with any strides."""
    inputs = testing.lora_linear_inputs(17, 33, 20, 5, torch.float32, device)
    expected = testing.outputs_and_gradients(lora_linear, inputs, 1.3, 0.0, "triton")
    strided = strided_variants(inputs[name])[variant]
    assert torch.equal(strided, inputs[name])
    leaf = {
        key: (strided if key == name else value).detach().requires_grad_(key in testing.TRAINED)
        for key, value in inputs.items()
    }
    y = lora_linear(
        leaf["x"], leaf["weight"], leaf["lora_a"], leaf["lora_b"], 1.3, leaf["bias"], impl="triton"
    )
    gradients = torch.autograd.grad(y, [leaf[key] for key in testing.TRAINED], leaf["dy"].detach())
    assert torch.equal(y, expected["y"])
    for key, gradient in zip(testing.TRAINED, gradients, strict=True):
        assert torch.equal(gradient, expected[f"d_{key}"]), key


@pytest.mark.kernel
@pytest.mark.parametrize("shape", [(1, 33), (17, 1), (1, 1)], ids=["rows", "columns", "both"])
def test_expanded_gradient(shape, device):
    """`sum`, `mean` and `expand` send gradients of stride 0."""
    t = leaves(17, 33, 20, 5, torch.float32, device)
    dy = t["dy"][: shape[0], : shape[1]].expand(17, 33)
    assert 0 in dy.stride()
    results = []
    for gradient in (dy, dy.contiguous()):
        y = lora_linear(
            t["x"], t["weight"], t["lora_a"], t["lora_b"], 1.3, t["bias"], impl="triton"
        )
        results.append(torch.autograd.grad(y, [t[name] for name in testing.TRAINED], gradient))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.kernel
@pytest.mark.parametrize("m", [0, 1])
@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_no_rows(m, impl, device):
    """M = 0: no launch, zero gradients of the right shapes."""
    t = leaves(m, 33, 20, 5, torch.float32, device)
    y = lora_linear(t["x"], t["weight"], t["lora_a"], t["lora_b"], 1.3, t["bias"], impl=impl)
    y.backward(t["dy"])
    assert y.shape == (m, 33)
    for name in testing.TRAINED:
        assert t[name].grad.shape == t[name].shape
        assert torch.isfinite(t[name].grad).all()
        assert bool(t[name].grad.any()) == (m > 0)


@pytest.mark.kernel
def test_nothing_is_written_into_what_is_given(device):
    """Inputs, saved tensors and the incoming gradient keep every bit; a second backward agrees."""
    t = leaves(17, 33, 20, 5, torch.float32, device)
    before = {name: tensor.detach().clone() for name, tensor in t.items()}
    y = lora_linear(t["x"], t["weight"], t["lora_a"], t["lora_b"], 1.3, t["bias"], impl="triton")
    inputs = [t[name] for name in testing.TRAINED]
    first = torch.autograd.grad(y, inputs, t["dy"], retain_graph=True)
    second = torch.autograd.grad(y, inputs, t["dy"])
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
    for name, tensor in t.items():
        assert torch.equal(tensor, before[name]), name
    assert all(g.data_ptr() != t["dy"].data_ptr() for g in first)


@pytest.mark.kernel
def test_repeats_are_bitwise_equal(device):
    inputs = testing.lora_linear_inputs(70, 130, 50, 5, torch.float32, device)
    first = testing.outputs_and_gradients(lora_linear, inputs, 1.3, 0.0, "triton")
    for _ in range(3 if interpreting() else 100):
        again = testing.outputs_and_gradients(lora_linear, inputs, 1.3, 0.0, "triton")
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.kernel
def test_a_nan_row_touches_that_row_alone(device):
    inputs = testing.lora_linear_inputs(20, 33, 20, 5, torch.float32, device)
    clean = lora_linear(*[inputs[n] for n in ("x", "weight", "lora_a", "lora_b")], impl="triton")
    inputs["x"][13] = float("nan")
    y = lora_linear(*[inputs[n] for n in ("x", "weight", "lora_a", "lora_b")], impl="triton")
    rows = torch.arange(20, device=device) != 13
    assert torch.equal(y[rows], clean[rows])
    assert y[13].isnan().all()


def test_only_what_backward_needs_is_saved(device):
    """x for d_lora_a alone, S for d_lora_b alone, never an [M, N] tensor and never a mask."""
    sizes = []
    t = leaves(8, 64, 32, 4, torch.float32, device, (False, False, True, False))

    def record(saved: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(saved.shape))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(record, lambda saved: saved):
        lora_linear(t["x"], t["weight"], t["lora_a"], t["lora_b"], 1.0, dropout_p=0.5, impl="eager")
    assert sorted(sizes) == sorted([(64, 32), (4, 32), (64, 4), (8, 4), (1,)])
