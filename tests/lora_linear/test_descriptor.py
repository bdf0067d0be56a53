"""The kernels that load through tensor descriptors: the pointer kernels' results, and who may."""

from dataclasses import replace

import pytest
import torch

from lora_kernels import testing
from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear import triton_backward, triton_descriptor, triton_forward
from lora_kernels.lora_linear.tables import TileConfig
from lora_kernels.lora_linear.triton_descriptor import MAX_PROJECTIONS, describable

HAS_DESCRIPTORS = interpreting() or (
    torch.cuda.is_available()
    and torch.version.hip is None
    and torch.cuda.get_device_capability() >= (9, 0)
)
needs_descriptors = pytest.mark.skipif(
    not HAS_DESCRIPTORS, reason="tensor descriptors are for sm_90 and later"
)
# float64 runs in the interpreter alone, bfloat16 on a GPU alone.
DTYPES = [torch.float32, torch.float16]
DTYPES += [torch.float64] if interpreting() else [torch.bfloat16]
if interpreting():
    CONFIG = TileConfig(16, 32, 16, 16, 1, 1, group_m=2, descriptors=True)
else:
    CONFIG = TileConfig(64, 64, 32, 16, 4, 3, descriptors=True)
POINTERS = replace(CONFIG, descriptors=False)


def draw(m, n, k, r, dtype, device, seed=0):
    """x, weights, S, lora_bs, biases, dys, P and lora_a of projections of n_g outputs, rank r_g."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    accumulator = torch.promote_types(dtype, torch.float32)
    return {
        "x": normal(m, k),
        "weights": [normal(size, k, scale=k**-0.5) for size in n],
        "s": normal(m, sum(r)),
        "lora_bs": [normal(size, rank, scale=rank**-0.5) for size, rank in zip(n, r, strict=True)],
        "biases": [normal(size) for size in n],
        # Of the accumulator's dtype, as the scales of a layer are.
        "scales": [(1 + 0.25 * normal(size)).to(accumulator) for size in n],
        "dys": [normal(m, size) for size in n],
        "p": normal(m, sum(r)),
        "lora_a": normal(sum(r), k, scale=k**-0.5),
        "ranks": r,
    }


def expand(t, config, bias=True):
    return triton_forward.expand(
        t["x"],
        t["weights"],
        t["s"],
        t["lora_bs"],
        t["biases"] if bias else None,
        t["scales"] if bias else None,
        config,
    )


def dx(t, config):
    return triton_backward.dx(t["dys"], t["weights"], t["p"], t["lora_a"], t["ranks"], config)


def expected(t):
    """y_g and dx in plain torch, in the dtype of the tensors."""
    parts = t["s"].split(t["ranks"], 1)
    ys = [
        ((t["x"] @ weight.t() + s @ b.t()) * scale.to(s.dtype)) + bias
        for weight, bias, scale, s, b in zip(
            t["weights"], t["biases"], t["scales"], parts, t["lora_bs"], strict=True
        )
    ]
    products = [dy @ weight for dy, weight in zip(t["dys"], t["weights"], strict=True)]
    return [*ys, torch.stack([*products, t["p"] @ t["lora_a"]]).sum(0)]


def exactly(t):
    def double(value):
        if isinstance(value, torch.Tensor):
            return value.double()
        return [double(part) for part in value] if isinstance(value, list) else value

    return {name: double(value) for name, value in t.items()}


@pytest.fixture
def by_descriptors(monkeypatch):
    """How often a descriptor kernel ran."""
    runs = []

    for name in ("expand", "dx"):
        original = getattr(triton_descriptor, name)

        def counted(*arguments, name=name, original=original):
            result = original(*arguments)
            runs.append((name, result is not None))
            return result

        monkeypatch.setattr(triton_descriptor, name, counted)
    return runs


# One tile and less, several with ragged ends, more tiles than programs; ranks across the blocks.
CASES = [
    (5, (16,), 16, (1,)),
    (40, (48, 32, 16), 56, (8, 16, 24)),
    (33, (80, 16), 32, (40, 3)),
    (66, (96,), 40, (16,)),
]


@pytest.mark.kernel
@needs_descriptors
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case, dtype, device, by_descriptors):
    draws = []
    for seed in range(4):
        t = draw(*case, dtype, device, seed)
        ours = [*expand(t, CONFIG), dx(t, CONFIG)]
        draws.append((ours, expected(t), expected(exactly(t))))
    for tensors in zip(*(zip(*results, strict=True) for results in draws), strict=True):
        ours, plain, oracle = (torch.stack(part) for part in zip(*tensors, strict=True))
        if dtype == torch.float64:
            # There the oracle is plain torch itself.
            torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)
        else:
            assert testing.compare(ours, plain, oracle).ratio <= testing.MAX_RATIO
    assert by_descriptors == [("expand", True), ("dx", True)] * 4


@pytest.mark.kernel
@needs_descriptors
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_pointer_kernels_results(case, bias, device, by_descriptors):
    """The same tiles in the same order: the same bits, where float32 products are float32's."""
    t = draw(*case, torch.float32, device)
    for ours, pointers in zip(expand(t, CONFIG, bias), expand(t, POINTERS, bias), strict=True):
        assert torch.equal(ours, pointers)
    assert torch.equal(dx(t, CONFIG), dx(t, POINTERS))
    assert by_descriptors == [("expand", True), ("dx", True)]


