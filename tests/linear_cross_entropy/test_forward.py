"""The loss: against torch and transformers, in every shape and layout."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.loss.loss_utils import ForCausalLMLoss

from lora_kernels.linear_cross_entropy.op import linear_cross_entropy

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel

IMPLS = ("reference", "eager", pytest.param("triton", marks=kernel))
# The kernels take no float64 on a GPU.
WIDEST = torch.float32 if CUDA else torch.float64


def inputs(rows=6, vocab=11, width=5, dtype=WIDEST, seed=0, device=DEVICE):
    """hidden [M, H], weight [V, H] and labels [M], some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64) * width**-0.5
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[1::3] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


def aligned(*args, **kwargs):
    return linear_cross_entropy(*args, **kwargs, shift=False)


@pytest.mark.parametrize("num_items", (None, 5, 2.5, "tensor", "integer tensor"))
@pytest.mark.parametrize("impl", IMPLS)
def test_equals_torch(impl, num_items):
    hidden, weight, labels = inputs()
    if num_items == "tensor":
        num_items = torch.tensor(2.5, device=DEVICE)
    elif num_items == "integer tensor":
        num_items = torch.tensor([7], device=DEVICE)
    actual = aligned(hidden, weight, labels, num_items=num_items, impl=impl)
    logits = hidden.double() @ weight.double().t()
    if num_items is None:
        expected = F.cross_entropy(logits, labels)
    else:
        expected = F.cross_entropy(logits, labels, reduction="sum") / num_items
    assert actual.dtype == WIDEST and actual.shape == ()
    assert_close(
        actual.double(), expected.reshape(()).double(), rtol=1e-6 if CUDA else 1e-12, atol=0
    )


