"""The tables of tiles, one file an architecture: their format, their check, the nearest entry.

    tables/sm_90.json = {"arch", "flops", "bytes_per_second", "multiprocessors", "measured",
                         "entries": [{"bits", "m", "n", "k", "r", "method", "one_pass", ...}]}

`measured` names the GPU, versions, commit and date of the run that timed the entries, or is null:
then each entry is the first of the tuner's candidates that compiles without spills within the
architecture's shared memory, and its method is "auto". `python -m bench.tune` writes both kinds.

An entry is for a shape m, n (all outputs together), k, r and for inputs of `bits` bits; a shape
takes the entry of its bits and class of rank that is nearest in log2 of m, n and k.
"""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from math import log2
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tables"
METHODS = ("auto", "one_pass", "split", "library")

# Shared memory of one block, in bytes. Sources: CUDA C++ Programming Guide, compute capabilities;
# AMD, "CDNA 3" and "CDNA 4 Instruction Set Architecture" (there all of a compute unit's).
SHARED_BYTES = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
    "gfx950": 163_840,
}
# Architectures on which an accumulator lives in memory of its own, not in registers.
TENSOR_MEMORY = ("sm_100",)
# Elements of an accumulator that a thread can hold: its registers.
MAX_ELEMENTS = 255


@dataclass(frozen=True)
class TileConfig:
    """Tiles of a GEMM: out[block_m, block_n], reduced block_k at a time; rank block_r at a time.

    One pass holds the whole rank. Split and dx take block_r of it at a time if 16 divides the ranks
    and they are above 16, else 16. With `descriptors` the kernel is persistent and loads through
    tensor descriptors (TMA), from sm_90 on.
    """

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    descriptors: bool = False


@dataclass(frozen=True)
class PassConfig:
    """Tiles of one pass over a tall matrix: [block_rows, block_columns] at a time.

    `block_r` is for ranks above 16; up to 16 the passes over x take 16. `chunk` is how many rows
    one program covers; each chunk gives one partial result, and the partial results are added in
    their order. (The pass that makes S has none: it walks along K.)
    """

    block_rows: int
    block_columns: int
    block_r: int
    chunk: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DecodeConfig:
    """Tiles of the forward pass for at most 16 rows: `splits` programs share a column tile's K."""

    block_n: int
    block_k: int
    block_r: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Entry:
    """The tiles for one shape. `method` "auto" leaves one_pass or split to the plan's rule."""

    bits: int
    m: int
    n: int
    k: int
    r: int
    method: str
    one_pass: TileConfig
    split: TileConfig
    dx: TileConfig
    shrink: PassConfig
    dy_b: PassConfig
    d_a: PassConfig
    decode: DecodeConfig


@dataclass(frozen=True)
class Table:
    """All entries of one architecture, and its rates: FLOP/s of 16-bit products, bytes/s copied."""

    arch: str
    flops: float
    bytes_per_second: float
    multiprocessors: int
    measured: dict[str, str] | None
    entries: tuple[Entry, ...]


def next_power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def padded_rank(r: int, limit: int = 1 << 30) -> int:
    """The rank as a dot operand: a power of two from 16 to `limit`."""
    return min(max(16, next_power_of_2(r)), limit)


def rank_class(r: int) -> int:
    """16, 32, or 64 for all ranks above 32: no kernel holds more of a rank at a time."""
    return padded_rank(r, 64)


@cache
def load_table(arch: str) -> Table | None:
    """The committed table of an architecture, or None. ValueError: it is faulty."""
    path = FOLDER / f"{arch}.json"
    return read_table(path) if path.is_file() else None


def read_table(path: Path) -> Table:
    """Reads and checks a table.

    Raises:
        ValueError: it names the file and the key: not JSON, an unknown or missing key, or a value
            that no kernel can have.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    _check_keys(content, Table, str(path))
    entries = content["entries"]
    if not isinstance(entries, list):
        raise ValueError(f"{path}: entries: expected a list, got {type(entries).__name__}")
    read = tuple(
        _entry(entry, path.stem, f"{path}: entries[{i}]") for i, entry in enumerate(entries)
    )
    for key in ("flops", "bytes_per_second", "multiprocessors"):
        value = content[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{path}: {key}: expected a positive number, got {value!r}")
    if content["arch"] != path.stem:
        raise ValueError(f"{path}: arch: expected {path.stem!r}, got {content['arch']!r}")
    measured = content["measured"]
    if measured is not None and not isinstance(measured, dict):
        raise ValueError(f"{path}: measured: expected null or an object, got {measured!r}")
    return Table(**{**content, "entries": read})


def write_table(table: Table, path: Path) -> None:
    """Writes a table, one entry a line; what has its default value is left out."""
    content = {key: value for key, value in asdict(table).items() if key != "entries"}
    head = json.dumps(content, indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(_changed(entry)) for entry in table.entries)
    path.write_text(f'{head},\n "entries": [\n{lines}\n ]\n}}\n')


def _changed(value: Any) -> Any:
    """An entry as JSON, without its configurations' defaults."""
    if not isinstance(value, Entry | TileConfig | PassConfig | DecodeConfig):
        return value
    named = ((field, getattr(value, field.name)) for field in fields(value))
    return {field.name: _changed(part) for field, part in named if part != field.default}


