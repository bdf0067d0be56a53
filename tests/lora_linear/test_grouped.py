"""Several projections of one x in one op: equal to each alone, forward and backward."""

from itertools import product

import pytest
import torch

from lora_kernels import testing
from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear import op, reference
from lora_kernels.lora_linear.dropout import generator_keep, philox_keep
from lora_kernels.lora_linear.op import lora_linear_grouped

KERNEL = pytest.param("triton", marks=pytest.mark.kernel)
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float64 kernels run in the interpreter alone"
)
EXACT_KERNEL = pytest.param("triton", marks=[pytest.mark.kernel, interpreted])
# N, R and whether there is a bias: more, as many and fewer than a tile's 32 columns; ranks that
# differ, so that the stacked rank has ragged seams.
PROJECTIONS = ((53, 5, False), (1, 3, True), (32, 20, True))
M, K = 19, 37


def group(dtype=torch.float64, device="cpu", m=M, projections=PROJECTIONS, grad=True, seed=0):
    """x, the projections with scalings 0.5, 1.5, ..., and one output gradient each."""
    x = testing.lora_linear_inputs(m, 1, K, 1, dtype, device, seed=seed)["x"].requires_grad_(grad)
    entries, dys = [], []
    for g, (n, r, has_bias) in enumerate(projections):
        t = testing.lora_linear_inputs(m, n, K, r, dtype, device, seed=10 * seed + g + 1)
        trained = [t[name].requires_grad_(grad) for name in ("lora_a", "lora_b")]
        bias = t["bias"].requires_grad_(grad) if has_bias else None
        entries.append((t["weight"], *trained, 0.5 + g, bias))
        dys.append(t["dy"])
    return x, entries, dys


def leaves(x, entries):
    """What has a gradient, in one order."""
    return [x] + [t for entry in entries for t in (entry[1], entry[2], entry[4]) if t is not None]


