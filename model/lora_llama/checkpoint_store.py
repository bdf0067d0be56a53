"""A training's checkpoint-N directories: each is there complete, or not at all.

    .checkpoint-N.new       being written
    checkpoint-N            finished: renamed when all of it was on the disk
    .checkpoint-N.old       the finished checkpoint-N before, while a new one takes its place
    .checkpoint-N.deleted   being deleted

Every change is one rename. A save that was interrupted at any point leaves the finished
checkpoints that there were: at most one of them is still called .checkpoint-N.old, and counts as
checkpoint-N until the next save gives it its name back. That save also removes what is left over.
"""

import math
import re
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from lora_llama import disk, state_files, training_state
from lora_llama.checkpoint_files import check_inside, read_json_object

# A hundred thousand lines of the log.
_MAX_STATE_BYTES = 1 << 26
_MAX_STATE_VALUES = 1 << 20
_HIDDEN = re.compile(r"\.checkpoint-(\d+)\.(new|old|deleted)")


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The content of the file that is written after all others of a checkpoint.

    Raises:
        OSError, ValueError: it is missing or faulty, or a link to a place elsewhere.
    """
    file = checkpoint / TRAINER_STATE_NAME
    check_inside(checkpoint, file)
    return read_json_object(file, _MAX_STATE_BYTES, _MAX_STATE_VALUES)


def is_finished(checkpoint: Path) -> bool:
    """Whether a directory has the file that is written after all others of a checkpoint."""
    try:
        read_trainer_state(checkpoint)
    except (OSError, ValueError):
        return False
    return True


def finished_checkpoints(output_dir: Path) -> dict[int, Path]:
    """The finished checkpoints by their number of steps, in the order in which they were saved.

    Not in that of their steps: a training anew, in the directory of an older one, must neither go
    on from that one's checkpoints nor lose its own to them. Nor in that of time, which copies
    change.
    """
    found = {step: path for step, path in _checkpoints(output_dir).items() if is_finished(path)}
    return dict(sorted(found.items(), key=lambda item: (save_number(item[1]), item[0])))


def save_number(checkpoint: Path) -> float:
    """A checkpoint's place in the order of saving, from 1.

    What is not known is inf, so that it is not passed over in silence, and deleted last.
    """
    try:
        number = state_files.read(checkpoint, training_state.TRAINING)["save_number"]
    except (OSError, ValueError, LookupError, TypeError):
        return math.inf
    return number if type(number) is int and number > 0 else math.inf


def next_save_number(output_dir: Path) -> int:
    """The place of the checkpoint to be saved next."""
    numbers = map(save_number, _checkpoints(output_dir).values())
    return max((int(number) for number in numbers if number < math.inf), default=0) + 1


def staging_of(checkpoint: Path) -> Path:
    """The directory that a checkpoint is written into."""
    return checkpoint.with_name(f".{checkpoint.name}.new")


def begin(checkpoint: Path) -> Path:
    """Clears up after interrupted saves, and makes the directory to write a checkpoint into."""
    output_dir = checkpoint.parent
    if not output_dir.exists():
        disk.make_directory(output_dir)
    for path in _hidden(output_dir, "deleted").values():
        disk.remove_tree(path)
    for step, path in _hidden(output_dir, "old").items():
        named = output_dir / f"checkpoint-{step}"
        if named.exists():
            _discard(path)
        else:
            disk.rename(path, named)
    for path in _hidden(output_dir, "new").values():
        disk.remove_tree(path)
    staging = staging_of(checkpoint)
    disk.make_directory(staging)
    return staging


def commit(staging: Path, checkpoint: Path) -> None:
    """Makes what `begin` returned, now written, the checkpoint; it takes an older one's place."""
    disk.sync_tree(staging)
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    replaces = checkpoint.exists()
    if replaces:
        disk.rename(checkpoint, old)
    disk.rename(staging, checkpoint)
    if replaces:
        _discard(old)


def rotate(output_dir: Path, limit: int | None, kept: set[Path]) -> None:
    """Deletes what was saved first, until `limit` checkpoints are left; never one of `kept`."""
    if limit is None:
        return
    checkpoints = list(finished_checkpoints(output_dir).values())
    surplus = len(checkpoints) - limit
    for path in [path for path in checkpoints if path not in kept][: max(surplus, 0)]:
        _discard(path)


def _discard(checkpoint: Path) -> None:
    name = checkpoint.name.removeprefix(".").removesuffix(".old")
    deleted = checkpoint.with_name(f".{name}.deleted")
    disk.rename(checkpoint, deleted)
    disk.remove_tree(deleted)


def _checkpoints(output_dir: Path) -> dict[int, Path]:
    """All that count as a checkpoint by their names, by the number of steps."""
    old = _hidden(output_dir, "old")
    return old | {
        int(step): path
        for path in output_dir.glob("checkpoint-*")
        if (step := path.name.removeprefix("checkpoint-")).isdecimal()
    }


def _hidden(output_dir: Path, kind: str) -> dict[int, Path]:
    if not output_dir.is_dir():
        return {}
    matches = ((_HIDDEN.fullmatch(path.name), path) for path in sorted(output_dir.iterdir()))
    return {int(match[1]): path for match, path in matches if match and match[2] == kind}
