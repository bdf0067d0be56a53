"""Loss and gradient in low precision: at most twice as far from float64 as torch's own are."""

import pytest
import torch
import torch.nn.functional as F

from lora_kernels.linear_cross_entropy import eager
from lora_kernels.linear_cross_entropy.op import linear_cross_entropy
from lora_kernels.testing import MAX_RATIO, compare

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel

HALVES = (torch.float16, torch.bfloat16)
# Triton's interpreter computes bfloat16 wrongly.
TRITON_DTYPES = (torch.float32, *(HALVES if CUDA else HALVES[:1]))
CASES = (
    *(pytest.param("eager", dtype, id=f"eager-{dtype}") for dtype in (torch.float32, *HALVES)),
    *(pytest.param("eager_own", dtype, id=f"eager_own-{dtype}") for dtype in HALVES),
    *(pytest.param("triton", dtype, id=f"triton-{dtype}", marks=kernel) for dtype in TRITON_DTYPES),
)

# hidden, from what was drawn and the direction that gives every target a logit of 1.
REGIMES = {
    "random": lambda hidden, aim: hidden,
    "sure_and_right": lambda hidden, aim: 50 * aim,
    "sure_and_wrong": lambda hidden, aim: -50 * aim,
    "large": lambda hidden, aim: 100 * hidden,
    "no_preference": lambda hidden, aim: torch.zeros_like(hidden),
    "one_hot": lambda hidden, aim: 8.0 * F.one_hot(torch.arange(len(hidden)) % 48, 48),
    "tied": lambda hidden, aim: hidden,
}


def inputs(regime, dtype, seed, rows=12, vocab=301, width=48):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * width**-0.5
    if regime == "tied":
        weight[1::2] = weight[: vocab // 2 * 2 : 2]
    labels = torch.randint(vocab, (rows,), generator=generator)
    aim = weight[labels] / weight[labels].square().sum(-1, keepdim=True)
    hidden = REGIMES[regime](hidden, aim)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


def ours(hidden, weight, labels, num_items, impl):
    return linear_cross_entropy(hidden, weight, labels, num_items=num_items, impl=impl, shift=False)


def plain(hidden, weight, labels, num_items, impl):
    """transformers' way: logits in hidden's dtype, the rest in at least float32."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="sum") / num_items


def loss_and_gradient(function, hidden, weight, labels, num_items, loss_scale, impl=None):
    hidden = hidden.detach().requires_grad_()
    loss = function(hidden, weight, labels, num_items, impl) * loss_scale
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


def ratios(draws, impl, num_items=7, loss_scale=1.0):
    """The `Comparison.ratio` of the loss and of the gradient, all draws taken as one."""
    results = {"ours": [], "plain": [], "exact": []}
    for hidden, weight, labels in draws:
        rest = (labels, num_items, loss_scale)
        results["ours"].append(loss_and_gradient(ours, hidden, weight, *rest, impl))
        results["plain"].append(loss_and_gradient(plain, hidden, weight, *rest))
        results["exact"].append(loss_and_gradient(plain, hidden.double(), weight.double(), *rest))
        assert results["ours"][-1][0].dtype == torch.float32
        assert results["ours"][-1][1].dtype == hidden.dtype
    stacked = {
        name: [torch.stack(tensors) for tensors in zip(*drawn, strict=True)]
        for name, drawn in results.items()
    }
    return [
        compare(stacked["ours"][i], stacked["plain"][i], stacked["exact"][i]).ratio
        for i in range(2)
    ]


@pytest.fixture
def own_products(monkeypatch):
    """Has the eager products run in 16 bits, as on a CPU with instructions for it or on a GPU."""
    monkeypatch.setattr(eager, "_product_dtype", lambda device_type, dtype: dtype)


@pytest.mark.parametrize("impl, dtype", CASES)
@pytest.mark.parametrize("regime", REGIMES)
def test_error_is_at_most_twice_that_of_torch(impl, dtype, regime, request):
    if impl == "eager_own":
        request.getfixturevalue("own_products")
        impl = "eager"
    draws = [inputs(regime, dtype, seed) for seed in range(4)]
    loss_ratio, gradient_ratio = ratios(draws, impl)
    assert loss_ratio <= MAX_RATIO
    assert gradient_ratio <= MAX_RATIO


@pytest.mark.parametrize("impl, dtype", CASES)
def test_gradient_does_not_underflow(impl, dtype, request):
    """Loss scaling multiplies what arrives in backward: nothing may be lost before.

    The probabilities over the number of items are below float16's smallest numbers.
    """
    if impl == "eager_own":
        request.getfixturevalue("own_products")
        impl = "eager"
    draws = [inputs("no_preference", dtype, seed, rows=6, vocab=2048) for seed in range(4)]
    num_items = 2**14
    assert torch.tensor(1 / 2048 / num_items).half() == 0
    _, gradient_ratio = ratios(draws, impl, num_items, loss_scale=2.0**16)
    assert gradient_ratio <= MAX_RATIO


@kernel
def test_target_gradient_of_a_sure_row_has_no_cancellation():
    """A target whose probability rounds to 1 still gets the gradient that the others leave it."""
    from lora_kernels.linear_cross_entropy.triton_kernel import cross_entropy

    logits = torch.tensor([[0.0, 30.0, -2.0, 1.0], [5.0, -40.0, 1.0, 0.0]], device=DEVICE)
    labels = torch.tensor([1, 0], device=DEVICE)
    exact = logits.double().softmax(-1)
    exact[0, 1], exact[1, 0] = 0, 0
    exact[0, 1], exact[1, 0] = -exact.sum(-1)
    losses = torch.empty(2, device=DEVICE)
    cross_entropy(logits, labels, losses, -100, True)
    assert exact[0, 1].abs() < torch.finfo(torch.float32).eps
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=0)
