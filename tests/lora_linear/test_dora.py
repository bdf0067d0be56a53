"""DoRA: column scales in the kernels, the factored norm, and every gradient with a magnitude."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from lora_kernels import testing
from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear import dora, op, reference
from lora_kernels.lora_linear.op import lora_linear, lora_linear_grouped
from lora_kernels.lora_linear.plan import plan

KERNEL = pytest.param("triton", marks=pytest.mark.kernel)
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float64 kernels run in the interpreter alone"
)
EXACT_KERNEL = pytest.param("triton", marks=[pytest.mark.kernel, interpreted])
SCALING = 1.5
K = 37


def inputs(m=19, n=53, r=5, dtype=torch.float64, device="cpu", bias=True, seed=0, k=K):
    """x, weight, lora_a, lora_b, scaling, bias, magnitude, all trained but the weight; and dy."""
    t = testing.lora_linear_inputs(m, n, k, r, dtype, device, seed=seed)
    magnitude = t["weight"].norm(dim=1).mul(1 + 0.2 * t["bias"]).detach()
    leaves = [
        t[name].detach().requires_grad_(name != "weight")
        for name in ("x", "weight", "lora_a", "lora_b")
    ]
    last = t["bias"].detach().requires_grad_() if bias else None
    return [*leaves, SCALING, last, magnitude.requires_grad_()], t["dy"]


def run(arguments, impl, dropout_p=0.0):
    *first, magnitude = arguments
    return lora_linear(*first, dropout_p=dropout_p, impl=impl, magnitude=magnitude)


def specification(arguments):
    *first, magnitude = arguments
    return reference.lora_linear(*first, magnitude=magnitude)


def trained(arguments):
    return [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]


def results(function, arguments, dy):
    y = function(arguments)
    return [y, *torch.autograd.grad(y, trained(arguments), dy.to(y.dtype))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("impl", [EXACT_KERNEL, "eager", "auto"])
@pytest.mark.parametrize("m, r", [(19, 5), (1, 5), (300, 3), (19, 40)])
def test_output_and_gradients(impl, m, r, bias):
    arguments, dy = inputs(m=m, r=r, bias=bias)
    ours = results(lambda a: run(a, impl), arguments, dy)
    for one, two in zip(ours, results(specification, arguments, dy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


@pytest.mark.kernel
def test_one_pass_split_and_decode_are_among_the_kernels():
    """The cases above and below run each forward kernel that scales columns."""
    methods = {
        (m, r): plan(m, 53, K, r, torch.float64, "interpreter").method
        for m, r in ((19, 5), (19, 40))
    }
    assert methods == {(19, 5): "one_pass", (19, 40): "split"}
    assert plan(1, 53, K, 5, torch.float64, "interpreter").decode is not None


@pytest.mark.parametrize("impl", [EXACT_KERNEL, "eager"])
@torch.no_grad()
def test_decoding(impl):
    arguments, _ = inputs(m=3)
    torch.testing.assert_close(
        run(arguments, impl), specification(arguments), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("impl", [EXACT_KERNEL, "eager"])
def test_a_group_of_which_some_have_a_magnitude(impl):
    entries, dys, x = [], [], None
    for g, (n, has_magnitude) in enumerate(((53, True), (1, False), (32, True))):
        (first, *entry), dy = inputs(n=n, seed=g, bias=g > 0)
        x = first if x is None else x
        entries.append(tuple(entry) if has_magnitude else tuple(entry[:-1]))
        dys.append(dy)
    wanted = [x, *(t for entry in entries for t in trained(entry))]
    ours = lora_linear_grouped(x, entries, impl=impl)
    expected = [
        reference.lora_linear(x, *entry[:5], magnitude=entry[5] if len(entry) > 5 else None)
        for entry in entries
    ]
    for one, two in zip(
        [*ours, *torch.autograd.grad(ours, wanted, dys)],
        [*expected, *torch.autograd.grad(expected, wanted, dys)],
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", [KERNEL, "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_accuracy(impl, dtype, device):
    """At most twice the error that plain torch makes in the same dtype."""
    if dtype == torch.bfloat16 and impl == "triton" and interpreting():
        pytest.skip("the interpreter computes bfloat16 products wrongly")
    draws = []
    for seed in range(8):
        arguments, dy = inputs(m=40, dtype=dtype, device=device, seed=seed)
        exact = [
            t.detach().double().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t
            for t in arguments
        ]
        draws.append((
            results(lambda a: run(a, impl), arguments, dy),
            results(specification, arguments, dy),
            results(specification, exact, dy),
        ))  # fmt: skip
    for tensors in zip(*(zip(*draw, strict=True) for draw in draws), strict=True):
        ours, plain, oracle = (torch.stack(part) for part in zip(*tensors, strict=True))
        assert testing.compare(ours, plain, oracle).ratio <= testing.MAX_RATIO


@pytest.mark.parametrize("impl", [EXACT_KERNEL, "eager"])
def test_gradcheck(impl):
    """With the norm held: its gradient is left out by definition."""
    arguments, _ = inputs(m=4, n=6, r=2, k=5)
    x, weight, lora_a, lora_b, scaling, bias, magnitude = arguments
    norm = dora.weight_norm(weight, lora_a, lora_b, scaling)

    def function(x, a, b, bias, magnitude):
        given = dora.weight_norm(weight, a, b, scaling)
        # The magnitude that gives this scale whatever the norm of the perturbed weight.
        return lora_linear(
            x, weight, a, b, scaling, bias, impl=impl, magnitude=magnitude * (given / norm)
        )

    assert torch.autograd.gradcheck(function, (x, lora_a, lora_b, bias, magnitude))


@pytest.mark.parametrize("scaling", [0.0, 1.0, -3.0, torch.tensor(2.0)], ids=str)
def test_the_norm_is_that_of_the_merged_weight(scaling):
    (_, weight, lora_a, lora_b, *_), _ = inputs(r=7)
    norm = dora.weight_norm(weight, lora_a, lora_b, scaling)
    expected = (weight + scaling * lora_b @ lora_a).norm(dim=1)
    torch.testing.assert_close(norm, expected.detach(), rtol=1e-12, atol=1e-12)
    assert not norm.requires_grad


def test_a_16_bit_weight_has_a_float32_norm():
    (_, weight, lora_a, lora_b, *_), _ = inputs(dtype=torch.bfloat16)
    norm = dora.weight_norm(weight, lora_a.float(), lora_b.float(), SCALING)
    exact = (weight.double() + SCALING * lora_b.double() @ lora_a.double()).norm(dim=1)
    assert norm.dtype == torch.float32
    # The product with lora_a is rounded to 8 bits, and it is one part of the norm.
    torch.testing.assert_close(norm.double(), exact.detach(), rtol=2.0**-8, atol=0.0)


def test_rows_of_no_length_after_cancellation():
    """A norm that rounding could make the root of a negative number."""
    lora_a, lora_b = torch.randn(3, 8), torch.randn(5, 3)
    norm = dora.weight_norm(-(lora_b @ lora_a), lora_a, lora_b, 1.0)
    assert torch.isfinite(norm).all() and (norm < 1e-2).all()


@pytest.mark.parametrize("impl", [EXACT_KERNEL, "eager"])
def test_needs_input_grad(impl):
    """All the patterns of x, lora_a, lora_b, bias and magnitude."""
    arguments, dy = inputs()
    full = dict(zip((0, 2, 3, 5, 6), results(specification, arguments, dy)[1:], strict=True))
    for needs in product((False, True), repeat=5):
        if not any(needs):
            continue
        places = [place for place, need in zip(full, needs, strict=True) if need]
        given = [
            t.detach().requires_grad_(i in places) if torch.is_tensor(t) else t
            for i, t in enumerate(arguments)
        ]
        gradients = torch.autograd.grad(run(given, impl), [given[i] for i in places], dy)
        for place, gradient in zip(places, gradients, strict=True):
            torch.testing.assert_close(gradient, full[place], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", [EXACT_KERNEL, "eager"])
def test_a_magnitude_of_zero_has_its_gradient(impl):
    arguments, dy = inputs(bias=False)
    with torch.no_grad():
        arguments[-1][::3] = 0.0
    ours = results(lambda a: run(a, impl), arguments, dy)
    for one, two in zip(ours, results(specification, arguments, dy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_a_large_bias_does_not_drown_the_gradient_of_the_magnitude():
    """In bfloat16: had it been taken from an output with the bias, it would be lost."""
    arguments, dy = inputs(m=64, dtype=torch.bfloat16)
    with torch.no_grad():
        arguments[5].fill_(1000.0)
    exact = [
        t.detach().double().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t
        for t in arguments
    ]
    ours = results(lambda a: run(a, "eager"), arguments, dy)[-1]
    expected = results(specification, exact, dy)[-1]
    assert (ours.double() - expected).norm() <= 2.0**-6 * expected.norm()


@pytest.mark.parametrize("trains", [True, False])
def test_y_is_kept_only_for_the_gradient_of_a_magnitude(trains):
    arguments, _ = inputs()
    arguments[-1].requires_grad_(trains)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
    ):
        run(arguments, "eager")
    assert shapes.count((19, 53)) == int(trains)


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_dropout_is_of_the_scaled_product_alone(impl):
    """y = base(x) + (c - 1) * base(dropped) + c s lora(dropped), as PEFT defines it."""
    arguments, dy = inputs()
    x, weight, lora_a, lora_b, scaling, bias, magnitude = arguments
    torch.manual_seed(5)
    ours = results(lambda a: run(a, impl, dropout_p=0.4), arguments, dy)
    torch.manual_seed(5)

    def by_definition(_):
        dropped = F.dropout(x, 0.4)
        scale = magnitude / (weight + scaling * lora_b @ lora_a).detach().norm(dim=1)
        delta = scale * scaling * (dropped @ lora_a.t() @ lora_b.t())
        return F.linear(x, weight, bias) + (scale - 1) * F.linear(dropped, weight) + delta

    for one, two in zip(ours, results(by_definition, arguments, dy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_dropout_in_a_group_where_one_has_a_magnitude():
    (x, *entry), _ = inputs()
    (_, *plain), _ = inputs(n=8, seed=1)
    ones = torch.ones_like(x)
    entries = [tuple(entry), tuple(plain[:5])]
    torch.manual_seed(0)
    ys = lora_linear_grouped(ones, entries, dropout_p=0.5)
    assert [y.shape[-1] for y in ys] == [53, 8]
    torch.manual_seed(1)
    others = lora_linear_grouped(ones, entries, dropout_p=0.5)
    assert all(not torch.equal(one, two) for one, two in zip(ys, others, strict=True))


STRIDES = {
    "contiguous": lambda dy: dy,
    "transposed": lambda dy: dy.t().contiguous().t(),
    "expanded rows": lambda dy: dy[:1].expand(dy.shape),
    "one number": lambda dy: dy[:1, :1].expand(dy.shape),
}


@pytest.mark.parametrize("impl", [EXACT_KERNEL, "eager"])
@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("m", [0, 1, 33, 600])
def test_the_gradient_of_a_scale(impl, layout, m):
    if m == 0 and layout != "contiguous":
        pytest.skip("there is no first row to expand")
    generator = torch.Generator().manual_seed(0)
    dy, y = (torch.randn(m, 130, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = 1 + torch.rand(130, generator=generator, dtype=torch.float64)
    dy = STRIDES[layout](dy)
    before = dy.clone()
    scaled, d_scale = dora.scale_gradient(dy, y, scale, impl)
    torch.testing.assert_close(scaled, dy * scale, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(d_scale, (dy * y).sum(0) / scale, rtol=1e-12, atol=1e-12)
    assert scaled.is_contiguous() and torch.equal(dy, before)


@pytest.mark.parametrize("impl", [KERNEL, "eager"])
def test_opcheck(impl, device):
    dtype = torch.float32
    dy, y = torch.randn(9, 33, device=device), torch.randn(9, 33, device=device)
    scale = 1 + torch.rand(33, device=device)
    torch.library.opcheck(dora._scale_gradient_op, (dy, y, scale, impl))
    (x, weight, lora_a, lora_b, *_), _ = inputs(dtype=dtype, device=device, n=33, m=9)
    settings = ([SCALING], None, None, 0.0, impl, True)
    torch.library.opcheck(
        op._forward_op,
        (x, [weight], [lora_a], [lora_b], [], [scale.requires_grad_()], *settings),
    )


@pytest.mark.parametrize("impl", [KERNEL, "eager", "auto"])
def test_torch_compile_has_no_graph_break(impl, device):
    arguments, dy = inputs(dtype=torch.float32, device=device)
    compiled = torch.compile(lambda a: run(a, impl).sin(), fullgraph=True)
    ours = results(compiled, arguments, dy)
    for one, two in zip(ours, results(lambda a: run(a, impl).sin(), arguments, dy), strict=True):
        torch.testing.assert_close(one, two)


def test_autocast_and_float32_adapters():
    arguments, _ = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(arguments, "auto")
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert {t.grad.dtype for t in trained(arguments)} == {torch.float32}


def test_a_wrong_magnitude_is_named():
    arguments, _ = inputs()
    arguments[-1] = torch.ones(7, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"magnitude: expected shape \(53,\).*got \(7,\)"):
        run(arguments, "auto")
    arguments[-1] = torch.ones(53, dtype=torch.int64)
    with pytest.raises(TypeError, match="magnitude: expected a floating-point dtype"):
        run(arguments, "auto")
