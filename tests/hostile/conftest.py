"""Files as a stranger may make them, and what is watched while they are read.

A `Fault` makes one file of a good directory bad; `Watch.refused` reads the directory, wants one
ValueError, OSError or TypeError that names file and fault, and measures what that took. Nothing
may be opened outside the directory, unpickled, started or fetched meanwhile: the interpreter's
audit hook sees it, and safetensors' own way to open a file is made to pass by it.
"""

import contextlib
import ctypes
import json
import os
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_callback import TrainerState

from lora_kernels import adapter_files
from lora_kernels.adapter_files import save_adapter
from lora_kernels.adapters import load_adapter_into
from lora_kernels.config import LoraConfig
from lora_kernels.injection import inject_lora
from lora_kernels.safetensors_header import MAX_HEADER_BYTES, MAX_TENSORS
from lora_llama import LoraLlama, state_files, training_state
from lora_llama.options import FinetuneOptions
from lora_llama.resuming import (
    check_checkpoint,
    check_training,
    find_checkpoint,
    load_checkpoint,
)

MAX_SECONDS, MAX_MIB = 2.0, 200.0
ERRORS = (ValueError, OSError, TypeError)
# The row of corrupt and malicious files in the table of reliability.
ROW = 29

_FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect")
_events: list[tuple[str, Any]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is not None and (event == "open" or event in _FORBIDDEN):
        _events.append((event, arguments[0] if arguments else None))


sys.addaudithook(_audit)


@contextlib.contextmanager
def events() -> Iterator[list[tuple[str, Any]]]:
    """What is opened, unpickled, started or connected to inside."""
    global _events
    _events = found = []
    try:
        yield found
    finally:
        _events = None


def opened_outside(found: list[tuple[str, Any]], directory: Path) -> list[tuple[str, Any]]:
    """The events that are no opening of a file in the directory, or of Python's own modules."""
    code = [Path(place).resolve() for place in {sys.prefix, sys.base_prefix, *sys.path} if place]
    allowed = [directory.resolve(), *(place for place in code if place != Path("/").resolve())]
    modules = (".py", ".pyc", ".so", ".json")

    def is_fine(event: str, path: Any) -> bool:
        if event != "open" or isinstance(path, int):
            return event == "open"
        target = Path(os.path.realpath(os.fsdecode(path)))
        if target.is_relative_to(allowed[0]):
            return True
        if str(target).startswith("/proc/self/") or target.suffix not in modules:
            return str(target).startswith("/proc/")
        return any(target.is_relative_to(place) for place in allowed[1:])

    return [(event, path) for event, path in found if not is_fine(event, path)]


def _memory(field: str) -> float:
    """VmRSS (resident now) or VmHWM (at its highest), in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


class Watch:
    """Reads bad directories; what it counted is recorded as figures of the test."""

    def __init__(self) -> None:
        self.refused_count = 0
        self.seconds = 0.0
        self.mib = 0.0

    def measured(self, read: Callable[[], Any]) -> Any:
        """Runs it and measures; the peaks are of the process, reset before."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        has_peak = os.access("/proc/self/clear_refs", os.W_OK)
        if has_peak:
            Path("/proc/self/clear_refs").write_text("5")
            before = _memory("VmRSS")
        # The processor's time: other processes share the machine.
        start = time.process_time()
        try:
            return read()
        finally:
            seconds = time.process_time() - start
            mib = _memory("VmHWM") - before if has_peak else 0.0
            self.seconds, self.mib = max(self.seconds, seconds), max(self.mib, mib)
            assert seconds <= MAX_SECONDS, f"{seconds:.2f} s"
            assert mib <= MAX_MIB, f"{mib:.0f} MiB"

    def inside(self, read: Callable[[Path], Any], directory: Path) -> None:
        """Reads, or fails to, and opens nothing outside."""
        with events() as found:
            try:
                self.measured(lambda: read(directory))
            finally:
                outside = opened_outside(found, directory)
                assert not outside, outside

    def refused(self, read: Callable[[Path], Any], directory: Path, file: Path, match: str) -> None:
        """Reads, in vain: one error that names the file (or its directory) and the fault."""
        with events() as found, pytest.raises(ERRORS) as caught:
            self.measured(lambda: read(directory))
        message = str(caught.value)
        assert str(file) in message, message[:500]
        assert re.search(match, message, re.DOTALL), f"{match}: {message[:500]}"
        assert not opened_outside(found, directory)
        self.refused_count += 1


@pytest.fixture
def watch(record_property, request, monkeypatch) -> Iterator[Watch]:
    safe_open = adapter_files.safe_open

    def audited(file: Any, *arguments: Any, **options: Any) -> Any:
        sys.audit("open", os.fspath(file), "r", 0)
        return safe_open(file, *arguments, **options)

    monkeypatch.setattr(adapter_files, "safe_open", audited)
    watched = Watch()
    yield watched
    for name, value, combine, limit in (
        ("hostile files refused", watched.refused_count, "sum", None),
        ("worst seconds of a hostile file", watched.seconds, "max", MAX_SECONDS),
        ("worst MiB of a hostile file", watched.mib, "max", MAX_MIB),
    ):
        figure = {"row": ROW, "name": name, "value": float(value), "combine": combine}
        record_property("figure", figure if limit is None else {**figure, "limit": limit})


# Good directories.


@dataclass(frozen=True)
class Kind:
    """Files of one kind: how good ones are made, and how they are read."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    tensors: tuple[str, ...]
    objects: tuple[str, ...]


# More than the 4 KiB that are cut at every 64 bytes.
PADDING = "x" * 5000


def make_adapter(directory: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q", "v"], extra={"note": PADDING})
    torch.manual_seed(0)
    save_adapter(
        directory,
        config,
        {
            f"{module}.lora_{matrix}.weight": torch.randn(shape)
            for module in "qv"
            for matrix, shape in (("A", (4, 96)), ("B", (96, 4)))
        },
    )


def model_for_adapters() -> nn.Module:
    """A model with an adapter, which the adapter of `make_adapter` fits as well."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"q": nn.Linear(96, 96), "v": nn.Linear(96, 96)})
    return inject_lora(model, LoraConfig(r=2, target_modules=["q"]), "first")


def read_adapter(directory: Path) -> None:
    """Loads it into a model, which an error leaves as it was."""
    model = model_for_adapters()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    try:
        load_adapter_into(model, directory, "new")
    except ERRORS:
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert list(model.lora_configs) == ["first"]
        raise


TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}  # fmt: skip


