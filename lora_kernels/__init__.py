"""Triton kernels that make LoRA fine-tuning cost what running the frozen model costs."""

from lora_kernels.config import LoraConfig
from lora_kernels.dispatch import implementation
from lora_kernels.injection import inject_lora
from lora_kernels.layers import LoraLinear
from lora_kernels.linear_cross_entropy.op import linear_cross_entropy
from lora_kernels.lora_linear.op import lora_linear, lora_linear_grouped
from lora_kernels.lora_linear_mixed.op import lora_linear_mixed
from lora_kernels.lora_linear_mixed.rows import MixedRows
from lora_kernels.mixed_batch import mixed_adapters
from lora_kernels.peft import accelerate, restore
from lora_kernels.rms_norm.op import rms_norm
from lora_kernels.rope.op import apply_rotary_pos_emb
from lora_kernels.status import status
from lora_kernels.swiglu.op import swiglu

__all__ = [
    "LoraConfig",
    "LoraLinear",
    "MixedRows",
    "accelerate",
    "apply_rotary_pos_emb",
    "implementation",
    "inject_lora",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_grouped",
    "lora_linear_mixed",
    "mixed_adapters",
    "restore",
    "rms_norm",
    "status",
    "swiglu",
]
__version__ = "0.1.0"
