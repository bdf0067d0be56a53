"""Which kernels LoRA linear layers of one shape run, and with which tiles. Pure and GPU-free.

Methods of the forward pass:
    one_pass   one kernel: S accumulates beside the base product, the rank-R product comes last
               (few rows, nothing trained: the same split along K, `triton_decode.py`)
    split      S = s x lora_aᵀ first, then a GEMM whose rank-R product comes after its K loop
    library    library GEMMs (`eager.py`)

The tiles, and where it was timed also the method, come from the table of the GPU's architecture
(`tables/`), from the entry nearest in shape. Where there is none, a heuristic takes tiles that
every architecture from sm_80 on compiles without spills.

One pass repeats x lora_aᵀ for every column tile, R/BLOCK_N more arithmetic; split reads x once
more. They cost the same at N* = (F BLOCK_N / R) (1/W + t / 2MK), with F the matrix rate, W the copy
bandwidth and t the cost of a launch; below N* one pass wins. That decides where nothing was timed.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from lora_kernels.lora_linear.tables import (
    DecodeConfig,
    Entry,
    PassConfig,
    TileConfig,
    load_table,
    nearest_entry,
    next_power_of_2,
    padded_rank,
)

Method = Literal["one_pass", "split", "library"]

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
        return f"{self.method} {tile} ({self.reason})"


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
) -> Plan:
    """The plan for y_g[m, n_g] = x[m, k] weight_gᵀ with ranks r_g.

    Args:
        n, r: of one projection, or of several that share x.
        arch: "sm_90" and the like, "gfx942" and the like, "interpreter", or "cpu".
        dropout: one mask draw per element of x: done once (split), not once per column tile.

    Raises:
        ValueError: the architecture's table is faulty.
    """
    n = n if isinstance(n, tuple) else (n,)
    r = r if isinstance(r, tuple) else (r,)
    if arch == "cpu":
        return Plan("library", "no GPU")
    if dtype == torch.float64 and arch != "interpreter":
        return Plan("library", "float64")
    aligned = not k % 16 and all(not size % 16 for size in n)
    table = load_table(arch)
    entry = None
    if table is not None and aligned and not dropout:
        entry = nearest_entry(table, m, sum(n), k, max(r), dtype.itemsize * 8)
    if entry is None:
        entry = _heuristic(m, n, k, r, dtype, arch, dropout)
    if entry.method == "library":
        return Plan("library", "timed fastest")
    flops, bandwidth = FLOPS, BYTES_PER_SECOND
    if table is not None:
        flops, bandwidth = table.flops, table.bytes_per_second
    method: Method = "split"
    if dropout:
        reason = "dropout draws its mask once"
    elif max(r) > one_pass_max_rank(dtype):
        reason = f"rank {max(r)} > {one_pass_max_rank(dtype)}"
    elif arch == "interpreter":
        method, reason = "one_pass", "interpreter"
    elif entry.method in ("one_pass", "split"):
        method, reason = entry.method, "timed fastest"
    elif m <= 64:
        method, reason = "one_pass", f"{m} rows"
    else:
        limit = one_pass_limit(m, k, max(r), entry.one_pass.block_n, flops, bandwidth)
        method = "one_pass" if sum(n) < limit else "split"
        reason = f"N {'<' if sum(n) < limit else '>='} {limit:.0f}"
    decodes = m <= DECODE_MAX_ROWS and max(r) <= ONE_PASS_MAX_RANK and not dropout
    # What reads x once for all the projections takes their ranks together.
    stacked = max(r) if dropout else sum(r)
    return Plan(
        method,
        reason,
        forward=entry.one_pass if method == "one_pass" else entry.split,
        shrink=_for_rank(entry.shrink, stacked),
        dx=entry.dx,
        dy_b=entry.dy_b,
        d_a=_for_rank(entry.d_a, stacked),
        decode=entry.decode if decodes else None,
    )


def _for_rank(config: PassConfig, r: int) -> PassConfig:
    """The same tiles, 64 wide along the rank where 16 are too few."""
    return replace(config, block_r=16 if r <= 16 else 64)


def _heuristic(
    m: int,
    n: tuple[int, ...],
    k: int,
    r: tuple[int, ...],
    dtype: torch.dtype,
    arch: str,
    dropout: bool,
) -> Entry:
    """Modest tiles for any GPU, ragged sizes, float32 and dropout."""
    rank = max(r)
    one_pass_rank = padded_rank(rank, one_pass_max_rank(dtype))
    decode_rank = padded_rank(rank, ONE_PASS_MAX_RANK)
    if arch == "interpreter":
        # Small tiles, so that small test shapes have several, with ragged ends.
        tile = TileConfig(16, 32, 16, one_pass_rank, 1, 1, group_m=2)
        narrow = replace(tile, block_r=16)
        rows = PassConfig(16, 16, 16, 48, 1, 1)
        return Entry(
            dtype.itemsize * 8, m, sum(n), k, rank, "auto", tile, narrow, narrow, rows,
            replace(rows, block_columns=32), rows, DecodeConfig(32, 16, decode_rank, 3, 1, 1),
        )  # fmt: skip
    tile = _tile(m, (*n, k), dtype, dropout=False)
    rows = _pass(m, (*n, k))
    return Entry(
        dtype.itemsize * 8, m, sum(n), k, rank, "auto",
        one_pass=replace(tile, block_r=one_pass_rank),
        split=tile,
        dx=_tile(m, (*n, k), dtype, dropout),
        shrink=replace(rows, block_rows=_shrink_rows(m, rows.block_rows)),
        dy_b=_dy_b(m, (*n, k), rank, dtype),
        d_a=rows,
        decode=DecodeConfig(64, 64, decode_rank, decode_splits(n, k, 64, 64), 4, 3),
    )  # fmt: skip


def _tile(m: int, sizes: tuple[int, ...], dtype: torch.dtype, dropout: bool) -> TileConfig:
    aligned = all(not size % 16 for size in sizes)
    large = dtype.itemsize == 2 and m > 64 and aligned
    rank = 32 if large else 16
    block_m = 16 if m <= 16 else 64
    if not aligned:
        # Loads element by element take registers; a narrow tile leaves them.
        return TileConfig(block_m, 64, 32, rank, 4 if m <= 16 else 8, 2)
    if not large:
        return TileConfig(block_m, 64, 32 if dtype == torch.float32 else 64, rank, 4, 3)
    if dropout:
        # Two accumulators and the mask's integers: a larger tile spills.
        return TileConfig(64, 128, 32, rank, 8, 3)
    return TileConfig(128, 128, 32, rank, 8, 3)


def _pass(m: int, sizes: tuple[int, ...]) -> PassConfig:
    rank = 16
    if any(size % 16 for size in sizes):
        return PassConfig(16 if m <= 16 else 32, 32, rank, 1024, 4, 2)
    if m <= 16:
        return PassConfig(16, 64, rank, 1024, 4, 3)
    return PassConfig(64, 64, rank, 1024, 4, 3)


def _dy_b(m: int, sizes: tuple[int, ...], r: int, dtype: torch.dtype) -> PassConfig:
    # Wide in columns: P leaves a partial result for each block of them.
    if any(size % 16 for size in sizes):
        return PassConfig(16 if m <= 16 else 32, 32, 16, 512, 4, 2)
    columns = 64 if dtype == torch.float32 else 128
    return PassConfig(16 if m <= 16 else 32, columns, 16 if r <= 16 else 32, 512, 4, 2)


def _shrink_rows(m: int, limit: int, multiprocessors: int = MULTIPROCESSORS) -> int:
    """Rows of a block, so few that every multiprocessor has one."""
    return min(max(16, next_power_of_2(m // multiprocessors)), limit)


def decode_splits(
    n: tuple[int, ...], k: int, block_n: int, block_k: int, multiprocessors: int = MULTIPROCESSORS
) -> int:
    """Splits along K, so many that every multiprocessor has two programs of 4 steps or more."""
    tiles = sum(-(-size // block_n) for size in n)
    wanted = -(-2 * multiprocessors // tiles)
    return max(1, min(wanted, k // (4 * block_k)))
