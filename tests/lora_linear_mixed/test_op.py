"""The public operation: bad input, dtypes, strides, which gradients exist, tracing."""

import itertools

import pytest
import torch

import lora_kernels as lk
from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear_mixed import op, reference
from lora_kernels.lora_linear_mixed.op import lora_linear_mixed
from lora_kernels.lora_linear_mixed.rows import MixedRows

KERNEL = pytest.param("triton", marks=pytest.mark.kernel)
IMPLS = [KERNEL, "eager", "reference"]
NAMES = ("x", "weight", "lora_as", "lora_bs", "scalings", "row_adapters", "bias", "dropout_p")

# What is changed in a call of 2 adapters of rank 4 and 6, x [20, 9], weight [12, 9].
BAD = {
    "no adapter": ({"lora_as": []}, ValueError, "lora_as: expected at least one adapter, got none"),
    "counts": ({"lora_bs": lambda v: v[:1]}, ValueError, "lora_bs: expected 2 adapters.*got 1"),
    "x": ({"x": lambda v: v[:, :-1]}, ValueError, r"x: expected shape \(20, 9\).*\(20, 8\)"),
    "weight": ({"weight": lambda v: v[0]}, ValueError, r"weight: expected 2 dimensions"),
    "scalar x": ({"x": torch.tensor(1.0)}, ValueError, "x: expected at least 1 dimension"),
    "lora_a": (
        {"lora_as": lambda v: [v[0], v[1][:, 1:]]},
        ValueError,
        r"lora_as\[1\]: expected shape \(6, 9\).*\(6, 8\)",
    ),
    "ranks": (
        {"lora_bs": lambda v: v[::-1]},
        ValueError,
        r"lora_bs\[0\]: expected shape \(12, 4\).*got \(12, 6\)",
    ),
    "rank 0": (
        {"lora_as": lambda v: [v[0][:0], v[1]]},
        ValueError,
        r"lora_as\[0\]: expected a rank of at least 1",
    ),
    "no tensor": (
        {"lora_bs": lambda v: [v[0], None]},
        TypeError,
        r"lora_bs\[1\]: expected a torch.Tensor, got NoneType",
    ),
    "integers": (
        {"lora_as": lambda v: [v[0].long(), v[1]]},
        TypeError,
        r"lora_as\[0\]: expected a floating-point dtype, got torch.int64",
    ),
    "device": (
        {"lora_as": lambda v: [v[0].to("meta"), v[1]]},
        ValueError,
        r"lora_as\[0\]: expected x's device .*, got meta",
    ),
    "dtype": ({"weight": lambda v: v.half()}, TypeError, "weight: expected x's dtype"),
    "bias": ({"bias": lambda v: v[:-1]}, ValueError, r"bias: expected shape \(12,\)"),
    "scalings": ({"scalings": [1.0]}, ValueError, "scalings: expected 2, one for each.*got 1"),
    "scaling type": ({"scalings": ["1", 2.0]}, TypeError, "scalings: expected floats.*got str"),
    "scaling tensor": (
        {"scalings": lambda v: torch.ones(3)},
        ValueError,
        r"scalings: expected 2 floats or .* shape \(2,\), got .* shape \(3,\)",
    ),
    "dropout": ({"dropout_p": [0.1]}, ValueError, "dropout_p: expected a float or 2 of them"),
    "dropout 1": ({"dropout_p": 1}, ValueError, r"dropout_p: .* in \[0, 1\), got 1"),
    "rows": (
        {"row_adapters": lambda v: v[1:]},
        ValueError,
        r"row_adapters: expected one entry for each row of x, shape \(20,\).*got \(19,\)",
    ),
    "row type": ({"row_adapters": lambda v: v.float()}, TypeError, "row_adapters: .*torch.float32"),
    "row list": ({"row_adapters": lambda v: v.tolist()}, TypeError, "row_adapters: .*got list"),
    "prepared": (
        {"row_adapters": lambda v: MixedRows.of(v, 3)},
        ValueError,
        "row_adapters: expected rows of 2 adapters, as lora_as has, got MixedRows of 3",
    ),
}