@pytest.mark.kernel
@needs_descriptors
def test_one_program_for_all_tiles(device, monkeypatch, by_descriptors):
    """How tiles are dealt out over the projections does not show, whatever the programs."""
    t = draw(*CASES[1], torch.float32, device)
    first = [*expand(t, CONFIG), dx(t, CONFIG)]
    for programs in (1, 2, 7, 30):
        monkeypatch.setattr(triton_descriptor, "_programs", lambda device, n=programs: n)
        for ours, before in zip([*expand(t, CONFIG), dx(t, CONFIG)], first, strict=True):
            assert torch.equal(ours, before)
    assert len(by_descriptors) == 10


@pytest.mark.kernel
@needs_descriptors
def test_rows_may_lie_apart(device, by_descriptors):
    """x, dy and the weights as columns of wider tensors."""
    t = draw(*CASES[1], torch.float32, device)

    def widened(tensor):
        wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 16), torch.nan)
        wide[:, 4 : 4 + tensor.shape[1]] = tensor
        return wide[:, 4 : 4 + tensor.shape[1]]

    apart = {
        **t,
        "x": widened(t["x"]),
        "weights": [widened(weight) for weight in t["weights"]],
        "dys": [widened(dy) for dy in t["dys"]],
    }
    assert all(
        torch.equal(*ys) for ys in zip(expand(t, CONFIG), expand(apart, CONFIG), strict=True)
    )
    assert torch.equal(dx(t, CONFIG), dx(apart, CONFIG))
    assert by_descriptors == [("expand", True)] * 2 + [("dx", True)] * 2


@pytest.mark.kernel
@needs_descriptors
@pytest.mark.parametrize(
    "change", ["columns apart", "rows misaligned", "start misaligned", "expanded"]
)
def test_other_tensors_take_the_pointer_kernels(change, device, by_descriptors):
    t = draw(40, (32,), 48, (5,), torch.float32, device)

    def other(tensor):
        rows, columns = tensor.shape
        if change == "columns apart":
            return tensor.t().contiguous().t()
        if change == "rows misaligned":
            return tensor.new_zeros(rows, columns + 1)[:, :columns].copy_(tensor)
        if change == "start misaligned":
            flat = tensor.new_zeros(tensor.numel() + 1)
            return flat[1:].view(rows, columns).copy_(tensor)
        return tensor[:1].expand(rows, columns)

    changed = {**t, "x": other(t["x"]), "dys": [other(t["dys"][0])]}
    same = {**changed, "x": changed["x"].contiguous().clone(), "dys": [changed["dys"][0].clone()]}
    assert not describable(changed["x"])
    assert torch.equal(expand(changed, CONFIG)[0], expand(same, POINTERS)[0])
    assert torch.equal(dx(changed, CONFIG), dx(same, POINTERS))
    assert by_descriptors == [("expand", False), ("dx", False)]


@pytest.mark.kernel
@needs_descriptors
def test_sizes_that_no_descriptor_has(device, by_descriptors):
    """Outputs whose rows do not start at multiples of 16 bytes, and more projections than three."""
    for case in ((20, (33,), 48, (4,)), (20, (16,) * (MAX_PROJECTIONS + 1), 32, (2,) * 4)):
        t = draw(*case, torch.float32, device)
        for ours, pointers in zip(expand(t, CONFIG), expand(t, POINTERS), strict=True):
            assert torch.equal(ours, pointers)
        assert torch.equal(dx(t, CONFIG), dx(t, POINTERS))
    assert by_descriptors == [("expand", False), ("dx", False)] * 2


@pytest.mark.kernel
@needs_descriptors
def test_what_lies_outside_is_not_touched(device):
    """NaN beside x, dy and the weights is neither read into the sums nor written over."""
    t = draw(*CASES[1], torch.float32, device)
    wide = t["x"].new_full((t["x"].shape[0] + 20, t["x"].shape[1] + 16), torch.nan)
    wide[: t["x"].shape[0], : t["x"].shape[1]] = t["x"]
    before = wide.clone()
    x = wide[: t["x"].shape[0], : t["x"].shape[1]]
    for ours, pointers in zip(expand({**t, "x": x}, CONFIG), expand(t, CONFIG), strict=True):
        assert torch.equal(ours, pointers)
    assert torch.equal(wide.nan_to_num(7.0), before.nan_to_num(7.0))


def test_describable():
    """A pure function of sizes, strides and the address."""
    base = torch.zeros(64, 64, dtype=torch.float16)
    assert describable(base) and describable(base, base[:3, :5], base[:, 8:])
    assert not describable(base[:, 1:])
    assert not describable(base.t()[1:])
    assert not describable(base[:0])
    assert not describable(base, base[:, ::2])
    assert not describable(torch.zeros(4, 12, dtype=torch.float16))
    assert describable(torch.zeros(4, 12, dtype=torch.float32))
    assert not describable(base[:1].expand(64, 64))
