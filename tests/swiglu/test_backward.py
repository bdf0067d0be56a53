"""Gradients: gradcheck in float64, every requires_grad pattern, any layout of the gradient."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from transformers.activations import ACT2FN

from lora_kernels import dispatch
from lora_kernels.swiglu import op
from lora_kernels.swiglu.op import swiglu
from lora_kernels.testing import MAX_RATIO, compare

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel

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


def inputs(*shape, dtype=torch.float32):
    """gate and up, both requiring a gradient."""
    return tuple(randn(*shape, dtype=dtype, seed=seed, requires_grad=True) for seed in (1, 2))


def transformers_swiglu(gate, up):
    return ACT2FN["silu"](gate) * up


def exact_swiglu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def gradients(function, leaves, dout):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(function(*leaves), leaves, dout)


def skip_if_compiled(impl):
    if impl == "triton" and not dispatch.interpreting():
        pytest.skip("the kernels take float64 under the interpreter only")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((2, 3), (1, 1), (4,)))
def test_gradcheck(impl, shape):
    skip_if_compiled(impl)
    leaves = inputs(*shape, dtype=torch.float64)
    assert gradcheck(lambda gate, up: swiglu(gate, up, impl=impl), leaves)


def test_reference_can_be_differentiated_twice():
    leaves = inputs(2, 3, dtype=torch.float64)
    assert gradgradcheck(lambda gate, up: swiglu(gate, up, impl="reference"), leaves)


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_second_derivatives_are_refused(impl):
    gate, up = inputs(2, 3)
    out = swiglu(gate, up, impl=impl).sum()
    (d_gate,) = torch.autograd.grad(out, gate, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(d_gate.sum(), gate)


@pytest.mark.parametrize("impl, dtype", IMPLS_AND_DTYPES)
@pytest.mark.parametrize("scale", (1.0, 0.01, 20.0))
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(impl, dtype, scale):
    gate, up = inputs(24, 96, dtype=dtype)
    gate, dout = gate.detach() * scale, randn(24, 96, dtype=dtype, seed=5)
    ours = gradients(lambda gate, up: swiglu(gate, up, impl=impl), (gate, up), dout)
    plain = gradients(transformers_swiglu, (gate, up), dout)
    oracle = gradients(exact_swiglu, (gate.double(), up.double()), dout.double())
    for name, *three in zip(("gate", "up"), ours, plain, oracle, strict=True):
        assert three[0].dtype == dtype
        comparison = compare(*three)
        assert comparison.ratio <= MAX_RATIO, (name, comparison)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_eager_gives_the_bits_of_transformers(dtype):
    leaves = inputs(5, 97, dtype=dtype)
    dout = randn(5, 97, dtype=dtype, seed=5)
    actual = gradients(lambda gate, up: swiglu(gate, up, impl="eager"), leaves, dout)
    assert_close(actual, gradients(transformers_swiglu, leaves, dout), rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_in_the_tails(impl):
    gate = torch.tensor([-1000.0, -80.0, -30.0, -5.0, 0.0, 5.0, 30.0, 100.0, 1000.0])
    gate = gate.to(DEVICE)
    up, dout = torch.full_like(gate, 3.0), torch.full_like(gate, -2.0)
    actual = gradients(lambda gate, up: swiglu(gate, up, impl=impl), (gate, up), dout)
    # exp(1000) overflows in float64 too: those gradients are 0.
    expected = gradients(exact_swiglu, (gate[1:].double(), up[1:].double()), dout[1:].double())
    for ours, right in zip(actual, expected, strict=True):
        assert ours[0] == 0.0
        assert_close(ours[1:].double(), right, rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gate_needs", (True, False))
@pytest.mark.parametrize("up_needs", (True, False))
def test_only_what_is_required_gets_a_gradient(impl, gate_needs, up_needs):
    leaves, dout = inputs(4, 6), randn(4, 6, seed=5)
    expected = gradients(transformers_swiglu, leaves, dout)
    needs = (gate_needs, up_needs)
    leaves = [leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True)]
    out = swiglu(*leaves, impl=impl)
    assert out.requires_grad == any(needs)
    if any(needs):
        out.backward(dout)
    for leaf, need, right in zip(leaves, needs, expected, strict=True):
        if need:
            assert_close(leaf.grad, right)
        else:
            assert leaf.grad is None


@kernel
@pytest.mark.parametrize("needs", ((True, True), (True, False), (False, True)), ids=str)
def test_unneeded_gradients_are_not_computed(monkeypatch, needs):
    from lora_kernels.swiglu import triton_kernel

    calls, backward = [], triton_kernel.backward

    def spy(dout, gate, up, d_gate, d_up):
        calls.append((up is not None, d_gate is not None, d_up is not None))
        backward(dout, gate, up, d_gate, d_up)

    monkeypatch.setattr(triton_kernel, "backward", spy)
    leaves = [
        leaf.detach().requires_grad_(need) for leaf, need in zip(inputs(4, 6), needs, strict=True)
    ]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = swiglu(*leaves, impl="triton")
    # up is kept for the gradient of gate alone; nothing is kept that was not there before.
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in leaves[: 1 + needs[0]]}
    out.sum().backward()
    assert calls == [(needs[0], *needs)]


@pytest.mark.parametrize("impl", IMPLS)
def test_up_may_be_gate(impl):
    gate, _ = inputs(3, 8)
    dout = randn(3, 8, seed=5)
    (actual,) = torch.autograd.grad(swiglu(gate, gate, impl=impl), gate, dout)
    (expected,) = torch.autograd.grad(transformers_swiglu(gate, gate), gate, dout)
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
def test_layouts_of_the_gradient(impl, layout, dtype):
    leaves = inputs(3, 4, 10, dtype=dtype)
    dout = LAYOUTS[layout](randn(3, 4, 10, dtype=dtype, seed=5))
    copy = dout.clone()
    out = swiglu(*leaves, impl=impl)
    actual = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    expected = torch.autograd.grad(out, leaves, dout.contiguous())
    if impl == "triton":
        assert_close(actual, expected, rtol=0, atol=0)
    else:
        assert_close(actual, expected)
    assert torch.equal(dout, copy) and dout._version == 0


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_saved_inputs(impl, layout):
    gate, up = (LAYOUTS[layout](x.detach()) for x in inputs(3, 4, 10))
    dout = randn(3, 4, 10, seed=5)
    expected = gradients(transformers_swiglu, (gate.contiguous(), up.contiguous()), dout)
    for leaves in ((gate, up), (gate.contiguous(), up), (gate, up.contiguous())):
        actual = gradients(lambda gate, up: swiglu(gate, up, impl=impl), leaves, dout)
        assert_close(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_gives_the_same_and_changes_nothing(impl):
    leaves, dout = inputs(20, 10), randn(20, 10, seed=5)
    copies = [x.detach().clone() for x in leaves]
    out = swiglu(*leaves, impl=impl)
    result = out.detach().clone()
    tensors = (*leaves, out, dout)
    versions = [x._version for x in tensors]
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout)
    assert_close(first, second, rtol=0, atol=0)
    assert_close([x.detach() for x in leaves], copies, rtol=0, atol=0)
    assert torch.equal(out.detach(), result)
    assert [x._version for x in tensors] == versions
    storages = {x.untyped_storage().data_ptr() for x in (*tensors, *first, *second)}
    assert len(storages) == 8


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((0, 8), (2, 0, 8)))
def test_empty_inputs(impl, shape):
    leaves = inputs(*shape)
    swiglu(*leaves, impl=impl).sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


@kernel
def test_backward_uses_the_implementation_of_the_forward(monkeypatch):
    from lora_kernels.swiglu import triton_kernel

    calls, backward = [], triton_kernel.backward
    monkeypatch.setattr(triton_kernel, "backward", lambda *args: (calls.append(1), backward(*args)))
    leaves = inputs(4, 6)
    with dispatch.implementation("triton"):
        out = swiglu(*leaves, impl="eager")
    with dispatch.implementation("eager"):
        out.sum().backward()
    assert calls == [1]


@pytest.mark.skipif(CUDA, reason="on a GPU every call goes through torch.library")
@pytest.mark.parametrize("impl", OP_IMPLS)
def test_direct_call_and_library_give_the_same_bits(monkeypatch, impl):
    calls = []

    def run():
        leaves = inputs(4, 6)
        out = swiglu(*leaves, impl=impl)
        return out.detach(), *torch.autograd.grad(out, leaves, randn(4, 6, seed=5))

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
        gate, up = (torch.empty(3, 8, requires_grad=True) for _ in range(2))
        out = swiglu(gate, up, impl=impl)
        out.sum().backward()
        assert out.shape == gate.grad.shape == up.grad.shape == gate.shape


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("layout", ("transposed", "one_element"))
def test_opcheck(impl, layout):
    gate, up = (LAYOUTS[layout](x.detach()).requires_grad_() for x in inputs(2, 3, 4))
    torch.library.opcheck(op._forward_op, (gate, up, impl))


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("needs", ((True, True), (True, False), (False, True)), ids=str)
def test_opcheck_of_the_backward_op(impl, needs):
    gate, up = (x.detach() for x in inputs(2, 3, 4))
    dout = LAYOUTS["transposed"](randn(2, 3, 4, seed=5))
    arguments = (dout, gate, up if needs[0] else None, *needs, impl)
    torch.library.opcheck(op._gradients_op, arguments)
