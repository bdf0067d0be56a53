"""Checkpoints of two processes, resumed by two and by one; what one of them meets, both know."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels.adapter_files import load_adapter
from lora_llama import cli, state_files

pytestmark = pytest.mark.long

SPOILED = """
import sys
from lora_llama import cli, trainer

forward = trainer.LoraTrainer.compute_loss

def compute_loss(self, *args, **kwargs):
    loss = forward(self, *args, **kwargs)
    # The value alone: the gradients are good, and the other process meets no fault.
    if loss.requires_grad and self.args.process_index == 1 and self.state.global_step == 2:
        loss.data.fill_(float("nan"))
    return loss

trainer.LoraTrainer.compute_loss = compute_loss
sys.exit(cli.main(sys.argv[1:]))
"""

SLOW = """
import sys, time
from lora_llama import cli, trainer

step = trainer.LoraTrainer.training_step

def training_step(self, *args, **kwargs):
    time.sleep(60)
    return step(self, *args, **kwargs)

trainer.LoraTrainer.training_step = training_step
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def command(tiny_llama, sums, write_rows, tmp_path, monkeypatch) -> Callable[..., list[str]]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings: dict[str, Any] = {
        "model": tiny_llama, "data": write_rows(sums), "dtype": "float32", "val_set_size": 4,
        "max_steps": 6, "save_steps": 3, "eval_steps": 2, "logging_steps": 2, "warmup_steps": 0,
        "lora_r": 4, "lora_dropout": 0.2, "learning_rate": 5e-3, "per_device_train_batch_size": 2,
    }  # fmt: skip

    def make(name: str, **changes: Any) -> list[str]:
        options = settings | {"output_dir": tmp_path / name} | changes
        return ["finetune", *(f"--{key}={value}" for key, value in options.items())]

    return make


def two_processes(arguments: list[str], script: Path | None = None) -> subprocess.Popen[str]:
    program = ["-m", "lora_llama.cli"] if script is None else [str(script)]
    return started(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "--no-python", sys.executable, *program, *arguments]
    )  # fmt: skip


def started(words: list[str]) -> subprocess.Popen[str]:
    """In a process group of its own, as a shell starts a command."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, text=True, start_new_session=True, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, err = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, err


def losses(output: Path) -> Any:
    metrics = json.loads((output / "metrics.json").read_text())
    return metrics["train_losses"], metrics["eval_losses"]


def test_a_training_of_two_processes_is_resumed(command, tmp_path):
    code, err = finish(two_processes(command("whole")))
    assert code == 0, err
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    states = [state_files.read(checkpoint, f"rng_state_{rank}") for rank in (0, 1)]
    # Between two lines of the log, each has had other rows.
    assert 0 < states[0]["unlogged_loss"] != states[1]["unlogged_loss"] > 0
    expected = load_adapter(tmp_path / "whole")[1]

    code, err = finish(two_processes(command("two", resume_from_checkpoint=checkpoint)))
    assert code == 0, err
    assert losses(tmp_path / "two") == losses(tmp_path / "whole")
    ours = load_adapter(tmp_path / "two")[1]
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())

    # One process goes on with the optimizer, the data and the log, but draws other masks.
    one = command("one", resume_from_checkpoint=checkpoint, per_device_train_batch_size=4)
    assert cli.main(one) == 0
    (train, evaluated), (whole_train, _) = losses(tmp_path / "one"), losses(tmp_path / "whole")
    assert train[0] == whole_train[0] and [step for step, _ in train] == [2, 4, 6]
    assert train[1][1] == pytest.approx(whole_train[1][1], rel=0.2)
    assert [step for step, _ in evaluated] == [0, 2, 4, 6]

    # Two go on where one had been: the second is seeded.
    single = tmp_path / "one" / "checkpoint-6"
    code, err = finish(
        two_processes(command("again", resume_from_checkpoint=single, max_steps=8, save_steps=0))
    )
    assert code == 0, err
    assert [step for step, _ in losses(tmp_path / "again")[0]] == [2, 4, 6, 8]


def test_a_signal_to_one_process_stops_both(command, tmp_path):
    process = two_processes(command("stopped", max_steps=100000, save_steps=0, eval_steps=0))
    os.kill(workers_of(process)[1], signal.SIGTERM)
    code, err = finish(process)
    assert code != 0 and err.count("lora-llama: error: terminated; saved in ") == 1, err
    assert_saved_by_both(tmp_path / "stopped")


def test_ctrl_c_saves_and_the_printed_command_goes_on(command, tmp_path):
    """A terminal sends it to torchrun's process group; the workers are in groups of their own."""
    changes = {"max_steps": 100000, "save_steps": 0, "eval_steps": 0, "logging_steps": 1}
    process = two_processes(command("stopped", **changes))
    workers_of(process)
    os.killpg(process.pid, signal.SIGINT)
    code, err = finish(process)
    # The workers' 130 is not what torchrun gives.
    assert code == 1, err
    assert err.count("stopping after this step, with a checkpoint; again stops at once") == 1
    assert err.count("torchrun kills what still runs 30 s after Ctrl-C") == 1
    checkpoint = assert_saved_by_both(tmp_path / "stopped")
    error = err.partition("lora-llama: error: ")[2].splitlines()
    assert error[0] == f"interrupted; saved in {checkpoint}; to go on:"
    printed = shlex.split(error[1])
    assert printed == [*process.args, "--resume_from_checkpoint", str(checkpoint)]
    step = int(checkpoint.name.partition("-")[2])
    steps = [f"--max_steps={step + 2}" if "max_steps" in word else word for word in printed]
    code, err = finish(started(steps))
    assert code == 0, err
    assert losses(tmp_path / "stopped")[0][-1][0] == step + 2


def test_the_second_ctrl_c_stops_at_once(command, tmp_path):
    process = two_processes(command("stopped", max_steps=100000, save_steps=0), slow(tmp_path))
    workers_of(process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(3)
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    code, err = finish(process)
    assert code == 1 and err.count("interrupted; no checkpoint was saved") == 1, err
    assert time.monotonic() - start < 20
    assert not list((tmp_path / "stopped").glob("checkpoint-*"))


def slow(directory: Path) -> Path:
    script = directory / "slow.py"
    script.write_text(SLOW)
    return script


def assert_saved_by_both(output: Path) -> Path:
    (checkpoint,) = output.glob("checkpoint-*")
    assert {f"rng_state_{rank}.json" for rank in (0, 1)} < {p.name for p in checkpoint.iterdir()}
    return checkpoint


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """torchrun's two processes, once they train."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        # They have set their handlers once they say so: SIGINT is caught from the start, SIGTERM
        # by the training alone.
        workers = [int(child) for child in children if catches_sigterm(int(child))]
        if len(workers) == 2:
            return workers
        time.sleep(0.2)
    raise AssertionError("the processes have not begun to train")


def catches_sigterm(process: int) -> bool:
    status = Path(f"/proc/{process}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught & 1 << (signal.SIGTERM - 1))


def test_a_fault_in_one_process_stops_both(command, tmp_path):
    script = tmp_path / "spoiled.py"
    script.write_text(SPOILED)
    start = time.monotonic()
    code, err = finish(two_processes(command("spoiled", save_steps=1, eval_steps=0), script))
    assert code != 0
    # Neither waits for the other until torchrun's patience ends.
    assert err.count("lora-llama: error: the training diverged at step 3: ") == 2, err
    assert "the loss is nan" in err and "another process says where" in err
    assert err.count(f"the last good checkpoint is {tmp_path / 'spoiled' / 'checkpoint-2'}") == 2
    assert time.monotonic() - start < 120
