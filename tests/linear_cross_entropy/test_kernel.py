"""The kernel by itself: launches, bounds, offsets, extreme logits and compile cases."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lora_kernels.linear_cross_entropy.op import linear_cross_entropy

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.kernel


def flat_inputs(rows=10, vocab=11, width=5):
    """hidden [M, H], weight [V, H] and labels [M], none of them ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    labels = torch.randint(vocab, (rows,), generator=generator)
    return hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE)


class Launches:
    """Stands in for the kernel and records how it would have been launched."""

    def __init__(self):
        self.grids, self.arguments = [], []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: self.arguments.append((args, kwargs))


@pytest.mark.parametrize("need_dx", (True, False))
def test_launches(monkeypatch, need_dx):
    from lora_kernels.linear_cross_entropy import triton_kernel

    launches = Launches()
    monkeypatch.setattr(triton_kernel, "_cross_entropy_kernel", launches)
    hidden, weight, labels = flat_inputs(rows=10, vocab=101)
    triton_kernel.forward(hidden, weight, labels, -100, need_dx, 4)
    assert launches.grids == [(4,), (4,), (2,)]
    for (logits, _, losses, stride, _), constants in launches.arguments:
        # Every row is aligned, whatever the vocabulary.
        assert stride == 128 and logits.data_ptr() % 16 == 0
        assert losses.dtype == torch.float32
        assert constants["VOCAB"] == 101 and constants["BLOCK"] == 128
        assert constants["GRADIENT"] == need_dx


@pytest.mark.parametrize("rows", (0, 5))
def test_nothing_is_launched_for_nothing(monkeypatch, rows):
    from lora_kernels.linear_cross_entropy import triton_kernel

    launches = Launches()
    monkeypatch.setattr(triton_kernel, "_cross_entropy_kernel", launches)
    hidden, weight, labels = flat_inputs(rows=max(rows, 1))
    hidden, labels = hidden[:rows], labels[:rows].fill_(-100)
    linear_cross_entropy(hidden, weight, labels, impl="triton", shift=False)
    # On a GPU ignored rows reach the kernel.
    assert launches.grids == [] or (CUDA and rows)


@pytest.mark.parametrize("gradient", (True, False))
@pytest.mark.parametrize("vocab", (10, 64, 4100))
def test_nothing_beyond_a_row_is_written(gradient, vocab):
    from lora_kernels.linear_cross_entropy.triton_kernel import cross_entropy

    band = torch.full((6, vocab + 7), torch.nan, device=DEVICE)
    logits = band[1:5, 3 : 3 + vocab]
    logits.copy_(torch.randn(4, vocab))
    losses = torch.full((6,), torch.nan, device=DEVICE)
    labels = torch.tensor([0, vocab - 1, -100, 5], device=DEVICE)
    expected = F.cross_entropy(logits, labels, reduction="none")
    probabilities = logits.softmax(-1)
    cross_entropy(logits, labels, losses[1:5], -100, gradient)
    assert_close(losses[1:5], expected)
    assert losses.isfinite().sum() == 4 and band.isfinite().sum() == 4 * vocab
    if gradient:
        one_hot = F.one_hot(labels.clamp(min=0), vocab)
        assert_close(logits, (probabilities - one_hot) * (labels >= 0).unsqueeze(1))


def test_rows_beyond_32_bit_offsets(monkeypatch, figure):
    """Rows 2**30 elements apart: only the pages that are used take up memory."""
    from lora_kernels.linear_cross_entropy.triton_kernel import cross_entropy

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        base = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    far = base.as_strided((3, 40), (2**30, 1))
    near = torch.randn(3, 40).to(DEVICE, torch.float16)
    far.copy_(near)
    labels = torch.tensor([3, 0, 39], device=DEVICE)
    losses = torch.empty(2, 3, device=DEVICE)
    cross_entropy(near, labels, losses[0], -100, True)
    cross_entropy(far, labels, losses[1], -100, True)
    assert torch.equal(losses[0], losses[1]) and torch.equal(near, far)
    figure(7, "largest offset that ran, in elements", 2 * 2**30 + 39)


def test_extreme_logits():
    """Large ones of either sign are exact; -inf has probability 0, +inf gives NaN as in torch."""
    from lora_kernels.linear_cross_entropy.triton_kernel import cross_entropy

    logits = torch.randn(4, 20, device=DEVICE)
    logits[0, 4:] = -torch.inf
    logits[1, 7] = torch.inf
    logits[2] *= 1e4
    logits[3] -= 1e4
    labels = torch.tensor([2, 3, 4, 5], device=DEVICE)
    expected = F.cross_entropy(logits, labels, reduction="none")
    probabilities = logits.softmax(-1)
    losses = torch.empty(4, device=DEVICE)
    cross_entropy(logits, labels, losses, -100, True)
    assert_close(losses, expected, equal_nan=True)
    assert losses[1].isnan()
    finite = [0, 2, 3]
    one_hot = F.one_hot(labels, 20)
    assert_close(logits[finite], (probabilities - one_hot)[finite])


def test_compile_cases_name_every_argument():
    from lora_kernels.linear_cross_entropy.triton_kernel import compile_cases

    cases = list(compile_cases())
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert set(case.signature) == set(case.kernel.arg_names)
        constants = {name for name, kind in case.signature.items() if kind == "constexpr"}
        assert constants == set(case.constexprs)
        assert set(case.divisible) <= set(case.signature) - constants
        assert case.constexprs["BLOCK"] in (128, 2048) and case.num_warps in (1, 16)
