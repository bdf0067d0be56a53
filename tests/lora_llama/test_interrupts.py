"""Ctrl-C and SIGTERM: the first ends the step and saves, the second stops at once.

A training that has made its last step has its adapter saved, whatever comes.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_kernels.adapter_files import load_adapter
from lora_llama import cli, interrupts
from lora_llama.interrupts import SIGNALS, StopAfterStep, StopRequest, TrainingInterrupted
from lora_llama.options import FinetuneOptions
from lora_llama.trainer import LoraTrainer
from lora_llama.training import finetune


@pytest.fixture
def settings(tiny_llama, sums, tmp_path, write_rows, monkeypatch) -> dict[str, Any]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return {
        "model": str(tiny_llama), "data": write_rows(sums), "output_dir": str(tmp_path / "output"),
        "dtype": "float32", "val_set_size": 4, "lora_r": 4, "learning_rate": 5e-3,
        "warmup_steps": 0, "max_steps": 6, "eval_steps": 3, "lora_dropout": 0.1,
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
    }  # fmt: skip


@pytest.fixture
def signals_at(monkeypatch) -> Callable[..., None]:
    """Sends signals to this process in the first forward pass of a step."""

    def at(step: int, *numbers: int) -> None:
        original, sent = LoraTrainer.training_step, []

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == step - 1 and not sent:
                sent.append(True)
                for number in numbers:
                    os.kill(os.getpid(), number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(LoraTrainer, "training_step", training_step)

    return at


@pytest.fixture
def signals_in_evaluation(monkeypatch) -> Callable[..., None]:
    """Sends signals to this process in the evaluation after a step."""

    def after(step: int, *numbers: int) -> None:
        original = LoraTrainer.evaluate

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            if self.state.global_step == step:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(LoraTrainer, "evaluate", evaluate)

    return after


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_ends_the_step_and_saves(
    number, step, settings, signals_at, tmp_path, monkeypatch, capfd
):
    """At step 3 an evaluation is due, which the resumed training makes up for."""
    _, expected = finetune(FinetuneOptions(**settings | {"output_dir": str(tmp_path / "whole")}))
    before = handlers()
    with monkeypatch.context():
        signals_at(step, number)
        with pytest.raises(TrainingInterrupted) as caught:
            finetune(FinetuneOptions(**settings))
    checkpoint = str(Path(settings["output_dir"]) / f"checkpoint-{step}")
    assert (caught.value.checkpoint, caught.value.signal) == (checkpoint, number)
    assert handlers() == before
    assert "stopping after this step, with a checkpoint; again stops" in capfd.readouterr().err
    assert files(settings) == {f"checkpoint-{step}", "loss.png"}
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, result = finetune(FinetuneOptions(**settings, resume_from_checkpoint="latest"))
    assert result.train_losses == expected.train_losses
    assert result.eval_losses == expected.eval_losses
    adapters = [load_adapter(path)[1] for path in (settings["output_dir"], tmp_path / "whole")]
    assert all(torch.equal(adapters[0][name], tensor) for name, tensor in adapters[1].items())


def test_the_second_signal_stops_at_once(settings, signals_at):
    before = handlers()
    signals_at(4, signal.SIGINT, signal.SIGINT)
    with pytest.raises(TrainingInterrupted) as caught:
        finetune(FinetuneOptions(**settings, save_steps=2))
    assert caught.value.checkpoint == str(Path(settings["output_dir"]) / "checkpoint-2")
    assert handlers() == before
    assert not (Path(settings["output_dir"]) / "checkpoint-4").exists()


def test_a_signal_in_the_last_step_ends_what_is_ended(settings, signals_at, capfd):
    signals_at(6, signal.SIGINT)
    _, result = finetune(FinetuneOptions(**settings))
    assert result.steps == 6 and result.eval_losses[-1][0] == 6
    assert {"adapter_model.safetensors", "metrics.json", "loss.png"} < files(settings)
    error = capfd.readouterr().err
    assert "this is the last step, and the adapter is saved after it; again stops" in error
    assert "with a checkpoint" not in error


def test_the_only_step_is_the_last(settings, signals_in_evaluation, capfd):
    """In the evaluation before it."""
    signals_in_evaluation(0, signal.SIGINT)
    finetune(FinetuneOptions(**settings | {"max_steps": 1}))
    assert "this is the last step" in capfd.readouterr().err
    assert {"adapter_model.safetensors", "metrics.json"} < files(settings)


# 3: the evaluation after the last step is Trainer's own; 0: it comes when the training is over.
@pytest.mark.parametrize("eval_steps", [0, 3])
def test_a_signal_in_the_last_evaluation_takes_nothing_away(
    eval_steps, settings, signals_in_evaluation, capfd
):
    settings["eval_steps"] = eval_steps
    before = handlers()
    signals_in_evaluation(6, signal.SIGTERM)
    _, result = finetune(FinetuneOptions(**settings))
    assert result.eval_losses[-1][0] == 6 and handlers() == before
    assert {"adapter_model.safetensors", "metrics.json", "loss.png"} < files(settings)
    assert "the training is finished and its adapter saved; metrics" in capfd.readouterr().err


@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize("eval_steps", [0, 3])
def test_two_signals_never_take_the_trained_adapter(
    eval_steps, in_step, settings, signals_at, signals_in_evaluation, tmp_path, capfd
):
    """The first comes in the last step, or in the evaluation after it; the second there."""
    settings["eval_steps"] = eval_steps
    finetune(FinetuneOptions(**settings | {"output_dir": str(tmp_path / "whole")}))
    before = handlers()
    if in_step:
        signals_at(6, signal.SIGINT)
    signals_in_evaluation(6, *[signal.SIGINT] * (1 if in_step else 2))
    arguments = ["finetune", *(f"--{name}={value}" for name, value in settings.items())]
    assert cli.main(arguments) == 130 and handlers() == before
    assert "metrics.json" not in files(settings)
    ours, expected = (
        load_adapter(path)[1] for path in (settings["output_dir"], tmp_path / "whole")
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    message = f"the training was finished, and its adapter is saved in {settings['output_dir']}"
    assert capfd.readouterr().err.splitlines()[-1] == f"lora-llama: error: interrupted; {message}"


def test_the_adapter_is_written_to_its_end(settings, monkeypatch):
    original = LoraTrainer.save_model

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        original(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "save_model", save_model)
    with pytest.raises(TrainingInterrupted) as caught:
        finetune(FinetuneOptions(**settings))
    assert caught.value.adapter == settings["output_dir"]
    assert files(settings) == {
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_what_one_process_cannot_write_is_an_error_in_all(settings, monkeypatch):
    original = LoraTrainer.save_model

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # From here on, another process tells of its failure.
        monkeypatch.setattr(LoraTrainer, "_any_process", lambda self, flag: True)

    monkeypatch.setattr(LoraTrainer, "save_model", save_model)
    with pytest.raises(
        OSError, match=r"^/.*: the adapter could not be saved: another process says why"
    ):
        finetune(FinetuneOptions(**settings | {"max_steps": 1, "val_set_size": 0, "eval_steps": 0}))


def files(settings: dict[str, Any]) -> set[str]:
    return {path.name for path in Path(settings["output_dir"]).iterdir()}


def test_an_error_restores_the_handlers(settings, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a kernel failed")

    before = handlers()
    monkeypatch.setattr(LoraTrainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        finetune(FinetuneOptions(**settings))
    assert handlers() == before


def test_a_thread_trains_without_handlers():
    request, found = StopRequest(), []

    def run() -> None:
        with request.listening():
            found.append(handlers())

    before = handlers()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize(
    ("launched", "seconds", "stops"), [(False, 0.0, True), (True, 0.9, False), (True, 1.1, True)]
)
def test_what_counts_as_the_second(launched, seconds, stops, second, monkeypatch):
    """Of several processes each may have the first signal twice: its own, and the launcher's."""
    monkeypatch.delenv("RANK", raising=False)
    if launched:
        monkeypatch.setenv("RANK", "0")
    now = 100.0
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now)
    request = StopRequest()
    stopped = False
    with request.listening():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            now += seconds
            os.kill(os.getpid(), second)
        except KeyboardInterrupt:
            stopped = True
    assert stopped == stops and request.signal == signal.SIGINT


