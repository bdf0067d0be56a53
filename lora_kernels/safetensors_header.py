"""The header of a safetensors file, checked before a library or a tensor is made of it.

    8 bytes        H, the header's length, little-endian
    H bytes        {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
                   "__metadata__": {str: str}}, as JSON
    the rest       data; every byte belongs to exactly one tensor

The format is safetensors' own (https://github.com/huggingface/safetensors, "Format"). Its reader
refuses most of what is refused here, but takes a header of 100 MB, over which it can spend half a
minute, and the last of two equal names. A header of the size allowed here takes some tenths of a
second and tens of MiB, whatever is in it; an adapter for each of 128 experts in 48 layers, the
longest that is known, has 6 MiB of it.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_kernels.field_checks import shown
from lora_kernels.strict_json import parse_object

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 1 << 16
MAX_NAME_LENGTH = 1024
MAX_DIMENSIONS = 64

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "I64": torch.int64,
    "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def outlines(entries: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
    """Tensors of these dtypes and shapes without memory, by name.

    Raises:
        ValueError: torch has no such dtype; the message names the tensor.
    """
    for name, entry in entries.items():
        if entry.dtype not in _TORCH_DTYPES:
            raise ValueError(
                f"{shown(name)}: expected a dtype of {list(_TORCH_DTYPES)}, got {entry.dtype}"
            )
    return {
        name: torch.empty(entry.shape, dtype=_TORCH_DTYPES[entry.dtype], device="meta")
        for name, entry in entries.items()
    }


def read_header(file: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by name in the order of the header. No data are read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, or not a safetensors file of at most
            `MAX_HEADER_BYTES` of header and `MAX_TENSORS` tensors. The message names the fault and
            the tensor, not the file.
    """
    # A pipe would be waited for, and a device has no end.
    if os.path.exists(file) and not os.path.isfile(file):
        raise ValueError("expected a regular file")
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        prefix = opened.read(8)
        if len(prefix) < 8:
            raise ValueError(f"expected at least 8 bytes, got {len(prefix)}")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"expected a header of at most {MAX_HEADER_BYTES} bytes, got {length}")
        if 8 + length > size:
            raise ValueError(f"expected a header of {length} bytes, the file has {size - 8}")
        content = opened.read(length)
    return parse_header(content, size - 8 - length)


def parse_header(content: bytes, data_length: int) -> dict[str, TensorEntry]:
    """The tensors of a header; see `read_header`.

    Args:
        content: the header's JSON.
        data_length: bytes of the file behind the header.

    Raises:
        ValueError: as `read_header`.
    """
    if not content.startswith(b"{"):
        raise ValueError(f"expected a header that begins with '{{', got {content[:1]!r}")
    # Before the parser runs: a tensor has four colons.
    if content.count(b":") > 5 * MAX_TENSORS:
        raise ValueError(f"expected a header of at most {MAX_TENSORS} tensors, got more")
    try:
        parsed = parse_object(content)
    except ValueError as error:
        raise ValueError(f"header: {error}") from None
    _check_metadata(parsed.pop("__metadata__", {}))
    if len(parsed) > MAX_TENSORS:
        raise ValueError(f"expected at most {MAX_TENSORS} tensors, got {len(parsed)}")
    entries = {name: _entry(name, value) for name, value in parsed.items()}
    _check_coverage(entries, data_length)
    return entries


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"__metadata__: expected an object of strings, got {shown(metadata)}")


def _entry(name: str, value: Any) -> TensorEntry:
    where = shown(name)
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"{where}: expected a name of at most {MAX_NAME_LENGTH} characters")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected dtype, shape and data_offsets, got {shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{where}: dtype: expected one of {list(_BITS)}, got {shown(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(
            f"{where}: shape: expected at most {MAX_DIMENSIONS} integers from 0 to 2**63 - 1, got "
            f"{shown(shape)}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{where}: data_offsets: expected [begin, end], got {shown(offsets)}")
    begin, end = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (end - begin):
        raise ValueError(
            f"{where}: shape {shown(shape)} of {dtype} takes {bits} bits, data_offsets "
            f"{shown(offsets)} hold {8 * (end - begin)}"
        )
    if bits >= 1 << 66:
        raise ValueError(f"{where}: shape: expected less than 2**63 bytes, got {shown(shape)}")
    return TensorEntry(dtype, tuple(shape), begin, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 63 for item in value
    )


def _check_coverage(entries: Mapping[str, TensorEntry], data_length: int) -> None:
    """Checks that the tensors lie behind one another, from the first byte to the last."""
    position, before = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            fault = "overlaps" if entry.begin < position else "leaves a gap behind"
            raise ValueError(
                f"{shown(name)}: data_offsets [{entry.begin}, {entry.end}] {fault} {before}, which "
                f"ends at {position}"
            )
        position, before = entry.end, shown(name)
    if position != data_length:
        raise ValueError(f"expected {position} bytes behind the header, got {data_length}")
