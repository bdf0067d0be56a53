"""A training that is stopped at any of its disk operations goes on from a whole checkpoint.

Each case counts the operations of a run (write, fsync, rename, mkdir, unlink, rmdir), stops another
at the k-th, and resumes: what is found is the old or the new checkpoint, complete, and the training
that goes on from it is the uninterrupted one to the last bit.

    kill          the process is gone; what it has written so far is there
    power loss    so is the machine: of the last write half is there, and of every file that was
                  not brought onto the disk, nothing

`make test-long` takes every k; here are the renames and a few others.
"""

import builtins
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels.adapter_files import load_adapter
from lora_llama import cli
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
    """

    def __init__(self, root: Path, stop_at: int | None = None, error: Any = Crash) -> None:
        self.root = str(root)
        self.stop_at = stop_at
        self.error = error
        self.power_loss = False
        self.names: list[str] = []
        self.synced = {path.stat().st_ino for path in root.rglob("*")}
        self.crashed = False

    def reach(self, name: str, torn: Callable[[], None] | None = None) -> None:
        if self.crashed:
            raise self.error
        self.names.append(name)
        if len(self.names) - 1 == self.stop_at:
            if self.power_loss:
                if torn is not None:
                    torn()
                self._lose()
            self.crashed = True
            raise self.error

    def _lose(self) -> None:
        for path in Path(self.root).rglob("*"):
            if path.is_file() and path.stat().st_ino not in self.synced:
                os.truncate(path, 0)

    def counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self.root in os.path.abspath(path):
                self.reach(f"{name} {os.path.basename(path)}")
            return original(path, *args, **kwargs)

        return operation

    def fsync(self, descriptor: int, original: Callable[[int], None] = os.fsync) -> None:
        self.reach("fsync")
        original(descriptor)
        self.synced.add(os.fstat(descriptor).st_ino)

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = OPEN(file, mode, *args, **kwargs)
        if set(mode) & set("wxa") and self.root in os.path.abspath(file):
            return CountedFile(opened, self, os.path.basename(file))
        return opened

    @contextmanager
    def watching(self) -> Iterator["Disk"]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir"):
                patch.setattr(os, name, self.counted(name, getattr(os, name)))
            patch.setattr(os, "fsync", self.fsync)
            patch.setattr(builtins, "open", self.open)
            yield self


class CountedFile:
    """A file whose writes are operations."""

    def __init__(self, file: Any, disk: Disk, name: str) -> None:
        self.file, self.disk, self.name = file, disk, name

    def write(self, content: Any) -> int:
        def torn() -> None:
            self.file.write(content[: len(content) // 2])
            self.file.flush()

        self.disk.reach(f"write {self.name}", torn)
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


def assert_goes_on(whole: Whole, options: FinetuneOptions, steps: set[int]) -> None:
    """Resumes from the latest checkpoint, which is that of one of the steps, to the end."""
    latest = dataclasses.replace(
        options, resume_from_checkpoint="latest", max_steps=STEPS, save_steps=STEPS
    )
    found = find_checkpoint(latest)
    assert found is not None and read_state(found).global_step in steps
    check_checkpoint(found, {"default": options.lora_config()})
    # The generators of this process are not what makes it the same.
    torch.manual_seed(int(time.monotonic_ns()) % 2**31)
    _, result = finetune(latest)
    assert result.train_losses == whole.losses
    adapter = load_adapter(options.output_dir)[1]
    assert adapter.keys() == whole.adapter.keys()
    assert all(torch.equal(adapter[name], tensor) for name, tensor in whole.adapter.items())
    # The save at the end has cleared up what was left over.
    assert not [p for p in Path(options.output_dir).iterdir() if p.name.startswith(".checkpoint")]


def crashed_run(whole: Whole, output: Path, scenario: str, stop_at: int | None) -> Disk:
    """A training from checkpoint 2 over the save at step 4, in a directory of its own.

    The scenario "kill" deletes checkpoint 2 when 4 is saved. "power loss" replaces a checkpoint 4
    that was there before, and loses what is not on the disk.
    """
    replaces = scenario == "power loss"
    for step in (2, 4) if replaces else (2,):
        shutil.copytree(checkpoint(whole, step), output / f"checkpoint-{step}")
    options = dataclasses.replace(
        whole.options, output_dir=str(output), max_steps=4, save_steps=4,
        save_total_limit=None if replaces else 1,
        resume_from_checkpoint=str(output / "checkpoint-2"),
    )  # fmt: skip
    disk = Disk(output, stop_at)
    disk.power_loss = replaces
    with disk.watching():
        if stop_at is None:
            finetune(options)
        else:
            with pytest.raises(Crash):
                finetune(options)
    return disk


@pytest.fixture(scope="module")
def operations(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The operations of each scenario."""
    return {
        scenario: crashed_run(whole, tmp_path_factory.mktemp("count"), scenario, None).names
        for scenario in ("kill", "power loss")
    }


