"""Ctrl-C and SIGTERM: the first ends the step and saves, the second stops at once."""

import json
import os
import shlex
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels.adapter_files import load_adapter
from lora_llama import cli
from lora_llama.interrupts import SIGNALS, StopRequest, TrainingInterrupted
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
    names = {path.name for path in Path(settings["output_dir"]).iterdir()}
    assert names == {f"checkpoint-{step}", "loss.png"}
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


def test_a_signal_in_the_last_step_ends_what_is_ended(settings, signals_at):
    signals_at(6, signal.SIGINT)
    _, result = finetune(FinetuneOptions(**settings))
    assert result.steps == 6 and (Path(settings["output_dir"]) / "metrics.json").exists()


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


@pytest.mark.parametrize(
    ("numbers", "torchrun", "stops"),
    [
        ((signal.SIGINT,), False, False),
        ((signal.SIGINT, signal.SIGINT), False, True),
        ((signal.SIGINT, signal.SIGTERM), False, True),
        ((signal.SIGTERM, signal.SIGTERM), True, True),
        ((signal.SIGINT, signal.SIGTERM), True, False),
        ((signal.SIGINT, signal.SIGTERM, signal.SIGINT), True, True),
    ],
)
def test_what_counts_as_the_second(numbers, torchrun, stops, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    request = StopRequest()
    stopped = False
    with request.listening():
        try:
            for number in numbers:
                os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            stopped = True
    assert stopped == stops and request.signal == numbers[0]


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


def test_the_command_replaces_an_older_checkpoint(monkeypatch):
    interrupt = TrainingInterrupted("out/checkpoint-9")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for older in (["--resume_from_checkpoint", "latest"], ["--resume_from_checkpoint=latest"]):
        given = ["finetune", "--model", "m", *older, "--data=d d"]
        assert cli._how_to_resume(interrupt, given).splitlines()[1].strip() == (
            "lora-llama finetune --model m '--data=d d' --resume_from_checkpoint out/checkpoint-9"
        )
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "\n  torchrun --nproc_per_node=2 -m lora_llama.cli finetune --model m" in (
        cli._how_to_resume(interrupt, ["finetune", "--model", "m"])
    )
    assert cli._how_to_resume(interrupt, ["demo"]) == "saved in out/checkpoint-9"
    assert "--save_steps" in cli._how_to_resume(TrainingInterrupted(None), ["finetune"])


def test_of_several_processes_one_speaks(monkeypatch, capsys):
    def interrupted(options: Any) -> None:
        raise TrainingInterrupted(None)

    monkeypatch.setattr(cli, "finetune", interrupted)
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["finetune", "--model=m", "--data=d"]) == 130
    assert capsys.readouterr().err == ""
