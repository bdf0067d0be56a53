"""`lora-llama verify`: are a model's adapter gradients there, and equal to the reference's?"""

import torch
from torch import Tensor

import lora_kernels as lk
from lora_kernels.config import LoraConfig
from lora_kernels.injection import is_adapter_parameter
from lora_llama.gradients import GradientError, gradient_table, verify_gradients
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import ALL_PROJECTIONS

# Both runs round every layer's result to the base's dtype, in different orders; the difference
# grows with the depth. Far below what a missing term or a wrong scale would make.
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def verify_model(model: LoraLlamaForCausalLM, r: int, tokens: int, seed: int) -> None:
    """Trains one step's gradients on random tokens, checks them, and prints them.

    A model without an adapter gets one with random A and B (with B = 0 half of the gradients would
    be zero). The gradients must be present, finite, non-zero, and as near to those of the reference
    implementation as the base's dtype allows.

    Raises:
        GradientError: a gradient is missing, zero, not finite, or differs from the reference's.
    """
    torch.manual_seed(seed)
    if not model.lora_configs:
        config = LoraConfig(
            r=r, lora_alpha=2 * r, target_modules=list(ALL_PROJECTIONS), init_lora_weights=False
        )
        model.add_adapter("default", config)
    model.set_adapter(model.active_adapters())
    model.eval()
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (1, tokens), device=model.device)
    print(lk.status(model, tokens))
    with lk.implementation("reference"):
        expected = _gradients(model, ids)
    actual = _gradients(model, ids)
    rows = verify_gradients(model)
    print("\n" + gradient_table(rows))
    limit = MAX_DIFFERENCE[model.dtype]
    differences = {
        name: ((actual[name] - gradient).norm() / gradient.norm().clamp_min(1e-30)).item()
        for name, gradient in expected.items()
    }
    worst = max(differences, key=differences.__getitem__)
    wrong = [name for name, difference in differences.items() if not difference <= limit]
    print(
        f"\n{len(differences)} gradients, largest difference from the reference: "
        f"{differences[worst]:.1e} ({worst}); limit {limit:.0e} for {model.dtype}"
    )
    if wrong:
        raise GradientError("gradients differ from the reference's: " + ", ".join(wrong))
    print("verified")


def _gradients(model: LoraLlamaForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()
    return {
        name: parameter.grad.detach().float().clone()
        for name, parameter in model.named_parameters()
        if is_adapter_parameter(name) and parameter.grad is not None
    }