@pytest.mark.parametrize("num_items", (None, 4, "tensor"))
@pytest.mark.parametrize("impl", IMPLS)
def test_equals_transformers(impl, num_items):
    """Shifted as transformers shifts, with its denominator, and its `shift_labels`."""
    hidden, weight, _ = inputs(rows=10, dtype=torch.float32)
    labels = torch.tensor([[3, -100, 10, 0, 7], [-100, -100, 4, 4, -100]], device=DEVICE)
    hidden = hidden.reshape(2, 5, -1)
    if num_items == "tensor":
        num_items = torch.tensor(9, device=DEVICE)
        wide = torch.tensor(9.0, dtype=torch.float64, device=DEVICE)
        assert (
            linear_cross_entropy(hidden, weight, labels, num_items=wide, impl=impl).dtype
            == torch.float32
        )
    logits = F.linear(hidden, weight)
    expected = ForCausalLMLoss(logits, labels, 11, num_items_in_batch=num_items)
    actual = linear_cross_entropy(hidden, weight, labels, num_items=num_items, impl=impl)
    assert actual.dtype == expected.dtype == torch.float32
    assert_close(actual, expected, rtol=1e-6, atol=0)
    # Scoring a position against its own label is another loss: the test can tell them apart.
    unshifted = aligned(hidden, weight, labels, num_items=num_items, impl=impl)
    assert abs(unshifted - expected) > 1e-2
    expected = ForCausalLMLoss(logits, None, 11, num_items_in_batch=num_items, shift_labels=labels)
    assert_close(unshifted, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_last_position_and_first_label_are_not_scored(impl):
    hidden, weight, labels = inputs(rows=6)
    hidden, labels = hidden.reshape(2, 3, -1), labels.reshape(2, 3).clamp(min=0)
    expected = linear_cross_entropy(hidden, weight, labels, impl=impl)
    changed_hidden, changed_labels = hidden.clone(), labels.clone()
    changed_hidden[:, -1] = 1e3
    changed_labels[:, 0] = 10
    actual = linear_cross_entropy(changed_hidden, weight, changed_labels, impl=impl)
    assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_positions_ignored(impl):
    """As from torch: 0 / 0 without num_items, else 0."""
    hidden, weight, labels = inputs()
    labels.fill_(-100)
    assert aligned(hidden, weight, labels, impl=impl).isnan()
    assert aligned(hidden, weight, labels, num_items=3, impl=impl) == 0


@pytest.mark.parametrize("ignore_index", (-100, -1, 4))
@pytest.mark.parametrize("impl", IMPLS)
def test_ignore_index(impl, ignore_index):
    hidden, weight, labels = inputs(rows=12)
    labels = torch.where(labels < 0, ignore_index, labels)
    actual = aligned(hidden, weight, labels, ignore_index=ignore_index, impl=impl)
    scored = labels != ignore_index
    assert 0 < scored.sum() < 12
    expected = F.cross_entropy((hidden @ weight.t())[scored], labels[scored])
    assert_close(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_ignored_positions_hold_does_not_matter(impl):
    hidden, weight, labels = inputs()
    expected = aligned(hidden, weight, labels, impl=impl)
    for value in (torch.nan, torch.inf, -1e30):
        hidden[labels == -100] = value
        assert_close(aligned(hidden, weight, labels, impl=impl), expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_a_scored_position_is_nan(impl):
    hidden, weight, labels = inputs()
    hidden[0, 2] = torch.nan
    assert aligned(hidden, weight, labels, impl=impl).isnan()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab", (1, 2, 16, 17, 101, 2048, 2049, 5003))
def test_sizes_of_the_vocabulary(impl, vocab):
    hidden, weight, labels = inputs(vocab=vocab)
    labels[0], labels[2] = 0, vocab - 1
    actual = aligned(hidden, weight, labels, impl=impl)
    assert_close(actual, F.cross_entropy(hidden @ weight.t(), labels))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((), (1,), (7,), (2, 3), (2, 1, 2)))
def test_any_leading_shape(impl, shape):
    rows = torch.Size(shape).numel()
    hidden, weight, labels = inputs(rows=rows)
    expected = F.cross_entropy(hidden @ weight.t(), labels)
    actual = aligned(hidden.reshape(*shape, -1), weight, labels.reshape(shape), impl=impl)
    assert actual.shape == ()
    assert_close(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((0, 4), (2, 0), (2, 1)))
def test_nothing_to_score(impl, shape):
    _, weight, _ = inputs()
    hidden = torch.zeros(*shape, 5, dtype=WIDEST, device=DEVICE)
    labels = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    assert linear_cross_entropy(hidden, weight, labels, impl=impl).isnan()
    assert linear_cross_entropy(hidden, weight, labels, num_items=2, impl=impl) == 0


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat((x, x, x), dim=-1)[:, x.shape[1] : 2 * x.shape[1]],
    "strided": lambda x: x.repeat_interleave(3, dim=0).repeat_interleave(2, dim=1)[1::3, ::2],
    "expanded_rows": lambda x: x[:1].expand(x.shape),
    "expanded_features": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, layout):
    tensors = dict(zip(("hidden", "weight", "labels"), inputs(), strict=True))
    for name in ("hidden", "weight"):
        arguments = tensors | {name: LAYOUTS[layout](tensors[name])}
        assert not arguments[name].is_contiguous()
        expected = aligned(**tensors | {name: arguments[name].contiguous()}, impl=impl)
        assert_close(aligned(**arguments, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_of_labels(impl):
    hidden, weight, labels = inputs()
    expected = aligned(hidden, weight, labels, impl=impl)
    strided = labels.repeat_interleave(3)[1::3]
    assert_close(aligned(hidden, weight, strided, impl=impl), expected, rtol=0, atol=0)
    expanded = labels[:1].expand(6)
    expected = aligned(hidden, weight, expanded.contiguous(), impl=impl)
    assert_close(aligned(hidden, weight, expanded, impl=impl), expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("requires_grad", (False, True))
def test_inputs_are_not_written(impl, requires_grad):
    tensors = inputs()
    copies, versions = [x.clone() for x in tensors], [x._version for x in tensors]
    tensors[0].requires_grad_(requires_grad)
    aligned(*tensors, impl=impl)
    for x, copy in zip(tensors, copies, strict=True):
        assert torch.equal(x, copy)
    assert [x._version for x in tensors] == versions


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_is_that_of_linear(impl, dtype):
    if impl == "triton" and dtype == torch.bfloat16 and not CUDA:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    hidden, weight, labels = inputs(rows=9, width=33, dtype=torch.float32)
    hidden.requires_grad_()
    with torch.autocast(DEVICE, dtype):
        actual = aligned(hidden, weight, labels, impl=impl)
    expected = aligned(hidden.to(dtype), weight.to(dtype), labels, impl=impl)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, rtol=0, atol=0)
    assert abs(actual - aligned(hidden, weight, labels, impl=impl)) > 1e-6
    (gradient,) = torch.autograd.grad(actual, hidden)
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    assert gradient.dtype == torch.float32
    assert_close(gradient, expected_gradient, rtol=0, atol=0)


@pytest.mark.skipif(CUDA, reason="the kernels take no float64 on a GPU")
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_leaves_float64_alone(impl):
    tensors = inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = aligned(*tensors, impl=impl)
    assert_close(actual, aligned(*tensors, impl=impl), rtol=0, atol=0)


@kernel
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 300),
    width=st.integers(1, 9),
    scored=st.integers(0, 31),
    seed=st.integers(0, 9),
)
def test_kernel_on_any_shape(rows, vocab, width, scored, seed):
    hidden, weight, labels = inputs(rows, vocab, width, torch.float32, seed)
    for row in range(rows):
        labels[row] = labels[row].clamp(min=0) if scored >> row & 1 else -100
    hidden.requires_grad_()
    results = []
    for impl in ("triton", "reference"):
        loss = aligned(hidden, weight, labels, num_items=3, impl=impl)
        results.append((loss, *torch.autograd.grad(loss, hidden)))
    assert_close(*results)
