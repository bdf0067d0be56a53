"""Which kernels a LoRA linear layer of one shape runs, and with which tiles. Pure and GPU-free.

Methods of the forward pass:
    one_pass   one kernel: S accumulates beside the base product, the rank-R product comes last
    split      S = s x lora_aᵀ first, then a GEMM whose rank-R product comes after its K loop
    library    library GEMMs (`eager.py`)

One pass repeats x lora_aᵀ for every column tile, R/BLOCK_N more arithmetic; split reads x once
more. They cost the same at N* = (F BLOCK_N / R) (1/W + t / 2MK), with F the matrix rate, W the copy
bandwidth and t the cost of a launch; below N* one pass wins. The rates are published figures, and
an unknown architecture takes the most modest tiles.
"""

from dataclasses import dataclass
from typing import Literal

import torch

Method = Literal["one_pass", "split", "library"]

# Ranks above this leave too few registers beside the accumulator for one pass.
ONE_PASS_MAX_RANK = 64
ONE_PASS_MAX_RANK_FLOAT32 = 16
# Launching one more kernel, in seconds.
LAUNCH_SECONDS = 2e-6
# Matrix rate (FLOP/s, 16-bit inputs) and copy bandwidth (bytes/s).
RATES = {
    "sm_80": (280e12, 1.4e12),
    "sm_86": (75e12, 0.7e12),
    "sm_89": (165e12, 0.9e12),
    "sm_90": (790e12, 4.3e12),
    "sm_100": (1600e12, 7.0e12),
    "sm_120": (210e12, 1.5e12),
}
LARGE_TILE_ARCHS = ("sm_90", "sm_100")


@dataclass(frozen=True)
class TileConfig:
    """Tiles of a GEMM: out[block_m, block_n], reduced block_k at a time; rank block_r at a time."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    group_m: int = 8


@dataclass(frozen=True)
class PassConfig:
    """Tiles of one pass over a tall matrix: [block_rows, block_columns] at a time.

    `chunk` is what one program covers of the dimension it walks along; each chunk gives one
    partial result, and the partial results are added in their order.
    """

    block_rows: int
    block_columns: int
    block_r: int
    chunk: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """What runs for one shape. With method "library" the tile fields are None."""

    method: Method
    reason: str
    forward: TileConfig | None = None
    shrink: PassConfig | None = None
    dx: TileConfig | None = None
    dy_b: PassConfig | None = None
    d_a: PassConfig | None = None

    def __str__(self) -> str:
        if self.forward is None:
            return f"library GEMMs ({self.reason})"
        tile = f"{self.forward.block_m}x{self.forward.block_n}x{self.forward.block_k}"
        return f"{self.method} {tile} ({self.reason})"


def next_power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def padded_rank(r: int, limit: int) -> int:
    """The rank as a dot operand: a power of two from 16 to `limit`."""
    return min(max(16, next_power_of_2(r)), limit)


def one_pass_limit(m: int, k: int, r: int, block_n: int, arch: str) -> float:
    """N*: the number of outputs below which one pass is faster than split."""
    rate, bandwidth = RATES.get(arch, RATES["sm_80"])
    extra_read = 1 / bandwidth + LAUNCH_SECONDS / (2 * m * k)
    return rate * block_n / padded_rank(r, 1 << 30) * extra_read


def one_pass_max_rank(dtype: torch.dtype) -> int:
    return ONE_PASS_MAX_RANK if dtype.itemsize == 2 else ONE_PASS_MAX_RANK_FLOAT32


def _gemm_tile(
    shape: tuple[int, int, int],
    r: int,
    dtype: torch.dtype,
    arch: str,
    one_pass: bool = False,
    dropout: bool = False,
) -> TileConfig:
    m, n, k = shape
    large = dtype.itemsize == 2 and m > 64 and not (n % 16 or k % 16)
    # S of one pass lives in registers whole; the tail of split and dx walks through the rank.
    rank = padded_rank(r, one_pass_max_rank(dtype) if one_pass else 32 if large else 16)
    if arch == "interpreter":
        # Small tiles, so that small test shapes have several, with ragged ends.
        return TileConfig(16, 32, 16, rank, 1, 1, group_m=2)
    block_m = 16 if m <= 16 else 64
    if n % 16 or k % 16:
        # Loads element by element take registers; a narrow tile leaves them.
        return TileConfig(block_m, 64, 32, rank, 4 if m <= 16 else 8, 2)
    if not large:
        return TileConfig(block_m, 64, 32 if dtype == torch.float32 else 64, rank, 4, 3)
    if dropout:
        # Two accumulators and the mask's integers: a larger tile spills.
        return TileConfig(64, 128, 32, rank, 8, 3)
    if arch in LARGE_TILE_ARCHS:
        return TileConfig(128, 256, 64, rank, 8, 3)
    return TileConfig(128, 128, 64 if rank <= 32 else 32, rank, 8, 3)


def _pass_tile(
    shape: tuple[int, int, int],
    r: int,
    dtype: torch.dtype,
    arch: str,
    chunk: int,
    dropout: bool = False,
) -> PassConfig:
    m, n, k = shape
    if arch == "interpreter":
        return PassConfig(16, 16, 16, 48, 1, 1)
    if n % 16 or k % 16:
        return PassConfig(16 if m <= 16 else 32, 32, padded_rank(r, 32), chunk, 4, 2)
    if m <= 16:
        return PassConfig(16, 64, padded_rank(r, 32), chunk, 4, 3)
    if dtype == torch.float32 or dropout:
        return PassConfig(64, 64, padded_rank(r, 32), chunk, 4, 3)
    # The more rows, the fewer partial results of d_lora_b; 4 warps or 3 stages spill on sm_120.
    rank = padded_rank(r, 64)
    stages = 3 if arch in LARGE_TILE_ARCHS else 2
    return PassConfig(128 if rank <= 32 else 64, 64, rank, chunk, 8, stages)


def plan(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, arch: str, dropout: bool = False
) -> Plan:
    """The plan for y[m, n] = x[m, k] weightᵀ with rank r.

    Args:
        arch: "sm_90" and the like, "gfx942" and the like, "interpreter", or "cpu".
        dropout: one mask draw per element of x: done once (split), not once per column tile.
    """
    if arch == "cpu":
        return Plan("library", "no GPU")
    if dtype == torch.float64 and arch != "interpreter":
        return Plan("library", "float64")
    shape = (m, n, k)
    one_pass_tile = _gemm_tile(shape, r, dtype, arch, one_pass=True)
    method: Method = "split"
    if dropout:
        reason = "dropout draws its mask once"
    elif r > one_pass_max_rank(dtype):
        reason = f"rank {r} > {one_pass_max_rank(dtype)}"
    elif arch == "interpreter":
        method, reason = "one_pass", "interpreter"
    elif m <= 64:
        method, reason = "one_pass", f"{m} rows"
    else:
        limit = one_pass_limit(m, k, r, one_pass_tile.block_n, arch)
        method = "one_pass" if n < limit else "split"
        reason = f"N {'<' if n < limit else '>='} {limit:.0f}"
    return Plan(
        method,
        reason,
        forward=one_pass_tile if method == "one_pass" else _gemm_tile(shape, r, dtype, arch),
        shrink=_pass_tile(shape, r, dtype, arch, k, dropout),
        dx=_gemm_tile((m, k, n), r, dtype, arch, dropout=dropout),
        dy_b=_pass_tile(shape, r, dtype, arch, 512),
        d_a=_pass_tile(shape, r, dtype, arch, 1024, dropout),
    )
