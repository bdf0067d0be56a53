"""Gradients: gradcheck in float64, every requires_grad pattern, any layout of the gradients."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_kernels import dispatch
from lora_kernels.rms_norm import eager, op
from lora_kernels.rms_norm.op import rms_norm
from lora_kernels.testing import MAX_RATIO, compare

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel
EPS = 1e-5

IMPLS = ("reference", "eager", pytest.param("triton", marks=kernel))
OP_IMPLS = IMPLS[1:]
IMPLS_AND_DTYPES = (
    *(
        pytest.param("eager", dtype, id=f"eager-{dtype}")
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    ),
    # Triton's interpreter computes bfloat16 wrongly.
    *(
        pytest.param("triton", dtype, id=f"triton-{dtype}", marks=kernel)
        for dtype in (torch.float16, torch.float32) + ((torch.bfloat16,) if CUDA else ())
    ),
)


def randn(*shape, dtype=torch.float32, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    return x.requires_grad_(requires_grad)


def inputs(*shape, dtype=torch.float32, weight_dtype=None):
    """x, weight and residual, all requiring a gradient."""
    return (
        randn(*shape, dtype=dtype, seed=1, requires_grad=True),
        randn(shape[-1], dtype=weight_dtype or dtype, seed=3, requires_grad=True),
        randn(*shape, dtype=dtype, seed=2, requires_grad=True),
    )


def skip_if_compiled(impl):
    if impl == "triton" and not dispatch.interpreting():
        pytest.skip("the kernels take float64 under the interpreter only")


@pytest.fixture
def wide(monkeypatch):
    """The kernels' way with rows wider than they hold in registers, at widths that test quickly."""
    from lora_kernels.rms_norm import triton_kernel

    monkeypatch.setattr(triton_kernel, "_WIDEST_FORWARD", 0)
    monkeypatch.setattr(triton_kernel, "_WIDEST_BACKWARD", 0)
    monkeypatch.setattr(triton_kernel, "_TILE_WIDE", 32)


def check_gradients(shape, impl, fast_mode=False):
    x, weight, residual = inputs(*shape, dtype=torch.float64)

    # A large eps, so that its part in the gradient shows.
    def alone(x, weight):
        return rms_norm(x, weight, 0.3, impl=impl)

    def with_residual(x, weight, residual):
        # gradcheck sends a gradient to one result at a time: the sum is what takes one to both.
        y, total = rms_norm(x, weight, 0.3, residual, impl=impl)
        return y, total, y + total

    assert gradcheck(alone, (x, weight), fast_mode=fast_mode)
    assert gradcheck(with_residual, (x, weight, residual), fast_mode=fast_mode)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((2, 3), (1, 1), (3, 1), (2, 1, 2)))
def test_gradcheck(impl, shape):
    skip_if_compiled(impl)
    check_gradients(shape, impl)


@kernel
@pytest.mark.parametrize("shape", ((2, 9), (9, 5)))
def test_gradcheck_of_rows_wider_than_a_tile(wide, shape):
    skip_if_compiled("triton")
    check_gradients(shape, "triton", fast_mode=True)


def test_gradcheck_without_the_kernel_of_weight_normalisation(monkeypatch):
    monkeypatch.setattr(eager, "_weight_norm_backward", None)
    check_gradients((3, 5), "eager")


