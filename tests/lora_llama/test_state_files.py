"""State as JSON and safetensors: what is written is read back to the bit, and nothing else is."""

import json
import math
import os
import struct
from collections import OrderedDict
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lora_llama import state_files
from lora_llama.state_files import read, to_files


def write(directory: Path, state: Any, name: str = "state") -> Path:
    for suffix, content in to_files(state).items():
        (directory / f"{name}{suffix}").write_bytes(content)
    return directory


def same(a: Any, b: Any) -> bool:
    """Equal in every type, key, order and bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        bits = (
            a.contiguous().flatten().view(torch.uint8),
            b.contiguous().flatten().view(torch.uint8),
        )
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        keys = list(map(same, a, b))
        return len(a) == len(b) and all(keys) and all(same(a[key], b[key]) for key in a)
    return a == b


keys = st.text(max_size=4) | st.integers(-(10**6), 10**6) | st.sampled_from(["$tuple", "a/b", "0"])
tensors = st.builds(
    lambda shape, dtype, seed: torch.randint(
        -99, 99, shape, generator=torch.Generator().manual_seed(seed)
    ).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(state_files._DTYPES),
    st.integers(0, 9),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@given(values)
def test_every_state_comes_back(tmp_path_factory, state):
    directory = write(tmp_path_factory.mktemp("state"), state)
    assert same(read(directory, "state"), state)


EXACT = [
    0.1, 1.0, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, math.nan, math.inf, -math.inf, 1e22,
    2**63, -(2**200), True, None, "", "ü\ud800\n", (), [], {}, ((1, [2.0]),), {0: 1, "0": 2},
    {"$tensor": "x"}, {"a": {"b": {"c": (None,)}}}, {1: {"$dict": []}},
]  # fmt: skip


@pytest.mark.parametrize("state", EXACT, ids=repr)
def test_values(state, tmp_path):
    assert same(read(write(tmp_path, state), "state"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_tensors_of_every_layout(tmp_path):
    base = torch.randn(4, 6)
    state = {
        "transposed": base.T, "sliced": base[1:, ::2], "expanded": base[:1].expand(4, 6),
        "shared": [base, base.view(24)], "scalar": torch.tensor(3.0), "empty": torch.empty(0, 3),
        "nan": torch.tensor([math.nan, -0.0, math.inf]), "grad": base.clone().requires_grad_(),
    }  # fmt: skip
    result = read(write(tmp_path, state), "state")
    assert not result["grad"].requires_grad
    state["grad"] = state["grad"].detach()
    assert same(result, state)


def test_a_state_names_its_tensors_by_their_paths(tmp_path):
    write(tmp_path, {"state": {0: {"exp_avg": torch.ones(1)}}, "a": [torch.ones(2)]})
    names = set(read_header(tmp_path / "state.safetensors"))
    assert names == {"state/0/exp_avg", "a/0"}


def read_header(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


class Kind(IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({1}, "builtins.set"),
        (b"", "builtins.bytes"),
        (1j, "builtins.complex"),
        (Kind.ONE, "Kind"),
        (np.float64(1), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (OrderedDict(a=1), "collections.OrderedDict"),
        ({True: 1}, "builtins.dict"),
        ({1.5: 1}, "builtins.dict"),
        (lambda: 0, "builtins.function"),
        (torch.zeros(2, dtype=torch.complex128), "torch.complex128"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(2, device="meta"), "meta"),
    ],
)
def test_what_is_no_state_is_named_by_its_path(value, name):
    with pytest.raises(TypeError, match=r"^a/1: expected .*" + name):
        to_files({"a": [0, value]})


def test_a_state_that_is_nested_too_deeply():
    state: Any = 0
    for _ in range(100):
        state = [state]
    with pytest.raises(ValueError, match="nested deeper than 64"):
        to_files(state)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write(tmp_path, {"step": 3, "moments": {0: torch.arange(4.0), 1: torch.ones(2, 2)}})


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_file_that_is_cut_anywhere(name, directory):
    file = directory / name
    content = file.read_bytes()
    # JSON alone may end in white space.
    for length in range(len(content.rstrip(b"\n"))):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError) as caught:
            read(directory, "state")
        assert str(caught.value).startswith(f"{file}: ")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        read(directory, "state")


@pytest.mark.parametrize(
    "text",
    [
        "[]", "1", '{"state": 1}', '{"version": 2, "state": 1}', '{"version": 1, "state": NaN}',
        '{"version": 1, "state": {"a": 1, "a": 2}}', '{"version": 1, "state": {"$tuple": 1}}',
        '{"version": 1, "state": {"$float": "1"}}', '{"version": 1, "state": {"$float": 1}}',
        '{"version": 1, "state": {"$eval": "1"}}', '{"version": 1, "state": {"$tensor": 1}}',
        '{"version": 1, "state": {"$dict": [[1, 2], [1, 3]]}}', "\0", "\udcff",
        '{"version": 1, "state": {"$dict": [[true, 2]]}}',
        '{"version": 1, "state": {"$dict": [1]}}',
        '{"version": 1, "state": {"$tuple": [], "a": 1}}', '{"version": 1, "state": 1, "x": 1}',
        '{"version": 1, "state": ' + "[" * 200 + "]" * 200 + "}", "[" * 99_999,
        '{"version": 1, "state": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_a_structure_that_is_none(text, directory):
    file = directory / "state.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as caught:
        read(directory, "state")
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"moments/0": torch.ones(4)},
        {"moments/0": torch.ones(4), "moments/1": torch.ones(1), "x": torch.ones(1)},
        {"other": torch.ones(4), "moments/1": torch.ones(1)},
    ],
)
def test_tensors_of_another_structure(tensors, directory):
    file = directory / "state.safetensors"
    save_file(tensors, file)
    with pytest.raises(ValueError) as caught:
        read(directory, "state")
    assert str(caught.value).startswith(f"{file}: expected the tensors of state.json")


def test_one_tensor_in_two_places(directory):
    file = directory / "state.json"
    file.write_text(file.read_text().replace("moments/1", "moments/0"))
    with pytest.raises(ValueError, match="differing in"):
        read(directory, "state")


def test_files_that_have_no_end(directory, monkeypatch):
    monkeypatch.setattr(state_files, "_MAX_TENSOR_BYTES", 100)
    with pytest.raises(ValueError, match=r"state.safetensors: expected at most 100 bytes, got \d+"):
        read(directory, "state")
    for name in ("state.json", "state.safetensors"):
        write(directory, [torch.ones(1)])
        (directory / name).unlink()
        os.mkfifo(directory / name)
        with pytest.raises(ValueError, match=f"{name}: expected a regular file"):
            read(directory, "state")
        (directory / name).unlink()
