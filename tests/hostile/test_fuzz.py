"""Files that hypothesis changes: they are read, or refused with one of three errors, soon.

An adapter goes into a model, which is as it was after a refusal; a base checkpoint is loaded; no
file outside the directory is opened meanwhile (`conftest.py`).
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lora_kernels.safetensors_header import read_header
from lora_llama.checkpoint_files import (
    find_weights,
    read_json_object,
    read_shapes,
)
from lora_llama.config_checks import check_config

ERRORS = (ValueError, OSError, TypeError)
# More values than a byte has, and what has broken readers before.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 4, 10**9, 2**31, 2**53, 2**63, 2**64, -(2**63), 0.5, -0.0,
    1e308, "", "x", "..", "../x", "/etc/passwd", "F32", "BF16", "F4", "U8", "\0", "é", "a" * 300,
    [], [0], [[]], [0, 0], [-1, 4], [2**62, 2**62], ["q", "q"], {}, {"a": {}}, {"": 1},
    {"$tensor": "x"}, {"$tuple": [1, 2]}, {"$dict": [[0, 1]]}, {"$float": "nan"}, "(a+)+$", "(",
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "LORA", "llama", "model.safetensors",
)  # fmt: skip
TOKENS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\xff", b"\x00", b"-", b"1e999",
    b"NaN", b"null", b"9" * 40, b'"a":1,', b'"dtype":"F32",', b"[[[[", b"/../", b"\xef\xbb\xbf",
)  # fmt: skip


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Up to four bytes or tokens overwritten, put in, left out or repeated."""
    text = bytearray(content)
    # The header of a file of tensors is at its beginning.
    reach = min(len(text), rng.choice((16, 200, 2000, len(text))))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(reach + 1)
        width = rng.choice((0, 1, 1, 8, 64))
        new = rng.choice(
            (b"", bytes([rng.randrange(256)]), rng.choice(TOKENS), bytes(text[at : at + width]) * 2)
        )
        text[at : at + width] = new
    return bytes(text)


def changed_value(value: Any, rng: random.Random) -> Any:
    """One value, name or item of a JSON structure replaced, left out or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.2:
            return {**value, str(rng.choice(VALUES)): rng.choice(VALUES)}
        return {**value, key: changed_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        new = [] if rng.random() < 0.1 else [changed_value(value[at], rng)] * rng.choice((1, 1, 2))
        return [*value[:at], *new, *value[at + 1 :]]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-8, -4, -1, 1, 4, 8, 2**32, 2**63))
    return rng.choice(VALUES)


def changed(name: str, content: bytes, rng: random.Random, joined: Callable[..., bytes]) -> bytes:
    if rng.random() < 0.4:
        return changed_bytes(content, rng)
    if not name.endswith(".safetensors"):
        return json.dumps(changed_value(json.loads(content), rng)).encode()
    length = int.from_bytes(content[:8], "little")
    header = changed_value(json.loads(content[8 : 8 + length]), rng)
    return joined(json.dumps(header).encode(), content[8 + length :])


def read_base(directory: Path) -> None:
    """What of a base checkpoint is read before transformers reads it."""
    content = read_json_object(directory / "config.json")
    check_config(str(directory / "config.json"), content)
    read_shapes(find_weights(str(directory), content, {}))


# What is read, by what, and how many inputs there are of it in `make test` and in `make test-long`.
READERS: dict[str, tuple[str, Callable[[Path], Any] | None, int, int]] = {
    "adapter": ("adapter", None, 100, 8000),
    "base": ("llama", read_base, 100, 4000),
    "index": ("sharded", read_base, 100, 4000),
    "training": ("training", None, 100, 6000),
    # The same as LoraLlama.from_pretrained reads it.
    "base loaded": ("llama", None, 40, 800),
    "index loaded": ("sharded", None, 40, 800),
}


def fuzz(
    name: str, count: int, kinds, good, tmp_path, watch, joined
) -> tuple[Path, dict[str, int], Callable[[], None]]:
    """The directory, what is counted, and a test of `count` inputs that hypothesis makes."""
    kind, read = READERS[name][:2]
    read = read or kinds[kind].read
    directory = shutil.copytree(good[kind], tmp_path / name)
    files = [directory / file for file in (*kinds[kind].tensors, *kinds[kind].objects)]
    originals = {file: file.read_bytes() for file in files}
    counts = {"read": 0, "refused": 0}

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=count <= 100,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.sampled_from(files), st.randoms(use_true_random=False))
    def inputs(file: Path, rng: random.Random) -> None:
        bad = changed(file.name, originals[file], rng, joined)
        note(f"{file.name}: {bad[:300]!r}")
        file.write_bytes(bad)
        try:
            try:
                watch.inside(read, directory)
                counts["read"] += 1
            except ERRORS:
                counts["refused"] += 1
            if file.suffix == ".safetensors":
                agrees_with_safetensors(file)
        finally:
            file.write_bytes(originals[file])

    return directory, counts, inputs


def agrees_with_safetensors(file: Path) -> None:
    """What passes the check of the header is a file that safetensors reads."""
    try:
        entries = read_header(file)
    except ERRORS:
        return
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == set(entries)
        for key, entry in entries.items():
            assert tuple(opened.get_slice(key).get_shape()) == entry.shape


@pytest.fixture
def run(kinds, good, tmp_path, watch, joined, record_property) -> Callable[..., None]:
    def fuzzed(name: str, count: int, start: int | None = None) -> None:
        directory, counts, inputs = fuzz(name, count, kinds, good, tmp_path, watch, joined)
        failed = True
        try:
            (inputs if start is None else seed(start)(inputs))()
            failed = False
        finally:
            for what, value in (("inputs", sum(counts.values())), ("crashes", int(failed))):
                figure = {"row": 29, "name": f"fuzz: {what}", "value": value, "combine": "sum"}
                record_property("figure", figure)
        kinds[READERS[name][0]].read(directory)
        # Neither a reader that takes everything nor one that takes nothing is tested by this.
        assert sum(counts.values()) >= count
        assert counts["refused"] > count / 4 and counts["read"] > count / 100

    return fuzzed


@pytest.mark.parametrize("name", READERS)
def test_some_inputs(name, run):
    run(name, READERS[name][2])


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", READERS)
def test_many_inputs(name, run):
    run(name, READERS[name][3], start=2)