def arguments(draw, **changes):
    batch = draw(20, 12, 9, (4, 6), "random", torch.float32)
    values = dict(zip(NAMES, batch.arguments(0.0), strict=True))
    for name, change in changes.items():
        values[name] = change(values[name]) if callable(change) else change
    return values


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, draw):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        lora_linear_mixed(**arguments(draw, **changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the check would wait for the device")
@pytest.mark.parametrize("wrong", [2, -2])
def test_an_unknown_adapter_is_named(wrong, draw):
    values = arguments(draw)
    values["row_adapters"][7] = wrong
    message = rf"row_adapters: expected -1 \(the base alone\) to 1, got {wrong}"
    with pytest.raises(ValueError, match=message):
        lora_linear_mixed(**values)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["random", "long runs"])
def test_an_unknown_adapter_that_no_one_could_check_is_the_base(impl, layout, draw):
    batch = draw(160, 12, 9, (4, 6, 5), layout, torch.float32)
    assert (batch.ids == 2).any()
    values = dict(zip(NAMES, batch.arguments(0.0), strict=True))
    prepared = MixedRows.of(batch.ids, 3)
    two = MixedRows(
        prepared.row_adapters, prepared.order, prepared.sorted_adapters, prepared.starts[:3]
    )
    values |= {name: values[name][:2] for name in ("lora_as", "lora_bs", "scalings")}
    y = lora_linear_mixed(**{**values, "row_adapters": two}, impl=impl)
    ids = torch.where(batch.ids == 2, -1, batch.ids)
    torch.testing.assert_close(y, lora_linear_mixed(**{**values, "row_adapters": ids}, impl=impl))
    y.sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in (batch.x, *values["lora_as"]))


def test_what_cannot_get_a_gradient_must_not_ask_for_one(draw):
    values = arguments(draw, weight=lambda v: v.requires_grad_())
    with pytest.raises(ValueError, match="weight: expected requires_grad=False"):
        lora_linear_mixed(**values)
    with torch.no_grad():
        lora_linear_mixed(**values)
    scalings = torch.ones(2, device=values["x"].device, requires_grad=True)
    with pytest.raises(ValueError, match="scalings: expected requires_grad=False"):
        lora_linear_mixed(**arguments(draw, scalings=scalings))


def test_an_implementation_that_cannot_run_says_why(draw):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    values = arguments(draw)
    changed = {"x", "weight", "bias"}
    values |= {name: values[name].bfloat16() for name in changed}
    with pytest.raises(ValueError, match="impl='triton' cannot run here"):
        lora_linear_mixed(**values, impl="triton")
    with pytest.raises(ValueError, match=r"impl: expected one of .*'fast'"):
        lora_linear_mixed(**values, impl="fast")


@pytest.mark.parametrize("impl", IMPLS)
def test_leading_dimensions_and_prepared_rows(impl, draw):
    """ids in x's leading shape, flat, or sorted beforehand; one row as a vector."""
    batch = draw(24, 12, 9, (4, 6), "random", torch.float32)
    values = dict(zip(NAMES, batch.arguments(0.0), strict=True))
    flat = lora_linear_mixed(**values, impl=impl)
    rows = MixedRows.of(batch.ids, 2)
    for ids in (batch.ids, batch.ids.view(2, 3, 4), batch.ids.to(torch.int16), rows):
        cube = {**values, "x": batch.x.view(2, 3, 4, 9), "row_adapters": ids}
        y = lora_linear_mixed(**cube, impl=impl)
        assert y.shape == (2, 3, 4, 12) and torch.equal(y.view(24, 12), flat)
    vector = {**values, "x": batch.x[5], "row_adapters": batch.ids[5]}
    torch.testing.assert_close(lora_linear_mixed(**vector, impl=impl), flat[5])


