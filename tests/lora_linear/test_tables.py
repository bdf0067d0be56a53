"""The committed tables of tiles, their check, and the choice of an entry."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest

from lora_kernels.lora_linear.tables import (
    FOLDER,
    SHARED_BYTES,
    Entry,
    TileConfig,
    load_table,
    nearest_entry,
    padded_rank,
    rank_class,
    read_table,
    write_table,
)

COMMITTED = sorted(path.stem for path in FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def content():
    """A committed table, cut down to one entry."""
    whole = json.loads((FOLDER / "sm_90.json").read_text())
    return {**whole, "entries": whole["entries"][:1]}


def changed(content, *path, value=None, remove=False):
    """A copy with one value replaced or removed."""
    copied = deepcopy(content)
    place = copied
    for key in path[:-1]:
        place = place[key]
    if remove:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return copied


def error_of(content, folder, arch="sm_90"):
    path = folder / f"{arch}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as caught:
        read_table(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def test_every_architecture_has_a_table():
    assert COMMITTED == sorted(SHARED_BYTES)


@pytest.mark.parametrize("arch", COMMITTED)
def test_a_committed_table_is_sound(arch):
    """It reads, has few rows and many of every class of rank, and is what writing it gives."""
    table = load_table(arch)
    assert table is not None and table.arch == arch
    assert {rank_class(entry.r) for entry in table.entries} == {16, 32, 64}
    shapes = [(entry.m, entry.n, entry.k, entry.r, entry.bits) for entry in table.entries]
    assert len(set(shapes)) == len(shapes)
    for r in (16, 32, 64):
        rows = [entry.m for entry in table.entries if entry.r == r]
        assert min(rows) <= 64 and max(rows) >= 8192
    if table.measured is None:
        assert {entry.method for entry in table.entries} == {"auto"}
    else:
        assert {"gpu", "torch", "triton", "commit", "date"} <= table.measured.keys()


@pytest.mark.parametrize("arch", COMMITTED)
def test_writing_a_table_gives_its_file(arch, tmp_path):
    table = load_table(arch)
    write_table(table, tmp_path / f"{arch}.json")
    assert (tmp_path / f"{arch}.json").read_text() == (FOLDER / f"{arch}.json").read_text()
    assert read_table(tmp_path / f"{arch}.json") == table


def test_an_entry_is_one_line():
    lines = (FOLDER / "sm_90.json").read_text().splitlines()
    assert sum('"bits"' in line for line in lines) == len(load_table("sm_90").entries)


def test_an_ampere_workstation_card_runs_what_ada_runs():
    """sm_86's kernels are compiled as sm_89's: every tile of one is a tile of the other."""

    def configs(arch, part):
        entries = load_table(arch).entries
        found = {(getattr(entry, part), rank_class(entry.r)) for entry in entries}
        if part in ("dy_b", "d_a", "shrink"):
            return {(replace(config, chunk=512), r) for config, r in found}
        if part == "decode":
            return {(replace(config, splits=1), r) for config, r in found}
        return found

    for part in ("one_pass", "split", "dx", "shrink", "dy_b", "d_a", "decode"):
        assert configs("sm_86", part) <= configs("sm_89", part)


def test_no_table_of_an_unknown_architecture():
    assert load_table("sm_999") is None


ONE_PASS = ("entries", 0, "one_pass")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("speed",), 1, ": unknown key 'speed'; known are "),
        (("entries", 0, "tile"), {}, ": entries[0]: unknown key 'tile'; known are "),
        ((*ONE_PASS, "block_z"), 16, ": entries[0].one_pass: unknown key 'block_z'; known are "),
        (("arch",), "sm_80", ": arch: expected 'sm_90', got 'sm_80'"),
        (("flops",), 0, ": flops: expected a positive number, got 0"),
        (("flops",), True, ": flops: expected a positive number, got True"),
        (("multiprocessors",), "132", ": multiprocessors: expected a positive number, got '132'"),
        (("measured",), [], ": measured: expected null or an object, got []"),
        (("entries",), {}, ": entries: expected a list, got dict"),
        (("entries", 0), [], ": entries[0]: expected an object, got list"),
        (("entries", 0, "bits"), 8, ": entries[0].bits: expected 16 or 32, got 8"),
        (("entries", 0, "m"), 0, ": entries[0].m: expected a positive integer, got 0"),
        (("entries", 0, "n"), 1.5, ": entries[0].n: expected a positive integer, got 1.5"),
        (("entries", 0, "method"), "fast", ": entries[0].method: expected one of "),
        (ONE_PASS, 128, ": entries[0].one_pass: expected an object, got int"),
        (
            (*ONE_PASS, "block_m"), 48,
            ": entries[0].one_pass.block_m: expected a power of two from 16 to 512, got 48",
        ),
        (
            (*ONE_PASS, "num_warps"), 3,
            ": entries[0].one_pass.num_warps: expected 1, 2, 4, 8 or 16, got 3",
        ),
        (
            (*ONE_PASS, "num_stages"), 9,
            ": entries[0].one_pass.num_stages: expected at most 8, got 9",
        ),
        ((*ONE_PASS, "descriptors"), 1, ".one_pass.descriptors: expected true or false, got 1"),
        ((*ONE_PASS, "descriptors"), True, ".one_pass.descriptors: expected false, got true"),
        (
            ("entries", 0, "dy_b", "chunk"), 100,
            ".dy_b.chunk: expected a multiple of block_rows 32, got 100",
        ),
    ],
)  # fmt: skip
def test_a_fault_is_named(content, tmp_path, path, value, message):
    assert message in error_of(changed(content, *path, value=value), tmp_path)


@pytest.mark.parametrize("path", [("flops",), ("entries", 0, "dx"), (*ONE_PASS, "block_m")])
def test_a_missing_key_is_named(content, tmp_path, path):
    assert f"no {path[-1]!r}" in error_of(changed(content, *path, remove=True), tmp_path)


def test_what_is_not_json_is_named(tmp_path):
    assert "expected JSON" in error_of("{", tmp_path)
    assert "expected an object, got list" in error_of("[]", tmp_path)


def with_tile(content, arch="sm_90", part="split", **values):
    tile = {**content["entries"][0][part], **values}
    return {**changed(content, "entries", 0, part, value=tile), "arch": arch}


def test_impossible_tiles_are_named(content, tmp_path):
    """More accumulator than registers, more stages than shared memory, no descriptors there."""
    large = with_tile(content, block_m=256, block_n=256, num_warps=4)
    assert "entries[0].split: 256 x 256 over 4 warps is 512 elements" in error_of(large, tmp_path)
    deep = with_tile(content, block_m=128, block_n=256, block_k=128, num_warps=8, num_stages=4)
    assert "4 stages take 294912 bytes" in error_of(deep, tmp_path)
    assert "expected at most 232448 on sm_90" in error_of(deep, tmp_path)
    # What fits one architecture is too much for another.
    wide = {"block_m": 128, "block_n": 256, "block_k": 64, "num_warps": 8, "num_stages": 4}
    (tmp_path / "sm_90.json").write_text(json.dumps(with_tile(content, **wide)))
    read_table(tmp_path / "sm_90.json")
    assert "expected at most 101376" in error_of(
        with_tile(content, "sm_89", **wide), tmp_path, "sm_89"
    )
    described = with_tile(content, "sm_89", descriptors=True)
    assert "descriptors: expected false on sm_89" in error_of(described, tmp_path, "sm_89")
    described = with_tile(content, "gfx942", descriptors=True)
    assert "descriptors: expected false on gfx942" in error_of(described, tmp_path, "gfx942")


def test_one_pass_must_hold_the_rank(content, tmp_path):
    narrow = changed(content, "entries", 0, "r", value=64)
    assert "one_pass.block_r: expected at least the rank 64" in error_of(narrow, tmp_path)


def test_the_nearest_entry():
    """By classes of rank and of bits exactly, by sizes in log2."""
    table = load_table("sm_90")
    for entry in table.entries:
        assert nearest_entry(table, entry.m, entry.n, entry.k, entry.r, entry.bits) == entry
    few = nearest_entry(table, 300, 4096, 4096, 9, 16)
    assert (few.m, few.n, few.r) == (512, 4096, 16)
    # 128 is as near to 64 as to 256; 96 is nearer to 64, and 1000 rows to 512 than to 2048.
    assert nearest_entry(table, 96, 4096, 4096, 16, 16).m == 64
    assert nearest_entry(table, 1000, 14336, 4096, 16, 16).m == 512
    assert nearest_entry(table, 512, 576, 576, 16, 16).n == 768
    assert nearest_entry(table, 512, 4096, 4096, 33, 16).r == 64
    assert nearest_entry(table, 512, 4096, 4096, 300, 16).r == 64
    assert nearest_entry(table, 512, 4096, 4096, 16, 32) is None
    assert nearest_entry(replace(table, entries=()), 512, 4096, 4096, 16, 16) is None


def test_ranks():
    assert [padded_rank(r, 64) for r in (1, 16, 17, 33, 65)] == [16, 16, 32, 64, 64]
    assert [rank_class(r) for r in (1, 16, 17, 33, 65, 1000)] == [16, 16, 32, 64, 64, 64]


def test_an_entry_has_every_part():
    entry = load_table("sm_90").entries[0]
    assert isinstance(entry, Entry) and isinstance(entry.split, TileConfig)
    assert entry.split.group_m == 8
