"""Triton kernels that make LoRA fine-tuning cost what running the frozen model costs."""

from lora_kernels.config import LoraConfig
from lora_kernels.dispatch import implementation
from lora_kernels.layers import LoraLinear, inject_lora
from lora_kernels.lora_linear.op import lora_linear, lora_linear_grouped
from lora_kernels.rope.op import apply_rotary_pos_emb
from lora_kernels.status import status

__all__ = [
    "LoraConfig",
    "LoraLinear",
    "apply_rotary_pos_emb",
    "implementation",
    "inject_lora",
    "lora_linear",
    "lora_linear_grouped",
    "status",
]
__version__ = "0.1.0"
