"""The kernel for the few rows of a decoding step: split along K, in one launch, the same bits."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels import testing
from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear import reference, triton_forward
from lora_kernels.lora_linear.op import lora_linear, lora_linear_grouped
from lora_kernels.lora_linear.tables import DecodeConfig
from lora_kernels.lora_linear.triton_decode import decode

pytestmark = pytest.mark.kernel
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
NAMES = ("x", "weight", "lora_a", "lora_b")


@pytest.fixture
def decoded(monkeypatch):
    """The configurations with which the decode kernel was launched."""
    launched = []
    original = triton_forward.decode

    def record(*arguments):
        launched.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(triton_forward, "decode", record)
    return launched


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 192, 16), (3, 53, 130, 5), (16, 33, 37, 13)], ids=str)
def test_accuracy(shape, dtype, device, decoded):
    draws = []
    for seed in range(16):
        inputs = testing.lora_linear_inputs(*shape, dtype, device, seed=seed)
        with torch.no_grad():
            y = lora_linear(*(inputs[n] for n in NAMES), 0.75, inputs["bias"], impl="triton")
        exact = [inputs[n].double() for n in NAMES]
        draws.append((
            y,
            reference.lora_linear(*(inputs[n] for n in NAMES), 0.75, inputs["bias"]),
            reference.lora_linear(*exact, 0.75, inputs["bias"].double()),
        ))  # fmt: skip
    ours, plain, oracle = (torch.stack(part) for part in zip(*draws, strict=True))
    assert testing.compare(ours, plain, oracle).ratio <= testing.MAX_RATIO
    assert len(decoded) == 16


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
@pytest.mark.parametrize("k", [16, 37, 130])
def test_any_number_of_splits(splits, k, device):
    """Also more splits than K has blocks: the last ones add nothing."""
    dtype = torch.float64 if interpreting() else torch.float32
    t = testing.lora_linear_inputs(5, 53, k, 5, dtype, device)
    config = DecodeConfig(32, 16, 16, splits, 1 if interpreting() else 4, 1)
    (y,) = decode(
        t["x"], [t["weight"]], t["lora_a"], [t["lora_b"]], [t["bias"]], None, [0.75], None, config
    )
    expected = reference.lora_linear(*(t[n].double() for n in NAMES), 0.75, t["bias"].double())
    tolerance = 1e-12 if interpreting() else 1e-5
    torch.testing.assert_close(y, expected.to(dtype), rtol=tolerance, atol=tolerance)


def test_a_group_in_one_launch(device, decoded):
    x = testing.lora_linear_inputs(2, 1, 130, 1, torch.float32, device)["x"]
    projections = []
    for g, (n, r) in enumerate(((53, 5), (1, 3), (32, 16))):
        t = testing.lora_linear_inputs(2, n, 130, r, torch.float32, device, seed=g)
        projections.append((t["weight"], t["lora_a"], t["lora_b"], 0.5 + g, t["bias"]))
    with torch.no_grad():
        ys = lora_linear_grouped(x, projections, impl="triton")
    assert len(decoded) == 1
    for y, projection in zip(ys, projections, strict=True):
        exact = [t.double() if isinstance(t, torch.Tensor) else t for t in projection]
        expected = reference.lora_linear(x.double(), *exact)
        torch.testing.assert_close(y, expected.float(), rtol=2e-5, atol=2e-5)


def test_only_where_nothing_is_trained_and_rows_are_few(device, decoded):
    """Backward needs S, which this kernel does not keep."""
    for m, grad in ((16, True), (17, False), (16, False)):
        t = testing.lora_linear_inputs(m, 33, 37, 5, torch.float32, device)
        t["lora_b"].requires_grad_(grad)
        lora_linear(*(t[n] for n in NAMES), 1.0, impl="triton")
        assert len(decoded) == (m == 16 and not grad)


def test_ranks_up_to_64_in_16_bits(device, decoded):
    """Where one pass is what runs: up to 64 in 16 bits, up to 16 in float32."""
    for dtype, r, decodes in ((torch.float16, 64, True), (torch.float32, 64, False)):
        decoded.clear()
        t = testing.lora_linear_inputs(3, 33, 37, r, dtype, device)
        y = lora_linear(*(t[n] for n in NAMES), 1.0, impl="triton")
        expected = reference.lora_linear(*(t[n].double() for n in NAMES), 1.0)
        plain = reference.lora_linear(*(t[n] for n in NAMES), 1.0)
        assert testing.compare(y, plain, expected).ratio <= testing.MAX_RATIO
        assert bool(decoded) == decodes


def test_repeats_are_bitwise_equal(device):
    t = testing.lora_linear_inputs(4, 130, 1000, 5, torch.float32, device)
    with torch.no_grad():
        first = lora_linear(*(t[n] for n in NAMES), 1.0, impl="triton")
        for _ in range(3 if interpreting() else 250):
            assert torch.equal(lora_linear(*(t[n] for n in NAMES), 1.0, impl="triton"), first)


@pytest.mark.skipif(interpreting(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replays():
    t = testing.lora_linear_inputs(1, 256, 512, 16, torch.bfloat16, "cuda")
    with torch.no_grad(), lk.implementation("triton"):
        lora_linear(*(t[n] for n in NAMES), 1.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = lora_linear(*(t[n] for n in NAMES), 1.0)
        for _ in range(3):
            t["x"].normal_()
            graph.replay()
            assert torch.equal(y, lora_linear(*(t[n] for n in NAMES), 1.0))
