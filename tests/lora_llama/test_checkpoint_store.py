"""checkpoint-N directories through the operations that make, replace and delete them."""

import math
import os
import shutil
from pathlib import Path

import pytest

from lora_llama import checkpoint_store, disk, state_files, training_state
from lora_llama.checkpoint_store import (
    begin,
    commit,
    finished_checkpoints,
    next_save_number,
    rotate,
    save_number,
)


def save(output: Path, step: int, content: str) -> Path:
    checkpoint = output / f"checkpoint-{step}"
    staging = begin(checkpoint)
    disk.write_file(staging / "weights", content.encode())
    record = {"save_number": next_save_number(output)}
    disk.write_file(staging / "training.json", state_files.to_files(record)[".json"])
    disk.write_file(staging / "trainer_state.json", b"{}")
    commit(staging, checkpoint)
    return checkpoint


def contents(output: Path) -> dict[str, str]:
    return {path.name: (path / "weights").read_text() for path in output.iterdir()}


def test_checkpoints_are_made_replaced_and_deleted(tmp_path):
    output = tmp_path / "deep" / "er"
    for step in (2, 4, 10):
        save(output, step, f"first {step}")
    assert list(finished_checkpoints(output)) == [2, 4, 10]
    # A new training in the same directory: its own are the youngest.
    fourth = save(output, 4, "second 4")
    rotate(output, 2, {fourth})
    assert contents(output) == {"checkpoint-10": "first 10", "checkpoint-4": "second 4"}
    second = save(output, 2, "second 2")
    rotate(output, 1, {second, fourth})
    assert contents(output) == {"checkpoint-2": "second 2", "checkpoint-4": "second 4"}
    rotate(output, None, set())
    assert len(contents(output)) == 2


def test_the_order_of_saving_outlives_a_copy(tmp_path):
    for step in (6, 12, 2, 4):
        save(tmp_path / "first", step, str(step))
    output = tmp_path / "copy"
    for seconds, step in enumerate((4, 2, 12, 6)):
        copied = shutil.copytree(tmp_path / "first" / f"checkpoint-{step}", output / str(step))
        # As a copy may have it: the times say the opposite, or nothing.
        for path in (copied, *copied.iterdir()):
            os.utime(path, (seconds // 2, seconds // 2))
        copied.rename(output / f"checkpoint-{step}")
    assert list(finished_checkpoints(output)) == [6, 12, 2, 4]
    os.rename(output / "checkpoint-4", output / ".checkpoint-4.old")
    assert list(finished_checkpoints(output)) == [6, 12, 2, 4] and next_save_number(output) == 5
    rotate(output, 2, set())
    assert list(finished_checkpoints(output)) == [2, 4]


@pytest.mark.parametrize(
    "record",
    [
        None, b"", state_files.to_files([1])[".json"], state_files.to_files({})[".json"],
        *(state_files.to_files({"save_number": n})[".json"] for n in (0, -1, True, 1.5, "9")),
    ],
)  # fmt: skip
def test_a_checkpoint_whose_place_is_not_known_is_not_passed_over(record, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, str(step))
    file = tmp_path / "checkpoint-1" / f"{training_state.TRAINING}.json"
    file.unlink()
    if record is not None:
        file.write_bytes(record)
    assert save_number(tmp_path / "checkpoint-1") == math.inf
    assert list(finished_checkpoints(tmp_path)) == [2, 3, 1] and next_save_number(tmp_path) == 4


def test_other_names_are_left_alone(tmp_path):
    names = ("checkpoint-x", "checkpoint-", ".checkpoint-3", ".checkpoint-3.new.bak", "notes")
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-1").mkdir()
    last = save(tmp_path, 9, "nine")
    rotate(tmp_path, 1, {last})
    assert {path.name for path in tmp_path.iterdir()} == {*names, "checkpoint-1", "checkpoint-9"}
    assert list(finished_checkpoints(tmp_path)) == [9]
    assert finished_checkpoints(tmp_path / "nowhere") == {}


def test_the_next_save_clears_up(tmp_path):
    save(tmp_path, 4, "old")
    os.rename(tmp_path / "checkpoint-4", tmp_path / ".checkpoint-4.old")
    half = tmp_path / ".checkpoint-6.new"
    (half / "adapter").mkdir(parents=True)
    (half / "adapter" / "weights").write_text("half")
    (tmp_path / ".checkpoint-2.deleted").mkdir()
    # Between two renames of an interrupted save: what was there still counts.
    assert finished_checkpoints(tmp_path) == {4: tmp_path / ".checkpoint-4.old"}
    save(tmp_path, 8, "new")
    assert contents(tmp_path) == {"checkpoint-4": "old", "checkpoint-8": "new"}
    # After both renames it does not.
    save(tmp_path, 4, "newer")
    (tmp_path / ".checkpoint-4.old").mkdir()
    (tmp_path / ".checkpoint-4.old" / "trainer_state.json").write_text("{}")
    assert finished_checkpoints(tmp_path)[4] == tmp_path / "checkpoint-4"
    save(tmp_path, 10, "last")
    assert set(contents(tmp_path)) == {"checkpoint-4", "checkpoint-8", "checkpoint-10"}


def test_a_link_is_removed_and_what_it_names_is_not(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    output = tmp_path / "output"
    (output / ".checkpoint-1.new").mkdir(parents=True)
    (output / ".checkpoint-1.new" / "link").symlink_to(outside)
    save(output, 2, "two")
    assert (outside / "file").exists() and set(contents(output)) == {"checkpoint-2"}


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[" * 99_999])
def test_a_directory_without_a_valid_state_is_no_checkpoint(content, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    if content is not None:
        (tmp_path / "checkpoint-1" / "trainer_state.json").write_bytes(content)
    assert not checkpoint_store.is_finished(tmp_path / "checkpoint-1")
    assert finished_checkpoints(tmp_path) == {}


def test_a_file_is_replaced_whole_and_errors_name_it(tmp_path, monkeypatch):
    file = tmp_path / "metrics.json"
    disk.replace_file(file, b"one")
    disk.replace_file(file, b"two")
    assert file.read_bytes() == b"two" and list(tmp_path.iterdir()) == [file]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*\.metrics.json.new'"):
        disk.replace_file(file, b"three")
    monkeypatch.undo()
    assert file.read_bytes() == b"two" and list(tmp_path.iterdir()) == [file]
    disk.replace_file(file, b"four")
    assert file.read_bytes() == b"four" and list(tmp_path.iterdir()) == [file]
