"""The gradient of hidden: gradcheck in float64, any incoming gradient, nothing more than needed."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lora_kernels.linear_cross_entropy import eager, op
from lora_kernels.linear_cross_entropy.op import linear_cross_entropy

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel

IMPLS = ("reference", "eager", pytest.param("triton", marks=kernel))
OP_IMPLS = IMPLS[1:]
# The kernels take no float64 on a GPU.
WIDEST = torch.float32 if CUDA else torch.float64


def inputs(rows=6, vocab=11, width=5, dtype=WIDEST, seed=0):
    """hidden [M, H] that requires a gradient, weight [V, H] and labels [M], some ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64) * width**-0.5
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[1::3] = -100
    hidden, weight = hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    return hidden.requires_grad_(), weight, labels.to(DEVICE)


def aligned(*args, **kwargs):
    return linear_cross_entropy(*args, **kwargs, shift=False)


def torch_gradient(hidden, weight, labels, factor=1.0, num_items=None):
    hidden = hidden.detach().double().requires_grad_()
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(hidden @ weight.double().t(), labels, reduction=reduction)
    return torch.autograd.grad(loss / (num_items or 1) * factor, hidden)[0]


def close(actual, expected):
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if CUDA else {"rtol": 1e-12, "atol": 1e-14}
    assert_close(actual.double(), expected, **tolerance)


@pytest.mark.skipif(CUDA, reason="the kernels take no float64 on a GPU")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_items", (None, 3))
def test_gradcheck(impl, num_items):
    hidden, weight, labels = inputs(rows=4)

    def function(hidden):
        # Squared: the gradient that comes back is not 1.
        return 1.7 * aligned(hidden, weight, labels, num_items=num_items, impl=impl) ** 2

    assert gradcheck(function, hidden)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_items", (None, 7))
