"""PEFT's two files: exchanged with PEFT, saved by saves that are killed, broken on purpose."""

import copy
import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import stat
import struct
import sys
import tempfile
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import adapter_files
from lora_kernels.adapter_files import adapter_directory, load_adapter, save_adapter
from lora_kernels.config import LoraConfig

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter(rank: int = 2, seed: int = 0) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """A config and tensors of two modules, in which `rank` and `seed` can be recognised."""
    generator = torch.Generator().manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=seed + 1, target_modules=["q", "v"], rank_pattern={"v": rank + 1}
    )
    tensors = {}
    for module, r in (("layers.0.q", rank), ("layers.0.v", rank + 1)):
        tensors[f"{module}.lora_A.weight"] = torch.randn(r, 6, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(5, r, generator=generator).half()
    return config, tensors


def is_adapter(directory: Path, expected: tuple[LoraConfig, dict[str, torch.Tensor]]) -> bool:
    config, tensors = load_adapter(directory)
    same_tensors = tensors.keys() == expected[1].keys() and all(
        tensors[key].dtype == tensor.dtype and torch.equal(tensors[key], tensor)
        for key, tensor in expected[1].items()
    )
    # Both or neither: a config with the other adapter's tensors is what must never be.
    assert same_tensors == (config == expected[0])
    return same_tensors


def write_raw(directory: Path, config: object, tensors: dict[str, torch.Tensor]) -> None:
    directory.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (directory / CONFIG).write_text(text)
    save_file({PREFIX + key: tensor for key, tensor in tensors.items()}, directory / TENSORS)


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "adapter"
    save_adapter(directory, *adapter())
    return directory


# Exchange with PEFT


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


PEFT_CONFIGS = {
    "default": {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"1.mlp.down_proj": 2, "down_proj": 3},
        "alpha_pattern": {"q_proj": 5},
        "use_rslora": True,
    },
    "second": {"r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
}


@pytest.fixture(scope="module")
def base_model():
    return tiny_llama()


@pytest.fixture(scope="module")
def peft_model(base_model):
    torch.manual_seed(1)
    configs = {
        name: peft.LoraConfig(**kwargs, init_lora_weights=False)
        for name, kwargs in PEFT_CONFIGS.items()
    }
    model = peft.get_peft_model(copy.deepcopy(base_model), configs["default"])
    model.add_adapter("second", configs["second"])
    return model.eval()


@pytest.mark.parametrize("name", PEFT_CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exchange_with_peft(tmp_path, base_model, peft_model, name, dtype):
    model = copy.deepcopy(peft_model)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(dtype)
    model.set_adapter(name)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)

    theirs = adapter_directory(tmp_path / "theirs", name)
    config, tensors = load_adapter(theirs)
    written = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    assert {PREFIX + key for key in tensors} == set(written)
    for key, tensor in tensors.items():
        expected = written[PREFIX + key]
        assert tensor.dtype == expected.dtype == dtype
        assert torch.equal(tensor, expected)

    ours = adapter_directory(tmp_path / "ours", name)
    save_adapter(ours, config, tensors)
    assert json.loads((ours / CONFIG).read_text()) == json.loads((theirs / CONFIG).read_text())
    assert (ours / TENSORS).read_bytes() == (theirs / TENSORS).read_bytes()
    with safe_open(ours / TENSORS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}

    reloaded = peft.PeftModel.from_pretrained(
        copy.deepcopy(base_model), ours, adapter_name=name, autocast_adapter_dtype=False
    ).eval()
    input_ids = torch.arange(8).reshape(1, 8)
    if dtype == torch.float32:
        with torch.no_grad():
            logits = reloaded(input_ids).logits
            assert torch.equal(logits, model(input_ids).logits)
            assert not torch.allclose(logits, base_model(input_ids).logits)
    again = peft.get_peft_model_state_dict(reloaded, adapter_name=name, save_embedding_layers=False)
    assert again.keys() == written.keys()
    assert all(torch.equal(again[key], written[key]) for key in written)


def test_peft_reads_what_was_made_here(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    config = LoraConfig(
        r=2,
        lora_alpha=5,
        lora_dropout=0.25,
        target_modules=["0", "2"],
        init_lora_weights="gaussian",
        alpha_pattern={"2": 7},
    )
    tensors = {
        "0.lora_A.weight": torch.randn(2, 4),
        "0.lora_B.weight": torch.randn(6, 2),
        "2.lora_A.weight": torch.randn(2, 6),
        "2.lora_B.weight": torch.randn(3, 2),
    }
    save_adapter(tmp_path, config, tensors)
    x = torch.randn(5, 4)
    hidden = model[0](x) + 2.5 * (x @ tensors["0.lora_A.weight"].T) @ tensors["0.lora_B.weight"].T
    hidden = hidden.relu()
    update = (hidden @ tensors["2.lora_A.weight"].T) @ tensors["2.lora_B.weight"].T
    expected = model[2](hidden) + 3.5 * update
    loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(loaded(x), expected)
    assert loaded.peft_config["default"].lora_dropout == 0.25


def test_unknown_keys_survive(tmp_path):
    config, tensors = adapter()
    write_raw(tmp_path / "a", {**config.to_dict(), "from_the_future": [1, {"x": None}]}, tensors)
    save_adapter(tmp_path / "b", *load_adapter(tmp_path / "a"))
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["from_the_future"] == [1, {"x": None}]


def test_the_order_of_patterns_survives(tmp_path):
    """PEFT sorts them as it writes, and cannot load what it wrote if two match one module."""
    torch.manual_seed(0)
    patterns = {"b.0": 2, "0": 3}
    model = nn.ModuleDict(
        {"b": nn.Sequential(nn.Linear(4, 4)), "c": nn.Sequential(nn.Linear(4, 4))}
    )
    theirs = peft.LoraConfig(target_modules=["0"], rank_pattern=patterns, init_lora_weights=False)
    peft_model = peft.get_peft_model(copy.deepcopy(model), theirs)
    peft_model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"b\.0\.lora_A\.weight: expected rank 3, got 2"):
        load_adapter(tmp_path / "theirs")

    tensors = {
        key.removeprefix(PREFIX): tensor
        for key, tensor in peft.get_peft_model_state_dict(peft_model).items()
    }
    ours = LoraConfig(target_modules=["0"], rank_pattern=patterns)
    save_adapter(tmp_path / "ours", ours, tensors)
    assert load_adapter(tmp_path / "ours")[0].rank_for("b.0") == 2
    peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")


def test_adapter_directory(tmp_path):
    assert adapter_directory(tmp_path, "default") == tmp_path
    assert adapter_directory(str(tmp_path), "b") == tmp_path / "b"
    with pytest.raises(ValueError, match="adapter_name"):
        adapter_directory(tmp_path, "../b")


# Saving


def test_tensors_are_copied_whatever_their_layout(tmp_path):
    config = LoraConfig(r=2, target_modules=["q"])
    flat = torch.arange(24.0, dtype=torch.bfloat16, requires_grad=True)
    tensors = {
        "q.lora_A.weight": flat[:12].view(6, 2).t(),
        "q.lora_B.weight": flat[12:].view(6, 2),
    }
    save_adapter(tmp_path, config, tensors)
    loaded = load_adapter(tmp_path)[1]
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == torch.bfloat16
        assert loaded[key].is_contiguous()
        assert not loaded[key].requires_grad
        assert torch.equal(loaded[key], tensor)


def test_loaded_tensors_do_not_change_with_the_file(saved):
    tensors = load_adapter(saved)[1]
    size = (saved / TENSORS).stat().st_size
    with open(saved / TENSORS, "r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert all(torch.equal(tensors[key], tensor) for key, tensor in adapter()[1].items())


def test_saving_is_reproducible(tmp_path):
    for name in "ab":
        save_adapter(tmp_path / name, *adapter())
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_each_step_of_a_save_is_on_disk_before_the_next(saved, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        fsync(descriptor)
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        new_files = sorted(path.name for path in saved.glob("*.new"))
        steps.append(("directory" if is_directory else "file", *new_files))

    def note_replace(source, target):
        replace(source, target)
        steps.append((Path(source).name, Path(target).name))

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save_adapter(saved, *adapter(seed=1))
    assert steps == [
        ("directory",),
        ("file", f"{TENSORS}.new"),
        ("directory", f"{TENSORS}.new"),
        ("file", f"{CONFIG}.new", f"{TENSORS}.new"),
        ("directory", f"{CONFIG}.new", f"{TENSORS}.new"),
        (f"{TENSORS}.new", TENSORS),
        ("directory", f"{CONFIG}.new"),
        (f"{CONFIG}.new", CONFIG),
        ("directory",),
    ]


class Killed(BaseException):
    """Ends a save as a kill does: no handler for errors runs."""


def save_until_line(count: int, directory: Path, *content) -> bool:
    """Saves, killed before the count-th executed line of adapter_files; whether it was."""
    remaining = count

    def trace(frame, event, argument):
        nonlocal remaining
        code = frame.f_code
        if code.co_filename != adapter_files.__file__ or code.co_name.startswith("_check"):
            return None
        if event == "line":
            remaining -= 1
            if remaining < 0:
                raise Killed
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        save_adapter(directory, *content)
    except Killed:
        return True
    finally:
        sys.settrace(previous)
    return False


def snapshot(directory: Path) -> frozenset[tuple[str, bytes]]:
    return frozenset((path.name, path.read_bytes()) for path in directory.iterdir())


def restore(directory: Path, files: frozenset[tuple[str, bytes]]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    # Tensors first, as a save writes them.
    for name, content in sorted(files, reverse=True):
        (directory / name).write_bytes(content)


def states_of_killed_saves(directory, before, content) -> list[frozenset[tuple[str, bytes]]]:
    """Every state that a save leaves when killed, in order of time; the last is of a whole save."""
    states = []
    killed, count = True, 0
    while killed:
        restore(directory, before)
        killed = save_until_line(count, directory, *content)
        if snapshot(directory) not in states:
            states.append(snapshot(directory))
        count += 1
    assert count > 30
    return states


def test_a_save_killed_at_any_line_leaves_the_old_or_the_new_adapter(tmp_path, monkeypatch):
    # The order of the syncs is tested above; they take most of the time.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    old, new, newest = adapter(2, seed=1), adapter(4, seed=2), adapter(3, seed=3)
    directory = tmp_path / "adapter"
    save_adapter(directory, *old)
    states = states_of_killed_saves(directory, snapshot(directory), new)
    # Untouched; empty and full file of tensors; of config; either renamed.
    assert len(states) == 7
    is_new = []
    for state in states:
        restore(directory, state)
        is_new.append(is_adapter(directory, new))
        assert is_new[-1] or is_adapter(directory, old)
        assert snapshot(directory) == state, "reading wrote"
    assert is_new == sorted(is_new)
    assert is_new[0] is False
    assert is_new[-2:] == [True, True]

    for state, was_new in zip(states, is_new, strict=True):
        before = new if was_new else old
        second = states_of_killed_saves(directory, state, newest)
        seen_newest = []
        for later_state in second:
            restore(directory, later_state)
            seen_newest.append(is_adapter(directory, newest))
            assert seen_newest[-1] or is_adapter(directory, before)
        assert seen_newest == sorted(seen_newest)
        assert {name for name, _ in second[-1]} == {CONFIG, TENSORS}
        assert is_adapter(directory, newest)


def test_a_first_save_killed_at_any_line_leaves_nothing_or_the_adapter(tmp_path):
    new = adapter()
    found = []
    for state in states_of_killed_saves(tmp_path / "adapter", frozenset(), new):
        restore(tmp_path / "adapter", state)
        try:
            found.append(is_adapter(tmp_path / "adapter", new))
        except FileNotFoundError:
            found.append(False)
    assert found == [False] * 5 + [True] * 2


@pytest.mark.parametrize("torn", [TENSORS, CONFIG])
def test_a_torn_write_leaves_the_old_adapter(saved, monkeypatch, torn):
    write = adapter_files._write

    def write_half(path, content):
        if path.name != f"{torn}.new":
            return write(path, content)
        path.write_bytes(content[: len(content) // 2])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(adapter_files, "_write", write_half)
        with pytest.raises(Killed):
            save_adapter(saved, *adapter(seed=1))
    assert (saved / f"{torn}.new").exists()
    assert is_adapter(saved, adapter())
    save_adapter(saved, *adapter(seed=1))
    assert is_adapter(saved, adapter(seed=1))


def test_an_interrupted_save_that_another_program_overwrote_is_an_error(saved):
    shutil.copy(saved / CONFIG, saved / f"{CONFIG}.new")
    later = (saved / f"{CONFIG}.new").stat().st_mtime_ns + 10**9
    os.utime(saved / TENSORS, ns=(later, later))
    with pytest.raises(ValueError, match=rf"{TENSORS}.*newer than {CONFIG}\.new"):
        load_adapter(saved)


def unchanged_after_error(directory: Path, error: type[OSError]) -> OSError:
    before = snapshot(directory)
    with pytest.raises(error) as caught:
        save_adapter(directory, *adapter(seed=1))
    assert snapshot(directory) == before
    assert is_adapter(directory, adapter())
    assert str(caught.value.filename).startswith(str(directory))
    return caught.value


@pytest.mark.parametrize("call", range(5))
def test_an_error_of_fsync_before_the_save_counts_changes_nothing(saved, monkeypatch, call):
    calls = iter(range(100))
    fsync = os.fsync

    def fail(descriptor):
        fsync(descriptor)
        if next(calls) == call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    assert unchanged_after_error(saved, OSError).errno == errno.EIO


@pytest.mark.parametrize(("renamed", "is_new"), [(TENSORS, False), (CONFIG, True)])
def test_an_error_of_a_rename_leaves_one_adapter(saved, monkeypatch, renamed, is_new):
    replace = os.replace

    def fail(source, target):
        if Path(target).name == renamed:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source), None, str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match=renamed):
            save_adapter(saved, *adapter(seed=1))
    assert is_adapter(saved, adapter(seed=1)) == is_new
    assert (saved / f"{CONFIG}.new").exists() == is_new
    save_adapter(saved, *adapter(seed=2))
    assert is_adapter(saved, adapter(seed=2))


def test_a_directory_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    save_adapter(tmp_path, *adapter())
    assert is_adapter(tmp_path, adapter())


def test_a_full_disk_changes_nothing(saved):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        error = unchanged_after_error(saved, OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.errno == errno.EFBIG
    assert error.filename.endswith(f"{TENSORS}.new")


def test_a_read_only_directory_changes_nothing():
    # Not tmp_path, whose parents only their owner can enter: the superuser, who may write
    # anywhere, becomes another user here.
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(directory, *adapter())
        os.chmod(directory, 0o555)
        try:
            if user == 0:
                os.seteuid(65534)
            error = unchanged_after_error(Path(directory), PermissionError)
        finally:
            os.seteuid(user)
            os.chmod(directory, 0o755)
    assert error.filename.endswith(f"{TENSORS}.new")


def test_a_path_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    for directory in (path, path / "below"):
        with pytest.raises(OSError, match=str(path)):
            save_adapter(directory, *adapter())
    assert path.read_text() == "mine"


def test_a_link_at_the_name_of_a_new_file_is_not_followed(saved, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in (CONFIG, TENSORS):
        (saved / f"{name}.new").symlink_to(mine)
        with pytest.raises(FileExistsError):
            adapter_files._write(saved / f"{name}.new", b"not mine")
    save_adapter(saved, *adapter(seed=1))
    assert mine.read_text() == "mine"
    assert is_adapter(saved, adapter(seed=1))


def test_what_could_not_be_loaded_is_not_saved(saved):
    config, tensors = adapter(seed=1)
    tensors["layers.0.q.lora_A.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.q\.lora_A\.weight: expected finite"):
        save_adapter(saved, config, tensors)
    assert is_adapter(saved, adapter())


# Loading what is broken


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adapter directory", lambda saved: shutil.rmtree(saved)),
        ("adapter directory", lambda saved: (shutil.rmtree(saved), saved.write_text("a file"))),
        (CONFIG, lambda saved: (saved / CONFIG).unlink()),
        (TENSORS, lambda saved: (saved / TENSORS).unlink()),
    ],
)
def test_missing(saved, name, make):
    make(saved)
    with pytest.raises(FileNotFoundError, match=rf"{name}.*missing"):
        load_adapter(saved)


def test_a_pickle_is_not_loaded(saved):
    (saved / TENSORS).rename(saved / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickle.*never loaded.*safe_serialization"):
        load_adapter(saved)


@pytest.mark.parametrize("name", [CONFIG, TENSORS, f"{CONFIG}.new"])
def test_links_and_special_files(saved, tmp_path, name):
    path, outside = saved / name, tmp_path / "outside"
    shutil.copy(saved / name.removesuffix(".new"), outside)
    inside = saved / "inside"
    shutil.copy(outside, inside)
    for target, message in (
        (outside, "outside the adapter's directory"),
        (Path("..") / "outside", "outside the adapter's directory"),
        (Path("/dev/zero"), "outside the adapter's directory"),
        (saved / "dangling", "not a regular file"),
        (path, "not a regular file"),
    ):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            load_adapter(saved)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"{name}.*not a regular file"):
        load_adapter(saved)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=rf"{name}.*not a regular file"):
        load_adapter(saved)
    path.rmdir()
    path.symlink_to(inside)
    assert is_adapter(saved, adapter())


def test_a_link_to_the_whole_directory_is_fine(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    assert is_adapter(tmp_path / "link", adapter())


GOOD = '"peft_type": "LORA", "r": 2, "rank_pattern": {"v": 3}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        (f"{{{GOOD}}} x", "Extra data"),
        ("[]", "expected a JSON object, got list"),
        ("3", "expected a JSON object, got int"),
        (f'{{{GOOD}, "r": 2}}', r"duplicate keys \['r'\]"),
        (f'{{{GOOD}, "alpha_pattern": {{"q": 1, "q": 2}}}}', r"duplicate keys \['q'\]"),
        (f'{{{GOOD}, "lora_alpha": NaN}}', "NaN is not JSON"),
        (f'{{{GOOD}, "x": -Infinity}}', "-Infinity is not JSON"),
        (f'{{{GOOD}, "lora_alpha": 1e999}}', "lora_alpha: expected a finite number"),
        (f'{{{GOOD}, "lora_alpha": 1{"0" * 5000}}}', "4300 digits"),
        (f'{{{GOOD}, "x": {"[" * 100_000}', "nested too deeply"),
        (f'{{{GOOD}, "x": {"[" * 40}{"]" * 40}}}', "nested deeper than 32"),
        (f'{{{GOOD}, "x": {chr(34)}{"a" * (1 << 20)}{chr(34)}}}', "at most 1048576 bytes"),
        ('{"r": 2}', "peft_type: expected 'LORA', got no such key"),
        ('{"peft_type": "LOHA"}', "peft_type: expected 'LORA', got 'LOHA'"),
        ('{"peft_type": null}', "peft_type: expected 'LORA', got None"),
        (f'{{{GOOD}, "use_qalora": true}}', "use_qalora: expected False"),
        (f'{{{GOOD}, "lora_dropout": "a lot"}}', "lora_dropout: expected a number"),
        (f'{{{GOOD}, "target_modules": "("}}', "target_modules: expected a regular expression"),
        (b"\xff\xfe{}", "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
    ],
)
def test_configs_that_are_refused(saved, text, message):
    (saved / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"{CONFIG}.*{message}"):
        load_adapter(saved)


def test_the_config_of_these_tests_is_good(saved):
    (saved / CONFIG).write_text(f'{{{GOOD}, "x": {"[" * 30}{"]" * 30}}}')
    load_adapter(saved)


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tensors of `adapter`, one replaced or left out."""
    tensors = adapter()[1]
    for name, tensor in changes.items():
        module, matrix = name.split("_")
        key = f"layers.0.{module}.lora_{matrix}.weight"
        del tensors[key]
        if tensor is not None:
            tensors[key] = tensor
    return tensors


@pytest.mark.parametrize(
    ("tensors", "messages"),
    [
        (changed(q_A=None), [r"0\.q\.lora_B\.weight: expected layers\.0\.q\.lora_A\.weight"]),
        (changed(q_B=None), [r"0\.q\.lora_A\.weight: expected layers\.0\.q\.lora_B\.weight"]),
        (
            changed(q_A=torch.zeros(3, 6), v_B=torch.zeros(5, 4)),
            [
                r"0\.q\.lora_A\.weight: expected rank 2, got 3",
                r"0\.v\.lora_B\.weight: expected rank 3, got 4",
            ],
        ),
        (changed(q_A=torch.zeros(2, 6, dtype=torch.int8)), [r"q\.lora_A.*got torch\.int8"]),
        (changed(q_B=torch.zeros(5, 2, dtype=torch.complex64)), [r"q\.lora_B.*complex64"]),
        (changed(q_B=torch.zeros(5, 2).to(torch.float8_e4m3fn)), [r"q\.lora_B.*float8"]),
        (changed(q_A=torch.zeros(12)), [r"q\.lora_A.*non-empty matrix, got shape \[12\]"]),
        (changed(q_A=torch.zeros(2, 0)), [r"q\.lora_A.*non-empty matrix, got shape \[2, 0\]"]),
        (changed(q_A=torch.zeros(2, 6, 1)), [r"q\.lora_A.*matrix, got shape \[2, 6, 1\]"]),
        (changed(q_A=torch.full((2, 6), torch.nan)), [r"q\.lora_A.*NaN or infinity"]),
        (changed(v_B=torch.full((5, 3), -torch.inf)), [r"v\.lora_B.*NaN or infinity"]),
        ({}, ["expected LoRA tensors, got none"]),
        (
            {
                **adapter()[1],
                "layers.0.q.lora_magnitude_vector": torch.zeros(5),
                "embed.lora_embedding_A": torch.zeros(2, 6),
                "lm_head.weight": torch.zeros(2, 6),
                "layers.0.q.lora_B.bias": torch.zeros(5),
                "layers.0.q.lora_A.default.weight": torch.zeros(2, 6),
            },
            [
                "expected keys",
                r"q\.lora_magnitude_vector'",
                r"lora_embedding_A'",
                r"lm_head\.weight'",
                r"lora_B\.bias'",
                r"default\.weight'",
            ],
        ),
        ({"lora_A.weight": torch.zeros(2, 6)}, ["expected keys"]),
    ],
)
def test_tensors_that_are_refused(tmp_path, tensors, messages):
    write_raw(tmp_path, adapter()[0].to_dict(), tensors)
    with pytest.raises(ValueError, match=TENSORS) as caught:
        load_adapter(tmp_path)
    for message in messages:
        caught.match(message)


OPTIONAL = {
    "lora_bias": {"layers.0.q.lora_B.bias": torch.ones(5), "layers.0.v.lora_B.bias": torch.ones(5)},
    "use_dora": {
        "layers.0.q.lora_magnitude_vector": torch.ones(5),
        "layers.0.v.lora_magnitude_vector": torch.ones(5),
    },
    "bias": {"layers.0.q.base_layer.bias": torch.ones(5), "layers.0.norm.bias": torch.ones(7)},
    "modules_to_save": {
        "score.weight": torch.ones(2, 3).half(),
        "layers.0.score.inner.count": torch.tensor(3),
        "layers.0.score.mask": torch.tensor([True]),
        "score.log_scale": torch.ones(()),
    },
}
OPTIONS = {"lora_bias": True, "use_dora": True, "bias": "all", "modules_to_save": ["score"]}


def with_optional(name: str) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    config, tensors = adapter()
    return dataclasses.replace(config, **{name: OPTIONS[name]}), {**tensors, **OPTIONAL[name]}


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_an_option_adds_goes_to_disk_and_back(tmp_path, name):
    save_adapter(tmp_path, *with_optional(name))
    assert is_adapter(tmp_path, with_optional(name))
    # Without the option the same tensors have no meaning.
    change_json = json.loads((tmp_path / CONFIG).read_text())
    change_json[name] = LoraConfig().to_dict()[name]
    (tmp_path / CONFIG).write_text(json.dumps(change_json))
    with pytest.raises(ValueError, match="expected keys") as caught:
        load_adapter(tmp_path)
    for key in OPTIONAL[name]:
        caught.match(f"'{key}'")


def test_the_weight_of_a_targeted_head_may_be_there(tmp_path):
    config, tensors = adapter()
    tensors["lm_head.base_layer.weight"] = torch.ones(3, 2)
    save_adapter(tmp_path, config, tensors)
    assert is_adapter(tmp_path, (config, tensors))
    tensors["layers.0.q.base_layer.weight"] = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"got \['layers\.0\.q\.base_layer\.weight'\]"):
        save_adapter(tmp_path, config, tensors)


@pytest.mark.parametrize(
    ("name", "key", "tensor", "message"),
    [
        ("lora_bias", "layers.0.v.lora_B.bias", None, "expected {key} beside it, got none"),
        ("use_dora", "layers.0.q.lora_magnitude_vector", None, "expected {key} beside it"),
        ("lora_bias", "layers.0.q.lora_B.bias", torch.ones(4), r"{key}: expected shape \[5\]"),
        ("use_dora", "layers.0.q.lora_magnitude_vector", torch.ones(5, 1), r"shape \[5\], got"),
        ("use_dora", "layers.0.q.lora_magnitude_vector", torch.ones(5).int(), "{key}: .*int32"),
        ("use_dora", "layers.0.v.lora_magnitude_vector", torch.ones(5) * torch.inf, "finite"),
        ("bias", "layers.0.norm.bias", torch.ones(7) * torch.nan, "{key}: expected finite"),
        ("modules_to_save", "score.weight", torch.ones(2) * torch.nan, "{key}: expected finite"),
        (
            "modules_to_save",
            "score.weight",
            torch.ones(2, 3).to(torch.float8_e4m3fn),
            "{key}: .*float8",
        ),
        ("modules_to_save", "scores.weight", torch.ones(2), r"expected keys .*'{key}'"),
    ],
)
def test_optional_tensors_that_are_refused(tmp_path, name, key, tensor, message):
    config, tensors = with_optional(name)
    tensors.pop(key, None)
    if tensor is not None:
        tensors[key] = tensor
    write_raw(tmp_path, config.to_dict(), tensors)
    with pytest.raises(ValueError, match=message.replace("{key}", key.replace(".", r"\."))):
        load_adapter(tmp_path)


def test_keys_without_peft_s_prefix_are_refused(saved):
    tensors = load_file(saved / TENSORS)
    save_file(
        {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}, saved / TENSORS
    )
    with pytest.raises(ValueError, match=r"expected keys base_model.*'layers\.0\.v\.lora_B") as e:
        load_adapter(saved)
    assert all(key.removeprefix(PREFIX) in str(e.value) for key in tensors)


def header_of(content: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: dict | bytes, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def test_corrupt_tensor_files(saved):
    path = saved / TENSORS
    content = path.read_bytes()
    header, data = header_of(content)
    first, second = [key for key in header if key != "__metadata__"][:2]

    def edited(key, **fields):
        return with_header({**header, key: {**header[key], **fields}}, data)

    corrupt = [
        *(content[:size] for size in range(len(content))),
        content + b"\0",
        struct.pack("<Q", 1 << 63) + content[8:],
        struct.pack("<Q", 200_000_000) + content[8:],
        edited(first, data_offsets=header[second]["data_offsets"]),
        edited(first, data_offsets=[0, 1 << 62]),
        edited(first, data_offsets=[-4, 4]),
        edited(first, shape=[1 << 40, 1 << 40]),
        edited(first, shape=[-2, 6]),
        edited(first, dtype="F8_E8M0"),
        edited(first, dtype="PICKLE"),
        with_header(b"[" * 10_000, data),
        with_header(b"{}", data),
        b"PK\x03\x04" + content,
    ]
    for bad in corrupt:
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=TENSORS):
            load_adapter(saved)


def test_mutated_files_load_or_are_refused(saved):
    """Bytes changed at random: an adapter that satisfies every rule, or ValueError."""
    generator = random.Random(0)
    originals = {name: (saved / name).read_bytes() for name in (CONFIG, TENSORS)}
    refused = 0
    for _ in range(300):
        name = generator.choice((CONFIG, TENSORS))
        content = bytearray(originals[name])
        for _ in range(generator.randint(1, 3)):
            end = len(content) if name == CONFIG else 600
            content[generator.randrange(end)] = generator.choice(b'0129-"{}[],:etn\\\xff\x00')
        (saved / name).write_bytes(content)
        try:
            config, tensors = load_adapter(saved)
            adapter_files._check_tensors("", config, tensors)
        except ValueError:
            refused += 1
        (saved / name).write_bytes(originals[name])
    assert 150 < refused < 300
