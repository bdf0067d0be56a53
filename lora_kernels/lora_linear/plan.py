"""Which kernels LoRA linear layers of one shape run, and with which tiles. Pure and GPU-free.

Methods of the forward pass:
    one_pass   one kernel: S accumulates beside the base product, the rank-R product comes last
               (few rows, nothing trained: the same split along K, `triton_decode.py`)
    split      S = s x lora_aᵀ first, then a GEMM whose rank-R product comes after its K loop
    library    library GEMMs (`eager.py`), of the backward pass too

The tiles, and where it was timed also the method, come from the table of the GPU's architecture
(`tables/`), from the entry nearest in shape. Where there is none, and for ragged sizes, float32 and
dropout, a heuristic takes tiles that every architecture from sm_80 on compiles without spills.
There are few of them, because each is a compilation more for the user.

One pass repeats x lora_aᵀ for every column tile, R/BLOCK_N more arithmetic; split reads x once
more. They cost the same at N* = (F BLOCK_N / R) (1/W + t / 2MK), with F the matrix rate, W the copy
bandwidth and t the cost of a launch; below N* one pass wins. That decides where nothing was timed.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log2
from typing import Literal, TypeVar

import torch

from lora_kernels.lora_linear.tables import (
    DecodeConfig,
    Entry,
    PassConfig,
    TileConfig,
    load_table,
    nearest_entry,
    padded_rank,
)

Method = Literal["one_pass", "split", "library"]
Config = TypeVar("Config", TileConfig, PassConfig)

# Ranks above this leave too few registers beside the accumulator for one pass.
ONE_PASS_MAX_RANK = 64
ONE_PASS_MAX_RANK_FLOAT32 = 16
# The rows of one tile: up to here the weights' bytes are all that counts.
DECODE_MAX_ROWS = 16
# Launching one more kernel, in seconds.
LAUNCH_SECONDS = 2e-6
# Of a GPU without a table: matrix rate (FLOP/s, 16-bit inputs), copy bandwidth (bytes/s), and
# multiprocessors, of an ordinary data-centre card.
FLOPS, BYTES_PER_SECOND, MULTIPROCESSORS = 280e12, 1.4e12, 108


@dataclass(frozen=True)
class Plan:
    """What runs for one shape. With method "library" the tile fields are None.

    `decode` is there for few rows, and runs where S need not be kept.
    """

    method: Method
    reason: str
    forward: TileConfig | None = None
    shrink: PassConfig | None = None
    dx: TileConfig | None = None
    dy_b: PassConfig | None = None
    d_a: PassConfig | None = None
    decode: DecodeConfig | None = None

    def __str__(self) -> str:
        if self.forward is None:
            return f"library GEMMs ({self.reason})"
        tile = f"{self.forward.block_m}x{self.forward.block_n}x{self.forward.block_k}"
        descriptors = " by descriptors" if self.forward.descriptors else ""
        return f"{self.method} {tile}{descriptors} ({self.reason})"


def one_pass_limit(
    m: int,
    k: int,
    r: int,
    block_n: int,
    flops: float = FLOPS,
    bytes_per_second: float = BYTES_PER_SECOND,
) -> float:
    """N*: the number of outputs below which one pass is faster than split."""
    extra_read = 1 / bytes_per_second + LAUNCH_SECONDS / (2 * m * k)
    return flops * block_n / padded_rank(r) * extra_read


def one_pass_max_rank(dtype: torch.dtype) -> int:
    return ONE_PASS_MAX_RANK if dtype.itemsize == 2 else ONE_PASS_MAX_RANK_FLOAT32


@lru_cache(maxsize=4096)
def plan(
    m: int,
    n: int | tuple[int, ...],
    k: int,
    r: int | tuple[int, ...],
    dtype: torch.dtype,
    arch: str,
    dropout: bool = False,
    kernels: bool = False,
) -> Plan:
    """The plan for y_g[m, n_g] = x[m, k] weight_gᵀ with ranks r_g.

    Args:
        n, r: of one projection, or of several that share x.
        arch: "sm_90" and the like, "gfx942" and the like, "interpreter", or "cpu".
        dropout: one mask draw per element of x: done once (split), not once per column tile.
        kernels: the kernels are asked for by name: where they run at all, no library GEMMs, and
            no way around a faulty table.

    Raises:
        ValueError: with `kernels`, the architecture's table is faulty. Without, a warning and the
            plan's reason say so, and the heuristic takes its place.
    """
    n = n if isinstance(n, tuple) else (n,)
    r = r if isinstance(r, tuple) else (r,)
    if arch == "cpu":
        return Plan("library", "no GPU")
    if dtype == torch.float64 and arch != "interpreter":
        return Plan("library", "float64")
    note = ""
    try:
        table = load_table(arch)
    except ValueError as error:
        if kernels:
            raise
        warnings.warn(f"no table of tiles is used: {error}", stacklevel=2)
        table, note = None, f"; faulty table: {error}"
    flops, bandwidth, multiprocessors = FLOPS, BYTES_PER_SECOND, MULTIPROCESSORS
    if table is not None:
        flops, bandwidth = table.flops, table.bytes_per_second
        multiprocessors = table.multiprocessors
    entry = None
    if table is not None and not dropout and not any(size % 16 for size in (*n, k)):
        entry = nearest_entry(table, m, sum(n), k, max(r), dtype.itemsize * 8)
    if entry is None:
        entry = heuristic(m, n, k, max(r), dtype, arch, dropout, multiprocessors)
    if entry.method == "library" and not kernels:
        return Plan("library", "timed fastest")
    method: Method = "split"
    if dropout:
        reason = "dropout draws its mask once"
    elif max(r) > one_pass_max_rank(dtype):
        reason = f"rank {max(r)} > {one_pass_max_rank(dtype)}"
    elif arch == "interpreter":
        method, reason = "one_pass", "interpreter"
    elif entry.method in ("one_pass", "split"):
        method = "one_pass" if entry.method == "one_pass" else "split"
        reason = "timed fastest"
    elif m <= 64:
        method, reason = "one_pass", f"{m} rows"
    else:
        limit = one_pass_limit(m, k, max(r), entry.one_pass.block_n, flops, bandwidth)
        method = "one_pass" if sum(n) < limit else "split"
        reason = f"N {'<' if sum(n) < limit else '>='} {limit:.0f}"
    decode = None
    if method == "one_pass" and m <= DECODE_MAX_ROWS:
        decode = _for_outputs(entry.decode, entry.n, sum(n), k)
    # What reads x once for all the projections takes their ranks together.
    stacked = (max(r),) if dropout else (sum(r),)
    return Plan(
        method,
        reason + note,
        forward=entry.one_pass if method == "one_pass" else for_ranks(entry.split, r),
        shrink=for_ranks(entry.shrink, stacked),
        dx=for_ranks(entry.dx, stacked),
        dy_b=entry.dy_b,
        d_a=for_ranks(entry.d_a, stacked),
        decode=decode,
    )


def for_ranks(config: Config, r: Sequence[int]) -> Config:
    """The same tiles, as wide along the rank as the ranks need.

    GEMMs take ranks that 16 does not divide 16 at a time too: their loads, element by element,
    hold a register for each address.
    """
    small = max(r) <= 16
    if isinstance(config, TileConfig):
        small = small or any(rank % 16 for rank in r)
    return replace(config, block_r=16) if small else config


def _for_outputs(config: DecodeConfig, n_of_entry: int, n: int, k: int) -> DecodeConfig:
    """As many programs for n outputs as the entry has for its own."""
    wanted = config.splits * n_of_entry / max(n, 1)
    return replace(config, splits=splits_of_k(wanted, k, config.block_k))


def splits_of_k(wanted: float, k: int, block_k: int) -> int:
    """The nearest power of two splits of K, none of fewer than 4 steps."""
    splits = 2 ** round(log2(max(wanted, 1)))
    while splits > 1 and splits * 4 * block_k > k:
        splits //= 2
    return splits


def heuristic(
    m: int,
    n: tuple[int, ...],
    k: int,
    r: int,
    dtype: torch.dtype,
    arch: str = "",
    dropout: bool = False,
    multiprocessors: int = MULTIPROCESSORS,
) -> Entry:
    """Modest tiles for any GPU, in the form of a table's entry."""
    bits, outputs = dtype.itemsize * 8, sum(n)
    one_pass_rank = padded_rank(r, one_pass_max_rank(dtype))
    if arch == "interpreter":
        # Small tiles, so that small test shapes have several, with ragged ends.
        tile = TileConfig(16, 32, 16, one_pass_rank, 1, 1, group_m=2)
        narrow = replace(tile, block_r=16)
        rows = PassConfig(16, 16, 64, 48, 1, 1)
        return Entry(
            bits, m, outputs, k, r, "auto", tile, narrow, narrow, rows,
            PassConfig(16, 32, 16, 48, 1, 1), rows, DecodeConfig(32, 16, one_pass_rank, 3, 1, 1),
        )  # fmt: skip
    aligned = not any(size % 16 for size in (*n, k))
    chunk = chunk_rows(m, outputs // 128, r, multiprocessors)
    splits = decode_splits(outputs, k, 64, 64, multiprocessors)
    if not aligned or bits > 16:
        # Loads element by element and operands twice as wide take registers; narrow tiles leave
        # them.
        one_pass = tile = TileConfig(64, 32, 32, 16, 4, 2)
        rows = PassConfig(32, 32, 16, chunk, 4, 2)
        dy_b = replace(rows, num_warps=8)
        decode = DecodeConfig(64, 32, one_pass_rank, splits, 4, 2)
        if aligned:
            one_pass, tile = TileConfig(64, 64, 32, 16, 8, 2), TileConfig(64, 64, 32, 16, 4, 3)
            rows = PassConfig(64, 64, 16, chunk, 4, 3)
            decode = DecodeConfig(64, 64, one_pass_rank, splits, 4, 3)
        one_pass = replace(one_pass, block_r=one_pass_rank)
        return Entry(
            bits, m, outputs, k, r, "auto", one_pass, tile, tile, rows, dy_b, rows, decode
        )  # fmt: skip
    small, large = TileConfig(64, 64, 64, 64, 4, 3), TileConfig(128, 128, 64, 64, 8, 3)
    fills = _fills(m, outputs, multiprocessors)
    one_pass = TileConfig(64, 64, 64, one_pass_rank, 4 if r <= 32 else 8, 3)
    if fills and r <= 32:
        one_pass = TileConfig(128, 128, 32, one_pass_rank, 8, 3)
    dx = large if _fills(m, k, multiprocessors) else small
    few = m <= 32 * multiprocessors
    shrink = PassConfig(16, 128, 64, 64, 4, 4) if few else PassConfig(64, 128, 64, 64, 4, 3)
    d_a = PassConfig(64, 128, 64, chunk, 4, 3)
    if dropout:
        # The mask's integers take registers, and in dx a second accumulator does.
        dx = TileConfig(64, 128, 32, 64, 8, 3)
        shrink = PassConfig(16, 128, 64, 64, 4, 3) if few else PassConfig(64, 64, 64, 64, 4, 3)
        d_a = PassConfig(64, 64, 64, chunk, 4, 3)
    return Entry(
        bits, m, outputs, k, r, "auto",
        one_pass=one_pass,
        split=large if fills else small,
        dx=dx,
        shrink=shrink,
        dy_b=PassConfig(32, 256, 16, chunk, 4, 2)
        if r <= 16
        else PassConfig(32, 128, 64, chunk, 8, 2),
        d_a=d_a,
        decode=DecodeConfig(64, 64, one_pass_rank, splits, 4, 3),
    )  # fmt: skip


def _fills(m: int, columns: int, multiprocessors: int) -> bool:
    """Whether tiles of 128 x 128 keep most multiprocessors busy."""
    return 2 * -(-m // 128) * -(-columns // 128) >= multiprocessors


def chunk_rows(m: int, column_blocks: int, r: int, multiprocessors: int) -> int:
    """Rows of a chunk: so few that there are two programs per multiprocessor, yet so many that the
    partial results, r numbers of 4 bytes a column, are a quarter of what the chunk reads."""
    chunk = 1024
    while chunk > max(128, 8 * r) and -(-m // chunk) * column_blocks < 2 * multiprocessors:
        chunk //= 2
    return chunk


def decode_splits(n: int, k: int, block_n: int, block_k: int, multiprocessors: int) -> int:
    """So many that every multiprocessor has two programs."""
    return splits_of_k(2 * multiprocessors / max(1, -(-n // block_n)), k, block_k)