@pytest.mark.parametrize("impl", IMPLS)
def test_scalings_may_be_a_tensor(impl, draw):
    batch = draw(40, 12, 9, (4, 6), "random", torch.float32)
    floats = batch.results(lora_linear_mixed, 0.0, impl)
    batch.scalings = torch.tensor(batch.scalings, device=batch.x.device)
    for one, two in zip(floats, batch.results(lora_linear_mixed, 0.0, impl), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides_and_nothing_written(impl, draw):
    """x and dy by columns, a transposed weight, factors inside others, an expanded dy."""
    dtype = torch.float32 if impl == "triton" and not interpreting() else torch.float64
    batch = draw(40, 12, 10, (4, 6), "random", dtype)
    expected = batch.results(lora_linear_mixed, 0.0, impl)

    def spread(tensor):
        wide = torch.full((2 * tensor.shape[0], 3 * tensor.shape[1]), torch.nan).to(tensor)
        wide[::2, 1::3] = tensor.detach()
        return wide[::2, 1::3].requires_grad_(tensor.requires_grad)

    def by_columns(tensor):
        return tensor.detach().t().contiguous().t().requires_grad_(tensor.requires_grad)

    for change in (spread, by_columns):
        batch.x, batch.weight, batch.dy = (change(t) for t in (batch.x, batch.weight, batch.dy))
        batch.lora_as, batch.lora_bs = (
            [change(t) for t in factors] for factors in (batch.lora_as, batch.lora_bs)
        )
        kept = [t.detach().clone() for t in (batch.weight, batch.dy, batch.ids, *batch.leaves())]
        for one, two in zip(batch.results(lora_linear_mixed, 0.0, impl), expected, strict=True):
            torch.testing.assert_close(one, two)
        now = (batch.weight, batch.dy, batch.ids, *batch.leaves())
        assert all(torch.equal(one, two) for one, two in zip(kept, now, strict=True))
    batch.dy = batch.dy[:1, :1].expand(40, 12)
    expanded = batch.results(lora_linear_mixed, 0.0, impl)
    batch.dy = batch.dy.contiguous()
    for one, two in zip(batch.results(lora_linear_mixed, 0.0, impl), expanded, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_gradients_that_are_needed(impl, draw):
    """All patterns of x, lora_a, lora_b and bias, with one adapter of the two trained."""
    batch = draw(40, 12, 9, (4, 6), "random", torch.float32)
    leaves = [batch.x, batch.lora_as[1], batch.lora_bs[1], batch.bias]
    y = lora_linear_mixed(*batch.arguments(0.0, impl))
    expected = torch.autograd.grad(y, leaves, batch.dy)
    for leaf in batch.leaves():
        leaf.requires_grad_(False)
    for pattern in itertools.product((False, True), repeat=4):
        for leaf, needed in zip(leaves, pattern, strict=True):
            leaf.requires_grad_(needed)
            leaf.grad = None
        y = lora_linear_mixed(*batch.arguments(0.0, impl))
        assert y.requires_grad == any(pattern)
        if any(pattern):
            y.backward(batch.dy)
        for leaf, needed, gradient in zip(leaves, pattern, expected, strict=True):
            assert (leaf.grad is not None) == needed
            if needed:
                torch.testing.assert_close(leaf.grad, gradient)
        assert batch.lora_as[0].grad is None and batch.lora_bs[0].grad is None


@pytest.mark.parametrize("needed", ["x", "lora_a", "lora_b"])
def test_what_is_saved(needed, draw):
    """x for d_lora_a alone, S for d_lora_b alone; never an [M, N] tensor or a mask."""
    batch = draw(40, 12, 9, (4, 6), "random", torch.float32)
    for leaf in batch.leaves():
        leaf.requires_grad_(False)
    {"x": batch.x, "lora_a": batch.lora_as[0], "lora_b": batch.lora_bs[0]}[needed].requires_grad_()
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear_mixed(*batch.arguments(0.25, "eager"))
    assert (40, 12) not in shapes
    assert ((40, 9) in shapes) == (needed == "lora_a")
    assert ((40, 6) in shapes) == (needed == "lora_b")


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_of_outputs_and_gradients(dtype, autocast, adapter_dtype, draw):
    """y has x's dtype, or autocast's; each gradient its own tensor's; adapters may differ."""
    batch = draw(40, 12, 9, (4, 6), "random", dtype)
    batch.lora_as[0] = batch.lora_as[0].detach().to(adapter_dtype).requires_grad_()
    batch.lora_bs[1] = batch.lora_bs[1].detach().to(adapter_dtype).requires_grad_()
    with torch.autocast(batch.x.device.type, autocast, enabled=autocast is not None):
        y = lora_linear_mixed(*batch.arguments())
    assert y.dtype == (autocast or dtype)
    y.float().sum().backward()
    for leaf in batch.leaves():
        assert leaf.grad.dtype == leaf.dtype
        assert torch.isfinite(leaf.grad).all() and leaf.grad.any()


def test_autocast_computes_what_the_casts_say(draw):
    batch = draw(40, 12, 9, (4, 6), "random", torch.float32)
    with torch.autocast(batch.x.device.type, torch.bfloat16):
        y = lora_linear_mixed(*batch.arguments())
    assert torch.equal(y, lora_linear_mixed(*batch.to(torch.bfloat16).arguments()))


def test_the_reference_differentiates_twice(draw):
    batch = draw(7, 4, 3, (2, 1), "random")
    assert torch.autograd.gradgradcheck(
        lambda x, a, b: reference.lora_linear_mixed(
            x, batch.weight, [a, batch.lora_as[1]], [b, batch.lora_bs[1]], batch.scalings, batch.ids
        ),
        (batch.x, batch.lora_as[0], batch.lora_bs[0]),
    )


@pytest.mark.parametrize("impl", [KERNEL, "eager"])
@pytest.mark.parametrize("options", [{}, {"scalings"}, {"dropout"}, {"no bias"}], ids=str)
def test_opcheck(impl, options, draw):
    batch = draw(9, 7, 5, (2, 3), "random", torch.float32)
    device = batch.x.device
    tensor = torch.ones(2, device=device) if "scalings" in options else None
    seed = torch.tensor([5], device=device) if "dropout" in options else None
    rows = MixedRows.of(batch.ids, 2)
    numbers = batch.scalings
    of_rows = (rows.row_adapters, rows.order, rows.sorted_adapters, rows.starts)
    ps = [0.0, 0.0] if seed is None else [0.25, 0.5]
    bias = None if "no bias" in options else batch.bias
    factors = (batch.weight, batch.lora_as, batch.lora_bs)
    sample = (batch.x, *factors, bias, numbers, tensor, *of_rows, seed, ps, impl)
    torch.library.opcheck(op._forward_op, (*sample, True))
    y, s = op._forward_op(*sample, True)
    detached = [[t.detach() for t in part] for part in factors[1:]]
    # Without gradients S is not kept.
    bare = (batch.x.detach(), batch.weight, *detached, None, *sample[5:])
    torch.library.opcheck(op._forward_op, (*bare, False))
    saved = (y.detach(), batch.x.detach(), batch.weight, *detached, s.detach(), numbers, tensor)
    for needs in ([True] * 4, [False, True, False, True]):
        torch.library.opcheck(op._gradients_op, (*saved, *of_rows, seed, ps, impl, needs))


@pytest.mark.parametrize("impl", [KERNEL, "eager", "auto"])
def test_torch_compile_has_no_graph_break(impl, draw):
    """fullgraph, dynamic numbers of rows, forward and backward equal to eager's."""

    def function(x, weight, a0, a1, b0, b1, bias, ids):
        y = lora_linear_mixed(x, weight, [a0, a1], [b0, b1], [0.5, 2.0], ids, bias, impl=impl)
        return y.sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for m in (12, 19):
        batch = draw(m, 12, 9, (4, 6), "random", torch.float32)
        tensors = (batch.x, batch.weight, *batch.lora_as, *batch.lora_bs, batch.bias)
        results = []
        for run in (compiled, function):
            leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
            y = run(*leaves, batch.ids)
            y.sum().backward()
            results.append([y, *(t.grad for t in leaves if t.requires_grad)])
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.kernel
@pytest.mark.skipif(not interpreting(), reason="needs no large tensors")
def test_64_bit_offsets(draw, monkeypatch, same_bits):
    """The kernels with 64-bit offsets compute the same."""
    from lora_kernels.lora_linear_mixed import triton_backward, triton_forward

    batch = draw(50, 37, 21, (5, 16), "random")
    expected = batch.results(lora_linear_mixed, [0.5, 0.25], "eager")[2:3]
    torch.manual_seed(0)
    plain = batch.results(lora_linear_mixed, [0.5, 0.25], "triton")
    for module in (triton_forward, triton_backward):
        monkeypatch.setattr(module, "needs_int64", lambda *tensors: True)
    torch.manual_seed(0)
    wide = batch.results(lora_linear_mixed, [0.5, 0.25], "triton")
    assert expected
    same_bits(7, "tensors that forced 64-bit offsets change", wide, plain)


def test_public_name(draw):
    assert lk.lora_linear_mixed is lora_linear_mixed and lk.MixedRows is MixedRows
