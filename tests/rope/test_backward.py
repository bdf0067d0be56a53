"""Gradients: gradcheck in float64, every requires_grad pattern, any layout of the gradient."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as transformers_rope

from lora_kernels import dispatch
from lora_kernels.rope import op
from lora_kernels.rope.op import apply_rotary_pos_emb

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel

IMPLS = ("reference", "eager", pytest.param("triton", marks=kernel))
OP_IMPLS = IMPLS[1:]
# Triton's interpreter computes bfloat16 wrongly.
LOW_DTYPES = (torch.float16, torch.float32) + ((torch.bfloat16,) if CUDA else ())


def randn(*shape, dtype=torch.float32, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    return x.requires_grad_(requires_grad)


def inputs(
    heads_q=4, heads_k=2, head_dim=16, rotary_dim=16, dtype=torch.float32, batch=2, seq_len=3
):
    """q, k, cos, sin; the tables without structure, so that the transpose is no inverse."""
    return (
        randn(batch, heads_q, seq_len, head_dim, dtype=dtype, seed=1, requires_grad=True),
        randn(batch, heads_k, seq_len, head_dim, dtype=dtype, seed=2, requires_grad=True),
        randn(batch, seq_len, rotary_dim, dtype=dtype, seed=3),
        randn(batch, seq_len, rotary_dim, dtype=dtype, seed=4),
    )


def gradients(outputs, tensors, upstream, **kwargs):
    return torch.autograd.grad(outputs, tensors, upstream, **kwargs)


def skip_if_compiled(impl):
    if impl == "triton" and not dispatch.interpreting():
        pytest.skip("the kernels take float64 under the interpreter only")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads_q, heads_k, head_dim, rotary_dim", ((2, 1, 4, 4), (1, 1, 7, 6)))
def test_gradcheck(impl, heads_q, heads_k, head_dim, rotary_dim):
    skip_if_compiled(impl)
    q, k, cos, sin = inputs(
        heads_q, heads_k, head_dim, rotary_dim, torch.float64, batch=1, seq_len=1
    )

    def function(q, k):
        return apply_rotary_pos_emb(q, k, cos, sin, impl=impl)

    assert gradcheck(function, (q, k))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradgradcheck(impl):
    skip_if_compiled(impl)
    q, k, cos, sin = inputs(1, 1, 5, 4, torch.float64, batch=1, seq_len=1)

    def function(q, k):
        # Squared: the rotation alone is linear, and its second derivatives are zero.
        return [x**2 for x in apply_rotary_pos_emb(q, k, cos, sin, impl=impl)]

    assert gradgradcheck(function, (q, k), fast_mode=True)


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("dtype", LOW_DTYPES, ids=str)
@pytest.mark.parametrize("rotary_dim", (64, 32))
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(impl, dtype, rotary_dim):
    q, k, cos, sin = inputs(5, 2, rotary_dim, rotary_dim, dtype)
    upstream = randn(*q.shape, dtype=dtype, seed=5), randn(*k.shape, dtype=dtype, seed=6)
    actual = gradients(apply_rotary_pos_emb(q, k, cos, sin, impl=impl), (q, k), upstream)
    baseline = gradients(transformers_rope(q, k, cos, sin), (q, k), upstream)
    q, k = (x.detach().double().requires_grad_() for x in (q, k))
    rotated = transformers_rope(q, k, cos.double(), sin.double())
    exact = gradients(rotated, (q, k), [x.double() for x in upstream])
    for ours, theirs, right in zip(actual, baseline, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("q_needs", (True, False))
@pytest.mark.parametrize("k_needs", (True, False))
def test_only_what_is_required_gets_a_gradient(impl, q_needs, k_needs):
    q, k, cos, sin = inputs()
    upstream = randn(*q.shape, seed=5), randn(*k.shape, seed=6)
    reference = apply_rotary_pos_emb(q, k, cos, sin, impl="reference")
    expected = gradients(reference, (q, k), upstream)
    q, k = q.detach().requires_grad_(q_needs), k.detach().requires_grad_(k_needs)
    outputs = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    if not (q_needs or k_needs):
        assert not any(x.requires_grad for x in outputs)
        return
    sum((x * dx).sum() for x, dx in zip(outputs, upstream, strict=True)).backward()
    for x, needs, right in zip((q, k), (q_needs, k_needs), expected, strict=True):
        assert (x.grad is not None) == needs
        if needs:
            assert_close(x.grad, right)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("used", (0, 1))
def test_unused_output_gives_no_gradient(impl, used):
    q, k, cos, sin = inputs()
    output = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)[used]
    upstream = randn(*output.shape, seed=5)
    output.backward(upstream)
    rotated = apply_rotary_pos_emb(q, k, cos, sin, impl="reference")[used]
    (expected,) = gradients(rotated, ((q, k)[used],), upstream)
    assert_close((q, k)[used].grad, expected)
    assert (q, k)[1 - used].grad is None


@kernel
@pytest.mark.parametrize("wanted", (0, 1))
@pytest.mark.parametrize("why", ("other_output_unused", "other_input_needs_none"))
def test_unwanted_gradient_costs_no_rotation(why, wanted, monkeypatch):
    from lora_kernels.rope import triton_kernel

    heads, rotate = [], triton_kernel.rotate

    def spy(q, k, *args, **kwargs):
        heads.append((q.shape[1], k.shape[1]))
        rotate(q, k, *args, **kwargs)

    monkeypatch.setattr(triton_kernel, "rotate", spy)
    q, k, cos, sin = inputs(heads_q=4, heads_k=2)
    if why == "other_input_needs_none":
        (q, k)[1 - wanted].requires_grad_(False)
    outputs = apply_rotary_pos_emb(q, k, cos, sin, impl="triton")
    if why == "other_output_unused":
        outputs = outputs[wanted : wanted + 1]
    sum(x.sum() for x in outputs).backward()
    assert heads == [(4, 2), ((4, 0), (0, 2))[wanted]]


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("layout", ("transposed", "last_dim_strided", "sliced", "expanded"))
def test_layouts_of_the_gradient(impl, layout):
    q, k, cos, sin = inputs()
    layouts = {
        "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        "last_dim_strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        "sliced": lambda x: torch.cat((x, x), dim=2)[:, :, x.shape[2] :],
        "expanded": lambda x: x[:1, :, :1, :1].expand(x.shape),
    }
    upstream = [layouts[layout](randn(*x.shape, seed=5)) for x in (q, k)]
    copies = [x.clone() for x in upstream]
    outputs = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    actual = gradients(outputs, (q, k), upstream, retain_graph=True)
    expected = gradients(outputs, (q, k), [x.contiguous() for x in upstream])
    tolerance = {"rtol": 0, "atol": 0} if impl == "triton" else {}
    assert_close(actual, expected, **tolerance)
    assert_close(upstream, copies, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_a_sum(impl):
    """`sum` sends back a single element expanded to the whole shape."""
    q, k, cos, sin = inputs()
    sum(x.sum() for x in apply_rotary_pos_emb(q, k, cos, sin, impl=impl)).backward()
    outputs = apply_rotary_pos_emb(q, k, cos, sin, impl="reference")
    expected = gradients(outputs, (q, k), [torch.ones_like(x) for x in (q, k)])
    assert_close((q.grad, k.grad), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_gives_the_same_and_changes_nothing(impl):
    q, k, cos, sin = inputs()
    copies = [x.detach().clone() for x in (q, k, cos, sin)]
    outputs = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    upstream = [randn(*x.shape, seed=5) for x in outputs]
    results = [x.detach().clone() for x in outputs]
    tensors = (q, k, cos, sin, *outputs, *upstream)
    versions = [x._version for x in tensors]
    first = gradients(outputs, (q, k), upstream, retain_graph=True)
    second = gradients(outputs, (q, k), upstream)
    assert_close(first, second, rtol=0, atol=0)
    assert_close([x.detach() for x in (q, k, cos, sin)], copies, rtol=0, atol=0)
    assert_close([x.detach() for x in outputs], results, rtol=0, atol=0)
    assert [x._version for x in tensors] == versions
    storages = {x.untyped_storage().data_ptr() for x in (*upstream, *first, *second)}
    assert len(storages) == 6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seq_len, heads_k", ((0, 2), (3, 0)))
def test_empty_inputs(impl, seq_len, heads_k):
    q, k, cos, sin = inputs(heads_k=heads_k, seq_len=seq_len)
    sum(x.sum() for x in apply_rotary_pos_emb(q, k, cos, sin, impl=impl)).backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_equal_halves_make_the_backward_pass_the_rotation_back(impl):
    q, k, _, _ = inputs()
    angle = randn(2, 3, 8, seed=3).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    upstream = [randn(*x.shape, seed=5) for x in (q, k)]
    outputs = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    actual = gradients(outputs, (q, k), upstream)
    expected = apply_rotary_pos_emb(*upstream, cos, -sin, impl=impl)
    assert_close(actual, expected)


@kernel
def test_backward_uses_the_implementation_of_the_forward(monkeypatch):
    from lora_kernels.rope import triton_kernel

    calls, rotate = [], triton_kernel.rotate

    def spy(q, k, cos, sin, q_out, k_out, transpose):
        calls.append(transpose)
        rotate(q, k, cos, sin, q_out, k_out, transpose)

    monkeypatch.setattr(triton_kernel, "rotate", spy)
    q, k, cos, sin = inputs()
    with dispatch.implementation("triton"):
        outputs = apply_rotary_pos_emb(q, k, cos, sin, impl="eager")
    with dispatch.implementation("eager"):
        sum(x.sum() for x in outputs).backward()
    assert calls == [False, True]


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("transpose", (False, True))
@pytest.mark.parametrize("layout", ("transposed", "expanded", "reversed_dims"))
def test_opcheck(impl, transpose, layout):
    q, k, cos, sin = inputs(seq_len=2)
    layouts = {
        "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda x: x[:, :1, :1].expand(x.shape),
        "reversed_dims": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }
    q, k = (layouts[layout](x.detach()).requires_grad_() for x in (q, k))
    torch.library.opcheck(op._rope, (q, k, cos, sin, transpose, impl))