def crash_and_go_on(whole: Whole, output: Path, scenario: str, stop_at: int) -> None:
    crashed_run(whole, output, scenario, stop_at)
    # A checkpoint 4 that was there before is not lost.
    steps = {4} if scenario == "power loss" else {2, 4}
    assert_goes_on(whole, dataclasses.replace(whole.options, output_dir=str(output)), steps)
    shutil.rmtree(output)


def test_the_operations_are_counted(operations):
    for names in operations.values():
        kinds = {name.partition(" ")[0] for name in names}
        assert {"write", "fsync", "rename", "mkdir", "unlink", "rmdir"} <= kinds
        assert len(names) > 80
        # On the disk before it has its name, and only then is the older one deleted.
        new = names.index("rename .checkpoint-4.new")
        assert names[new - 1] == "fsync" and names[new + 1] == "fsync"
        for name in ("optimizer.safetensors", "trainer_state.json"):
            assert names.index(f"write {name}") < new < names.index(f"unlink {name}")


SAMPLE = {
    "kill": ("write optimizer.safetensors", "rename .checkpoint-4.new", "unlink optimizer.json"),
    # The last of them comes when the new checkpoint has its name.
    "power loss": ("write trainer_state.json", "rename .checkpoint-4.new", "unlink optimizer.json"),
}


@pytest.mark.parametrize(
    ("scenario", "name"), [(key, name) for key, names in SAMPLE.items() for name in names]
)
def test_a_training_that_is_stopped_goes_on(scenario, name, whole, operations, tmp_path):
    crash_and_go_on(whole, tmp_path / "output", scenario, operations[scenario].index(name))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scenario", ["kill", "power loss"])
def test_a_training_that_is_stopped_at_any_operation_goes_on(scenario, whole, operations, tmp_path):
    survived = 0
    for stop_at, name in enumerate(operations[scenario]):
        try:
            crash_and_go_on(whole, tmp_path / str(stop_at), scenario, stop_at)
        except Exception as error:
            raise AssertionError(f"stopped at operation {stop_at}, {name}") from error
        survived += 1
    print(f"{scenario}: resumable {survived}/{len(operations[scenario])}")


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


@pytest.mark.slow
def test_a_killed_process_goes_on(whole, tmp_path):
    output = tmp_path / "output"
    options = dataclasses.replace(whole.options, output_dir=str(output))
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_llama.cli", "finetune"]
        + [f"--{name}={value}" for name, value in given.items()],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (output / "checkpoint-2").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    if process.returncode != 0:
        assert process.returncode == -signal.SIGKILL
    assert_goes_on(whole, options, set(range(2, STEPS + 1)))


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
    stop_at = operations["kill"].index(name)
    disk = Disk(output, stop_at, OSError(number, reason))
    # What is freed by clearing up is not refused.
    reach = disk.reach
    disk.reach = lambda *args: None if disk.crashed else reach(*args)
    arguments = [
        f"--{field.name}={getattr(options, field.name)}"
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    ]
    with disk.watching():
        code = cli.main(["finetune", *arguments])
    error = capsys.readouterr().err.partition("lora-llama: error: ")[2].strip()
    assert code == 1 and disk.crashed
    assert error.startswith(f"{output / 'checkpoint-4'} could not be saved: [Errno {number}] ")
    assert reason in error and len(error.splitlines()) == 1
    assert error.endswith(f"; the last checkpoint: {output / 'checkpoint-2'}")
    for path, content in before.items():
        assert path.read_bytes() == content
    assert {path.name for path in output.iterdir()} == {"checkpoint-2"}
    assert_goes_on(whole, dataclasses.replace(options, save_total_limit=None), {2})