def nearest_entry(table: Table, m: int, n: int, k: int, r: int, bits: int) -> Entry | None:
    """The entry for inputs of as many bits and of the same class of rank, nearest in shape."""
    fitting = [
        entry
        for entry in table.entries
        if entry.bits == bits and rank_class(entry.r) == rank_class(r)
    ]

    def distance(entry: Entry) -> float:
        pairs = ((m, entry.m), (n, entry.n), (k, entry.k))
        return sum(abs(log2(max(size, 1) / of_entry)) for size, of_entry in pairs)

    return min(fitting, key=distance, default=None)


def _check_keys(content: Any, kind: type, place: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{place}: expected an object, got {type(content).__name__}")
    known = {field.name: field.default for field in fields(kind)}
    if unknown := sorted(content.keys() - known.keys()):
        raise ValueError(f"{place}: unknown key {unknown[0]!r}; known are {sorted(known)}")
    for name, default in known.items():
        if name not in content and default is MISSING:
            raise ValueError(f"{place}: no {name!r}")


def _entry(content: Any, arch: str, place: str) -> Entry:
    _check_keys(content, Entry, place)
    values: dict[str, Any] = {}
    for field in fields(Entry):
        value = content[field.name]
        if field.type in (TileConfig, PassConfig, DecodeConfig):
            values[field.name] = _config(value, field.type, f"{place}.{field.name}")
        elif field.name == "method":
            if value not in METHODS:
                raise ValueError(f"{place}.method: expected one of {METHODS}, got {value!r}")
            values["method"] = value
        else:
            values[field.name] = _positive(value, f"{place}.{field.name}")
    if values["bits"] not in (16, 32):
        raise ValueError(f"{place}.bits: expected 16 or 32, got {values['bits']}")
    if values["one_pass"].block_r < min(padded_rank(values["r"]), 64):
        raise ValueError(
            f"{place}.one_pass.block_r: expected at least the rank {values['r']} (one pass holds "
            f"it whole), got {values['one_pass'].block_r}"
        )
    if values["one_pass"].descriptors:
        raise ValueError(f"{place}.one_pass.descriptors: expected false, got true")
    for key in ("one_pass", "split", "dx"):
        _check_possible(values[key], values["bits"], arch, f"{place}.{key}")
    return Entry(**values)


def _check_possible(config: TileConfig, bits: int, arch: str, place: str) -> None:
    """Refuses tiles that no compiler can fit into the architecture."""
    has_descriptors = arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90
    if config.descriptors and not has_descriptors:
        raise ValueError(f"{place}.descriptors: expected false on {arch}, got true")
    threads = config.num_warps * (32 if arch.startswith("sm_") else 64)
    elements = config.block_m * config.block_n // threads
    if elements > MAX_ELEMENTS and arch not in TENSOR_MEMORY:
        raise ValueError(
            f"{place}: {config.block_m} x {config.block_n} over {config.num_warps} warps is "
            f"{elements} elements a thread, expected at most {MAX_ELEMENTS}"
        )
    # Of the stages at least one is in registers without descriptors.
    buffers = config.num_stages if config.descriptors else config.num_stages - 1
    shared = buffers * (config.block_m + config.block_n) * config.block_k * bits // 8
    if shared > SHARED_BYTES.get(arch, shared):
        raise ValueError(
            f"{place}: {config.num_stages} stages take {shared} bytes of shared memory or more, "
            f"expected at most {SHARED_BYTES[arch]} on {arch}"
        )


def _positive(value: Any, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{place}: expected a positive integer, got {value!r}")
    return value


def _config(content: Any, kind: Any, place: str) -> Any:
    _check_keys(content, kind, place)
    for key, value in content.items():
        if key == "descriptors":
            if not isinstance(value, bool):
                raise ValueError(f"{place}.{key}: expected true or false, got {value!r}")
            continue
        _positive(value, f"{place}.{key}")
        if key.startswith("block_") and (value < 16 or value > 512 or value & (value - 1)):
            raise ValueError(f"{place}.{key}: expected a power of two from 16 to 512, got {value}")
        if key == "num_warps" and value not in (1, 2, 4, 8, 16):
            raise ValueError(f"{place}.{key}: expected 1, 2, 4, 8 or 16, got {value}")
        if key == "num_stages" and value > 8:
            raise ValueError(f"{place}.{key}: expected at most 8, got {value}")
    config = kind(**content)
    if isinstance(config, PassConfig) and config.chunk % config.block_rows:
        raise ValueError(
            f"{place}.chunk: expected a multiple of block_rows {config.block_rows}, "
            f"got {config.chunk}"
        )
    return config
