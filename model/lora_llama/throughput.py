"""Speed, memory and utilisation of a training, as they are logged.

    tokens_per_second   tokens that went forward and backward, in all processes
    peak_memory_gib     the most that was allocated: see `peak_memory_bytes`
    mfu                 model FLOP/s utilisation: the FLOPs that LoRA needs, over the seconds of
                        forward and backward, over what the GPUs can do

The FLOPs are LoRA's own, per token: 2 N_base for the forward pass and 2 N_base for the gradient of
its inputs, but none for a gradient of the base weights, which nobody computes; and 6 N_adapter for
the trained weights. A full fine-tuning counts 6 N_base, so that the two are not to be compared.
N_base are the weights of the frozen linear layers, the head's among them; N_adapter those of A, B
and the trained copies of linear layers (`modules_to_save`), each of which takes the place of a
frozen one. An embedding is looked up, and norms, biases and magnitudes are no products of
matrices: they count nothing. Attention is causal: a sequence
of T tokens takes 2 T² H D forward and 4 T² H D backward in each layer of H heads of D elements,
each half of what it would be without the mask. What gradient checkpointing computes again is not
counted.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.layers import lora_layers
from lora_kernels.saved_modules import saved_modules

# Peak of dense bfloat16 products with float32 sums, in FLOP/s, from NVIDIA's data sheets; the first
# that is part of the device's name counts.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 5080": 112.6e12,
    "RTX 4090": 165.2e12,
    "RTX 4080": 97.5e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What a device can do at best; None for a CPU, an unknown GPU, or wider dtypes."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory allocated so far: on a GPU by torch, on a CPU resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class FlopCount:
    """What a training step costs.

    Attributes:
        base: N_base, the weights of the frozen linear layers that compute.
        adapter: N_adapter, the trained matrices.
        attention: layers * H * D.
    """

    base: int
    adapter: int
    attention: int

    @classmethod
    def of(cls, model: nn.Module) -> "FlopCount":
        config: Any = model.config
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        # Of a module and its trained copies one computes.
        idle = {
            id(part)
            for _, module in saved_modules(model)
            for copy in (module.original_module, *module.modules_to_save.values())
            if copy is not module.current()
            for part in copy.modules()
        }
        base = adapter = 0
        for module in model.modules():
            if isinstance(module, nn.Linear) and id(module) not in idle:
                # Not the weight's size: 4-bit weights are stored in bytes.
                size = module.in_features * module.out_features
                trained = module.weight.requires_grad
                base, adapter = base + size * (not trained), adapter + size * trained
        for _, layer in lora_layers(model):
            for name in layer.active_adapters:
                adapter += layer.lora_A[name].numel() + layer.lora_B[name].numel()
        return cls(
            base=base,
            adapter=adapter,
            attention=config.num_hidden_layers * heads * width,
        )

    def of_batch(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """The tokens of a batch, and the FLOPs of its forward and backward pass.

        Args:
            inputs: "input_ids" [B, T] with "attention_mask" [B, T] (padding is not counted) or, of
                packed rows, "position_ids" [B, T], which restart at 0 with each row.
        """
        lengths = _lengths(inputs)
        tokens = int(lengths.sum())
        squares = int((lengths * lengths).sum())
        return tokens, (4 * self.base + 6 * self.adapter) * tokens + 6 * self.attention * squares


def _lengths(inputs: dict[str, Any]) -> Tensor:
    """The lengths of a batch's sequences, of which each attends to itself alone."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None:
        return mask.sum(1)
    if positions is None:
        rows, length = inputs["input_ids"].shape
        return torch.full((rows,), length)
    flat = positions.flatten()
    starts = (flat == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([flat.numel()])]).diff()
