"""How much memory a fine-tuning takes on each GPU, by calculation, before anything is downloaded.

    weights       of the frozen base, in its dtype; fully sharded (FSDP2) over the GPUs or a replica
    adapter       A and B in float32, their gradients, and AdamW's two moments: 16 bytes a parameter
    activations   what the forward pass keeps for the backward pass, T tokens on each GPU:
                      a block   T (4 H + (2 h + 2 k) D + 3 I) elements, S [T, R], and statistics
                      with gradient checkpointing T H a block, and all of the one that is replayed
    loss          one chunk of logits and the gradient of the last hidden states [T, H]; the logits
                  [T, V] of all tokens are never made
    working       the largest set of temporaries of the backward pass: those of an MLP
    gathered      FSDP2: two blocks' weights, the one that computes and the next, and those outside
                  the blocks (embedding, final norm, head), which stay gathered for the step;
                  DDP: the buckets in which the gradients travel
    runtime       CUDA's context, library workspaces and the allocator's slack

    H hidden size, I intermediate size, h and k heads and key-value heads of D, V vocabulary

A block keeps its input, both normalised inputs, the attention's q, k, v, output and log-sum, the
residual stream after attention, gate, up and their product. The figures are those of this package's
operations with an attention that keeps no [T, T] matrix (flash or memory-efficient SDPA). An
evaluation of as many sequences takes less than the step: it keeps no activations, and no logits
either.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from transformers import LlamaConfig

from lora_kernels.linear_cross_entropy.op import chunk_rows
from lora_llama.options import ALL_PROJECTIONS, DTYPES, MAX_RANK, check_range, names_of

Sharding = Literal["fsdp", "ddp"]
BaseDtype = Literal["bfloat16", "float16", "float32"]

# What a process holds beside its tensors: CUDA's context and kernels, cuBLAS's workspace, and the
# caching allocator's rounding. An estimate, not a measurement.
RUNTIME_BYTES = 1 << 30
CARDS_GB = (16, 24, 32, 80)
# A card has less than its name says: the driver and the display keep some.
USABLE = 0.97
_FP32 = 4

# Public configurations, so that nothing need be downloaded for the common question.
PRESETS: dict[str, dict[str, Any]] = {
    name: {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": width,
        "vocab_size": vocabulary, "tie_word_embeddings": tied,
    }
    for name, hidden, inner, layers, heads, kv, width, vocabulary, tied in (
        ("smollm2-135m", 576, 1536, 30, 9, 3, 64, 49152, True),
        ("llama-1b", 2048, 8192, 16, 32, 8, 64, 128256, True),
        ("llama-3b", 3072, 8192, 28, 24, 8, 128, 128256, True),
        ("llama-8b", 4096, 14336, 32, 32, 8, 128, 128256, False),
        ("llama-70b", 8192, 28672, 80, 64, 8, 128, 128256, False),
    )
}  # fmt: skip


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU, by what they hold; the parts are those of the module's docstring."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    working: int
    gathered: int
    runtime: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))

    def fits(self, card_gb: int) -> bool:
        """Whether a card of so many GB (as sold: 2³⁰ bytes each) holds it."""
        return self.total <= USABLE * card_gb * 2**30


def projection_sizes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of each projection of a block."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv, width = _heads(config)
    return {
        "q_proj": (hidden, heads * width), "k_proj": (hidden, kv * width),
        "v_proj": (hidden, kv * width), "o_proj": (heads * width, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    heads = config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    return heads, kv, config.get("head_dim") or config["hidden_size"] // heads


def estimate_memory(
    config: Mapping[str, Any],
    seq_len: int,
    batch_size: int = 1,
    gpus: int = 1,
    lora_r: int = 16,
    target_modules: Iterable[str] = ALL_PROJECTIONS,
    dtype: torch.dtype = torch.bfloat16,
    gradient_checkpointing: bool = False,
    sharding: Sharding = "fsdp",
    device_type: str = "cuda",
) -> MemoryEstimate:
    """The memory of a training step of a LoraLlama on each of several GPUs.

    Args:
        config: config.json's fields: hidden_size, intermediate_size, num_hidden_layers,
            num_attention_heads, num_key_value_heads, head_dim, vocab_size, tie_word_embeddings.
        seq_len: tokens of a sequence; batch_size: sequences on each GPU at a time.
        gpus: how many share the work; with "fsdp" they share the weights too.
        target_modules: names of the projections with an adapter, in every block.
        dtype: of the base weights and the activations.
        device_type: "cuda", or "cpu" for a step on a CPU, which has no runtime of CUDA's.

    Raises:
        ValueError: a number is out of range, a projection or the sharding is unknown.
    """
    sizes = projection_sizes(config)
    targets = list(target_modules)
    for name, number in (("seq_len", seq_len), ("batch_size", batch_size), ("gpus", gpus)):
        check_range(name, number, 1)
    check_range("lora_r", lora_r, 1, MAX_RANK)
    unknown = [name for name in targets if name not in sizes]
    if unknown or not targets:
        raise ValueError(
            f"lora_target_modules: expected names of {list(sizes)}, got {unknown or targets}"
        )
    if sharding not in get_args(Sharding):
        raise ValueError(f"sharding: expected one of {get_args(Sharding)}, got {sharding!r}")

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    layers, vocabulary = config["num_hidden_layers"], config["vocab_size"]
    heads, kv, width = _heads(config)
    bytes_each, tokens = dtype.itemsize, seq_len * batch_size
    block = sum(k * n for k, n in sizes.values()) + 2 * hidden
    tied = config.get("tie_word_embeddings", False)
    embeddings = vocabulary * hidden * (1 if tied else 2)
    adapter = layers * sum(lora_r * sum(sizes[name]) for name in targets)
    shards = gpus if sharding == "fsdp" else 1

    kept = tokens * (
        bytes_each * (4 * hidden + (2 * heads + 2 * kv) * width + 3 * inner + len(targets) * lora_r)
        # The attention's log-sums and the two norms' statistics.
        + _FP32 * (heads + 2)
    )
    replayed = tokens * bytes_each * hidden
    # What is kept of a block begins with its input.
    activations = (layers - 1) * replayed + kept if gradient_checkpointing else layers * kept
    rows = min(chunk_rows(tokens, vocabulary, dtype, device_type), tokens)
    logits = rows * vocabulary * bytes_each
    # The last normalised states, their gradient, and that gradient scaled.
    loss = tokens * bytes_each * 3 * hidden
    # While a chunk of logits is alive no gradient of a block is, and the other way about. In an MLP
    # the gradient of down's input takes the place of that input, and those of gate and up are new.
    working = max(logits, tokens * bytes_each * (2 * hidden + 2 * inner))
    gathered = 0
    if shards > 1:
        gathered = bytes_each * (2 * block + embeddings + hidden)
    elif gpus > 1:
        gathered = _FP32 * adapter
    return MemoryEstimate(
        weights=bytes_each * (layers * block + embeddings + hidden) // shards,
        adapter=_FP32 * adapter // shards,
        gradients=_FP32 * adapter // shards,
        optimizer=2 * _FP32 * adapter // shards,
        activations=activations,
        loss=loss,
        working=working,
        gathered=gathered,
        runtime=RUNTIME_BYTES if device_type == "cuda" else 0,
    )


def avoided_logits(
    config: Mapping[str, Any], seq_len: int, batch_size: int, dtype: torch.dtype
) -> int:
    """Bytes of the logits of all tokens, in the model's dtype and in float32, as a loss needs."""
    return seq_len * batch_size * config["vocab_size"] * (dtype.itemsize + _FP32)


