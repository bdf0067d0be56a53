"""Which tiles a mixed batch runs with. Pure and GPU-free.

The tiles are near those of the heuristic for one adapter (`lora_linear/plan.py`), whose products
run here over rows that are gathered and whose factors begin at places known only on the device. The
addresses take registers, so that these are the largest that every architecture from sm_80 on
compiles without spills. Where an architecture's table has timed library GEMMs as the fastest for
one adapter, the base product is the library's here too, and the kernel adds to it.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from lora_kernels.lora_linear.plan import MULTIPROCESSORS, chunk_rows, for_ranks, heuristic
from lora_kernels.lora_linear.plan import plan as plan_for_one_adapter
from lora_kernels.lora_linear.tables import PassConfig, TileConfig


@dataclass(frozen=True)
class MixedPlan:
    """What runs for one shape.

    Attributes:
        library_base: the base product is the library's, and `expand` and `dx` add to it.
        expand, dx: the GEMMs of y and of dx.
        shrink: the pass over x or dy that makes S or P.
        segments: the pass over x or dy that makes the gradients of the adapters.
    """

    library_base: bool
    expand: TileConfig
    dx: TileConfig
    shrink: PassConfig
    segments: PassConfig

    def __str__(self) -> str:
        tile = f"{self.expand.block_m}x{self.expand.block_n}x{self.expand.block_k}"
        return f"mixed {tile}{' on a library GEMM' if self.library_base else ''}"


@lru_cache(maxsize=4096)
def plan(
    m: int,
    n: int,
    k: int,
    ranks: tuple[int, ...],
    dtype: torch.dtype,
    arch: str,
    dropout: bool = False,
) -> MixedPlan:
    """The plan for y[m, n] from x[m, k] and adapters of these ranks; `arch` as in `lora_linear`."""
    if arch == "interpreter":
        tiles = heuristic(m, (n,), k, max(ranks), dtype, arch, dropout)
        expand, dx, shrink, segments = tiles.split, tiles.dx, tiles.shrink, tiles.d_a
        library_base = False
    else:
        method = plan_for_one_adapter(m, n, k, max(ranks), dtype, arch, dropout).method
        library_base = method == "library"
        expand, dx, shrink, segments = plan_tiles(m, n, k, max(ranks), dtype, dropout, library_base)
    return MixedPlan(
        library_base,
        for_ranks(expand, ranks),
        for_ranks(dx, ranks),
        for_ranks(shrink, ranks),
        for_ranks(segments, ranks),
    )


def plan_tiles(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, dropout: bool, library_base: bool
) -> tuple[TileConfig, TileConfig, PassConfig, PassConfig]:
    """`expand`, `dx`, `shrink` and `segments`."""
    chunk = chunk_rows(m, max(n, k) // 128, r, MULTIPROCESSORS)
    if n % 16 or k % 16:
        # Loads element by element hold a register for each address.
        gemm = TileConfig(64, 32, 32, 16, 8, 2)
        rows = PassConfig(32, 32, 16, chunk, 8 if dtype.itemsize == 2 else 4, 2)
        return gemm, replace(gemm, block_m=32, num_warps=4) if dropout else gemm, rows, rows
    if dtype.itemsize > 2:
        gemm = TileConfig(64, 64, 32, 16, 4, 3)
        rows = PassConfig(32, 64, 16, chunk, 4, 3)
        return gemm, gemm, rows, rows
    small, large = TileConfig(64, 64, 64, 64, 4, 3), TileConfig(128, 128, 64, 64, 8, 3)
    if library_base:
        # No loop along the reduction: what is read and written is all.
        large = small
    few = m <= 32 * MULTIPROCESSORS
    shrink = PassConfig(16, 128, 64, chunk, 4, 4) if few else PassConfig(64, 64, 64, chunk, 4, 3)
    segments = PassConfig(64, 128, 64, chunk, 4, 3)
    expand = large if _fills(m, n) else small
    dx = large if _fills(m, k) else small
    if dropout:
        # The mask's integers take registers, and in dx a second accumulator does.
        dx = TileConfig(64, 64, 32, 64, 8, 3)
        shrink = replace(shrink, num_warps=4 if few else 8, num_stages=3)
        segments = replace(segments, block_columns=64)
    return expand, dx, shrink, segments


def _fills(m: int, columns: int) -> bool:
    """Whether tiles of 128 x 128 keep most multiprocessors busy."""
    return 2 * -(-m // 128) * -(-columns // 128) >= MULTIPROCESSORS