def make_llama(directory: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(directory)
    for name in ("config.json", "generation_config.json"):
        pad(directory / name)


def make_sharded(directory: Path) -> None:
    """The same in files of a few weights each, with an index."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    model.save_pretrained(directory, max_shard_size="20KB")
    pad(directory / "model.safetensors.index.json")
    first = min(directory.glob("model-*.safetensors"))
    # Known names, whatever transformers calls them.
    shutil.copy(first, directory / "shard.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(first.name, "shard.safetensors"))
    first.unlink()


def pad(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "note": PADDING}))


def read_llama(directory: Path) -> None:
    LoraLlama.from_pretrained(directory)


def optimizer() -> torch.optim.Optimizer:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 96)) for _ in range(3)]
    return torch.optim.AdamW(parameters, lr=0.1)


RECORD = {"rows": 8, "rows_sha256": "0" * 64, "seed": 42, "global_batch_size": 4}


def make_training(directory: Path) -> None:
    make_adapter(directory)
    trained = optimizer()
    for group in trained.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    trained.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(trained, lambda step: 1.0)
    states = {
        training_state.OPTIMIZER: trained.state_dict(),
        training_state.SCHEDULER: schedule.state_dict(),
        training_state.rng_name(0): {
            **training_state.rng_state(),
            "unlogged_loss": 0.5,
            "recent_losses": [0.5],
        },
        training_state.TRAINING: {**RECORD, "save_number": 1, "note": PADDING},
    }
    for name, state in states.items():
        for suffix, content in state_files.to_files(state).items():
            # Behind its bracket, where no cut is without a fault.
            wide = b"{" + b" " * 5000 if suffix == ".json" else content[:1]
            (directory / f"{name}{suffix}").write_bytes(wide + content[1:])
    history = [{"step": step % 3, "loss": 1.0, "epoch": 0.5} for step in range(100)]
    state = TrainerState(global_step=2, log_history=history)
    state.save_to_json(str(directory / "trainer_state.json"))


def read_training(directory: Path) -> None:
    """Everything that resuming reads, in its order."""
    options = FinetuneOptions(model="m", data="d", resume_from_checkpoint=str(directory))
    assert find_checkpoint(options) == str(directory)
    config = LoraConfig(r=4, target_modules=["q", "v"])
    check_checkpoint(str(directory), {"default": config})
    check_training(str(directory), {"default": config}, RECORD)
    model = nn.ModuleDict({"q": nn.Linear(96, 96), "v": nn.Linear(96, 96)})
    load_checkpoint(inject_lora(model, config), str(directory))
    target = optimizer()
    with training_state.preserved_rng():
        training_state.load_optimizer(target, directory)
        schedule = torch.optim.lr_scheduler.LambdaLR(target, lambda step: 1.0)
        training_state.load_scheduler(schedule, target, directory)
        training_state.load_rng(directory, 0, 1, seed=0, step=2)


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "adapter", make_adapter, read_adapter,
            ("adapter_model.safetensors",), ("adapter_config.json",),
        ),
        Kind(
            "llama", make_llama, read_llama,
            ("model.safetensors",), ("config.json", "generation_config.json"),
        ),
        Kind(
            "sharded", make_sharded, read_llama,
            ("shard.safetensors",), ("model.safetensors.index.json",),
        ),
        Kind(
            "training", make_training, read_training,
            ("adapter_model.safetensors", "optimizer.safetensors", "rng_state_0.safetensors"),
            (
                "adapter_config.json", "trainer_state.json", "optimizer.json", "scheduler.json",
                "rng_state_0.json", "training.json",
            ),
        ),
    )
}  # fmt: skip


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A good directory of each kind."""
    root = tmp_path_factory.mktemp("good")
    for kind in KINDS.values():
        (root / kind.name).mkdir()
        kind.make(root / kind.name)
    return {name: root / name for name in KINDS}


# Faults of a file of tensors.


@dataclass(frozen=True)
class Fault:
    """What is written instead of a good file, and what the error says of it."""

    name: str
    content: Callable[[bytes], bytes]
    match: str


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def with_first(**fields: Any) -> Callable[[bytes], bytes]:
    """Changes fields of the tensor that comes first in the data."""

    def change(content: bytes) -> bytes:
        header, data = split(content)
        key = in_order(header)[0]
        return joined({**header, key: {**header[key], **fields}}, data)

    return change


def in_order(header: dict[str, Any]) -> list[str]:
    keys = [key for key in header if key != "__metadata__"]
    return sorted(keys, key=lambda key: header[key]["data_offsets"])


def with_header(change: Callable[[dict[str, Any]], dict[str, Any] | bytes]) -> Any:
    def changed(content: bytes) -> bytes:
        header, data = split(content)
        return joined(change(header), data)

    return changed


def with_text(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        header, data = split(content)
        text = json.dumps(header).encode()
        assert old in text
        return joined(text.replace(old, new, 1), data)

    return change


def gap(content: bytes) -> bytes:
    header, data = split(content)
    for key in in_order(header)[1:]:
        header[key]["data_offsets"] = [offset + 8 for offset in header[key]["data_offsets"]]
    return joined(header, data + bytes(8))


def overlap(content: bytes) -> bytes:
    header, data = split(content)
    for key in in_order(header)[1:]:
        header[key]["data_offsets"] = [offset - 8 for offset in header[key]["data_offsets"]]
    return joined(header, data[:-8])


def lying(shape: list[int], length: int = 0, dtype: str = "F32") -> Callable[[bytes], bytes]:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, length]}
    return lambda content: joined({"a": entry}, bytes(min(length, 64)))