def test_what_another_process_has_told_of_is_no_second_signal(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    request = StopRequest()
    accelerator = SimpleNamespace(
        num_processes=2,
        device="cpu",
        gather=lambda flag: torch.tensor([signal.SIGINT, flag.item()]),
    )
    state, control = SimpleNamespace(global_step=2, max_steps=6), SimpleNamespace()
    stopped_at_once = False
    with request.listening():
        StopAfterStep(request, accelerator).on_step_end(None, state, control)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            stopped_at_once = True
    assert control.should_save and control.should_training_stop and request.stopped
    assert not stopped_at_once and request.signal == signal.SIGINT


@pytest.mark.parametrize("torchrun", [True, False])
def test_torchruns_patience_is_told(torchrun, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with StopRequest().listening():
        os.kill(os.getpid(), signal.SIGINT)
    told = "torchrun kills what still runs 30 s after Ctrl-C" in capfd.readouterr().err
    assert told == torchrun


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_that_is_printed_goes_on(
    number, code, settings, signals_at, capsys, monkeypatch, tmp_path
):
    settings["output_dir"] = str(tmp_path / "a directory")
    settings["eval_steps"] = 0
    arguments = ["finetune", *(f"--{name}={value}" for name, value in settings.items())]
    whole = [*arguments, f"--output_dir={tmp_path / 'whole'}"]
    assert cli.main(whole) == 0
    with monkeypatch.context():
        signals_at(3, number)
        assert cli.main(arguments) == code
    error = capsys.readouterr().err.partition("lora-llama: error: ")[2].strip().splitlines()
    checkpoint = f"{settings['output_dir']}/checkpoint-3"
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert error[0] == f"{word}; saved in {checkpoint}; to go on:"
    command = shlex.split(error[1])
    assert command == ["lora-llama", *arguments, "--resume_from_checkpoint", checkpoint]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(command[1:]) == 0
    ours, expected = (
        json.loads((Path(path) / "metrics.json").read_text())
        for path in (settings["output_dir"], tmp_path / "whole")
    )
    assert ours["train_losses"] == expected["train_losses"]


GIVEN = ["finetune", "--model", "m", "--data=d d"]
RESUME = "--resume_from_checkpoint out/checkpoint-9"


@pytest.fixture
def no_launcher(monkeypatch) -> None:
    for name in ("RANK", "GROUP_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def how_to_resume(arguments: list[str]) -> str:
    return cli._how_to_resume(TrainingInterrupted("out/checkpoint-9"), arguments)


@pytest.mark.usefixtures("no_launcher")
def test_the_command_replaces_an_older_checkpoint():
    for older in (
        ["--resume_from_checkpoint", "latest"],
        ["--resume_from_checkpoint=latest"],
        ["--resume-from-checkpoint=latest"],
        ["--resume-from-checkpoint", "latest"],
    ):
        assert how_to_resume(["finetune", "--model", "m", *older, "--data=d d"]) == (
            "saved in out/checkpoint-9; to go on:\n"
            f"  lora-llama finetune --model m '--data=d d' {RESUME}"
        )
    assert how_to_resume(["demo"]) == "saved in out/checkpoint-9"
    assert "--save_steps" in cli._how_to_resume(TrainingInterrupted(None), ["finetune"])


LAUNCHERS = {
    "torchrun --standalone --nproc-per-node 2 -m lora_llama.cli": {"RANK": "0"},
    "accelerate launch --config_file fsdp2.yaml -m lora_llama.cli": {"RANK": "0"},
    "accelerate launch --num_processes 1 -m lora_llama.cli": {"ACCELERATE_MIXED_PRECISION": "no"},
    "torchrun --nnodes 2 --node-rank 0 -m lora_llama.cli": {"RANK": "0", "GROUP_WORLD_SIZE": "2"},
}


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_is_that_of_the_launcher(launcher, monkeypatch):
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "_launcher", lambda arguments: launcher.split())
    first, command = how_to_resume([*GIVEN, "--resume_from_checkpoint=latest"]).splitlines()
    assert command == f"  {launcher} finetune --model m '--data=d d' {RESUME}"
    machines = " (on this machine; each has its own launch command)"
    assert first == (
        f"saved in out/checkpoint-9; to go on{machines if 'nnodes' in launcher else ''}:"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("passed_on", [GIVEN, [*GIVEN[:-1], "--data=e"]])
def test_the_launcher_is_a_parent_that_has_the_same_arguments(passed_on, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    waits = "print(flush=True); input()"
    launcher = [sys.executable, "-c", waits, "--nproc-per-node", "2", "an other.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*launcher, *passed_on], **pipes) as parent:
        parent.stdout.readline()
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        printed = how_to_resume(GIVEN)
        parent.communicate(b"\n")
    if passed_on == GIVEN:
        assert printed.endswith(f"to go on:\n  {shlex.join([*launcher, *GIVEN])} {RESUME}")
    else:
        assert printed.endswith(f"to go on: the same launch command, with {RESUME}")


@pytest.mark.usefixtures("no_launcher")
def test_an_unknown_launcher_is_not_guessed(monkeypatch):
    """srun and mpirun start their processes through another one."""
    monkeypatch.setenv("RANK", "0")
    assert how_to_resume(GIVEN) == (
        f"saved in out/checkpoint-9; to go on: the same launch command, with {RESUME}"
    )


def test_of_several_processes_one_speaks(monkeypatch, capsys):
    def interrupted(options: Any) -> None:
        raise TrainingInterrupted(None)

    monkeypatch.setattr(cli, "finetune", interrupted)
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["finetune", "--model=m", "--data=d"]) == 130
    assert capsys.readouterr().err == ""