def test_reference_can_be_differentiated_twice():
    x, weight, residual = inputs(2, 3, dtype=torch.float64)
    assert gradgradcheck(
        lambda x, w, r: rms_norm(x, w, 0.3, r, impl="reference"), (x, weight, residual)
    )


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_second_derivatives_are_refused(impl):
    x, weight, _ = inputs(2, 3)
    (dx,) = torch.autograd.grad(rms_norm(x, weight, EPS, impl=impl).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(dx.sum(), x)


def gradients(function, leaves, upstream):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(function(*leaves), leaves, upstream)


def compare_with_transformers(impl, dtype, shape, scale=1.0, weight_dtype=None):
    """A comparison each of the gradients of x, weight and residual."""
    x, weight, residual = inputs(*shape, dtype=dtype, weight_dtype=weight_dtype)
    x, residual = x.detach() * scale, residual.detach() * scale
    upstream = (
        randn(*shape, dtype=torch.promote_types(dtype, weight.dtype), seed=5),
        randn(*shape, dtype=dtype, seed=6),
    )
    norm = LlamaRMSNorm(shape[-1], EPS).to(DEVICE)

    def theirs(x, weight, residual):
        total = x + residual
        return torch.func.functional_call(norm, {"weight": weight}, total), total

    def exact(x, weight, residual):
        total = x + residual
        return weight * total / (total.square().mean(-1, keepdim=True) + EPS).sqrt(), total

    leaves = x, weight, residual
    ours = gradients(lambda x, w, r: rms_norm(x, w, EPS, r, impl=impl), leaves, upstream)
    plain = gradients(theirs, leaves, upstream)
    oracle = gradients(exact, [t.double() for t in leaves], [t.double() for t in upstream])
    for gradient, leaf in zip(ours, leaves, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
    return [compare(*three) for three in zip(ours, plain, oracle, strict=True)]


@pytest.mark.parametrize("impl, dtype", IMPLS_AND_DTYPES)
@pytest.mark.parametrize("scale", (1.0, 0.003, 1000.0))
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(impl, dtype, scale):
    for comparison in compare_with_transformers(impl, dtype, (24, 96), scale):
        assert comparison.ratio <= MAX_RATIO, comparison


@pytest.mark.parametrize("impl, dtype", IMPLS_AND_DTYPES)
def test_float32_weight_over_16_bits(impl, dtype):
    for comparison in compare_with_transformers(impl, dtype, (24, 96), weight_dtype=torch.float32):
        assert comparison.ratio <= MAX_RATIO, comparison


@kernel
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("columns", (50, 32, 4))
def test_error_of_rows_wider_than_a_tile(wide, dtype, columns):
    for comparison in compare_with_transformers("triton", dtype, (19, columns)):
        assert comparison.ratio <= MAX_RATIO, comparison


@kernel
@pytest.mark.parametrize("columns", (8_192, 8_193, 16_384, 16_385))
def test_widest_rows_that_are_held_and_narrowest_that_are_not(columns):
    for comparison in compare_with_transformers("triton", torch.float32, (2, columns)):
        assert comparison.ratio <= MAX_RATIO, comparison


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_blocks_of_rows_give_the_same_bits(monkeypatch, dtype):
    x, weight, residual = inputs(7, 12, dtype=dtype)
    upstream = randn(7, 12, dtype=dtype, seed=5), randn(7, 12, dtype=dtype, seed=6)

    def run():
        return gradients(
            lambda x, w, r: rms_norm(x, w, EPS, r, impl="eager"), (x, weight, residual), upstream
        )

    expected = run()
    monkeypatch.setattr(eager, "_UNDIVIDED", 0)
    for block in (1, 30, 48):
        monkeypatch.setattr(eager, "_BLOCK", block)
        assert_close(run(), expected, rtol=0, atol=0)


def test_gradients_without_the_kernel_of_weight_normalisation(monkeypatch):
    monkeypatch.setattr(eager, "_weight_norm_backward", None)
    for comparison in compare_with_transformers("eager", torch.float32, (24, 96)):
        assert comparison.ratio <= MAX_RATIO, comparison


PATTERNS = list(itertools.product((True, False), repeat=3))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", PATTERNS, ids=str)
@pytest.mark.parametrize("used", ("y", "total", "both"))
def test_only_what_is_required_gets_a_gradient(impl, needs, used):
    leaves = inputs(4, 6, dtype=torch.float32)
    upstream = randn(4, 6, seed=5), randn(4, 6, seed=6)

    def loss(x, weight, residual, impl):
        y, total = rms_norm(x, weight, EPS, residual, impl=impl)
        terms = {"y": (y * upstream[0]).sum(), "total": (total * upstream[1]).sum()}
        return sum(terms.values()) if used == "both" else terms[used]

    wanted = torch.autograd.grad(loss(*leaves, "reference"), leaves, allow_unused=True)
    leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True)]
    value = loss(*leaves, impl)
    # The total does not depend on weight.
    if not any(needs if used != "total" else (needs[0], needs[2])):
        if impl == "reference" or not any(needs):
            assert not value.requires_grad
            return
    value.backward()
    for leaf, need, right in zip(leaves, needs, wanted, strict=True):
        if need and right is not None:
            assert_close(leaf.grad, right)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", PATTERNS[:2] + PATTERNS[4:6], ids=str)
def test_only_what_is_required_gets_a_gradient_without_residual(impl, needs):
    x, weight, _ = inputs(4, 6)
    dy = randn(4, 6, seed=5)
    wanted = torch.autograd.grad(rms_norm(x, weight, EPS, impl="reference"), (x, weight), dy)
    leaves = x.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[2])
    y = rms_norm(*leaves, EPS, impl=impl)
    assert y.requires_grad == (needs[0] or needs[2])
    if y.requires_grad:
        y.backward(dy)
    for leaf, need, right in zip(leaves, (needs[0], needs[2]), wanted, strict=True):
        if need:
            assert_close(leaf.grad, right)
        else:
            assert leaf.grad is None


