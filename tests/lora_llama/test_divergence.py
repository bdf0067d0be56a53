"""A training that diverges stops before the step that would spoil the weights, and says where."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainerCallback

from lora_kernels.adapter_files import load_adapter
from lora_llama import cli
from lora_llama import trainer as trainer_module
from lora_llama.divergence import (
    WINDOW,
    DivergenceError,
    LossWatch,
    first_nonfinite,
    gradient_fault,
)
from lora_llama.gradients import capture_lora_weights
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import FinetuneOptions
from lora_llama.resuming import find_checkpoint
from lora_llama.trainer import LoraTrainer
from lora_llama.training import build_trainer, encode_rows, finetune, train_and_save


@pytest.fixture
def options(tiny_llama, sums, tmp_path, write_rows, monkeypatch) -> Callable[..., FinetuneOptions]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = write_rows(sums)

    def make(**changes: Any) -> FinetuneOptions:
        settings: dict[str, Any] = {
            "model": str(tiny_llama), "data": data, "output_dir": str(tmp_path / "output"),
            "dtype": "float32", "val_set_size": 0, "lora_r": 4, "learning_rate": 5e-3,
            "warmup_steps": 0, "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2,
        }  # fmt: skip
        return FinetuneOptions(**settings | changes)

    return make


@pytest.fixture
def trainer_of(tiny_llama, sums) -> Callable[..., LoraTrainer]:
    def make(options: FinetuneOptions) -> LoraTrainer:
        torch.manual_seed(options.seed)
        model = LoraLlamaForCausalLM.from_pretrained(
            tiny_llama, lora=options.lora_config(), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        dataset = encode_rows(sums, tokenizer, options)
        return build_trainer(model, tokenizer, options.training_arguments(False), dataset)

    return make


class AtBatch(TrainerCallback):
    """Runs something once, before the n-th forward pass of all."""

    def __init__(self, model: nn.Module, number: int, action: Callable[[], None]) -> None:
        self.count, self.number, self.action = 0, number, action
        # The embedding alone is called in every forward pass, and once.
        self.handle = model.get_input_embeddings().register_forward_pre_hook(self.hook)
        self.weights: dict[str, Tensor] = {}
        self.model = model

    def hook(self, *_: Any) -> None:
        if not torch.is_grad_enabled():
            return
        self.count += 1
        if self.count == self.number:
            self.weights = capture_lora_weights(self.model)
            self.action()


PATH = "model.layers.1.mlp.down_proj"


def nan_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule(PATH).lora_A["default"][1, 2] = math.nan


def inf_base(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.k_proj").weight[0, 0] = math.inf


def nan_output(model: nn.Module) -> None:
    def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return output.index_fill(-1, torch.tensor(3), math.nan)

    model.get_submodule("model.layers.1.self_attn.o_proj").register_forward_hook(hook)


def inf_gradient(model: nn.Module) -> None:
    def hook(gradient: Tensor) -> Tensor:
        return gradient.index_fill(0, torch.tensor(0), math.inf)

    model.get_submodule(PATH).lora_B["default"].register_hook(hook)


def huge_gradient(model: nn.Module) -> None:
    """Finite, but not its norm in float32, by which it would be divided."""
    model.get_submodule(PATH).lora_B["default"].register_hook(lambda gradient: gradient * 1e30)


FAULTS = {
    "a weight": (
        nan_weight,
        rf"the loss is nan; NaN or Inf begins in the parameter {PATH}\.lora_A",
    ),
    "a base weight": (
        inf_base,
        r"loss is nan; .* parameter model.layers.0.self_attn.k_proj.weight",
    ),
    "an output": (nan_output, r"begins in the output of model.layers.1.self_attn.o_proj;"),
    "a gradient": (inf_gradient, rf"the gradient of {PATH}\.lora_B\.default has NaN or Inf;"),
    "a norm": (
        huge_gradient,
        rf"norm of the gradients is \S+e\+\d\d, beyond torch.float32; that of {PATH}\.lora_B\.",
    ),
}


@pytest.mark.parametrize(
    ("fault", "accumulation"),
    [("a weight", 1), ("a base weight", 2), ("an output", 1), ("a gradient", 1), ("a gradient", 2),
     ("a norm", 1), ("a norm", 2)],
)  # fmt: skip
def test_the_first_tensor_that_is_not_finite_is_named(fault, accumulation, options, trainer_of):
    inject, message = FAULTS[fault]
    settings = options(gradient_accumulation_steps=accumulation)
    trainer = trainer_of(settings)
    # The first of the batches of step 4: with accumulation, before the gradients are complete.
    at = AtBatch(trainer.model, 3 * accumulation + 1, lambda: inject(trainer.model))
    with pytest.raises(DivergenceError, match=message) as caught:
        train_and_save(trainer)
    assert str(caught.value).startswith("the training diverged at step 4: ")
    good = Path(settings.output_dir) / "checkpoint-2"
    assert f"; the last good checkpoint is {good}; lower learning_rate" in str(caught.value)
    assert trainer.state.global_step == 3 and at.weights
    # No optimizer step was made: but for the fault itself, the weights are what they were.
    for name, weight in capture_lora_weights(trainer.model).items():
        same = torch.equal(weight, at.weights[name])
        assert same or (fault == "a weight" and name == f"{PATH}.lora_A.default")
    assert not (Path(settings.output_dir) / "adapter_model.safetensors").exists()
    latest = options(resume_from_checkpoint="latest")
    assert find_checkpoint(latest) == str(good)
    if fault == "a weight":
        _, result = finetune(latest)
        assert result.steps == 6


@pytest.mark.parametrize("fault", FAULTS)
def test_nor_is_the_first_step_made(fault, options, trainer_of):
    """The same message as later, but that the learning rate is not to blame."""
    inject, message = FAULTS[fault]
    trainer = trainer_of(options())
    inject(trainer.model)
    before = capture_lora_weights(trainer.model)
    with pytest.raises(DivergenceError, match=message) as caught:
        train_and_save(trainer)
    assert str(caught.value).startswith("the training diverged at step 1: ")
    assert "; no checkpoint was saved; no optimizer step was made: " in str(caught.value)
    after = capture_lora_weights(trainer.model)
    assert all(torch.equal(after[name].nan_to_num(), w.nan_to_num()) for name, w in before.items())


def test_a_sharded_model_is_searched_by_all_processes_together(options, trainer_of, monkeypatch):
    """Its parameters alone, once all agree to stop: running it would wait for the others."""
    trainer = trainer_of(options(gradient_accumulation_steps=2))
    monkeypatch.setattr(trainer_module, "is_sharded", lambda model: True)
    monkeypatch.setattr(trainer_module, "first_nonfinite", lambda *_: pytest.fail("it was run"))
    AtBatch(trainer.model, 3, lambda: nan_weight(trainer.model))
    said = rf"at step 2: the loss is nan; NaN or Inf begins in the parameter {PATH}\.lora_A\."
    with pytest.raises(DivergenceError, match=said):
        train_and_save(trainer)


def test_the_first_step_after_a_checkpoint_names_it(options, trainer_of):
    settings = options(max_steps=2)
    finetune(settings)
    trainer = trainer_of(options(max_steps=4))
    inf_gradient(trainer.model)
    good = str(Path(settings.output_dir) / "checkpoint-2")
    said = (
        rf"at step 3: the gradient of .* has NaN or Inf; the last good checkpoint is {good}; lower"
    )
    with pytest.raises(DivergenceError, match=said):
        trainer.train(good)


def test_without_a_checkpoint_it_says_so(options, trainer_of):
    trainer = trainer_of(options(save_steps=0))
    AtBatch(trainer.model, 2, lambda: nan_weight(trainer.model))
    with pytest.raises(DivergenceError, match=r"at step 2: .*; no checkpoint was saved; lower"):
        train_and_save(trainer)


class Inflate(TrainerCallback):
    """What an optimizer step may do, without a number that is not finite."""

    def on_optimizer_step(self, args, state, control, model, **kwargs: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight.mul_(1e3)


def test_weights_that_are_no_good_are_not_saved(options, trainer_of):
    settings = options(learning_rate=1e30, save_steps=1)
    with pytest.raises(DivergenceError, match=r"diverged at step 1: the loss is nan; .* output of"):
        finetune(settings)
    trainer = trainer_of(options(save_steps=1))
    trainer.add_callback(Inflate())
    said = (
        r"step 1: the loss is \d+.*, above 11.13, twice that of guessing; no checkpoint was saved"
    )
    with pytest.raises(DivergenceError, match=said):
        train_and_save(trainer)
    assert not list(Path(settings.output_dir).glob("**/*.safetensors"))


def test_nor_at_the_end(options):
    settings = options(learning_rate=1e30, save_steps=0, max_steps=1)
    with pytest.raises(DivergenceError, match="at step 1: the loss is nan"):
        finetune(settings)
    assert not (Path(settings.output_dir) / "adapter_model.safetensors").exists()


def test_an_explosion_is_stopped_where_no_number_is_infinite(options, trainer_of):
    settings = options()
    trainer = trainer_of(settings)

    def explode() -> None:
        with torch.no_grad():
            trainer.model.model.norm.weight.mul_(1e3)

    at = AtBatch(trainer.model, 4, explode)
    with pytest.raises(DivergenceError, match=r"step 4: .*, and the mean over 4 steps \d+.*11.13"):
        train_and_save(trainer)
    assert at.weights and trainer.state.global_step == 3


def test_the_losses_before_an_interruption_count(options, trainer_of):
    """The same explosion, at step 4, in one training and in one that goes on from step 2."""
    settings, said = options(lora_dropout=0.2), []
    for checkpoint in (None, str(Path(settings.output_dir) / "checkpoint-2")):
        trainer = trainer_of(settings)

        def explode(model: nn.Module = trainer.model) -> None:
            with torch.no_grad():
                model.model.norm.weight.mul_(1e3)

        AtBatch(trainer.model, 4 if checkpoint is None else 2, explode)
        with pytest.raises(DivergenceError) as caught:
            train_and_save(trainer, checkpoint)
        said.append(str(caught.value))
    assert said[0] == said[1] and "step 4: " in said[0] and "mean over 4 steps" in said[0]


def test_a_lower_learning_rate_counts_where_the_training_goes_on(options):
    finetune(options(max_steps=6, save_steps=3, lr_scheduler_type="constant"))
    checkpoint = str(Path(options().output_dir) / "checkpoint-3")
    resumed = options(
        resume_from_checkpoint=checkpoint, learning_rate=1e-4, lr_scheduler_type="constant"
    )
    _, result = finetune(resumed)
    rates = [line["learning_rate"] for line in result.log if "loss" in line]
    assert rates == [5e-3] * 3 + [1e-4] * 3


def test_the_held_out_loss_is_watched_too(options, monkeypatch):
    original = LoraTrainer.prediction_step

    def spoiled(self, *args: Any, **kwargs: Any) -> Any:
        _, losses, counts = original(self, *args, **kwargs)
        return None, losses * (math.inf if self.state.global_step == 2 else 1), counts

    monkeypatch.setattr(LoraTrainer, "prediction_step", spoiled)
    with pytest.raises(DivergenceError, match="at step 2: the held-out loss is inf"):
        finetune(options(val_set_size=3, eval_steps=2))


# The parts.


def test_the_loss_is_watched_over_steps():
    watch = LossWatch(vocab_size=100)
    limit = 2 * math.log(100)
    # Two forward passes to a step; one bad step among good ones is chance.
    for loss in (2.0, limit + 3, 2.0):
        assert watch.fault(loss / 2, False) is None and watch.fault(loss / 2, True) is None
    assert watch.judge(limit + 1) is None and watch.judge(3 * limit) is not None
    # Judging is not counting.
    assert watch.judge(limit + 1) is None and len(watch.steps) == 3
    for loss in (math.nan, math.inf, -math.inf):
        assert watch.fault(loss, False) == watch.judge(loss) == f"the loss is {loss}"
    faults = [watch.fault(limit + 1, True) for _ in range(WINDOW)]
    assert faults[0] is None and "mean over 8 steps" in faults[-1]
    assert "the mean of this step" in LossWatch(100).fault(limit + 0.1, True)
    assert LossWatch(100).fault(limit - 0.1, True) is None


def judged(losses: list[float], vocab_size: int) -> list[int]:
    """The steps with a fault, of a training that goes on all the same."""
    watch = LossWatch(vocab_size)
    return [i for i, loss in enumerate(losses) if watch.fault(loss, True) is not None]


def test_a_model_that_unlearns_is_stopped():
    watch = LossWatch(vocab_size=261)
    assert [watch.fault(loss, True) for loss in (5.26, 4.36)] == [None, None]
    said = "the loss is 8.35, and the mean over 2 steps 6.355, above 5.565, that of guessing, after"
    assert str(watch.judge(8.35)).startswith(f"{said} 4.81")
    # A pretrained model of 32,000 tokens that gives every token the same probability; and one that
    # is as bad for a while: eight steps are not chance.
    guessing = math.log(32_000)
    assert judged([2.0] * 100 + [guessing + 0.01] * 30, 32_000) == list(range(107, 130))
    assert judged([2.0] * 100 + [guessing + 1] * 7 + [2.0] * 20, 32_000) == []
    # The lowest mean is among the last steps, in any place.
    for learned in (8, 20, 55):
        found = judged([guessing - 0.1] * 10 + [8.0] * learned + [guessing + 1] * 20, 32_000)
        assert found and found[0] <= 10 + learned + 8


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_noise_is_no_divergence(seed):
    draw = random.Random(seed).gauss
    fresh = math.log(261)
    # A new model: around guessing, or above it; learning or not; a few tokens to a step.
    for start in (fresh, fresh + 1, fresh - 0.3):
        assert judged([draw(start, 0.4) for _ in range(300)], 261) == []
        falling = [draw(2 + (start - 2) * 0.97**step, 0.4) for step in range(300)]
        assert judged(falling, 261) == []
    # A pretrained one, with the noise of a single token in each step.
    assert judged([max(0.0, draw(2.5, 3.0)) for _ in range(300)], 32_000) == []
    assert judged([10.0] + [2.0] * 50 + [10.3, 12.0, 10.4] + [2.0] * 9, 32_000) == []


def test_a_training_that_unlearns_is_stopped(options, trainer_of):
    trainer = trainer_of(options(max_steps=12))

    def confuse() -> None:
        with torch.no_grad():
            trainer.model.model.norm.weight.mul_(6)

    at = AtBatch(trainer.model, 7, confuse)
    with pytest.raises(DivergenceError, match=r"that of guessing, after \d.*; the last good ") as e:
        train_and_save(trainer)
    assert at.weights and "twice" not in str(e.value)
    assert 6 <= trainer.state.global_step < 11


def test_the_gradient_where_it_began_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    assert gradient_fault(model) is None
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert gradient_fault(model) is None
    # Four of them: 2e30.
    model[2].weight.grad.fill_(1e30)
    assert gradient_fault(model) == (
        "the norm of the gradients is 2.0e+30, beyond torch.float32; "
        "that of 2.weight is the largest"
    )
    for name in ("0.weight", "1.bias"):
        model.get_parameter(name).grad[0] = math.nan
        assert gradient_fault(model) == f"the gradient of {name} has NaN or Inf"
    assert all(not p.grad.isnan().all() for p in model.parameters())


# Two processes, of which each has half of every parameter.
SHARDED = """
import math, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from lora_llama.divergence import nonfinite_parameter
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", world_size=2,
                        rank=int(sys.argv[2]))
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
for layer in model:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
found = [nonfinite_parameter(model)]
for rank, name in ((0, "2.weight"), (1, "1.bias")):
    if dist.get_rank() == rank:
        model.get_parameter(name).to_local().data.view(-1)[-1] = math.inf
    found.append(nonfinite_parameter(model))
