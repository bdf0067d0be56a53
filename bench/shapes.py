"""What is measured, and the least work it takes: floating-point operations and bytes.

    M = tokens    K -> N = a projection    R = rank    H = hidden size    V = vocabulary
    floor = max(FLOPs / matmul rate, bytes / copy bandwidth), per operation; a step's is their sum

A product of [M, K] and [K, N] is 2MKN operations. Bytes are those of the tensors that an operation
must read and write once; where a working set fits a cache, the floor can be undercut.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

# The projections of one block that read the same input are one operation.
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
# The parts of a step outside the projections, and whether there are several in each block.
ELEMENTWISE = ("rope", "rms_norm", "rms_norm_residual", "swiglu")
# Kinds of projections that are verified, and not part of the step that is measured.
VARIANTS = ("dora", "mixed")


@dataclass(frozen=True)
class LlamaShape:
    """A Llama's sizes, and whether its head's weight is its embedding's."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int
    tied: bool = False

    def projections(self, group: str) -> tuple[int, list[int]]:
        """K and every N of a group of projections."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (self.hidden, [q, kv, kv]),
            "o": (q, [self.hidden]),
            "gate_up": (self.hidden, [self.inner, self.inner]),
            "down": (self.inner, [self.hidden]),
        }[group]


SMOLLM2 = LlamaShape("SmolLM2-135M", 576, 1536, 9, 3, 64, 30, 49152, tied=True)
LLAMA_1B = LlamaShape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 16, 128256, tied=True)
LLAMA_8B = LlamaShape("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 32, 128256)
# For checking the suite itself.
TINY = LlamaShape("tiny", 64, 96, 4, 2, 16, 2, 128)


@dataclass(frozen=True)
class OpCase:
    """One operation at one size.

    Attributes:
        part: a key of GROUPS, one of ELEMENTWISE, or "head" (the language-model head's loss).
        backward: forward and all gradients, or the forward pass alone.
        training: False times the forward pass without autograd, as in generation.
        graph: as a CUDA graph, without the host's launches.
    """

    shape: LlamaShape
    part: str
    tokens: int
    dtype: str
    backward: bool = True
    training: bool = True
    graph: bool = False
    r: int = 16

    @property
    def op(self) -> str:
        if self.part in GROUPS:
            return "lora_linear" if len(GROUPS[self.part]) == 1 else "lora_linear_grouped"
        return "linear_cross_entropy" if self.part == "head" else self.part

    @property
    def direction(self) -> str:
        if not self.training:
            return "decode"
        return "forward+backward" if self.backward else "forward"

    @property
    def id(self) -> str:
        graph = ["graph"] if self.graph else []
        parts = (self.shape.name, self.part, str(self.tokens), self.dtype, self.direction, *graph)
        return "-".join(parts)


@dataclass(frozen=True)
class StepCase:
    """One training step: forward, loss, backward, every adapter's gradient; no optimizer.

    Attributes:
        layers: of the shape's; a block stack has fewer than the model, and its vocabulary is
            smaller in proportion, so that the head keeps its share of the step.
        bundled: the bundled checkpoint's weights, else random ones.
        graph: as a CUDA graph, without the host's launches.
        only: these peers alone; all of them where it is empty.
    """

    shape: LlamaShape
    layers: int
    batch: int
    length: int
    dtype: str
    bundled: bool = False
    graph: bool = False
    only: tuple[str, ...] = ()
    r: int = 16

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def inner(self) -> bool:
        """Whether the blocks stand for inner ones of a larger model."""
        return self.layers < self.shape.layers

    @property
    def vocabulary(self) -> int:
        # A multiple of 64, as vocabularies are.
        share = self.shape.vocabulary * self.layers / self.shape.layers
        return max(64, round(share / 64) * 64)

    @property
    def id(self) -> str:
        layers = "" if self.layers == self.shape.layers else f"-{self.layers}layers"
        graph = "-graph" if self.graph else ""
        return f"{self.shape.name}{layers}-{self.batch}x{self.length}-{self.dtype}-step{graph}"


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, matmul_rate: float, bandwidth: float) -> float:
        """The floor."""
        return max(self.flops / matmul_rate, self.bytes / bandwidth)


def op_work(case: OpCase) -> Work:
    """The least work of one operation, with its adapter, in the directions that the case has."""
    shape, m, size = case.shape, case.tokens, itemsize(case.dtype)
    if case.part in GROUPS:
        return _projection_work(*shape.projections(case.part), m, case.r, size, case.backward)
    if case.part == "head":
        flops = 2 * m * shape.hidden * shape.vocabulary
        moved = (shape.hidden * shape.vocabulary + m * shape.hidden) * size
        return Work(flops * (1 + case.backward), moved * (1 + case.backward))
    rows = {
        "rope": (shape.heads + shape.kv_heads) * shape.head_dim,
        "swiglu": shape.inner,
    }.get(case.part, shape.hidden)
    # Tensors of [M, rows] that are read or written.
    forward, backward = {
        "rope": (2, 2),
        "rms_norm": (2, 3),
        "rms_norm_residual": (4, 4),
        "swiglu": (3, 5),
    }[case.part]
    return Work(0, (forward + backward * case.backward) * m * rows * size)


def step_work(case: StepCase) -> list[Work]:
    """The least work of each operation of a step: the floor of a step is the sum of theirs."""
    shape = case.shape
    vocabulary = LlamaShape(**{**vars(shape), "vocabulary": case.vocabulary})

    def work(part: str) -> Work:
        return op_work(OpCase(vocabulary, part, case.tokens, case.dtype, r=case.r))

    # Causal attention computes half of T² scores: two products forward, five backward.
    scores = case.batch * shape.heads * case.length**2 * shape.head_dim
    heads = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    attention = Work(7 * scores, 3 * heads * case.tokens * itemsize(case.dtype))
    block = [work(part) for part in (*GROUPS, "rope", "swiglu")]
    block += [work("rms_norm_residual"), work("rms_norm_residual"), attention]
    return block * case.layers + [work("rms_norm"), work("head")]


def floor_seconds(works: Iterable[Work], matmul_rate: float, bandwidth: float) -> float:
    return sum(work.seconds(matmul_rate, bandwidth) for work in works)


def itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def _projection_work(k: int, outputs: list[int], m: int, r: int, size: int, backward: bool) -> Work:
    n, g = sum(outputs), len(outputs)
    base, low_rank = 2 * m * k * n, 2 * m * r * (g * k + n)
    adapter = r * (g * k + n)
    flops = base + low_rank
    moved = m * k + k * n + m * n + adapter
    if backward:
        # dy weight; P = dy lora_b, d_lora_b, d_lora_a and P lora_a. dy and x are read, dx written.
        flops += base + 2 * low_rank
        moved += m * n + k * n + 2 * m * k + 2 * adapter
    return Work(flops, moved * size)
