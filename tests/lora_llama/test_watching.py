"""What can be seen of a training while it runs: plot, samples, TensorBoard."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from transformers import AutoTokenizer, TrainerCallback

from lora_llama import samples as sample_module
from lora_llama import watching
from lora_llama.data import split_dataset
from lora_llama.generation import generate_answers
from lora_llama.options import FinetuneOptions
from lora_llama.samples import EvalSamples, prompt_and_answer
from lora_llama.trainer import LoraTrainer
from lora_llama.training import finetune


@pytest.fixture
def options(tiny_llama, sums, tmp_path, write_rows, monkeypatch) -> FinetuneOptions:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return FinetuneOptions(
        model=str(tiny_llama), data=write_rows(sums), output_dir=str(tmp_path / "output"),
        dtype="float32", val_set_size=4, max_steps=4, eval_steps=2, save_steps=2, lora_r=4,
        lora_dropout=0.2, learning_rate=5e-3, warmup_steps=0,
    )  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_samples_of_the_first_held_out_rows(packing, options, sums, capsys, monkeypatch):
    monkeypatch.setattr(sample_module, "MAX_NEW_TOKENS", 8)
    settings = dataclasses.replace(options, eval_samples=3, packing=packing)
    trainer, _ = finetune(settings)
    _, held_out = split_dataset(sums, 4, settings.seed)
    file = Path(options.output_dir) / "samples.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0] * 3 + [2] * 3 + [4] * 3
    for index, line in enumerate(lines):
        row = held_out[index % 3]
        assert (line["prompt"], line["expected"]) == (row["prompt"], row["completion"])
    prompts = [row["prompt"] for row in held_out[:3]]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    answers = generate_answers(trainer.model, tokenizer, prompts, 8)
    assert [line["answer"] for line in lines[-3:]] == answers
    with trainer.model.disable_adapter():
        base = generate_answers(trainer.model, tokenizer, prompts, 8)
    assert [line["answer"] for line in lines[:3]] == base != answers
    shown = capsys.readouterr().out
    assert f"step 4  {prompts[0]}\n    expected  {lines[-3]['expected']}\n    answer    " in shown


def test_evaluation_and_samples_change_nothing(options, monkeypatch):
    """They draw from no generator of the training, whose dropout would be another then."""
    monkeypatch.setattr(sample_module, "MAX_NEW_TOKENS", 2)
    without = dataclasses.replace(options, eval_steps=0, output_dir=options.output_dir + "-without")
    _, expected = finetune(without)
    _, result = finetune(dataclasses.replace(options, eval_samples=2, eval_steps=1))
    assert result.train_losses == expected.train_losses
    assert len(result.eval_losses) == 5 and len(expected.eval_losses) == 2
    assert result.eval_losses[-1] == expected.eval_losses[-1]


MESSAGES = [
    {"role": "system", "content": "s"}, {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"}, {"role": "user", "content": "v"},
    {"role": "assistant", "content": "b"}, {"role": "user", "content": "w"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"messages": MESSAGES}, (MESSAGES[:4], "b")),
        ({"prompt": "p", "completion": "c"}, ("p", "c")),
        ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:5]}, (MESSAGES[:4], "b")),
        ({"instruction": "i", "output": "o"}, ("i", "o")),
        ({"instruction": "i", "input": "n", "output": "o"}, ("i\n\nn", "o")),
        ({"text": "t"}, None),
    ],
)
def test_what_a_row_asks(row, pair):
    assert prompt_and_answer(row, has_template=True) == pair
    if pair is not None and "instruction" in row:
        pair = (pair[0] + "\n\n", pair[1])
    assert prompt_and_answer(row, has_template=False) == pair


def test_rows_without_a_prompt_are_passed_over(tiny_llama, options, write_rows, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = [
        {"text": "t"},
        {"prompt": "x" * 60, "completion": "c"},
        {"prompt": "p", "completion": "c"},
    ]
    assert EvalSamples(rows, tokenizer, 5, max_length=32).prompts == ["p"]
    with pytest.raises(ValueError, match=r"^eval_samples: expected a held-out row with a prompt"):
        EvalSamples(rows[:2], tokenizer, 1, max_length=32)

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("lora_llama.training.LoraLlamaForCausalLM.from_pretrained", never)
    data = write_rows([{"text": f"row {i}"} for i in range(9)], "texts.jsonl")
    with pytest.raises(ValueError, match=r"^eval_samples: expected a held-out row with a prompt"):
        finetune(dataclasses.replace(options, data=data, eval_samples=1))


class LookAtPlot(TrainerCallback):
    def __init__(self) -> None:
        self.images: list[Any] = []

    def on_save(self, args, state, control, **kwargs: Any) -> None:
        self.images.append(matplotlib.image.imread(Path(args.output_dir) / "loss.png"))


def test_the_plot_is_drawn_anew_with_each_checkpoint(options, monkeypatch):
    look = LookAtPlot()
    train = LoraTrainer.train

    def watched(self, *args: Any, **kwargs: Any) -> None:
        self.add_callback(look)
        train(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "train", watched)
    finetune(options)
    first, second = look.images
    assert first.shape == second.shape == (600, 1050, 4) and (first != second).any()


def test_a_plot_that_cannot_be_drawn_is_no_reason_to_stop(options, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    said = []
    monkeypatch.setattr(watching, "plot_losses", full)
    monkeypatch.setattr(watching.logger, "warning", said.append)
    _, result = finetune(options)
    assert result.steps == 4 and len(said) == 2
    assert "loss.png could not be drawn: [Errno 28] No space left on device" in said[0]


def test_tensorboard(options):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    _, result = finetune(dataclasses.replace(options, report_to="tensorboard"))
    (directory,) = (Path(options.output_dir) / "runs").iterdir()
    events = accumulator.EventAccumulator(str(directory)).Reload()
    tags = set(events.Tags()["scalars"])
    for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_gib"):
        assert f"train/{name}" in tags
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert written == [(step, pytest.approx(loss)) for step, loss in result.train_losses]
    written = [(event.step, event.value) for event in events.Scalars("eval/loss")]
    assert written == [(step, pytest.approx(loss)) for step, loss in result.eval_losses]