@cache
def many(count: int, entry: bytes = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}') -> bytes:
    return joined(b"{" + b",".join(b'"%d":%s' % (i, entry) for i in range(count)) + b"}")


@cache
def dense(size: int, item: bytes) -> bytes:
    return joined(b'{"a":[' + item * (size // len(item)) + b"0]}")


@cache
def numbered(count: int) -> bytes:
    return b"{" + b",".join(b'"%x":1' % i for i in range(count)) + b"}"


def zip_archive(content: bytes) -> bytes:
    return b"PK\x03\x04" + content


LENGTHS = (MAX_HEADER_BYTES + 1, 100_000_000, 1 << 31, 1 << 63, (1 << 64) - 1)
TENSOR_FAULTS = (
    *(Fault(f"cut at {size}", lambda c, size=size: c[:size], "") for size in range(0, 4096, 64)),
    Fault("cut by a byte", lambda c: c[:-1], "bytes behind the header"),
    *(
        Fault(f"length {size}", lambda c, size=size: struct.pack("<Q", size) + c[8:], "header of")
        for size in LENGTHS
    ),
    Fault("length of the file", lambda c: struct.pack("<Q", len(c)) + c[8:], "header of"),
    Fault("overlap", overlap, "overlaps"),
    Fault("gap", gap, "leaves a gap"),
    Fault("a byte behind", lambda c: c + b"\0", "bytes behind the header, got"),
    Fault("bytes behind", lambda c: c + bytes(1 << 16), "bytes behind the header, got"),
    *(
        Fault(f"offsets {offsets}", with_first(data_offsets=offsets), "data_offsets")
        for offsets in (
            [0, 1 << 62],
            [-4, 4],
            [8, 0],
            [0],
            [0, 4, 8],
            [0.0, 4.0],
            [False, True],
            ["0", "4"],
            None,
            {},
            [0, 1 << 64],
            [1 << 70, 1 << 71],
        )
    ),
    Fault("length 0", lambda c: bytes(8) + c[8:], "begins with '{'"),
    *(
        Fault(f"shape {str(shape)[:30]}", with_first(shape=shape), "shape")
        for shape in (
            [1 << 40, 1 << 40], [1 << 32, 1 << 32], [-2, -8], [-1], [1 << 63], [2.0, 8.0], [True],
            ["2"], None, 3, [[2]], [1] * 100_000, [(1 << 63) - 1] * 100_000,
        )
    ),
    Fault("a product of 2**64", lying([1 << 32, 1 << 32]), "shape .* takes"),
    Fault("a product of 2**66", lying([1 << 33, 1 << 33], dtype="U8"), "shape .* takes"),
    Fault("data of 2**62", lying([1 << 60], 1 << 62), "bytes behind the header"),
    *(
        Fault(f"dtype {dtype}", with_first(dtype=dtype), "dtype: expected")
        for dtype in ("PICKLE", "F33", "f32", "", None, 3, ["F32"], {"F32": 1}, "x" * 100_000)
    ),
    Fault("a field more", with_first(code="import os"), "expected dtype, shape and data_offsets"),
    Fault("no entry", with_header(lambda h: {**h, in_order(h)[0]: 3}), "expected dtype, shape"),
    Fault("metadata", with_header(lambda h: {**h, "__metadata__": [1]}), "__metadata__: expected"),
    Fault("metadata 3", with_header(lambda h: {**h, "__metadata__": {"a": 3}}), "__metadata__"),
    Fault("a long name", with_header(lambda h: {**h, "x" * 2000: {}}), "at most 1024 characters"),
    Fault(
        "a key twice",
        with_header(
            lambda h: b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
            b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' + json.dumps(h).encode()[1:]
        ),
        r"duplicate keys \['a'\]",
    ),
    Fault("a field twice", with_text(b'"dtype"', b'"shape": [0], "dtype"'), "duplicate keys"),
    Fault("deep", lambda c: joined(b'{"a":' * 100_000), "nested too deeply"),
    Fault("40 levels", lambda c: joined(b'{"a":' + b"[" * 40 + b"]" * 40 + b"}"), "deeper than 32"),
    Fault("not UTF-8", with_header(lambda h: b'{"\xff\xfe":' + json.dumps(h).encode()), "utf-8"),
    Fault("BOM", with_header(lambda h: b"\xef\xbb\xbf" + json.dumps(h).encode()), "begins with"),
    Fault("UTF-16", with_header(lambda h: json.dumps(h).encode("utf-16")), "begins with"),
    Fault("NaN", lambda c: joined(b'{"a":NaN}'), "NaN is not JSON"),
    Fault("an array", lambda c: joined(b"[]"), "begins with"),
    Fault("two objects", lambda c: joined(b"{}{}"), "Extra data"),
    Fault("zeros", lambda c: bytes(4096), "begins with"),
    Fault("a pickle", lambda c: b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.", "header of"),
    Fault("a zip archive", zip_archive, ""),
    Fault("HTML", lambda c: b"<!DOCTYPE html><html></html>" * 9, "header of"),
)  # fmt: skip


# Megabytes of header.
LONG_HEADERS = (
    Fault(
        "header over the bound",
        lambda c: joined(json.dumps(split(c)[0]).encode() + b" " * MAX_HEADER_BYTES, split(c)[1]),
        f"header of at most {MAX_HEADER_BYTES} bytes",
    ),
    Fault("1e5 keys", lambda c: many(100_000), f"at most {MAX_TENSORS} tensors"),
    Fault("65,537 keys", lambda c: many(MAX_TENSORS + 1), f"at most {MAX_TENSORS} tensors"),
    Fault("a million keys", lambda c: many(1_000_000, b"0"), "at most"),
    Fault("60,000 keys of no entry", lambda c: joined(numbered(60_000)), "expected dtype, shape"),
    Fault("deep arrays", lambda c: joined(b'{"a":' + b"[" * 4_000_000), "nested too deeply"),
    Fault("lists of lists", lambda c: dense(8_000_000, b"[],"), "at most 524288 values"),
    Fault("half a million lists", lambda c: dense(1_500_000, b"[],"), "expected dtype, shape"),
    Fault("numbers", lambda c: dense(3_000_000, b"1.5e9,"), "expected dtype, shape"),
    Fault("long integer", lambda c: joined(b'{"a":' + b"9" * 8_000_000 + b"}"), "4300 digits"),
)


# Faults of a file with a JSON object.

JSON_FAULTS = (
    *(Fault(f"cut at {size}", lambda c, size=size: c[:size], "") for size in range(0, 4096, 64)),
    Fault("a key twice", lambda c: b'{"a": 1, "a": 2,' + c.lstrip()[1:], r"duplicate keys \['a'\]"),
    Fault(
        "a key twice inside",
        lambda c: b'{"a": [{"b": 1, "b": 2}],' + c.lstrip()[1:],
        r"duplicate keys \['b'\]",
    ),
    Fault("deep", lambda c: b'{"a":' * 100_000, "nested too deeply"),
    Fault("deep arrays", lambda c: b'{"a":' + b"[" * 900_000, "nested too deeply"),
    Fault("200 levels", lambda c: b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", "nested deeper"),
    Fault("too long", lambda c: c + b" " * (65 << 20), "at most"),
    Fault("too many values", lambda c: b'{"a":[' + b"0," * (1 << 20) + b"0]}", "at most"),
    Fault("lists of lists", lambda c: b'{"a":[' + b"[]," * (1 << 20) + b"0]}", "at most"),
    Fault("dense", lambda c: numbered(500_000), ""),
    Fault("long integer", lambda c: b'{"a":' + b"9" * 800_000 + b"}", "4300 digits"),
    Fault("not UTF-8", lambda c: b'{"\xff": 1,' + c[1:], "(?i)utf-8"),
    Fault("UTF-16", lambda c: c.decode().encode("utf-16"), "(?i)utf-8"),
    Fault("BOM", lambda c: b"\xef\xbb\xbf" + c, "BOM"),
    Fault("NUL", lambda c: bytes(4096), ""),
    Fault("nothing", lambda c: b"", ""),
    Fault("more behind", lambda c: c + b"{}", "Extra data"),
    *(
        Fault(f"the value {value.decode()}", lambda c, value=value: value, "object")
        for value in (b"[]", b"null", b"3", b'"x"', b"true", b"[[]]")
    ),
)


@pytest.fixture(scope="session")
def kinds() -> dict[str, Kind]:
    return KINDS


@pytest.fixture(scope="session")
def tensor_faults() -> tuple[Fault, ...]:
    return TENSOR_FAULTS


@pytest.fixture(scope="session")
def long_headers() -> tuple[Fault, ...]:
    return LONG_HEADERS


@pytest.fixture(scope="session")
def json_faults() -> tuple[Fault, ...]:
    return JSON_FAULTS


@pytest.fixture(scope="session", name="joined")
def joined_fixture() -> Callable[..., bytes]:
    return joined


@pytest.fixture(scope="session")
def save_tensors() -> Callable[[dict[str, torch.Tensor], Path], None]:
    return lambda tensors, file: save_file(tensors, file, metadata={"format": "pt"})
