"""Training through `finetune`: what is trained, on which loss, from which checkpoint, into what."""

import dataclasses
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback
from transformers.utils import logging as transformers_logging

from lora_kernels import LoraConfig
from lora_kernels.adapter_files import load_adapter
from lora_kernels.layers import LoraLinear, lora_layers
from lora_llama import options as option_module
from lora_llama import state_files
from lora_llama import trainer as trainer_module
from lora_llama.batching import Collator, load_dataset
from lora_llama.data import encode_row, split_dataset
from lora_llama.gradients import GradientError, capture_lora_weights
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import ALL_PROJECTIONS, FinetuneOptions, resolve_dtype
from lora_llama.resuming import find_checkpoint
from lora_llama.throughput import peak_memory_bytes
from lora_llama.trainer import LoraTrainer
from lora_llama.training import build_trainer, encode_rows, finetune, train_and_save
from lora_llama.watching import plot_losses

Rows = list[dict[str, Any]]
CPU = torch.device("cpu")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is promised to the last bit, or to float32's precision."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def options(tiny_llama: Path, sums: Rows, tmp_path: Path, write_rows) -> Callable[..., Any]:
    """Options for a short training of the tiny Llama on the sums; keywords change them."""
    data = write_rows(sums)

    def make(**changes: Any) -> FinetuneOptions:
        settings: dict[str, Any] = {
            "model": str(tiny_llama),
            "data": data,
            "output_dir": str(tmp_path / "output"),
            "dtype": "float32",
            "val_set_size": 0,
            "max_length": 128,
            "lora_r": 4,
            "lora_alpha": 8,
            "learning_rate": 5e-3,
            "warmup_steps": 2,
            "max_steps": 10,
        }
        if 0 < changes.get("max_steps", 10) <= 2:
            del settings["warmup_steps"]
        return FinetuneOptions(**settings | changes)

    return make


@pytest.fixture
def trainer_of(tiny_llama: Path, on_cpu: None) -> Callable[..., LoraTrainer]:
    """A trainer on the CPU whose adapter has a random B too, so that A has gradients at once."""

    def make(options: FinetuneOptions, rows: Rows, held_out: Rows | None = None) -> LoraTrainer:
        torch.manual_seed(options.seed)
        config = dataclasses.replace(options.lora_config(), init_lora_weights=False)
        model = LoraLlamaForCausalLM.from_pretrained(tiny_llama, lora=config, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        return build_trainer(
            model,
            tokenizer,
            options.training_arguments(bool(held_out)),
            encode_rows(rows, tokenizer, options),
            encode_rows(held_out, tokenizer, options) if held_out else None,
        )

    return make


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }


def as_alpaca(row: dict[str, Any]) -> dict[str, Any]:
    return {"instruction": "add", "input": row["prompt"], "output": row["completion"]}


