"""A pytest plugin that holds a test process to a share of the GPU's memory.

    LORA_KERNELS_MEMORY_BYTES=3000000000 python -m pytest -p bench.verify_limit ...

What a process allocates beyond it is an out-of-memory error, and the free memory that it is told of
is no more than that, so that benchmarks choose their sizes accordingly.
"""

import os
from typing import Any

import torch

VARIABLE = "LORA_KERNELS_MEMORY_BYTES"


def limit_memory(limit: int, device: Any = None) -> None:
    """Caps what this process allocates on a CUDA device, in bytes."""
    total = torch.cuda.get_device_properties(device or torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    original = torch.cuda.mem_get_info

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        free, total = original(device)
        return min(free, limit), total

    torch.cuda.mem_get_info = mem_get_info


def pytest_configure(config: Any) -> None:
    if VARIABLE in os.environ and torch.cuda.is_available():
        limit_memory(int(os.environ[VARIABLE]))