def estimate_table(
    config: Mapping[str, Any],
    seq_lens: Iterable[int],
    gpus: Iterable[int],
    lora_rs: Iterable[int],
    **options: Any,
) -> str:
    """One line for each combination, with and without gradient checkpointing, in GiB on each GPU.

    Args:
        options: `estimate_memory`'s others.
    """
    parts = [part.name for part in fields(MemoryEstimate)]
    header = ["GPUs", "seq_len", "r", "checkpointing", *parts, "total", "fits (GB)"]
    rows = [header]
    for count in gpus:
        for seq_len in seq_lens:
            for r in lora_rs:
                for checkpointing in (False, True):
                    estimate = estimate_memory(
                        config, seq_len, gpus=count, lora_r=r,
                        gradient_checkpointing=checkpointing, **options,
                    )  # fmt: skip
                    fitting = [str(card) for card in CARDS_GB if estimate.fits(card)]
                    rows.append([
                        str(count), str(seq_len), str(r), "yes" if checkpointing else "no",
                        *(f"{getattr(estimate, part) / 2**30:.2f}" for part in parts),
                        f"{estimate.total / 2**30:.2f}", " ".join(fitting) or "none",
                    ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def estimate(
    model: str,
    seq_len: list[int] | int | str = 2048,
    gpus: list[int] | int | str = 1,
    lora_r: list[int] | int | str = 16,
    batch_size: int = 1,
    lora_target_modules: list[str] | str = "all-linear",
    dtype: BaseDtype = "bfloat16",
    sharding: Sharding = "fsdp",
) -> None:
    """Say how much memory a fine-tuning takes on each GPU, and which cards hold it.

    Args:
        model: directory or hub id of a Llama (its config.json alone is read), or one of
            smollm2-135m, llama-1b, llama-3b, llama-8b, llama-70b.
        seq_len: tokens of a sequence; one number or several, as 1024,4096.
        gpus: how many GPUs; one number or several.
        lora_r: rank of the adapter; one number or several.
        batch_size: sequences on each GPU at a time.
        lora_target_modules: names of the projections with an adapter; all-linear takes every one.
        dtype: dtype of the base weights.
        sharding: fsdp shares the weights among the GPUs, ddp gives each its own.
    """
    from lora_llama.loading import read_llama_config

    lengths, base_dtype = _several("seq_len", seq_len), DTYPES[dtype]
    counts, ranks = _several("gpus", gpus), _several("lora_r", lora_r)
    targets = lora_target_modules
    if targets == "all-linear":
        targets = list(ALL_PROJECTIONS)
    else:
        targets = names_of("lora_target_modules", targets)
    config = PRESETS.get(model)
    if config is None:
        # What the file leaves out has a default.
        config = LlamaConfig(**read_llama_config(model, None, check_weights=False)).to_dict()
    table = estimate_table(
        config, lengths, counts, ranks, batch_size=batch_size, target_modules=targets,
        dtype=base_dtype, sharding=sharding,
    )  # fmt: skip
    print(f"{model}, {dtype}, {sharding}, batch {batch_size}: GiB on each GPU\n{table}")
    for length in lengths:
        avoided = avoided_logits(config, length, batch_size, base_dtype)
        print(f"seq_len {length}: logits never made: {avoided / 2**30:.2f} GiB")
    print("Calculated, not measured; `runtime` is an allowance for CUDA and its allocator.")


def _several(name: str, value: list[int] | int | str) -> list[int]:
    """The numbers of a list, or of a text with commas between them."""
    parts: list[Any] = value if isinstance(value, list) else str(value).split(",")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"{name}: expected whole numbers, as 1,8, got {value!r}")
    return numbers