def as_text(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": f"{row['prompt']} = {row['completion']}"}


def adapter_of(directory: str | Path) -> dict[str, Tensor]:
    return load_adapter(directory)[1]


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and expected
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def token_losses(model: torch.nn.Module, item: dict[str, Tensor]) -> Tensor:
    """-log p of each trained token of one row, from the logits, in float64."""
    with torch.no_grad():
        logits = model(input_ids=item["input_ids"][None]).logits[0, :-1].double()
    labels = item["labels"][1:]
    kept = labels != -100
    return F.cross_entropy(logits[kept], labels[kept], reduction="none")


# Ten steps in every format, with every switch.

VARIANTS = {
    "messages": (as_messages, {}),
    "messages, packed": (as_messages, {"packing": True, "max_length": 160}),
    "prompt and completion, held-out rows": (dict, {"val_set_size": 5, "eval_steps": 5}),
    "prompt and completion, packed, dropout": (dict, {"packing": True, "lora_dropout": 0.2}),
    "alpaca, dropout": (as_alpaca, {"lora_dropout": 0.2, "use_rslora": True}),
    "alpaca, checkpointing": (as_alpaca, {"gradient_checkpointing": True}),
    "text": (as_text, {"val_set_size": 0.1}),
    "text, packed, checkpointing": (as_text, {"packing": True, "gradient_checkpointing": True}),
    "accumulation": (dict, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "two projections": (dict, {"lora_target_modules": "q_proj, down_proj"}),
    "all-linear": (dict, {"lora_target_modules": "all-linear"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_ten_steps_train_every_weight(name, options, sums, write_rows):
    convert, changes = VARIANTS[name]
    settings = options(data=write_rows([convert(row) for row in sums], "data.jsonl"), **changes)
    _, result = finetune(settings)
    assert result.steps == 10
    assert [step for step, _ in result.train_losses] == list(range(1, 11))
    losses = [loss for _, loss in result.train_losses]
    assert all(map(math.isfinite, losses)) and sum(losses[-3:]) < sum(losses[:3])
    projections = 2 if name == "two projections" else 7
    assert len(result.gradients) == 2 * projections
    for row in result.gradients:
        assert row.b_is_zero and row.lora_a == 0 < row.lora_b < math.inf, row
    saved = adapter_of(settings.output_dir)
    assert len(saved) == 4 * projections
    for key, tensor in saved.items():
        assert tensor.dtype == torch.float32 and tensor.abs().max() > 0, key
    evaluated = [0, 5, 10] if settings.eval_steps else [0, 10] if settings.val_set_size else []
    assert [step for step, _ in result.eval_losses] == evaluated


# What an adapter may have beside A and B: the options, and its tensors in the file.
ADAPTERS: dict[str, tuple[dict[str, Any], int]] = {
    "lora_bias": ({"lora_bias": True}, 42),
    "whole modules": ({"lora_modules_to_save": "lm_head, norm"}, 28 + 1 + 5),
    "dora, whole modules": ({"use_dora": True, "lora_modules_to_save": ["embed_tokens"]}, 43),
    "pissa": ({"init_lora_weights": "pissa"}, 28),
}


@pytest.mark.filterwarnings(
    "ignore:.*shared with", "ignore:Model with `tie", "ignore:.*lora_bias=True"
)
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_kind_of_adapter_is_trained_saved_and_resumed(name, options, tmp_path, on_cpu):
    changes, tensors = ADAPTERS[name]
    settings = options(max_steps=6, save_steps=3, **changes)
    trainer, expected = finetune(settings)
    assert expected.train_losses[-1][1] < expected.train_losses[0][1]
    for row in expected.gradients:
        assert (row.lora_a == 0) == row.b_is_zero == (name != "pissa")
        for norm, has_it in ((row.magnitude, "dora" in name), (row.lora_bias, name == "lora_bias")):
            assert (norm is not None and 0 < norm < math.inf) if has_it else norm is None
    saved = adapter_of(settings.output_dir)
    assert len(saved) == tensors

    checkpoint = str(Path(settings.output_dir) / "checkpoint-3")
    again = options(
        max_steps=6,
        output_dir=str(tmp_path / "again"),
        resume_from_checkpoint=checkpoint,
        **changes,
    )
    _, resumed = finetune(again)
    assert resumed.train_losses == expected.train_losses
    assert_same_tensors(adapter_of(again.output_dir), saved)

    item = trainer.train_dataset[0]
    loaded = LoraLlamaForCausalLM.from_pretrained(settings.output_dir).eval()
    assert torch.equal(token_losses(loaded, item), token_losses(trainer.model.eval(), item))


def test_a_whole_module_that_does_not_move_is_an_error(options, sums, trainer_of):
    trainer = trainer_of(options(max_steps=3, lora_modules_to_save=["norm"]), sums)
    weight = trainer.model.model.norm.modules_to_save["default"].weight
    trainer.add_callback(DropGradient(weight))
    with pytest.raises(
        ValueError, match=r"not moved: model\.norm\.modules_to_save\.default\.weight$"
    ):
        train_and_save(trainer)


def test_an_evaluation_makes_no_logits_of_all_tokens(options, sums, trainer_of):
    """Those of four rows would take more than the step that is trained between evaluations."""
    trainer = trainer_of(options(), sums[:-9], sums[-9:])
    losses = []
    handle = trainer.model.register_forward_hook(
        lambda module, arguments, output: losses.append((output.logits, output.loss.shape))
    )
    trainer.evaluate()
    handle.remove()
    assert losses == [(None, (4,)), (None, (4,)), (None, (1,))]


def test_only_the_adapter_changes(options, tiny_llama):
    trainer, _ = finetune(options(weight_decay=0.1))
    original = LlamaForCausalLM.from_pretrained(tiny_llama).state_dict()
    trained = trainer.model.state_dict()
    assert len(trained) - len(original) == 28
    for name, weight in original.items():
        assert torch.equal(trained[name].cpu(), weight), name


# The gradient check comes before the first optimizer step.


def cut_the_adapter(layer: LoraLinear) -> None:
    layer.register_forward_hook(lambda module, args, output: F.linear(args[0], module.weight))


def fault_in(kind: str, change: Callable[[Tensor], Tensor]) -> Callable[[LoraLinear], None]:
    def inject(layer: LoraLinear) -> None:
        getattr(layer, kind)["default"].register_hook(change)

    return inject


def freeze(layer: LoraLinear) -> None:
    layer.lora_B["default"].requires_grad_(False)


# What is done to a layer, which of its gradients are wrong then, and what the message says.
FAULTS = {
    "cut": (cut_the_adapter, ("lora_A", "lora_B"), "no gradient"),
    "zero A": (fault_in("lora_A", torch.zeros_like), ("lora_A",), "is zero"),
    "zero B": (fault_in("lora_B", torch.zeros_like), ("lora_B",), "is zero"),
    "frozen": (freeze, ("lora_B",), "requires_grad is False"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "path", ["model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
)
def test_a_faulty_gradient_stops_before_the_first_step(fault, path, options, sums, trainer_of):
    inject, kinds, reason = FAULTS[fault]
    settings = options(warmup_steps=0)
    trainer = trainer_of(settings, sums)
    inject(trainer.model.get_submodule(path))
    before = capture_lora_weights(trainer.model)
    with pytest.raises(GradientError, match=reason) as caught:
        train_and_save(trainer)
    for kind in ("lora_A", "lora_B"):
        assert (f"{path}.{kind}.default" in str(caught.value)) == (kind in kinds)
    assert f"{len(kinds)} of 28 adapter gradients" in str(caught.value)
    assert_same_tensors(capture_lora_weights(trainer.model), before)
    assert trainer.state.global_step == 0
    assert not list(Path(settings.output_dir).glob("adapter*"))


def test_the_check_runs_once_and_keeps_the_norms(options, sums, trainer_of, monkeypatch):
    calls = []
    check = trainer_module.verify_gradients
    monkeypatch.setattr(
        trainer_module, "verify_gradients", lambda model: calls.append(1) or check(model)
    )
    result = train_and_save(trainer_of(options(max_steps=3), sums))
    assert len(calls) == 1
    assert len(result.gradients) == 14 and not any(row.b_is_zero for row in result.gradients)


class DropGradient(TrainerCallback):
    """After the check, as if the optimizer did not know the parameter."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

    def on_pre_optimizer_step(self, args, state, control, **kwargs: Any) -> None:
        self.parameter.grad = None


@pytest.mark.parametrize("kind", ["lora_A", "lora_B"])
def test_a_weight_that_does_not_move_is_an_error_after_saving(kind, options, sums, trainer_of):
    settings = options(max_steps=3)
    trainer = trainer_of(settings, sums)
    path = "model.layers.1.mlp.up_proj"
    parameters = getattr(trainer.model.get_submodule(path), kind)
    trainer.add_callback(DropGradient(parameters["default"]))
    with pytest.raises(ValueError, match="have not moved") as caught:
        train_and_save(trainer)
    assert str(caught.value) == f"adapter weights have not moved: {path}.{kind}.default"
    assert len(adapter_of(settings.output_dir)) == 28
    assert json.loads((Path(settings.output_dir) / "metrics.json").read_text())["steps"] == 3


@pytest.mark.parametrize("warmup", [0, 2, 10])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_no_error(steps, warmup, options):
    """A warm-up begins with a learning rate of zero, and A has no gradient while B is zero."""
    settings = options(max_steps=steps)
    # As where epochs have fewer steps than the warm-up, which nobody knows beforehand.
    settings.warmup_steps = warmup
    _, result = finetune(settings)
    assert result.steps == steps


# The loss: every unmasked position of the sequence, averaged over the step's tokens.


@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_that_of_every_trained_token(
    train_on_inputs, packing, options, sums, tiny_llama, on_cpu
):
    settings = options(
        max_steps=1,
        per_device_train_batch_size=len(sums),
        train_on_inputs=train_on_inputs,
        packing=packing,
    )
    _, result = finetune(settings)
    # B is zero: the first loss is the base model's.
    base = LlamaForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    losses = []
    for row in sums:
        item = encode_row(row, tokenizer, 128, train_on_inputs)
        prompt = "<|user|>" + row["prompt"] + "<|end|><|assistant|>"
        length = len(tokenizer(prompt)["input_ids"])
        trained = item["labels"] != -100
        expected = torch.arange(len(trained)) >= (1 if train_on_inputs else length)
        assert torch.equal(trained, expected)
        losses.append(token_losses(base, item))
    mean = torch.cat(losses).mean().item()
    assert result.train_losses[0][1] == pytest.approx(mean, rel=1e-6)
    # Rows have unequal numbers of tokens, so a mean of means is something else.
    assert abs(mean - torch.stack([row.mean() for row in losses]).mean().item()) > 1e-3


class KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs: Any) -> None:
        for path, layer in lora_layers(model):
            for kind in ("lora_A", "lora_B"):
                gradient = getattr(layer, kind)["default"].grad
                self.gradients[f"{path}.{kind}"] = gradient.double().clone()


def test_accumulation_equals_one_large_batch(options, sums, trainer_of):
    # From 3 to 60 trained tokens a row.
    rows = [{"prompt": row["prompt"], "completion": row["completion"] * (3 * i + 1)}
            for i, row in enumerate(sums[:8])]  # fmt: skip
    runs = {}
    for batch, accumulation in ((8, 1), (1, 8), (2, 4)):
        settings = options(
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=1e9,
        )
        trainer = trainer_of(settings, rows)
        keep = KeepGradients()
        trainer.add_callback(keep)
        result = train_and_save(trainer)
        runs[batch] = (result.train_losses[0][1], keep.gradients)
    loss, expected = runs[8]
    assert len(expected) == 28
    for batch in (1, 2):
        other, gradients = runs[batch]
        assert other == pytest.approx(loss, rel=1e-6)
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_checkpointing_changes_no_bit(options, on_cpu):
    """With dropout, whose masks are drawn again in the backward pass."""
    results = {}
    for checkpointing in (False, True):
        trainer, result = finetune(
            options(gradient_checkpointing=checkpointing, lora_dropout=0.3, max_steps=5)
        )
        assert trainer.model.is_activation_checkpointing == checkpointing
        results[checkpointing] = (result.train_losses, capture_lora_weights(trainer.model))
    assert results[True][0] == results[False][0]
    assert_same_tensors(results[True][1], results[False][1])


# Evaluation.


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_held_out_loss_is_the_mean_over_tokens(batch_size, options, sums, trainer_of):
    # Rows of 2 to 17 trained tokens, in batches of which the last is not full.
    held_out = [{"prompt": "x", "completion": "y" * (1 + 4 * (i % 5))} for i in range(7)]
    settings = options(per_device_eval_batch_size=batch_size)
    trainer = trainer_of(settings, sums, held_out)
    model = trainer.model.eval()
    losses = [token_losses(model, item) for item in trainer.eval_dataset]
    expected = torch.cat(losses).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    means = torch.stack([row.mean() for row in losses]).mean().item()
    assert abs(means - expected) > 1e-3


def test_evaluations_come_when_asked_for(options):
    _, result = finetune(options(val_set_size=6, eval_steps=4))
    assert [step for step, _ in result.eval_losses] == [0, 4, 8, 10]
    assert result.eval_losses[-1][1] < result.eval_losses[0][1]
    _, result = finetune(options(val_set_size=6, eval_steps=5))
    assert [step for step, _ in result.eval_losses] == [0, 5, 10]


# What is written.


def names(directory: str | Path) -> set[str]:
    return {path.name for path in Path(directory).iterdir()}


TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
STATE_FILES = {
    "training.json",
    "optimizer.json", "optimizer.safetensors", "scheduler.json", "rng_state_0.json",
    "rng_state_0.safetensors", "trainer_state.json",
}  # fmt: skip


def test_the_output_directory(options):
    settings = options(val_set_size=4, save_steps=3, save_total_limit=2)
    _, result = finetune(settings)
    output = Path(settings.output_dir)
    files = ADAPTER_FILES | TOKENIZER_FILES | {"loss.png", "metrics.json"}
    # No pickle beside the adapter.
    assert names(output) == files | {"checkpoint-9", "checkpoint-10"}
    for checkpoint in ("checkpoint-9", "checkpoint-10"):
        assert names(output / checkpoint) == ADAPTER_FILES | TOKENIZER_FILES | STATE_FILES
    assert_same_tensors(adapter_of(output), adapter_of(output / "checkpoint-10"))
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(dataclasses.asdict(result)))
    assert metrics["steps"] == 10 and len(metrics["gradients"]) == 14
    image = matplotlib.image.imread(output / "loss.png")
    assert image.shape == (600, 1050, 4)
    assert len({tuple(pixel) for pixel in image[::2, ::2, :3].reshape(-1, 3)}) > 20


def test_no_checkpoints_unless_asked_for(options):
    settings = options(max_steps=2)
    finetune(settings)
    expected = ADAPTER_FILES | TOKENIZER_FILES | {"loss.png", "metrics.json"}
    assert names(settings.output_dir) == expected


@pytest.mark.parametrize("losses", [[], [(1, 2.0)]])
def test_a_plot_of_little_is_no_error(losses, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_losses(losses, [], tmp_path / "loss.png")
    assert matplotlib.image.imread(tmp_path / "loss.png").shape == (600, 1050, 4)
    assert names(tmp_path) == {"loss.png"}


def test_peft_reads_the_adapter(options, tiny_llama, on_cpu):
    settings = options(lora_target_modules="q_proj,up_proj", use_rslora=True)
    trainer, _ = finetune(settings)
    theirs = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(tiny_llama), settings.output_dir
    )
    ids = torch.randint(261, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-5, atol=1e-5)
        with theirs.disable_adapter():
            assert (theirs(ids).logits - expected).abs().max() > 0.01
    config, _ = load_adapter(settings.output_dir)
    assert config.base_model_name_or_path == str(tiny_llama)
    assert (config.r, config.lora_alpha, config.task_type) == (4, 8, "CAUSAL_LM")


# Resuming.


@pytest.fixture
def long_options(options) -> Callable[..., FinetuneOptions]:
    """50 steps over 34 rows (the 25th is in the middle of an epoch), with dropout."""

    def make(**changes: Any) -> FinetuneOptions:
        settings: dict[str, Any] = {
            "max_steps": 50,
            "save_steps": 25,
            "val_set_size": 6,
            "eval_steps": 20,
            "lora_dropout": 0.1,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
        }
        return options(**settings | changes)

    return make


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = LoraTrainer.training_step

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "training_step", training_step)


def test_a_resumed_training_is_the_same_to_the_last_bit(
    long_options, tmp_path, monkeypatch, on_cpu, same_bits, figure
):
    trainer, expected = finetune(long_options(output_dir=str(tmp_path / "whole")))
    weights = capture_lora_weights(trainer.model)
    assert len(expected.train_losses) == 50
    expected_moments = trainer.optimizer.state_dict()["state"]

    interrupted = long_options(output_dir=str(tmp_path / "interrupted"))
    with monkeypatch.context() as patch:
        interrupt_at(30, patch)
        with pytest.raises(KeyboardInterrupt):
            finetune(interrupted)
    assert names(interrupted.output_dir) == {"checkpoint-25", "loss.png"}

    checkpoint = str(tmp_path / "whole" / "checkpoint-25")
    for resumed in (
        dataclasses.replace(interrupted, resume_from_checkpoint="latest"),
        long_options(output_dir=str(tmp_path / "new"), resume_from_checkpoint=checkpoint),
    ):
        # The state of the process's generators is the checkpoint's, not this.
        torch.manual_seed(12345)
        trainer, result = finetune(resumed)
        assert trainer.tokens_trained > 0 and len(result.gradients) == 14
        assert not any(row.b_is_zero for row in result.gradients)
        assert result.steps == 50
        assert result.train_losses == expected.train_losses
        assert result.eval_losses == expected.eval_losses
        assert_same_tensors(capture_lora_weights(trainer.model), weights)
        assert_same_tensors(adapter_of(resumed.output_dir), adapter_of(tmp_path / "whole"))
        moments = trainer.optimizer.state_dict()["state"]
        assert moments.keys() == expected_moments.keys() and len(moments) == 28
        for index, state in expected_moments.items():
            assert_same_tensors(moments[index], state)
        ours = capture_lora_weights(trainer.model)
        name = "adapter weights that differ after resuming, 25 steps"
        same_bits(24, name, ours.values(), weights.values())
        losses = [loss for _, loss in result.train_losses]
        expected_losses = [loss for _, loss in expected.train_losses]
        difference = max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True))
        figure(24, "largest difference of a loss after resuming", difference, 0.0)


def test_resuming_where_an_epoch_ends(options, on_cpu):
    settings = options(max_steps=15, save_steps=10, lora_dropout=0.1)
    trainer, expected = finetune(settings)
    assert trainer.train_dataset.num_rows == 10 * trainer.args.per_device_train_batch_size
    weights = capture_lora_weights(trainer.model)
    checkpoint = str(Path(settings.output_dir) / "checkpoint-10")
    trainer, result = finetune(dataclasses.replace(settings, resume_from_checkpoint=checkpoint))
    assert result.train_losses == expected.train_losses
    assert_same_tensors(capture_lora_weights(trainer.model), weights)


def test_seeds_decide_the_training(options, on_cpu):
    runs = [finetune(options(seed=seed, max_steps=4, lora_dropout=0.2)) for seed in (1, 1, 2)]
    first, same, other = (result.train_losses for _, result in runs)
    assert first == same != other


def test_a_resumed_training_may_begin_to_evaluate(options):
    settings = options(max_steps=4, save_steps=2, val_set_size=4)
    finetune(settings)
    checkpoint = str(Path(settings.output_dir) / "checkpoint-2")
    _, result = finetune(
        dataclasses.replace(settings, resume_from_checkpoint=checkpoint, eval_steps=1)
    )
    assert [step for step, _ in result.eval_losses] == [0, 2, 3, 4]


# 37 rows in batches of 4: an epoch is 10 steps.
LENGTHS = {
    "steps": ({"max_steps": 4}, 4),
    "steps, where an epoch ends": ({"max_steps": 10}, 10),
    "epochs": ({"max_steps": -1, "num_train_epochs": 1}, 10),
    "half an epoch more": ({"max_steps": -1, "num_train_epochs": 1.5}, 15),
}


@pytest.mark.parametrize("length", LENGTHS)
def test_a_finished_training_resumes_to_nothing(length, options):
    """Also one that was killed between its last checkpoint and the end."""
    changes, steps = LENGTHS[length]
    settings = options(
        save_steps=steps // 2 if steps % 2 == 0 else 5, val_set_size=3,
        lr_scheduler_type="constant", warmup_steps=0, **changes,
    )  # fmt: skip
    _, first = finetune(settings)
    weights = adapter_of(settings.output_dir)
    output = Path(settings.output_dir)
    for file in [path for path in output.iterdir() if path.is_file()]:
        file.unlink()
    for _ in range(2):
        trainer, second = finetune(dataclasses.replace(settings, resume_from_checkpoint="latest"))
        assert (second.steps, trainer.tokens_trained, second.gradients) == (steps, 0, [])
        assert_same_tensors(adapter_of(settings.output_dir), weights)
        assert second.train_losses == first.train_losses
        assert second.eval_losses == first.eval_losses


def test_fewer_steps_than_a_checkpoint_has_are_none(options, tmp_path):
    settings = options(max_steps=4, save_steps=4)
    finetune(settings)
    checkpoint = str(tmp_path / "output" / "checkpoint-4")
    fewer = options(
        max_steps=3, output_dir=str(tmp_path / "new"), resume_from_checkpoint=checkpoint
    )
    trainer, result = finetune(fewer)
    assert (result.steps, trainer.tokens_trained) == (4, 0)
    assert_same_tensors(adapter_of(fewer.output_dir), adapter_of(settings.output_dir))


def test_the_tokenizer_is_not_written_anew_where_it_is_the_same(options, tmp_path):
    settings = options(max_steps=1)
    finetune(settings)
    file, template = (tmp_path / "output" / n for n in ("tokenizer.json", "chat_template.jinja"))
    before, content = os.stat(file), template.read_bytes()
    template.write_text("older")
    finetune(settings)
    assert (os.stat(file).st_ino, os.stat(file).st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert template.read_bytes() == content


def test_missing_checkpoints(options, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no finished checkpoint-N directory in .*output"):
        finetune(options(resume_from_checkpoint="latest"))
    with pytest.raises(FileNotFoundError, match=r"nowhere is no checkpoint"):
        finetune(options(resume_from_checkpoint=str(tmp_path / "nowhere")))
    assert not (tmp_path / "output").exists()
    assert find_checkpoint(options()) is None


def test_latest_is_the_finished_checkpoint_that_was_saved_last(options, tmp_path):
    settings = options(resume_from_checkpoint="latest")
    contents = {"9": "{}", "10": "{}", "11": '{"epoch": ', "12": None, "x": "{}"}
    for number, (step, content) in enumerate(contents.items(), 1):
        directory = tmp_path / "output" / f"checkpoint-{step}"
        directory.mkdir(parents=True)
        record = state_files.to_files({"save_number": number})[".json"]
        (directory / "training.json").write_bytes(record)
        if content is not None:
            (directory / "trainer_state.json").write_text(content)
    assert find_checkpoint(settings) == str(tmp_path / "output" / "checkpoint-10")
    half = dataclasses.replace(
        settings, resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-11")
    )
    with pytest.raises(FileNotFoundError, match="its saving was interrupted"):
        find_checkpoint(half)


def test_latest_is_not_of_an_older_training(options, monkeypatch, tmp_path):
    output = tmp_path / "output"
    finetune(options(max_steps=6, save_steps=3))
    anew = options(max_steps=6, save_steps=1, seed=7, learning_rate=1e-3)
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            finetune(anew)
    assert names(output) >= {f"checkpoint-{step}" for step in (1, 2, 3, 6)}
    latest = dataclasses.replace(anew, resume_from_checkpoint="latest")
    assert find_checkpoint(latest) == str(output / "checkpoint-2")
    _, result = finetune(latest)
    _, whole = finetune(dataclasses.replace(anew, output_dir=str(tmp_path / "whole")))
    assert result.train_losses == whole.train_losses


# Precision.


def test_bfloat16_base_with_float32_adapters(options, tiny_llama, on_cpu):
    trainer, result = finetune(options(dtype="bfloat16"))
    original = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).state_dict()
    for name, parameter in trainer.model.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32 and parameter.requires_grad
        else:
            assert torch.equal(parameter, original[name]) and not parameter.requires_grad
    _, whole = finetune(options(dtype="float32"))
    # bfloat16 has 8 bits: the losses agree to a per cent.
    for (_, ours), (_, exact) in zip(result.train_losses, whole.train_losses, strict=True):
        assert ours == pytest.approx(exact, rel=0.01)
    assert result.train_losses != whole.train_losses
    assert all(t.dtype == torch.float32 for t in adapter_of(trainer.args.output_dir).values())


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_it_is_native(native, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_dtype("auto", CPU) == expected
    assert resolve_dtype("float16", CPU) == torch.float16


# What is measured and shown.


def test_speed_and_memory(options, sums, tiny_llama, capsys, on_cpu):
    settings = options(max_steps=10, per_device_train_batch_size=4)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        trainer, result = finetune(settings)
    finally:
        transformers_logging.set_verbosity(verbosity)
    # 40 rows in 10 steps of 4: every token once, no padding.
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert trainer.tokens_trained == load_dataset(sums, tokenizer, 128).num_tokens
    assert 0 < trainer.seconds_trained < result.seconds < 600
    assert result.tokens_per_second == trainer.tokens_trained / trainer.seconds_trained
    # A Python process with torch takes more than 0.1 GiB.
    assert 0.1 < result.peak_memory_gib <= peak_memory_bytes(CPU) / 2**30 < 64
    shown = capsys.readouterr().err
    for label in ("loss=", "tokens/s=", "peak=", "GiB", "10/10"):
        assert label in shown
    assert f"loss={result.train_losses[4][1]:.3f}" in shown


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own record")
def test_peak_memory_is_what_the_kernel_recorded():
    status = Path("/proc/self/status").read_text()
    recorded = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    assert peak_memory_bytes(CPU) == pytest.approx(recorded, rel=0.05)


def test_packed_batches_restart_positions(options, sums, trainer_of):
    trainer = trainer_of(options(packing=True, per_device_train_batch_size=2), sums)
    assert isinstance(trainer.data_collator, Collator)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch and (batch["position_ids"] == 0).sum() > 4


# Options.

INVALID: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: 0}, f"{name}: expected at least 1, got 0")
        for name in (
            "lora_r", "per_device_train_batch_size", "per_device_eval_batch_size",
            "gradient_accumulation_steps", "logging_steps", "save_total_limit",
        )
    ),
    *(
        ({name: -1}, f"{name}: expected at least 0, got -1")
        for name in ("eval_steps", "eval_samples", "save_steps", "warmup_steps", "seed")
    ),
    *(
        ({name: value}, f"{name}: expected a positive number, got {value}")
        for name in ("learning_rate", "max_grad_norm", "num_train_epochs", "lora_alpha")
        for value in (0, -1)
    ),
    *(
        ({name: -1}, f"{name}: expected 0 or more, got -1")
        for name in ("val_set_size", "weight_decay")
    ),
    *(
        ({name: value}, f"{name}: expected a finite number, got {value}")
        for name in (
            "learning_rate", "max_grad_norm", "num_train_epochs", "lora_alpha", "val_set_size",
            "weight_decay",
        )
        for value in (math.nan, math.inf)
    ),
    ({"max_length": 1}, "max_length: expected at least 2, got 1"),
    ({"max_steps": 0}, "max_steps: expected a positive number or -1, got 0"),
    ({"max_steps": -2}, "max_steps: expected a positive number or -1, got -2"),
    ({"seed": 2**32}, "seed: expected less than 2"),
    ({"dtype": "float16"}, "dtype: expected one of .*'bfloat16'.*, got 'float16'"),
    ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: expected one of .*'cosine'"),
    ({"eval_samples": 1}, "eval_samples: expected 0 without held-out rows .val_set_size., got 1"),
    ({"output_dir": ""}, "output_dir: expected a directory, got ''"),
    *(
        ({name: ""}, f"{name}: expected a name, got ''")
        for name in ("model", "data", "gguf_file", "resume_from_checkpoint")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), INVALID)
def test_invalid_options(changes, message, options):
    with pytest.raises(ValueError, match=f"^{message}"):
        options(**changes)


def test_an_output_directory_that_is_a_file(options, write_rows):
    path = write_rows([{"text": "a"}], "taken")
    with pytest.raises(ValueError, match=r"^output_dir: expected a directory, got '.*taken'"):
        options(output_dir=path)


def never(*_: Any, **__: Any) -> None:
    pytest.fail("the model was loaded")


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_an_output_directory_that_cannot_be_made_is_known_at_once(below, options, write_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraLlamaForCausalLM, "from_pretrained", never)
        taken = write_rows([{"text": "a"}], "taken")
        with pytest.raises(OSError, match=r"^output_dir: .*taken/x.* cannot be written: Not a dir"):
            finetune(options(output_dir=str(Path(taken) / "x" / below)))


@pytest.mark.parametrize("where", ["training", "held out", "padding"])
def test_tokens_that_the_model_does_not_know(
    where, options, tiny_llama, sums, tmp_path, write_rows
):
    """Known before the model is read: on a GPU the lookup would end the process."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    if where == "padding":
        tokenizer.pad_token = "<|new|>"
    tokenizer.save_pretrained(base)
    rows = [dict(row) for row in sums]
    _, held_out = split_dataset(range(len(rows)), 4, 42)
    if where != "padding":
        index = held_out[0] if where == "held out" else min(set(range(len(rows))) - set(held_out))
        rows[index]["completion"] += "<|new|>"
    settings = options(model=str(base), data=write_rows(rows, "new.jsonl"), val_set_size=4)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match="below 261, got 261"),
    ):
        patch.setattr(LoraLlamaForCausalLM, "from_pretrained", never)
        finetune(settings)
    assert not Path(settings.output_dir).exists()


def test_a_tokenizer_without_a_token_to_pad_with_is_known_before_the_model_is_read(
    options, tiny_llama, tmp_path
):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "tokenizer_config.json").write_text("{}")
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match=r"^tokenizer: has no"),
    ):
        patch.setattr(LoraLlamaForCausalLM, "from_pretrained", never)
        finetune(options(model=str(base)))


def test_a_row_that_the_template_refuses_is_named_by_its_line(options, tiny_llama, sums, tmp_path):
    """Whatever part of the split it is in, and however many lines are blank."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    template = base / "chat_template.jinja"
    refuses = "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    template.write_text(template.read_text() + refuses)
    parts = split_dataset(range(len(sums)), 5, 42)
    for index in (parts[0][7], parts[1][1]):
        rows = [dict(row) for row in sums]
        rows[index]["prompt"] = "bad"
        data = tmp_path / "blank.jsonl"
        data.write_text("".join(f"\n\n{json.dumps(row)}\n" for row in rows))
        with pytest.raises(ValueError) as caught:
            finetune(options(model=str(base), data=str(data), val_set_size=5))
        assert str(caught.value).startswith(
            f"{data}:{3 * index + 3}: the tokenizer's chat template"
        )
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("schedule", option_module.get_args(option_module.Schedule))
def test_every_schedule_trains(schedule, options):
    warmup = 0 if schedule == "constant" else 1
    _, result = finetune(options(lr_scheduler_type=schedule, max_steps=4, warmup_steps=warmup))
    assert result.steps == 4


@pytest.mark.parametrize("name", ["nonsense", "wandb"])
def test_report_to_names_what_is_there(name, options, tmp_path, monkeypatch):
    monkeypatch.setattr(option_module, "get_available_reporting_integrations", lambda: ["mlflow"])
    with pytest.raises(ValueError, match=rf"^report_to: .*installed \(mlflow\), got {name}"):
        finetune(options(report_to=name))
    assert not (tmp_path / "output").exists()


def test_options_become_the_adapter_and_the_arguments(options):
    settings = options(
        lora_target_modules=["q_proj"], use_rslora=True, weight_decay=0.1, max_grad_norm=0.5,
        lora_dropout=0.3, save_steps=7, eval_steps=3, num_train_epochs=2, max_steps=-1, seed=5,
        val_set_size=4,
    )  # fmt: skip
    assert settings.lora_config() == LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["q_proj"], use_rslora=True,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    assert options().lora_config().target_modules == list(ALL_PROJECTIONS)
    assert options(lora_target_modules="all-linear").lora_config().target_modules == "all-linear"
    arguments = settings.training_arguments(has_eval=True)
    expected = {
        "learning_rate": 5e-3, "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5,
        "save_steps": 7, "eval_steps": 3, "num_train_epochs": 2, "max_steps": -1, "seed": 5,
        "data_seed": 5, "report_to": [], "bf16": False, "fp16": False,
    }  # fmt: skip
    assert {name: getattr(arguments, name) for name in expected} == expected
    assert arguments.save_strategy == arguments.eval_strategy == "steps"
    assert settings.training_arguments(has_eval=False).eval_strategy == "no"
    assert arguments.n_gpu <= 1


def test_an_epoch_covers_every_row(options, sums):
    trainer, result = finetune(
        options(max_steps=-1, num_train_epochs=2, per_device_train_batch_size=16)
    )
    assert result.steps == 2 * math.ceil(len(sums) / 16)
    assert trainer.tokens_trained == 2 * trainer.train_dataset.num_tokens


def test_an_adapter_is_no_base_model(options, tmp_path):
    settings = options(max_steps=1)
    finetune(settings)
    with pytest.raises(ValueError, match=r"^model: expected a base model, got the adapter "):
        finetune(options(model=settings.output_dir, output_dir=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()
