"""Dropout on the LoRA branch: rate, scale, one mask for forward and backward, replay."""

import pytest
import torch
import torch.utils.checkpoint

from lora_kernels import testing
from lora_kernels.lora_linear import reference
from lora_kernels.lora_linear.dropout import Dropout, generator_keep, philox_keep
from lora_kernels.lora_linear.op import lora_linear

IMPLS = [pytest.param("triton", marks=pytest.mark.kernel), "eager", "reference"]


def branch_mask(impl, p, m, k, device):
    """The multiplier, read off: x = 1, weight = 0, lora_a = lora_b = identity."""
    eye = torch.eye(k, device=device)
    ones = torch.ones(m, k, device=device)
    return lora_linear(ones, torch.zeros(k, k, device=device), eye, eye, 1.0, None, p, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rate_and_scale(impl, p, device):
    """Elements are 0 or 1/(1-p); the share of zeros is p within 4 standard deviations."""
    torch.manual_seed(0)
    keep = branch_mask(impl, p, 96, 32, device)
    kept = keep[keep != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs((keep == 0).float().mean().item() - p) < 4 * deviation


@pytest.mark.parametrize("impl", IMPLS)
def test_calls_draw_independent_masks(impl, device):
    torch.manual_seed(0)
    first, second = (branch_mask(impl, 0.5, 96, 32, device) != 0 for _ in range(2))
    agreement = (first == second).float().mean().item()
    assert abs(agreement - 0.5) < 4 * (0.25 / first.numel()) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(branch_mask(impl, 0.5, 96, 32, device) != 0, first)


@pytest.mark.kernel
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 12345])
def test_kernels_follow_the_stated_stream(seed, device):
    """The kernels' mask is Philox4x32-10 as `philox_keep` states it, element by element."""
    from lora_kernels.lora_linear import triton_forward
    from lora_kernels.lora_linear.op import plan_for

    m, k, p = 19, 24, 0.3
    seed_tensor = torch.tensor([seed], device=device)
    plan = plan_for(m, k, k, k, torch.float32, device, dropout=True)
    eye = torch.eye(k, device=device)
    s = triton_forward.shrink(
        torch.ones(m, k, device=device), eye, [k], [1.0], None, plan.shrink, Dropout(seed_tensor, p)
    )
    torch.testing.assert_close(s, philox_keep(seed_tensor, p, m, k, torch.float32))


def test_philox_known_answers():
    """Salmon et al.'s test vectors for Philox4x32-10 with a zero counter and key: 6627e8d5..."""
    first_word = 0x6627E8D5
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox_keep(zero, first_word / 2**32 - 1e-6, 1, 1, torch.float64).item() > 0
    assert philox_keep(zero, first_word / 2**32 + 1e-6, 1, 1, torch.float64).item() == 0


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.kernel
def test_forward_and_backward_use_one_mask(impl, device):
    """Against the reference with the implementation's own mask: y and every gradient."""
    inputs = testing.lora_linear_inputs(19, 33, 20, 5, torch.float64, device)
    if device.type == "cuda":
        inputs = {name: t.float() for name, t in inputs.items()}
    p = 0.4
    torch.manual_seed(11)
    ours = testing.outputs_and_gradients(lora_linear, inputs, 0.75, p, impl)
    torch.manual_seed(11)
    seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
    if impl == "triton":
        keep = philox_keep(seed, p, 19, 20, inputs["x"].dtype)
    else:
        keep = generator_keep(seed, p, inputs["x"])
    expected = testing.outputs_and_gradients(reference.lora_linear, inputs, 0.75, keep)
    assert (keep == 0).any() and (keep != 0).any()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_replay_draws_the_same_mask(impl, use_reentrant, device):
    """Activation checkpointing restores torch's generator, and with it the seed: bitwise equal."""
    t = testing.lora_linear_inputs(19, 33, 20, 5, torch.float32, device)
    results = []
    for checkpointed in (False, True):
        leaves = [t[n].clone().requires_grad_() for n in ("x", "lora_a", "lora_b")]

        def layer(x, lora_a, lora_b):
            return lora_linear(x, t["weight"], lora_a, lora_b, 0.75, None, 0.4, impl).sin()

        torch.manual_seed(3)
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(layer, *leaves, use_reentrant=use_reentrant)
        else:
            y = layer(*leaves)
        y.backward(t["dy"])
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.kernel
def test_no_dropout_at_zero(impl, device):
    """p = 0 draws nothing from the generator."""
    t = testing.lora_linear_inputs(19, 33, 20, 5, torch.float32, device)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    lora_linear(t["x"], t["weight"], t["lora_a"], t["lora_b"], 0.75, impl=impl)
    assert torch.equal(torch.get_rng_state(), state)