def exact(x, entries):
    """The same in float64, as new leaves."""

    def double(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    return double(x), [tuple(double(value) for value in entry) for entry in entries]


def oracle(x, entries, keeps=None):
    """Each projection alone, by the reference, in float64."""
    return tuple(
        reference.lora_linear(x, weight, lora_a, lora_b, scaling, bias, keeps and keeps[g])
        for g, (weight, lora_a, lora_b, scaling, bias) in enumerate(entries)
    )


@pytest.mark.parametrize("impl", [EXACT_KERNEL, "eager"])
@pytest.mark.parametrize("m", [M, 1, 70])
def test_outputs_and_gradients(impl, m):
    x, entries, dys = group(m=m)
    ours, expected = lora_linear_grouped(x, entries, impl=impl), oracle(x, entries)
    wanted = leaves(x, entries)
    results = (
        (*ours, *torch.autograd.grad(ours, wanted, dys)),
        (*expected, *torch.autograd.grad(expected, wanted, dys)),
    )
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", [KERNEL, "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_accuracy(impl, dtype, device):
    """At most twice the error that plain torch makes in the same dtype."""
    if dtype == torch.bfloat16 and impl == "triton" and interpreting():
        pytest.skip("the interpreter computes bfloat16 products wrongly")
    draws = []
    for seed in range(8):
        x, entries, dys = group(dtype, device, m=40, seed=seed)
        exact_x, exact_entries = exact(x, entries)
        results = []
        for inputs, function in (
            ((x, entries), lambda *a: lora_linear_grouped(*a, impl=impl)),
            ((x, entries), oracle),
            ((exact_x, exact_entries), oracle),
        ):
            ys = function(*inputs)
            dy = [d.to(ys[0].dtype) for d in dys]
            results.append((*ys, *torch.autograd.grad(ys, leaves(*inputs), dy)))
        draws.append(results)
    # [seed][ours, plain, exact][tensor]: each tensor of all draws is one comparison.
    for tensors in zip(*(zip(*results, strict=True) for results in draws), strict=True):
        ours, plain, oracles = (torch.stack(part) for part in zip(*tensors, strict=True))
        assert testing.compare(ours, plain, oracles).ratio <= testing.MAX_RATIO


@pytest.mark.kernel
@interpreted
def test_gradcheck():
    x, entries, _ = group(m=5)

    def function(*values):
        given = iter(values[1:])
        filled = [
            (w, next(given), next(given), s, None if b is None else next(given))
            for w, _, _, s, b in entries
        ]
        return lora_linear_grouped(values[0], filled, impl="triton")

    assert torch.autograd.gradcheck(function, leaves(x, entries), fast_mode=True)


@pytest.mark.parametrize("impl", [KERNEL, "eager"])
def test_every_projection_has_its_own_mask(impl, device):
    """Dropout: against the reference with the masks of the seeds that were drawn, and gradients."""
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    x, entries, dys = group(dtype, device)
    p = 0.4
    torch.manual_seed(11)
    ours = lora_linear_grouped(x, entries, dropout_p=p, impl=impl)
    torch.manual_seed(11)
    seeds = torch.randint(0, 2**62, (len(entries),), device=device)
    if impl == "triton":
        keeps = [philox_keep(seed, p, M, K, dtype) for seed in seeds.split(1)]
    else:
        keeps = [generator_keep(seed, p, x) for seed in seeds.split(1)]
    assert not torch.equal(keeps[0], keeps[1])
    expected = oracle(x, entries, keeps)
    wanted = leaves(x, entries)
    results = (
        (*ours, *torch.autograd.grad(ours, wanted, dys)),
        (*expected, *torch.autograd.grad(expected, wanted, dys)),
    )
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("impl", [KERNEL, "eager"])
@pytest.mark.parametrize("pattern", list(product([True, False], repeat=3)), ids=str)
def test_needs_input_grad(impl, pattern, device):
    """x, one projection's A, another's B: what asks for a gradient gets it, and nothing else."""
    full_x, full, dys = group(torch.float32, device)
    x, entries, _ = group(torch.float32, device, grad=False)
    chosen = [x, entries[0][1], entries[2][2]]
    for tensor, needed in zip(chosen, pattern, strict=True):
        tensor.requires_grad_(needed)
    for given, projections in ((full_x, full), (x, entries)):
        ys = lora_linear_grouped(given, projections, impl=impl)
        if ys[0].requires_grad:
            torch.autograd.backward(ys, dys)
    assert ys[0].requires_grad == any(pattern)
    expected = [full_x, full[0][1], full[2][2]]
    for tensor, needed, of_full in zip(chosen, pattern, expected, strict=True):
        assert (tensor.grad is not None) == needed
        if needed:
            assert torch.equal(tensor.grad, of_full.grad)
    asked = {id(tensor) for tensor, needed in zip(chosen, pattern, strict=True) if needed}
    assert all(t.grad is None for t in leaves(x, entries) if id(t) not in asked)


@pytest.mark.parametrize("impl", [KERNEL, "eager"])
def test_an_output_that_nothing_uses(impl, device):
    """Its gradient is zero, the others' are as if it were used with a zero gradient."""
    x, entries, dys = group(torch.float32, device)
    wanted = leaves(x, entries)
    ys = lora_linear_grouped(x, entries, impl=impl)
    alone = torch.autograd.grad(ys[2], wanted, dys[2], retain_graph=True)
    zeros = [torch.zeros_like(dys[0]), torch.zeros_like(dys[1]), dys[2]]
    for one, two in zip(alone, torch.autograd.grad(ys, wanted, zeros), strict=True):
        torch.testing.assert_close(one, two)
    assert not alone[1].any() and alone[-1].any()


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["weight", "dy", "x"])
def test_mixed_strides(name, device):
    """One projection's weight transposed in memory, one's gradient expanded, x transposed."""
    x, entries, dys = group(torch.float32, device, projections=((33, 5, True), (16, 20, True)))
    if name == "weight":
        weight = entries[1][0]
        entries[1] = (weight.t().contiguous().t(), *entries[1][1:])
    elif name == "dy":
        dys[1] = dys[1][:, :1].expand(-1, 16)
    else:
        x = x.detach().t().contiguous().t().requires_grad_()
    exact_x, exact_entries = exact(x, entries)
    expected = oracle(exact_x, exact_entries)
    wanted = leaves(x, entries)
    ys = lora_linear_grouped(x, entries, impl="triton")
    results = (
        (*ys, *torch.autograd.grad(ys, wanted, dys)),
        (
            *expected,
            *torch.autograd.grad(
                expected, leaves(exact_x, exact_entries), [dy.double() for dy in dys]
            ),
        ),
    )
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two.to(one.dtype), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", [KERNEL, "eager"])
def test_scalings_of_both_kinds(impl, device):
    """One scaling a tensor, the other a float."""
    x, entries, dys = group(torch.float32, device)
    mixed = list(entries)
    mixed[1] = (*entries[1][:3], torch.tensor(1.5, device=device), entries[1][4])
    wanted = leaves(x, entries)
    results = []
    for given in (entries, mixed):
        ys = lora_linear_grouped(x, given, impl=impl)
        results.append((*ys, *torch.autograd.grad(ys, wanted, dys)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("impl", [KERNEL, "eager", "reference"])
def test_a_projection_without_an_adapter_is_a_linear_layer(impl, device):
    x, entries, _ = group(torch.float32, device)
    weight, bias = entries[2][0], entries[2][4]
    ys = lora_linear_grouped(
        x, [entries[0], (weight, None, None, 1.0, bias), entries[1]], impl=impl
    )
    together = lora_linear_grouped(x, entries[:2], impl=impl)
    assert torch.equal(ys[0], together[0]) and torch.equal(ys[2], together[1])
    assert torch.equal(ys[1], torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("impl", [KERNEL, "eager"])
def test_no_rows(impl, device):
    x, entries, dys = group(torch.float32, device, m=0)
    ys = lora_linear_grouped(x, entries, impl=impl)
    torch.autograd.backward(ys, dys)
    assert [y.shape for y in ys] == [(0, 53), (0, 1), (0, 32)]
    for leaf in leaves(x, entries):
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()


def test_only_references_and_two_tensors_are_saved(device):
    """x and S of all the projections; the rest are the arguments themselves."""
    x, entries, _ = group(torch.float32, device)
    saved = []

    def record(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        lora_linear_grouped(x, entries, impl="eager")
    arguments = {t.data_ptr() for entry in entries for t in entry[:3]} | {x.data_ptr()}
    own = [tuple(t.shape) for t in saved if t.data_ptr() not in arguments]
    assert own == [(M, sum(r for _, r, _ in PROJECTIONS))]


def test_one_operation_serves_the_whole_group(device, monkeypatch):
    x, entries, dys = group(torch.float32, device)
    calls = []
    names = ("_forward", "_gradients") if device.type == "cpu" else ("_forward_op", "_gradients_op")
    for name in names:
        original = getattr(op, name)

        def count(*arguments, original=original, name=name):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(op, name, count)
    torch.autograd.backward(lora_linear_grouped(x, entries), dys)
    assert calls == list(names)


@pytest.mark.parametrize("impl", [KERNEL, "eager"])
def test_torch_compile_has_no_graph_break(impl, device):
    x, entries, dys = group(torch.float32, device)
    wanted = leaves(x, entries)
    results = []

    def function(x):
        return [y.sin() for y in lora_linear_grouped(x, entries, impl=impl)]

    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        ys = run(x)
        results.append((*ys, *torch.autograd.grad(ys, wanted, dys)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_errors_name_the_projection():
    x, entries, _ = group(torch.float32)
    weight, lora_a, lora_b, scaling, bias = entries[1]
    with pytest.raises(ValueError, match="projections: expected at least one"):
        lora_linear_grouped(x, [])
    with pytest.raises(ValueError, match=r"projections\[1\]: lora_b is None"):
        lora_linear_grouped(x, [entries[0], (weight, lora_a, None, 1.0, None)])
    with pytest.raises(ValueError, match=r"projections\[1\]\.lora_a: expected shape \(3, 37\)"):
        lora_linear_grouped(x, [entries[0], (weight, lora_a[:, 1:], lora_b, scaling, bias)])
    with pytest.raises(TypeError, match=r"projections\[1\]\.weight: expected x's dtype"):
        lora_linear_grouped(x, [entries[0], (weight.double(), lora_a, lora_b, scaling, bias)])
    with pytest.raises(ValueError, match=r"x: expected shape \(19, 37\)"):
        lora_linear_grouped(x[:, 1:], entries)
