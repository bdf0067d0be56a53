"""A training that is stopped at any of its disk operations goes on from a whole checkpoint.

Each case counts the operations of a run (write, fsync, rename, mkdir, unlink, rmdir), stops another
at the k-th, and resumes: what is found is the old or the new checkpoint, complete, and the training
that goes on from it is the uninterrupted one to the last bit.

    kill           the process is gone; what it has written so far is there
    power loss     so is the machine: of the last write half is there, and of every file that was
                   not brought onto the disk, nothing
    lost names     in addition, every file, directory and rename is undone whose name was not
                   brought onto the disk (fsync of its directory); what was removed stays so

`make test-long` takes every k; here are the renames and a few others.
"""

import builtins
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels.adapter_files import load_adapter
from lora_llama import cli
from lora_llama.checkpoint_store import finished_checkpoints
from lora_llama.checkpointing import tokenizer_files
from lora_llama.options import FinetuneOptions
from lora_llama.resuming import check_checkpoint, find_checkpoint, read_state
from lora_llama.training import finetune

OPEN = builtins.open
ROWS = [{"prompt": f"add {i}+{i}", "completion": str(2 * i) * (1 + i % 3)} for i in range(12)]
STEPS = 5


class Crash(BaseException):
    """Not an Exception: nothing cleans up after a process that is gone."""


class Disk:
    """The operations below a directory: counted, and at the k-th the crash.

    Attributes:
        names: what each operation was.
        loses: after the crash "content" that is not on the disk, or "names" too; "nothing" else.
    """

    def __init__(self, root: Path, stop_at: int | None = None, error: Any = Crash) -> None:
        self.root = str(root)
        self.stop_at = stop_at
        self.error = error
        self.loses = "nothing"
        self.names: list[str] = []
        self.synced = {path.stat().st_ino for path in root.rglob("*")}
        # Of the names that are not on the disk: the directory, and what undoes the change.
        self.unsynced: list[tuple[int, Callable[[], object]]] = []
        self.crashed = False

    def reach(self, name: str, torn: Callable[[], None] | None = None) -> None:
        if self.crashed:
            raise self.error
        self.names.append(name)
        if len(self.names) - 1 == self.stop_at:
            if self.loses != "nothing" and torn is not None:
                torn()
            self.crashed = True
            raise self.error

    def _lose(self) -> None:
        for path in Path(self.root).rglob("*"):
            if path.is_file() and path.stat().st_ino not in self.synced:
                os.truncate(path, 0)
        if self.loses == "names":
            for _, undo in reversed(self.unsynced):
                undo()

    def remember(self, path: Path, undo: Callable[[], object]) -> None:
        """What is to be undone, unless the directory of a path is brought onto the disk."""
        self.unsynced.append((path.parent.stat().st_ino, undo))

    def undoing(self, name: str, path: Path, *args: Any) -> Callable[[], object] | None:
        """What undoes an operation that is about to be done; a removal is not undone."""
        if name == "mkdir":
            return lambda: shutil.rmtree(path, ignore_errors=True)
        if name not in ("rename", "replace"):
            return None
        target = Path(args[0])
        replaced = target.read_bytes() if target.is_file() else None

        def undo() -> None:
            # It may have been removed since.
            if target.exists():
                os.rename(target, path)
                if replaced is not None:
                    target.write_bytes(replaced)

        return undo

    def counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self.root not in os.path.abspath(path):
                return original(path, *args, **kwargs)
            self.reach(f"{name} {os.path.basename(path)}")
            undo = self.undoing(name, Path(path), *args)
            original(path, *args, **kwargs)
            if undo is not None:
                self.remember(Path(path), undo)

        return operation

    def fsync(self, descriptor: int, original: Callable[[int], None] = os.fsync) -> None:
        self.reach("fsync")
        original(descriptor)
        inode = os.fstat(descriptor).st_ino
        self.synced.add(inode)
        self.unsynced = [(parent, undo) for parent, undo in self.unsynced if parent != inode]

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wxa") or self.root not in os.path.abspath(file):
            return OPEN(file, mode, *args, **kwargs)
        path = Path(file)
        if not path.exists():
            self.remember(path, lambda: path.unlink(missing_ok=True))
        return CountedFile(OPEN(file, mode, *args, **kwargs), self, path.name)

    @contextmanager
    def watching(self) -> Iterator["Disk"]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir"):
                patch.setattr(os, name, self.counted(name, getattr(os, name)))
            patch.setattr(os, "fsync", self.fsync)
            patch.setattr(builtins, "open", self.open)
            yield self
        if self.crashed and self.loses != "nothing":
            self._lose()