@kernel
@pytest.mark.parametrize("needs", PATTERNS[:-1], ids=str)
def test_unneeded_gradients_are_not_computed(monkeypatch, needs):
    from lora_kernels.rms_norm import triton_kernel

    calls, backward = [], triton_kernel.backward

    def spy(*arguments):
        calls.append(arguments[-2:])
        return backward(*arguments)

    monkeypatch.setattr(triton_kernel, "backward", spy)
    leaves = [
        leaf.detach().requires_grad_(need)
        for leaf, need in zip(inputs(4, 6), (needs[0], needs[1], needs[2]), strict=True)
    ]
    y, total = rms_norm(leaves[0], leaves[1], EPS, leaves[2], impl="triton")
    y.sum().backward()
    assert calls == [(needs[0] or needs[2], needs[1])]
    if needs[0] or needs[2]:
        # The total alone: its gradient is dx, and no kernel runs.
        _, total = rms_norm(leaves[0], leaves[1], EPS, leaves[2], impl="triton")
        total.sum().backward()
        assert len(calls) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_residual_may_be_x(impl):
    x, weight, _ = inputs(3, 8)
    dy = randn(3, 8, seed=5)
    y, _ = rms_norm(x, weight, EPS, x, impl=impl)
    (actual,) = torch.autograd.grad(y, x, dy)
    (expected,) = torch.autograd.grad(rms_norm(2 * x, weight, EPS, impl="reference"), x, dy)
    assert_close(actual, expected)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features_outermost": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "last_dim_strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "sliced": lambda x: torch.cat((x, x), dim=-1)[..., x.shape[-1] :],
    "expanded_rows": lambda x: x[:1, :1].expand(x.shape),
    "one_element": lambda x: x[:1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_layouts_of_the_gradients(impl, layout, dtype):
    leaves = inputs(3, 4, 10, dtype=dtype)
    upstream = [LAYOUTS[layout](randn(3, 4, 10, dtype=dtype, seed=seed)) for seed in (5, 6)]
    copies = [x.clone() for x in upstream]
    outputs = rms_norm(leaves[0], leaves[1], EPS, leaves[2], impl=impl)
    actual = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    expected = torch.autograd.grad(outputs, leaves, [x.contiguous() for x in upstream])
    if impl == "triton":
        assert_close(actual, expected, rtol=0, atol=0)
    else:
        assert_close(actual, expected)
    assert_close(upstream, copies, rtol=0, atol=0)
    assert all(x._version == 0 for x in upstream)


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_saved_inputs_may_have_any_strides(impl):
    dy = randn(3, 4, 10, seed=5)
    for layout in LAYOUTS.values():
        x, weight, _ = (t.detach() for t in inputs(3, 4, 10))
        x, weight = layout(x), weight.repeat_interleave(2)[::2]
        expected = gradients(
            lambda x, w: rms_norm(x, w, EPS, impl="reference"), (x.contiguous(), weight), dy
        )
        x, weight = x.requires_grad_(), weight.requires_grad_()
        actual = torch.autograd.grad(rms_norm(x, weight, EPS, impl=impl), (x, weight), dy)
        assert_close(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_gives_the_same_and_changes_nothing(impl):
    leaves = inputs(20, 10)
    copies = [x.detach().clone() for x in leaves]
    outputs = rms_norm(leaves[0], leaves[1], EPS, leaves[2], impl=impl)
    upstream = [randn(20, 10, seed=seed) for seed in (5, 6)]
    results = [x.detach().clone() for x in outputs]
    tensors = (*leaves, *outputs, *upstream)
    versions = [x._version for x in tensors]
    first = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    assert_close(first, second, rtol=0, atol=0)
    assert_close([x.detach() for x in leaves], copies, rtol=0, atol=0)
    assert_close([x.detach() for x in outputs], results, rtol=0, atol=0)
    assert [x._version for x in tensors] == versions
    # dx is no view of anything that it was made from.
    given = {x.untyped_storage().data_ptr() for x in tensors}
    assert not given & {x.untyped_storage().data_ptr() for x in (*first, *second)}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((0, 8), (2, 0, 8)))
def test_no_rows(impl, shape):
    leaves = inputs(*shape)
    y, total = rms_norm(leaves[0], leaves[1], EPS, leaves[2], impl=impl)
    (y.sum() + total.sum()).backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)
    assert torch.equal(leaves[1].grad, torch.zeros_like(leaves[1]))


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_a_row_of_zeros_has_a_finite_gradient(impl):
    x, weight, _ = (t.detach() for t in inputs(3, 8))
    x[1] = 0.0
    dy = randn(3, 8, seed=5)
    actual = gradients(lambda x, w: rms_norm(x, w, EPS, impl=impl), (x, weight), dy)
    expected = gradients(lambda x, w: rms_norm(x, w, EPS, impl="reference"), (x, weight), dy)
    assert_close(actual, expected)


