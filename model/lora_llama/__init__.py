"""A Llama built from LoRA layers, and the tool that fine-tunes it."""

from lora_llama.gradients import capture_lora_weights, verify_gradients
from lora_llama.model import (
    LoraAttention,
    LoraLlama,
    LoraLlamaForCausalLM,
    LoraLlamaModel,
    LoraMLP,
    LoraTransformerBlock,
)

__all__ = [
    "LoraAttention",
    "LoraLlama",
    "LoraLlamaForCausalLM",
    "LoraLlamaModel",
    "LoraMLP",
    "LoraTransformerBlock",
    "capture_lora_weights",
    "verify_gradients",
]