class CountedFile:
    """A file whose writes are operations."""

    def __init__(self, file: Any, disk: Disk, name: str) -> None:
        self.file, self.disk, self.name = file, disk, name

    def write(self, content: Any) -> int:
        def torn() -> None:
            self.file.write(content[: len(content) // 2])
            self.file.flush()

        self.disk.reach(f"write {self.name}", torn)
        self.disk.synced.discard(os.fstat(self.file.fileno()).st_ino)
        return self.file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "CountedFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


@dataclasses.dataclass
class Whole:
    """An uninterrupted training: what the others are compared with."""

    options: FinetuneOptions
    losses: list[tuple[int, float]]
    adapter: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    """Five steps of two batches, with dropout, over an epoch's end; a checkpoint at each step."""
    directory = tmp_path_factory.mktemp("whole")
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        options = FinetuneOptions(
            model=str(tiny_llama), data=str(data), output_dir=str(directory / "output"),
            dtype="float32", val_set_size=0, max_steps=STEPS, save_steps=1, lora_r=2,
            warmup_steps=1, lora_dropout=0.2, learning_rate=5e-3, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, lora_target_modules="q_proj,down_proj",
            # Of no end that it would depend on.
            lr_scheduler_type="constant_with_warmup",
        )  # fmt: skip
        _, result = finetune(options)
        yield Whole(options, result.train_losses, load_adapter(options.output_dir)[1])


def checkpoint(whole: Whole, step: int) -> Path:
    return Path(whole.options.output_dir) / f"checkpoint-{step}"


def assert_whole(whole: Whole, options: FinetuneOptions) -> None:
    """Every checkpoint there is is complete, and so is every file of the tokenizer."""
    output = Path(options.output_dir)
    found = {*output.glob("checkpoint-*"), *finished_checkpoints(output).values()}
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for directory in found:
        check_checkpoint(str(directory), {"default": options.lora_config()})
    for directory in (output, *found):
        for file in [directory / name for name in tokenizer]:
            if directory != output or file.exists():
                assert file.read_bytes() == Path(whole.options.output_dir, file.name).read_bytes()


def assert_goes_on(whole: Whole, options: FinetuneOptions, steps: set[int]) -> None:
    """Resumes from the latest checkpoint, which is that of one of the steps, to the end."""
    latest = dataclasses.replace(
        options, resume_from_checkpoint="latest", max_steps=STEPS, save_steps=STEPS
    )
    found = find_checkpoint(latest)
    assert found is not None and read_state(found).global_step in steps
    # The generators of this process are not what makes it the same.
    torch.manual_seed(int(time.monotonic_ns()) % 2**31)
    _, result = finetune(latest)
    assert result.train_losses == whole.losses
    adapter = load_adapter(options.output_dir)[1]
    assert adapter.keys() == whole.adapter.keys()
    assert all(torch.equal(adapter[name], tensor) for name, tensor in whole.adapter.items())
    # The save at the end has cleared up what was left over.
    assert not [p for p in Path(options.output_dir).iterdir() if p.name.startswith(".checkpoint")]


# Whether a checkpoint 4 that was there before is replaced, or checkpoint 2 deleted when 4 is saved;
# and what is lost in the crash.
SCENARIOS = {
    "kill, deleting": (False, "nothing"),
    "power loss, replacing": (True, "content"),
    "lost names, deleting": (False, "names"),
    "lost names, replacing": (True, "names"),
}


def crashed_run(whole: Whole, output: Path, scenario: str, stop_at: int | None) -> Disk:
    """A training from checkpoint 2 over the save at step 4, in a directory of its own."""
    replaces, loses = SCENARIOS[scenario]
    for step in (2, 4) if replaces else (2,):
        shutil.copytree(checkpoint(whole, step), output / f"checkpoint-{step}")
    options = dataclasses.replace(
        whole.options, output_dir=str(output), max_steps=4, save_steps=4,
        save_total_limit=None if replaces else 1,
        resume_from_checkpoint=str(output / "checkpoint-2"),
    )  # fmt: skip
    disk = Disk(output, stop_at)
    disk.loses = loses
    with disk.watching():
        if stop_at is None:
            finetune(options)
        else:
            with pytest.raises(Crash):
                finetune(options)
    return disk


@pytest.fixture(scope="module")
def finished(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Disk]:
    """The disk after a whole run, by whether a checkpoint is replaced."""
    return {
        SCENARIOS[scenario][0]: crashed_run(whole, tmp_path_factory.mktemp("count"), scenario, None)
        for scenario in ("kill, deleting", "power loss, replacing")
    }


@pytest.fixture(scope="module")
def operations(finished: dict[bool, Disk]) -> dict[str, list[str]]:
    """The operations of each scenario."""
    return {scenario: finished[replaces].names for scenario, (replaces, _) in SCENARIOS.items()}


def crash_and_go_on(whole: Whole, output: Path, scenario: str, stop_at: int) -> None:
    crashed_run(whole, output, scenario, stop_at)
    options = dataclasses.replace(whole.options, output_dir=str(output))
    assert_whole(whole, options)
    # A checkpoint 4 that was there before is not lost.
    assert_goes_on(whole, options, {4} if SCENARIOS[scenario][0] else {2, 4})
    assert_whole(whole, options)
    shutil.rmtree(output)


def test_the_operations_are_counted(operations):
    for names in operations.values():
        kinds = {name.partition(" ")[0] for name in names}
        assert {"write", "fsync", "rename", "mkdir", "unlink", "rmdir"} <= kinds
        assert len(names) > 100
        # On the disk before it has its name, and only then is the older one deleted.
        new = names.index("rename .checkpoint-4.new")
        assert names[new - 1] == "fsync" and names[new + 1] == "fsync"
        for name in ("optimizer.safetensors", "trainer_state.json"):
            assert names.index(f"write {name}") < new < names.index(f"unlink {name}")


def test_every_file_is_written_by_a_counted_operation(finished):
    """Here all that there is in the end is the run's own: checkpoint 4, and the save at the end."""
    disk = finished[False]
    written = Counter(
        name.removeprefix("write ").removeprefix(".").removesuffix(".new")
        for name in disk.names
        if name.startswith("write ")
    )
    files = Counter(path.name for path in Path(disk.root).rglob("*") if path.is_file())
    # The plot is drawn at the checkpoint, and anew at the end.
    assert written == files + Counter(["loss.png"])
    assert files["tokenizer.json"] == 2 and files["training.json"] == 1
    for disk in finished.values():
        # And brought onto the disk, with its name.
        assert all(path.stat().st_ino in disk.synced for path in Path(disk.root).rglob("*"))
        assert not disk.unsynced


SAMPLE = {
    "kill, deleting": (
        "write optimizer.safetensors", "rename .checkpoint-4.new", "unlink optimizer.json",
    ),
    # The last of them comes when the new checkpoint has its name.
    "power loss, replacing": (
        "write trainer_state.json", "rename .checkpoint-4.new", "unlink optimizer.json",
        "replace .tokenizer.json.new",
    ),
    "lost names, deleting": ("rename checkpoint-2", "unlink optimizer.json"),
    "lost names, replacing": ("rename checkpoint-4", "unlink optimizer.json"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("scenario", "name"), [(key, name) for key, names in SAMPLE.items() for name in names]
)
def test_a_training_that_is_stopped_goes_on(scenario, name, whole, operations, tmp_path):
    crash_and_go_on(whole, tmp_path / "output", scenario, operations[scenario].index(name))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_training_that_is_stopped_at_any_operation_goes_on(
    scenario, whole, operations, tmp_path, figure
):
    survived = 0
    for stop_at, name in enumerate(operations[scenario]):
        try:
            crash_and_go_on(whole, tmp_path / str(stop_at), scenario, stop_at)
        except Exception as error:
            raise AssertionError(f"stopped at operation {stop_at}, {name}") from error
        survived += 1
    points = len(operations[scenario])
    figure(25, f"crash points recovered, of {points}, {scenario}", survived)


@pytest.mark.parametrize("step", range(1, STEPS))
def test_every_step_can_be_resumed(step, whole, tmp_path):
    """In the middle of an epoch (3 steps) and at its end."""
    output = tmp_path / "output"
    shutil.copytree(checkpoint(whole, step), output / f"checkpoint-{step}")
    assert_goes_on(whole, dataclasses.replace(whole.options, output_dir=str(output)), {step})


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_between_two_lines_of_the_log_is_resumed(packing, whole, tmp_path):
    """Also with packed rows, and an evaluation that draws nothing."""
    settings: dict[str, Any] = {
        "max_steps": 5, "logging_steps": 4, "packing": packing, "max_length": 64,
        "val_set_size": 2, "eval_steps": 3, "save_steps": 1,
    }  # fmt: skip
    options = dataclasses.replace(whole.options, output_dir=str(tmp_path / "one"), **settings)
    _, expected = finetune(options)
    assert [step for step, _ in expected.train_losses] == [4]
    for step in (1, 3):
        resumed = dataclasses.replace(
            options, output_dir=str(tmp_path / "two"),
            resume_from_checkpoint=str(tmp_path / "one" / f"checkpoint-{step}"),
        )  # fmt: skip
        _, result = finetune(resumed)
        assert result.train_losses == expected.train_losses
        assert result.eval_losses == expected.eval_losses
        adapters = [load_adapter(path.output_dir)[1] for path in (options, resumed)]
        assert all(torch.equal(adapters[1][name], tensor) for name, tensor in adapters[0].items())


# A process that says when it has come to the n-th call of a function, and waits there for its end.
WAITING = """
import importlib, sys, time

module, path, number, *arguments = sys.argv[1:]
owner = importlib.import_module(module)
*outer, name = path.split(".")
for part in outer:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), []

def waiting(*args, **kwargs):
    calls.append(None)
    if len(calls) == int(number):
        print("here", flush=True)
        time.sleep(600)
    return original(*args, **kwargs)

setattr(owner, name, waiting)
from lora_llama import cli
sys.exit(cli.main(arguments))
"""
# Where it is killed, and the checkpoint that there is then.
MOMENTS = {
    "between the batches of a step": ("lora_llama.trainer", "LoraTrainer.training_step", 6, 2),
    "before an optimizer step": ("lora_llama.trainer", "LoraTrainer._clip_grad_norm", 4, 3),
    "in the first checkpoint": ("lora_llama.disk", "sync_tree", 1, None),
    "before a rename": ("lora_llama.checkpoint_store", "disk.rename", 3, 2),
    "in the save at the end": ("lora_llama.disk", "replace_file", 8, STEPS),
}


@pytest.mark.parametrize(
    "moment",
    [next(iter(MOMENTS)), *(pytest.param(m, marks=pytest.mark.long) for m in list(MOMENTS)[1:])],
)
@pytest.mark.slow
def test_a_process_that_is_killed_goes_on(moment, whole, tmp_path):
    *where, step = MOMENTS[moment]
    options = dataclasses.replace(whole.options, output_dir=str(tmp_path / "output"))
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *map(str, where), "finetune", *given(options)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert "here\n" in process.stdout, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    if step is None:
        assert not finished_checkpoints(Path(options.output_dir))
        return
    assert_whole(whole, options)
    assert_goes_on(whole, options, {step})


def given(options: FinetuneOptions) -> list[str]:
    """The options, as the command takes them."""
    return [
        f"--{field.name}={getattr(options, field.name)}"
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    ]


# A disk that refuses: one error, and nothing lost.

REFUSALS = {
    "full, in a write": (28, "write optimizer.safetensors"),
    "full, in the adapter": (28, "write adapter_model.safetensors.new"),
    "full, in fsync": (28, "fsync"),
    "read-only": (30, "mkdir .checkpoint-4.new"),
    "no permission to rename": (13, "rename .checkpoint-4.new"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_disk_that_refuses_is_one_error(refusal, whole, operations, tmp_path, capsys):
    number, name = REFUSALS[refusal]
    output = tmp_path / "output"
    shutil.copytree(checkpoint(whole, 2), output / "checkpoint-2")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    options = dataclasses.replace(
        whole.options, output_dir=str(output), max_steps=4, save_steps=4, save_total_limit=1,
        resume_from_checkpoint=str(output / "checkpoint-2"),
    )  # fmt: skip
    reason = os.strerror(number)
    # The adapter of the last step is saved before.
    begin = operations["kill, deleting"].index("mkdir .checkpoint-4.new")
    stop_at = operations["kill, deleting"].index(name, begin)
    disk = Disk(output, stop_at, OSError(number, reason))
    # What is freed by clearing up is not refused.
    reach = disk.reach
    disk.reach = lambda *args: None if disk.crashed else reach(*args)
    with disk.watching():
        code = cli.main(["finetune", *given(options)])
    error = capsys.readouterr().err.partition("lora-llama: error: ")[2].strip()
    assert code == 1 and disk.crashed
    assert error.startswith(f"{output / 'checkpoint-4'} could not be saved: [Errno {number}] ")
    assert reason in error and len(error.splitlines()) == 1
    assert error.endswith(f"; the last checkpoint: {output / 'checkpoint-2'}")
    for path, content in before.items():
        assert path.read_bytes() == content
    assert {path.name for path in output.iterdir()} == {
        "checkpoint-2", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert_goes_on(whole, dataclasses.replace(options, save_total_limit=None), {2})


LAST_SAVE = (
    "write adapter_model.safetensors.new", "write .chat_template.jinja.new",
    "write .tokenizer.json.new", "replace .tokenizer.json.new",
)  # fmt: skip


@pytest.mark.parametrize("name", LAST_SAVE)
def test_a_disk_that_refuses_the_save_at_the_end_is_one_error(name, whole, tmp_path, capsys):
    output = tmp_path / "output"
    shutil.copytree(checkpoint(whole, 4), output / "checkpoint-4")
    older = ("adapter_model.safetensors", "chat_template.jinja", "tokenizer.json")
    for file in older:
        (output / file).write_bytes(b"older")
    (output / "adapter_config.json").write_bytes(b"{}")
    options = dataclasses.replace(
        whole.options, output_dir=str(output), max_steps=4, resume_from_checkpoint="latest"
    )
    disk = Disk(output)
    reach = disk.reach

    def refuse(reached: str, *args: Any) -> None:
        reach(reached, *args)
        if reached == name:
            raise OSError(28, os.strerror(28))

    disk.reach = refuse
    with disk.watching():
        code = cli.main(["finetune", *given(options)])
    error = capsys.readouterr().err.partition("lora-llama: error: ")[2].strip()
    assert code == 1 and name in disk.names and len(error.splitlines()) == 1
    assert error.startswith(f"{output}: adapter and tokenizer could not be saved: [Errno 28] ")
    assert error.endswith(f"; the last checkpoint: {output / 'checkpoint-4'}")
    if name.startswith("write "):
        assert f"'{output / name.removeprefix('write ')}'" in error
    for file in older[LAST_SAVE.index(name) :]:
        assert (output / file).read_bytes() == b"older"
    # Nothing of what was refused takes up room.
    assert not [path for path in output.rglob("*") if path.name.endswith(".new")]
    assert_goes_on(whole, options, {4})
    assert_whole(whole, options)


def test_a_tokenizer_that_cannot_be_written_is_an_error_of_the_disk():
    """Its own writer raises one without a type; any other error is none of the disk."""

    class Tokenizer:
        def save_pretrained(self, directory: str) -> None:
            raise Exception(message)

    message = "No space left on device (os error 28)"
    with pytest.raises(OSError, match=rf"^/.*: {re.escape(message)}$"):
        tokenizer_files(Tokenizer())
    message = "a fault of ours"
    with pytest.raises(Exception, match=f"^{message}$") as caught:
        tokenizer_files(Tokenizer())
    assert not isinstance(caught.value, OSError)