@kernel
@pytest.mark.parametrize("columns", (6, 700))
def test_sums_over_many_programs(monkeypatch, columns):
    """d_weight from several programs of several tiles, the last one partly beyond the rows."""
    from lora_kernels.rms_norm import triton_kernel

    monkeypatch.setattr(triton_kernel, "_TILE_NARROW", 2 * columns)
    monkeypatch.setattr(triton_kernel, "_MAX_PROGRAMS", 3)
    rows = 37
    launch = triton_kernel.backward_launch(rows, columns, need_weight=True)
    assert launch.tiles > 8 and launch.programs == 3 and launch.padded_rows > rows
    x, weight, _ = inputs(rows, columns)
    dy = randn(rows, columns, seed=5)
    first = gradients(lambda x, w: rms_norm(x, w, EPS, impl="triton"), (x, weight), dy)
    expected = gradients(lambda x, w: rms_norm(x, w, EPS, impl="reference"), (x, weight), dy)
    assert_close(first, expected, rtol=1e-5, atol=1e-5)
    again = gradients(lambda x, w: rms_norm(x, w, EPS, impl="triton"), (x, weight), dy)
    assert_close(again, first, rtol=0, atol=0)


@kernel
def test_backward_uses_the_implementation_of_the_forward(monkeypatch):
    from lora_kernels.rms_norm import triton_kernel

    calls, backward = [], triton_kernel.backward
    monkeypatch.setattr(
        triton_kernel, "backward", lambda *args: (calls.append(1), backward(*args))[1]
    )
    x, weight, _ = inputs(4, 6)
    with dispatch.implementation("triton"):
        y = rms_norm(x, weight, EPS, impl="eager")
    with dispatch.implementation("eager"):
        y.sum().backward()
    assert calls == [1]


@pytest.mark.skipif(CUDA, reason="on a GPU every call goes through torch.library")
@pytest.mark.parametrize("impl", OP_IMPLS)
def test_direct_call_and_library_give_the_same_bits(monkeypatch, impl):
    calls = []

    def run():
        x, weight, residual = inputs(4, 6)
        y, total = rms_norm(x, weight, EPS, residual, impl=impl)
        upstream = randn(4, 6, seed=5), randn(4, 6, seed=6)
        gradients = torch.autograd.grad((y, total), (x, weight, residual), upstream)
        return y.detach(), total.detach(), *gradients

    for name in ("_forward_op", "_gradients_op"):
        library = getattr(op, name)
        monkeypatch.setattr(
            op, name, lambda *args, f=library, n=name: (calls.append(n), f(*args))[1]
        )
    direct = run()
    assert calls == []
    monkeypatch.setattr(op, "calls_directly", lambda *tensors: False)
    assert_close(run(), direct, rtol=0, atol=0)
    assert calls == ["_forward_op", "_gradients_op"]


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_fake_tensors(impl):
    """They go through torch.library: no kernel sees them."""
    with FakeTensorMode():
        x, weight = torch.empty(3, 8, requires_grad=True), torch.empty(8, requires_grad=True)
        y = rms_norm(x, weight, EPS, impl=impl)
        y.sum().backward()
        assert y.shape == x.grad.shape == x.shape and weight.grad.shape == weight.shape


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("with_residual", (False, True))
@pytest.mark.parametrize("layout", ("transposed", "one_element"))
def test_opcheck(impl, with_residual, layout):
    x, weight, residual = (t.detach() for t in inputs(2, 3, 4))
    x, residual = (LAYOUTS[layout](t).requires_grad_() for t in (x, residual))
    weight.requires_grad_(layout == "transposed")
    torch.library.opcheck(
        op._forward_op, (x, residual if with_residual else None, weight, EPS, impl)
    )


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("needs", ((True, True), (True, False), (False, True)), ids=str)
def test_opcheck_of_the_backward_op(impl, needs):
    x, weight, _ = (t.detach() for t in inputs(2, 3, 4))
    dy, d_total = LAYOUTS["transposed"](randn(2, 3, 4, seed=5)), randn(2, 3, 4, seed=6)
    rstd = randn(2, 3, seed=7).abs() + 0.1
    torch.library.opcheck(
        op._gradients_op, (dy, d_total if needs[0] else None, x, weight, rstd, *needs, impl)
    )