@pytest.mark.parametrize("factor", (1.0, -3.7))
def test_equals_torch(impl, num_items, factor):
    hidden, weight, labels = inputs()
    loss = aligned(hidden, weight, labels, num_items=num_items, impl=impl)
    (actual,) = torch.autograd.grad(loss, hidden, torch.tensor(factor, dtype=WIDEST, device=DEVICE))
    close(actual, torch_gradient(hidden, weight, labels, factor, num_items))
    assert (actual[labels == -100] == 0).all() and (actual[labels >= 0] != 0).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_shifted_gradient(impl):
    hidden, weight, labels = inputs()
    batch = hidden.detach().reshape(2, 3, -1).requires_grad_()
    labels = labels.clamp(min=0).reshape(2, 3)
    (actual,) = torch.autograd.grad(linear_cross_entropy(batch, weight, labels, impl=impl), batch)
    expected = torch_gradient(
        batch[:, :-1].reshape(4, -1), weight, labels[:, 1:].reshape(-1)
    ).reshape(2, 2, -1)
    close(actual[:, :-1], expected)
    assert (actual[:, -1] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_items", (None, 3, 0))
def test_all_positions_ignored(impl, num_items):
    """The gradient is zero, as torch's is, though the loss may be 0 / 0."""
    hidden, weight, labels = inputs()
    labels.fill_(-100)
    num_items = None if num_items is None else torch.tensor(num_items, device=DEVICE)
    loss = aligned(hidden, weight, labels, num_items=num_items, impl=impl)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert (gradient == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("factor", (torch.inf, torch.nan))
def test_infinite_incoming_gradient_is_passed_on(impl, factor):
    """Loss scaling finds overflows by them; ignored positions stay zero, as from torch."""
    hidden, weight, labels = inputs()
    loss = aligned(hidden, weight, labels, impl=impl)
    (gradient,) = torch.autograd.grad(loss, hidden, torch.full_like(loss, factor))
    assert not gradient[labels >= 0].isfinite().any()
    assert (gradient[labels == -100] == 0).all()


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_nan_stays_in_its_position(impl):
    hidden, weight, labels = inputs()
    with torch.no_grad():
        hidden[0, 2], hidden[1, 0] = torch.nan, torch.nan
    assert labels[0] >= 0 and labels[1] == -100
    (gradient,) = torch.autograd.grad(aligned(hidden, weight, labels, impl=impl), hidden)
    assert gradient[0].isnan().all()
    assert gradient[1:].isfinite().all()


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat((x, x, x), dim=-1)[:, x.shape[1] : 2 * x.shape[1]],
    "expanded_rows": lambda x: x[:1].expand(x.shape),
    "expanded_features": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_hidden(impl, layout):
    hidden, weight, labels = inputs()
    results = []
    for contiguous in (False, True):
        x = LAYOUTS[layout](hidden)
        loss = aligned(x.contiguous() if contiguous else x, weight, labels, impl=impl)
        results.append(torch.autograd.grad(loss, hidden)[0])
    assert_close(*results)
    assert (results[0] != 0).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_incoming_gradient(impl):
    """As `sum` sends it back: a stride-0 view, which must not be written."""
    hidden, weight, labels = inputs()
    losses = torch.stack([aligned(hidden, weight, labels, impl=impl)] * 3)
    upstream = torch.full((1,), 0.5, dtype=WIDEST, device=DEVICE)
    (actual,) = torch.autograd.grad(losses, hidden, upstream.expand(3))
    close(actual, torch_gradient(hidden, weight, labels, 1.5))
    assert upstream.item() == 0.5 and upstream._version == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_gives_the_same_and_changes_nothing(impl):
    hidden, weight, labels = inputs()
    copies = [x.detach().clone() for x in (hidden, weight, labels)]
    loss = aligned(hidden, weight, labels, impl=impl)
    upstream = torch.full_like(loss, 0.3)
    tensors = (hidden, weight, labels, loss, upstream)
    versions = [x._version for x in tensors]
    value = loss.item()
    (first,) = torch.autograd.grad(loss, hidden, upstream, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, hidden, upstream)
    assert_close(second, kept, rtol=0, atol=0)
    assert loss.item() == value and upstream == torch.full_like(loss, 0.3)
    for x, copy in zip(tensors, copies, strict=False):
        assert torch.equal(x, copy)
    assert [x._version for x in tensors] == versions


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_repeated_runs_give_the_same_bits(impl):
    hidden, weight, labels = inputs(rows=40, vocab=301, width=33, dtype=torch.float32)
    results = []
    for _ in range(5):
        loss = aligned(hidden, weight, labels, impl=impl)
        results.append((loss, *torch.autograd.grad(loss, hidden)))
    for result in results[1:]:
        assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_accumulation(impl):
    """Micro-batches of unequal numbers of labels, with the whole batch's num_items, add up."""
    hidden, weight, labels = inputs(rows=9)
    labels[:4] = -100
    total = int((labels >= 0).sum())
    whole = aligned(hidden, weight, labels, impl=impl)
    parts = [
        aligned(hidden[rows], weight, labels[rows], num_items=total, impl=impl)
        for rows in (slice(0, 5), slice(5, 9))
    ]
    assert_close(sum(parts), whole)
    expected = torch.autograd.grad(whole, hidden)
    for part in parts:
        part.backward()
    assert_close(hidden.grad, *expected)


@pytest.fixture
def needs(monkeypatch):
    """Records whether each forward pass computes the gradient."""
    calls, forward = [], eager.forward

    def spy(hidden, weight, labels, ignore_index, need_dx, chunk_rows):
        calls.append(need_dx)
        return forward(hidden, weight, labels, ignore_index, need_dx, chunk_rows)

    monkeypatch.setattr(eager, "forward", spy)
    return calls


def test_gradient_is_computed_only_when_needed(needs):
    hidden, weight, labels = inputs()
    assert aligned(hidden, weight, labels, impl="eager").requires_grad
    with torch.no_grad():
        aligned(hidden, weight, labels, impl="eager")
    assert not aligned(hidden.detach(), weight, labels, impl="eager").requires_grad
    with torch.inference_mode():
        aligned(hidden, weight, labels, impl="eager")
    assert needs == [True, False, False, False]


@kernel
def test_kernel_writes_no_logits_without_gradient():
    from lora_kernels.linear_cross_entropy.triton_kernel import cross_entropy

    logits = torch.randn(3, 50, device=DEVICE)
    labels = torch.tensor([4, -100, 49], device=DEVICE)
    copy, losses = logits.clone(), torch.empty(2, 3, device=DEVICE)
    cross_entropy(logits, labels, losses[0], -100, False)
    assert torch.equal(logits, copy)
    cross_entropy(logits, labels, losses[1], -100, True)
    assert torch.equal(losses[0], losses[1])
    assert not torch.isclose(logits, copy).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_reach_only_hidden(impl):
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match=r"weight: expected requires_grad=False \(the head is fro"):
        aligned(hidden, weight.requires_grad_(), labels, impl=impl)
    with torch.no_grad():
        aligned(hidden, weight, labels, impl=impl)


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_second_derivative_is_refused(impl):
    hidden, weight, labels = inputs()
    loss = aligned(hidden, weight, labels, impl=impl)
    with pytest.raises(RuntimeError, match="linear_cross_entropy cannot be differentiated twice"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.skipif(CUDA, reason="gradgradcheck wants float64")
def test_reference_has_a_second_derivative():
    hidden, weight, labels = inputs(rows=3, vocab=5, width=2)
    assert gradgradcheck(lambda x: aligned(x, weight, labels, impl="reference"), hidden)


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpointing_gives_the_same_bits(impl, use_reentrant):
    hidden, weight, labels = inputs()
    expected = torch.autograd.grad(aligned(hidden, weight, labels, impl=impl), hidden)
    loss = checkpoint(
        lambda x: aligned(x, weight, labels, impl=impl), hidden, use_reentrant=use_reentrant
    )
    loss.backward()
    assert_close(hidden.grad, *expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("need_dx", (True, False))
def test_opcheck(impl, need_dx):
    hidden, weight, labels = inputs(rows=4)
    for x in (hidden, hidden.detach()[:1].expand(4, 5).requires_grad_()):
        x = x if need_dx else x.detach()
        torch.library.opcheck(op._total_loss, (x, weight, labels, -100, impl, need_dx))


@pytest.mark.parametrize("dtype", (torch.bfloat16, WIDEST))
def test_opcheck_of_backward(dtype):
    dx, _, labels = inputs(dtype=dtype)
    upstream = torch.tensor(0.3, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE)
    arguments = (dx.detach(), labels, -100, upstream)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op._scale, arguments, test_utils=tests)


def test_incoming_gradient_keeps_its_precision():
    """A third in bfloat16 is off by 2**-9: it must multiply dx in float32."""
    dx = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    third = torch.tensor(1 / 3, device=DEVICE)
    labels = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    gradient = op._scale(dx, labels, -100, third)
    expected = (dx.double() / 3).bfloat16()
    assert_close(gradient, expected, rtol=0, atol=0)
    assert not torch.equal((dx.double() * third.bfloat16().double()).bfloat16(), expected)
