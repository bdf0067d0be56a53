"""State of a training as JSON and safetensors: nothing is executed when it is read.

    write(directory, "optimizer", state)     optimizer.json: the structure
                                             optimizer.safetensors: its tensors, if it has any
    read(directory, "optimizer") == state    in every type, key, float and bit

A state is made of None, bool, int, float, str, list, tuple, dict with keys of str or int, and
tensors. JSON has most of them; the rest are objects with one key that begins with "$":

    {"$tuple": [...]}    {"$dict": [[key, value], ...]}    {"$float": "nan"}    {"$tensor": NAME}

A float is written so that it reads back as the same float. A tensor's name is its path in the
structure, as state/0/exp_avg.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from lora_kernels.safetensors_header import read_header
from lora_kernels.sharding import whole
from lora_kernels.strict_json import parse_object
from lora_llama.checkpoint_files import check_inside

VERSION = 1
# Ten thousand parameters; a Llama of 126 layers has two to four thousand that train.
_MAX_JSON_BYTES = 1 << 22
_MAX_TENSOR_BYTES = 1 << 40
_MAX_DEPTH = 64
_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
_NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def to_files(state: Any) -> dict[str, bytes]:
    """A state as files: their contents by suffix, ".json" and (with tensors) ".safetensors".

    A tensor that is sharded over processes is gathered: every process calls this.

    Raises:
        TypeError: a value is of another type than those above; the message names its path.
        ValueError: it is nested too deeply, or larger than can be read again.
    """
    tensors: dict[str, Tensor] = {}
    packed = {"version": VERSION, "state": _pack(state, "", tensors)}
    files = {".json": (json.dumps(packed, indent=1, allow_nan=False) + "\n").encode()}
    if len(files[".json"]) > _MAX_JSON_BYTES:
        raise ValueError(
            f"state: expected at most {_MAX_JSON_BYTES} bytes of JSON, got {len(files['.json'])}"
        )
    if tensors:
        files[".safetensors"] = serialize(tensors)
    return files


def read(directory: Path, name: str) -> Any:
    """Reads a state that `to_files` made; its tensors are on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        OSError: it cannot be read.
        ValueError: it is cut short, too large, malformed, or the two do not belong together. The
            message begins with the file.
    """
    file, tensor_file = directory / f"{name}.json", directory / f"{name}.safetensors"
    content = _content(file, _MAX_JSON_BYTES)
    try:
        # What is written as one value here may be an object and an array inside it.
        parsed = parse_object(content, max_depth=2 * _MAX_DEPTH + 2)
        if parsed.keys() != {"version", "state"}:
            raise ValueError("expected an object with version and state")
        if parsed["version"] != VERSION:
            raise ValueError(f"version: expected {VERSION}, got {parsed['version']!r}")
        wanted: list[str] = []
        _unpack(parsed["state"], lambda tensor: wanted.append(tensor))
    except ValueError as error:
        raise ValueError(f"{file}: broken or cut short: {error}") from error
    tensors: dict[str, Tensor] = {}
    if wanted:
        try:
            tensors = deserialize(_content(tensor_file, _MAX_TENSOR_BYTES, read_header))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{tensor_file}: broken or cut short: {error}") from error
    if sorted(wanted) != sorted(tensors):
        differing = sorted(set(wanted) ^ set(tensors)) or "tensors named twice"
        raise ValueError(
            f"{tensor_file}: expected the tensors of {file.name}, differing in {differing}"
        )
    return _unpack(parsed["state"], tensors.__getitem__)


def _pack(value: Any, path: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError(f"{path}: nested deeper than {_MAX_DEPTH} levels")
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        if value - value == 0:
            return value
        return {"$float": str(value)}
    if isinstance(value, Tensor):
        name = path or "state"
        while name in tensors:
            name += "'"
        tensors[name] = _on_cpu(value, path)
        return {"$tensor": name}
    below = f"{path}/" if path else ""
    if kind in (list, tuple):
        items = [
            _pack(item, f"{below}{index}", tensors, depth + 1) for index, item in enumerate(value)
        ]
        return items if kind is list else {"$tuple": items}
    if kind is dict and all(type(key) in (int, str) for key in value):
        pairs = [
            [key, _pack(item, f"{below}{key}", tensors, depth + 1)] for key, item in value.items()
        ]
        if all(type(key) is str and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$dict": pairs}
    raise TypeError(
        f"{path or 'state'}: expected None, bool, int, float, str, list, tuple, a dict with keys "
        f"of int or str, or a tensor, got {kind.__module__}.{kind.__qualname__}"
    )


def _on_cpu(tensor: Tensor, path: str) -> Tensor:
    """A contiguous copy on the CPU, gathered from all processes if it is sharded."""
    tensor = whole(tensor)
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{path}: expected a dense tensor of bool, integers or real numbers, got "
            f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        )
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _unpack(packed: Any, tensor: Callable[[str], Any], depth: int = 0) -> Any:
    if depth > 2 * _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(packed, list):
        return [_unpack(item, tensor, depth + 1) for item in packed]
    if not isinstance(packed, dict):
        return packed
    marks = [key for key in packed if key.startswith("$")]
    if not marks:
        return {key: _unpack(item, tensor, depth + 1) for key, item in packed.items()}
    mark, content = marks[0], packed[marks[0]]
    if len(packed) == 1:
        if mark == "$tensor" and isinstance(content, str):
            return tensor(content)
        if mark == "$float" and isinstance(content, str) and content in _NOT_FINITE:
            return _NOT_FINITE[content]
        if mark == "$tuple" and isinstance(content, list):
            return tuple(_unpack(item, tensor, depth + 1) for item in content)
        if mark == "$dict" and isinstance(content, list) and all(map(_is_pair, content)):
            pairs = {key: _unpack(item, tensor, depth + 1) for key, item in content}
            if len(pairs) == len(content):
                return pairs
    raise ValueError(f"no value is written as {str(packed)[:80]}")


def _is_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and type(item[0]) in (int, str)


def _content(file: Path, limit: int, check: Callable[[Path], object] = lambda file: None) -> bytes:
    """All of a file inside its directory, which passed a check of its beginning."""
    check_inside(file.parent, file)
    # A pipe would be waited for, and a device has no end.
    if file.exists() and not file.is_file():
        raise ValueError(f"{file}: expected a regular file")
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size > limit:
                raise ValueError(f"{file}: expected at most {limit} bytes, got {size}")
            try:
                check(file)
            except ValueError as error:
                raise ValueError(f"{file}: broken or cut short: {error}") from error
            return opened.read()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing") from error