print(*found)
dist.destroy_process_group()
"""


@pytest.mark.long
def test_a_parameter_of_a_sharded_model_is_named_in_every_process(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(tmp_path / "meeting"), str(rank)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(2)
    ]  # fmt: skip
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert printed == ["None 2.weight 1.bias\n"] * 2


def test_a_loss_that_alone_is_not_finite():
    model = nn.Sequential(nn.Linear(2, 2))
    said = first_nonfinite(model, lambda: model(torch.ones(1, 2)))
    assert said == "the loss itself, after finite outputs of every module"
    assert not model[0]._forward_hooks


def test_the_message_is_one_line_of_the_command(options, capsys):
    settings = options(learning_rate=1e30)
    arguments = [f"--{name}={getattr(settings, name)}" for name in (
        "model", "data", "output_dir", "dtype", "learning_rate", "warmup_steps", "max_steps",
    )]  # fmt: skip
    assert cli.main(["finetune", *arguments, "--val_set_size=0"]) == 1
    error = capsys.readouterr().err.partition("lora-llama: error: ")[2]
    assert error.startswith("the training diverged at step 2: the loss is nan; NaN or Inf begins")
    assert len(error.strip().splitlines()) == 1


def test_checkpoints_are_all_good(options):
    """However often is saved."""
    settings = options(learning_rate=0.5, save_steps=1, max_steps=4)
    try:
        finetune(settings)
    except DivergenceError as error:
        assert "the last good checkpoint" in str(error) or "no checkpoint" in str(error)
    for path in Path(settings.output_dir).glob("checkpoint-*"):
        assert all(torch.isfinite(t).all() for t in load_adapter(path)[1].values())
        assert json.loads((path / "trainer_state.json").read_text())["global_step"] >= 1
