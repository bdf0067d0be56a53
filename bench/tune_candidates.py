"""What the tuner chooses among: tiles for each kernel, the likely best first; and untimed tables.

    one_pass, split, dx     GEMMs                       large tiles first
    shrink, d_a, dy_b       passes over x and over dy   what moves the fewest bytes first
    decode                  one pass, split along K     narrow tiles first: more programs

Which candidates compile without spills within the shared memory differs from architecture to
architecture, and is found out by compiling them (`fitting`); of an untimed table each entry has the
first that do. The order is from published measurements: 128 x 256 x 64 with 8 warps, through
descriptors, on sm_90 (Triton PR #5461, PyTorch PR #181413), 128 x 128 on sm_89 and sm_120.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from typing import Any

from bench.compile_report import compile_case
from lora_kernels.lora_linear.compile_cases import FORWARD, HEAVY, USUAL, Config, kernel_case
from lora_kernels.lora_linear.plan import chunk_rows, decode_splits
from lora_kernels.lora_linear.tables import (
    DecodeConfig,
    Entry,
    PassConfig,
    Table,
    TileConfig,
)

PARTS = ("one_pass", "split", "dx", "shrink", "dy_b", "d_a", "decode")
# One of each class of rank.
RANKS = (16, 32, 64)
# Kernels whose tiles are the same for all ranks.
ANY_RANK = ("split", "dx", "shrink", "d_a")
UNTIMED_ROWS = (16, 64, 512, 2048, 8192)
# A large model's projection, and a small one's.
UNTIMED_SIZES = (4096, 768)
# By part and rank: the candidates that compile without a fault.
Fitting = Mapping[tuple[str, int], list[Config]]


@dataclass(frozen=True)
class Rates:
    """FLOP/s of 16-bit products and bytes/s copied."""

    flops: float
    bytes_per_second: float
    multiprocessors: int


# Estimates of what the fastest card of each reaches, from data sheets and published runs: A100,
# RTX 3090, RTX 4090, H200, B200, RTX 5090, MI300X, MI355X. A timed table has its own run's figures.
RATES = {
    "sm_80": Rates(280e12, 1.7e12, 108),
    "sm_86": Rates(64e12, 0.84e12, 82),
    "sm_89": Rates(165e12, 0.9e12, 128),
    "sm_90": Rates(790e12, 4.3e12, 132),
    "sm_100": Rates(1600e12, 7.0e12, 148),
    "sm_120": Rates(210e12, 1.5e12, 170),
    "gfx942": Rates(700e12, 4.3e12, 304),
    "gfx950": Rates(1400e12, 6.5e12, 256),
}


def candidates(arch: str, part: str, r: int) -> list[Config]:
    """The candidates of one kernel for ranks of r's class, best first; what compiles is not known.

    Args:
        arch: a key of RATES.
        r: one of RANKS.
    """
    amd, wide = arch.startswith("gfx"), arch in ("sm_90", "sm_100")
    stages = 2 if amd else 3
    if part in ("split", "dx"):
        tiles = [
            *([(128, 256, 64, 8, 4), (128, 256, 64, 8, 3)] if wide else []),
            *([(256, 128, 64, 8, stages)] if amd else []),
            (128, 128, 64, 8, 4 if wide else stages), (128, 128, 32, 8, stages),
            (64, 128, 64, 4, stages), (64, 64, 64, 4, stages), (64, 64, 32, 4, stages),
        ]  # fmt: skip
        pointers = [TileConfig(m, n, k, 64, w, s) for m, n, k, w, s in tiles]
        if arch not in ("sm_90", "sm_100", "sm_120"):
            return list(pointers)
        described = [replace(tile, descriptors=True) for tile in pointers if tile.block_m == 128]
        # On sm_120 Triton 3.6 keeps a stack for every load by descriptor.
        ordered = [*described, *pointers] if wide else [*pointers, *described]
        return [*sorted(ordered, key=lambda tile: -tile.block_m * tile.block_n)]
    if part == "one_pass":
        deep, shallow = (128, 128, 64, 8, stages), (128, 128, 32, 8, stages)
        large = [deep, shallow] if wide or amd else [shallow, deep]
        # A wide S takes registers beside the accumulator: more warps share them.
        warps = (4, 8) if r <= 32 else (8, 4)
        tiles = [
            *([(128, 256, 64, 8, 3)] if wide and r == 16 else []),
            *(large if r <= 32 else []),
            *((64, 64, 64, count, stages) for count in warps),
            (64, 64, 32, 4, stages),
        ]  # fmt: skip
        return [TileConfig(m, n, k, r, w, s) for m, n, k, w, s in tiles]
    if part == "decode":
        sizes = [(64, 64, 4, stages), (32, 128, 4, stages), (32, 64, 4, stages), (64, 128, 8, 3)]
        return [DecodeConfig(n, k, r, 1, w, s) for n, k, w, s in sizes]
    if part == "dy_b":
        if r == 16:
            sizes = [(32, 256, 4, 2), (32, 128, 4, 2), (64, 128, 8, stages)]
            return [PassConfig(m, n, 16, 512, w, s) for m, n, w, s in sizes]
        sizes = [(32, 128, 8, 2), (64, 128, 8, stages), (32, 64, 4, 2)]
        return [PassConfig(m, n, 64, 512, w, s) for m, n, w, s in sizes]
    sizes = [(64, 128, 4, stages), (64, 64, 4, stages), (32, 64, 4, stages)]
    if part == "shrink":
        sizes = [(16, 128, 4, stages + 1), (16, 64, 4, stages), *sizes]
    return [PassConfig(m, n, 64, 512, w, s) for m, n, w, s in sizes]


def needed_cases(part: str, config: Config) -> Iterator[Any]:
    """The compile cases that must be sound for the configuration to stand in a table."""
    heavy = [HEAVY, replace(HEAVY, label="int64", int64=True)]
    if part in FORWARD:
        heavy += [
            replace(variant, label=f"{variant.label} scales", options=False, scales=True)
            for variant in heavy
        ]
    if part in ("split", "dx"):
        # Narrow along the rank for small ranks, and those that 16 does not divide.
        assert isinstance(config, TileConfig)
        for of_pointers in {config, replace(config, descriptors=False)}:
            narrow = replace(of_pointers, block_r=16)
            yield from (kernel_case(part, narrow, variant) for variant in (USUAL, *heavy))
            yield kernel_case(part, of_pointers, USUAL)
        return
    if part in ("shrink", "d_a"):
        yield kernel_case(part, replace(config, block_r=16), USUAL)
    elif isinstance(config, DecodeConfig):
        yield kernel_case(part, config, USUAL)
        config = replace(config, splits=2)
    yield from (kernel_case(part, config, variant) for variant in (USUAL, *heavy))


def compile_indexed(arch: str, part: str, r: int, index: int) -> list[str]:
    """The faults of one candidate, compiled in all the ways it is launched."""
    config = candidates(arch, part, r)[index]
    return [
        fault for case in needed_cases(part, config) for fault in compile_case(arch, case).faults
    ]


def fitting(arch: str) -> Fitting:
    """Compiles every candidate, on all cores.

    Raises:
        RuntimeError: of some kernel no candidate compiles.
    """
    # Ranks with the same candidates are compiled once.
    sharing = {(part, r): 64 if part in ANY_RANK else r for part in PARTS for r in RANKS}
    jobs = [
        (arch, part, r, index)
        for part, r in dict.fromkeys((part, shared) for (part, _), shared in sharing.items())
        for index in range(len(candidates(arch, part, r)))
    ]
    # Interpreted kernels cannot be compiled; the processes read this when they start.
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            faults = list(pool.map(compile_indexed, *zip(*jobs, strict=True)))
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    sound: dict[tuple[str, int], list[Config]] = {}
    for (_, part, r, index), of_candidate in zip(jobs, faults, strict=True):
        if not of_candidate:
            sound.setdefault((part, r), []).append(candidates(arch, part, r)[index])
    found = {}
    for (part, r), shared in sharing.items():
        if (part, shared) not in sound:
            raise RuntimeError(f"{arch}: no candidate of {part} for rank {r} compiles")
        found[part, r] = sound[part, shared]
    return found


def untimed_entry(arch: str, m: int, n: int, k: int, r: int, found: Fitting) -> Entry:
    """The first candidates, of GEMMs those that give most multiprocessors a tile."""
    processors = RATES[arch].multiprocessors
    chosen: dict[str, Any] = {}
    for part in PARTS:
        configs = found[part, r]
        if part in ("one_pass", "split", "dx"):
            configs = for_size(configs, m, k if part == "dx" else n, processors)
        elif part == "shrink" and m > 32 * processors:
            # Enough rows for large blocks, which read lora_a less often.
            configs = [c for c in configs if isinstance(c, PassConfig) and c.block_rows >= 64]
        chosen[part] = adapted(part, configs[0], m, n, k, r, processors)
    return Entry(16, m, n, k, r, "auto", **chosen)


def for_size(configs: list[Config], rows: int, columns: int, processors: int) -> list[Config]:
    """GEMM tiles of which there are enough for three fifths of the multiprocessors; if there are
    none, all, the smallest first."""
    tiles = [config for config in configs if isinstance(config, TileConfig)]
    filling: list[Config] = [
        tile
        for tile in tiles
        if 5 * -(-rows // tile.block_m) * -(-columns // tile.block_n) > 3 * processors
    ]
    return filling or [*sorted(tiles, key=lambda tile: tile.block_m * tile.block_n)]


def adapted(part: str, config: Config, m: int, n: int, k: int, r: int, processors: int) -> Config:
    """The configuration with as many chunks or splits as occupy the GPU."""
    if isinstance(config, DecodeConfig):
        splits = decode_splits(n, k, config.block_n, config.block_k, processors)
        return replace(config, splits=splits)
    if isinstance(config, PassConfig) and part != "shrink":
        columns = k if part == "d_a" else n
        blocks = columns // config.block_columns
        return replace(config, chunk=chunk_rows(m, blocks, r, processors))
    return config


def untimed_table(arch: str, found: Fitting) -> Table:
    entries = []
    for size, r in product(UNTIMED_SIZES, RANKS):
        of_rank = [untimed_entry(arch, m, size, size, r, found) for m in UNTIMED_ROWS]
        # Entries of few rows that say what the next one says are left out.
        while len(of_rank) > 1 and replace(of_rank[0], m=of_rank[1].m) == of_rank[1]:
            del of_rank[0]
        entries += of_rank
    return Table(arch, **asdict(RATES[arch]), measured=None, entries=tuple(entries))
