"""Dropout in a mixed batch: one mask by place in x, each row at its adapter's rate."""

import pytest
import torch
import torch.utils.checkpoint

from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear.dropout import draw_seeds, philox_keep
from lora_kernels.lora_linear_mixed import reference
from lora_kernels.lora_linear_mixed.op import lora_linear_mixed
from lora_kernels.lora_linear_mixed.packing import MixedDropout, mixed_keep

IMPLS = [pytest.param("triton", marks=pytest.mark.kernel), "eager", "reference"]


def keep_of(impl, seed, ps, batch):
    """The multiplier that an implementation's mask is said to be, [M, K]."""
    if impl != "triton":
        return mixed_keep(MixedDropout(seed, tuple(ps)), batch.ids, batch.x.detach())
    m, k = batch.x.shape
    keep = torch.ones(m, k, dtype=batch.x.dtype, device=batch.x.device)
    for a, p in enumerate(ps):
        mine = batch.ids == a
        keep[mine] = philox_keep(seed, p, m, k, batch.x.dtype)[mine]
    return keep


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ps", [(0.5, 0.5, 0.5), (0.5, 0.0, 0.75)], ids=str)
def test_forward_and_backward_use_the_stated_mask(impl, ps, draw):
    """Against the reference under that mask: y and every gradient."""
    dtype = torch.float32 if impl == "triton" and not interpreting() else torch.float64
    # Multipliers of 1, 2 and 4 are exact in any dtype.
    batch = draw(75, 37, 21, (5, 16, 20), "random", dtype)
    torch.manual_seed(11)
    ours = batch.results(lora_linear_mixed, list(ps), impl)
    torch.manual_seed(11)
    keep = keep_of(impl, draw_seeds(1, batch.x.device), ps, batch)
    dropped = (keep == 0).float().mean(1)
    for a, p in enumerate(ps):
        assert abs(dropped[batch.ids == a].mean().item() - p) < 0.15
    expected = batch.results(reference.lora_linear_mixed, keep)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_rate_and_scale(impl, device):
    """Read off: x = 1, weight = 0, lora_a = lora_b = identity. Base rows are never dropped."""
    m, k, p = 120, 32, 0.25
    eye = torch.eye(k, device=device)
    ids = torch.arange(m, device=device) % 3 - 1
    torch.manual_seed(0)
    keep = lora_linear_mixed(
        torch.ones(m, k, device=device), 0 * eye, [eye, eye], [eye, eye], [1.0, 1.0], ids, None, p,
        impl,
    )  # fmt: skip
    assert not keep[ids < 0].any()
    branch = keep[ids >= 0]
    kept = branch[branch != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))
    deviation = (p * (1 - p) / branch.numel()) ** 0.5
    assert abs((branch == 0).float().mean().item() - p) < 4 * deviation


@pytest.mark.parametrize("impl", IMPLS)
def test_no_dropout_draws_nothing(impl, draw):
    batch = draw(20, 12, 9, (2, 3), "random", torch.float32)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    lora_linear_mixed(*batch.arguments([0.0, 0.0], impl))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_replay_draws_the_same_mask(impl, use_reentrant, draw):
    batch = draw(40, 20, 12, (4, 6), "random", torch.float32)
    leaves = batch.leaves()
    results = []
    for checkpointed in (False, True):

        def layer(*_):
            return lora_linear_mixed(*batch.arguments([0.3, 0.6], impl)).sin()

        torch.manual_seed(3)
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(layer, *leaves, use_reentrant=use_reentrant)
        else:
            y = layer()
        for leaf in leaves:
            leaf.grad = None
        y.backward(batch.dy)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
