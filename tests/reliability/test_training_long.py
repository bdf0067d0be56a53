"""A hundred training steps by the kernels and by the library path, beside the reference.

Three runs from the same weights over the same batches: the reference in float64, the reference in
the dtype under test, and the implementation. A trajectory departs from the float64 one by rounding
alone; that of an implementation may do so at most twice as far as the reference's own.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk
from lora_kernels.testing import MAX_RATIO
from lora_llama import LoraLlama

STEPS = 100
VOCABULARY = 61


def tiny_llama() -> LoraLlama:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15, use_cache=False,
    )  # fmt: skip
    model = LoraLlama(config)
    model.add_adapter("default", lk.LoraConfig(r=5, target_modules="all-linear"))
    return model.train()


def batches() -> list[torch.Tensor]:
    """Four batches in turn, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    distinct = torch.randint(1, VOCABULARY, (4, 2, 8), generator=generator)
    return [distinct[step % 4] for step in range(STEPS)]


def train(model: LoraLlama, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of all steps and the adapters' final values, in float64."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for ids in batches():
        with lk.implementation(impl):
            loss = model(ids, labels=ids).loss
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    values = torch.cat([parameter.detach().double().flatten() for parameter in parameters])
    return torch.tensor(losses, dtype=torch.float64), values


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


CASES = (
    pytest.param("eager", torch.float32, id="eager-float32"),
    pytest.param("eager", torch.bfloat16, id="eager-bfloat16"),
    pytest.param("eager", torch.float16, id="eager-float16"),
    # Interpreted, a step takes seconds.
    pytest.param("triton", torch.float32, id="triton-float32", marks=pytest.mark.kernel),
)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_a_hundred_steps_beside_the_reference(impl, dtype, figure, device):
    model = tiny_llama().to(device)
    # Adapters stay in float32 over a 16-bit base, as PEFT has them.
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    oracle_losses, oracle_values = train(copy.deepcopy(model).double(), "reference")
    plain_losses, plain_values = train(copy.deepcopy(model), "reference")
    losses, values = train(model, impl)
    assert oracle_losses[-10:].mean() < 0.5 * oracle_losses[:10].mean(), "nothing was learned"

    short = str(dtype).removeprefix("torch.")
    gap = (losses - plain_losses).abs().max().item()
    ratio = distance(values, oracle_values) / distance(plain_values, oracle_values)
    loss_ratio = distance(losses, oracle_losses) / distance(plain_losses, oracle_losses)
    name = f"{STEPS} steps, {impl}, {short}"
    figure(21, f"{name}: largest loss gap to the reference", gap)
    figure(21, f"{name}: RMS-rel of adapters to the reference", distance(values, plain_values))
    figure(21, f"{name}: adapters, error over the reference's", ratio, MAX_RATIO)
    figure(21, f"{name}: losses, error over the reference's", loss_ratio, MAX_RATIO)
    assert ratio <= MAX_RATIO and loss_ratio <= MAX_RATIO


@pytest.mark.long
@pytest.mark.parametrize("start", (0, 8192, 100_000))
def test_logits_of_far_positions_are_transformers(start, figure):
    """Grouped-query heads and Llama 3's scaling of the frequencies, which begins at 8,192."""
    scaling = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=89, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, head_dim=16, initializer_range=0.15,
        max_position_embeddings=131_072, rope_parameters=scaling,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = LlamaForCausalLM(copy.deepcopy(config)).eval()
    ours = LoraLlama(copy.deepcopy(config)).eval()
    ours.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 89, (2, 24), generator=torch.Generator().manual_seed(start))
    # The scaled frequencies turn slowly: they show at distances of thousands. (Without a cache,
    # transformers would take positions with gaps for packed sequences.)
    positions = start + 512 * torch.arange(24)[None]
    with torch.no_grad():
        expected = plain(ids, position_ids=positions).logits
        actual = ours(ids, position_ids=positions).logits
        unscaled = copy.deepcopy(config)
        unscaled.rope_parameters = {"rope_type": "default", "rope_theta": 500_000.0}
        other = LlamaForCausalLM(unscaled).eval()
        other.load_state_dict(plain.state_dict())
        control = other(ids, position_ids=positions).logits
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    figure(22, f"largest logit difference from position {start}, relative", error, 1e-5)
    assert error <= 1e-5
    assert (control - expected).abs().max() > 100 * (actual - expected).abs().max()
