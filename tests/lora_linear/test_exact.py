"""The kernels where only an exact comparison sees a fault: seams of stacked ranks, chunks, dtypes.

In float64, through the interpreter, they equal the oracle to rounding; on a GPU they run in float32
and are compared to its rounding.
"""

import pytest
import torch

from lora_kernels import testing
from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear import reference, triton_descriptor, triton_forward
from lora_kernels.lora_linear.dropout import philox_keep
from lora_kernels.lora_linear.op import lora_linear, lora_linear_grouped
from lora_kernels.lora_linear.tables import TileConfig

pytestmark = pytest.mark.kernel
K = 37


def group(m, projections, device, k=K):
    """x and (weight, lora_a, lora_b, scaling, bias) of each (N, R), with one dy each."""
    dtype = torch.float64 if interpreting() else torch.float32
    x = testing.lora_linear_inputs(m, 1, k, 1, dtype, device)["x"].requires_grad_()
    entries, dys = [], []
    for g, (n, r) in enumerate(projections):
        t = testing.lora_linear_inputs(m, n, k, r, dtype, device, seed=g + 1)
        # No number of few bits: a scaling that passes through a narrower dtype would show.
        trained = [t[name].requires_grad_() for name in ("lora_a", "lora_b", "bias")]
        entries.append((t["weight"], trained[0], trained[1], 0.7 + g / 3, trained[2]))
        dys.append(t["dy"])
    return x, entries, dys


def assert_equal_to_reference(x, entries, dys, ys, keeps=None):
    """Every output and every gradient."""
    leaves = [x, *(tensor for entry in entries for tensor in (entry[1], entry[2], entry[4]))]
    expected = [
        reference.lora_linear(x, *entry, None if keeps is None else keeps[g])
        for g, entry in enumerate(entries)
    ]
    tolerance = 1e-12 if interpreting() else 2e-5
    for one, two in zip(
        (*ys, *torch.autograd.grad(ys, leaves, dys)),
        (*expected, *torch.autograd.grad(expected, leaves, dys)),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def test_one_pass_of_a_group(device, monkeypatch):
    """Ranks that one pass takes, each of them ragged, and S of every projection for backward."""
    calls = []
    original = triton_forward.one_pass
    monkeypatch.setattr(
        triton_forward, "one_pass", lambda *arguments: calls.append(1) or original(*arguments)
    )
    x, entries, dys = group(19, ((53, 5), (1, 3), (32, 16)), device)
    ys = lora_linear_grouped(x, entries, impl="triton")
    assert calls
    assert_equal_to_reference(x, entries, dys, ys)


def test_masks_of_a_group_over_several_chunks(device):
    """More rows than one program of the passes over dy and x covers: partial results per chunk."""
    # Kept elements are doubled, which is exact: kernels take 1 / (1 - p) in float32.
    rows, p = 70 if interpreting() else 2500, 0.5
    x, entries, dys = group(rows, ((33, 5), (16, 20)), device)
    torch.manual_seed(5)
    ys = lora_linear_grouped(x, entries, dropout_p=p, impl="triton")
    torch.manual_seed(5)
    seeds = torch.randint(0, 2**62, (2,), device=device)
    keeps = [philox_keep(seed, p, rows, K, x.dtype) for seed in seeds.split(1)]
    assert_equal_to_reference(x, entries, dys, ys, keeps)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="tensor descriptors need compute capability 9.0",
)
@torch.no_grad()
def test_descriptors_of_a_group(device):
    """Several tiles for each program, ragged at every end; ranks below and above a block's."""
    x, entries, dys = group(70, ((52, 5), (4, 3), (32, 20)), device, k=36)
    weights, lora_as, lora_bs, scalings, biases = (
        list(part) for part in zip(*entries, strict=True)
    )
    s = torch.cat([x @ a.t() * c for a, c in zip(lora_as, scalings, strict=True)], dim=1)
    p = torch.cat([d @ b * c for d, b, c in zip(dys, lora_bs, scalings, strict=True)], dim=1)
    config = TileConfig(16, 32, 16, 16, 4, 2, group_m=2, descriptors=True)
    ys = triton_descriptor.expand(x, weights, s, lora_bs, biases, None, config)
    dx = triton_descriptor.dx(dys, weights, p, torch.cat(lora_as), config)
    assert ys is not None and dx is not None
    expected = [reference.lora_linear(x, *entry) for entry in entries]
    expected.append(
        sum(dy @ weight for dy, weight in zip(dys, weights, strict=True)) + p @ torch.cat(lora_as)
    )
    tolerance = 1e-12 if interpreting() else 2e-5
    for one, two in zip((*ys, dx), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def test_gradients_of_float32_adapters_are_not_rounded_to_16_bits(device):
    """The sums over the rows are float32; they reach float32 adapters as they are."""
    inputs = testing.lora_linear_inputs(33, 53, K, 5, torch.float16, device)
    mixed = inputs | {name: inputs[name].float() for name in ("lora_a", "lora_b")}
    ours = testing.outputs_and_gradients(lora_linear, mixed, 0.75, 0.0, "triton")
    for name in ("d_lora_a", "d_lora_b"):
        assert ours[name].dtype == torch.float32
        assert not torch.equal(ours[name], ours[name].half().float()), name
