"""States of a training that torch and transformers would take over: refused by file and field."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_llama import state_files, training_state
from lora_llama.state_checks import check_optimizer

NAN, INFINITE = {"$float": "nan"}, {"$float": "inf"}
Change = Callable[[dict[str, Any]], None]


def group(**fields: Any) -> Change:
    return lambda state: state["param_groups"][0].update(fields)


def field(**fields: Any) -> Change:
    return lambda state: state.update(fields)


def numpy(index: int, value: Any) -> Change:
    return lambda state: state["numpy"]["$tuple"].__setitem__(index, value)


def python(index: int, value: Any) -> Change:
    return lambda state: state["python"]["$tuple"].__setitem__(index, value)


def word(index: int, value: Any) -> Change:
    return lambda state: state["python"]["$tuple"][1]["$tuple"].__setitem__(index, value)


def entry(index: int, value: Any) -> Change:
    return lambda state: state["state"]["$dict"].__setitem__(index, value)


OPTIMIZER: list[tuple[Change, str]] = [
    *((group(lr=value), r"param_groups\[0\]\.lr: expected a finite number of at least 0")
      for value in (NAN, INFINITE, -1.0, "x", None, True, [0.1], 10**400)),
    *((group(eps=value), r"\.eps: expected a finite number") for value in (None, "x", NAN, -1e-8)),
    *((group(betas=value), r"\.betas: expected a tuple of 2") for value in ("x", 0.9, [2.0, 2.0])),
    (group(betas={"$tuple": [2.0, 2.0]}), r"\.betas: expected numbers below 1"),
    (group(betas={"$tuple": [0.9, 1.0]}), r"\.betas: expected numbers below 1"),
    (group(betas={"$tuple": [0.9, "x"]}), r"\.betas\[1\]: expected a finite number"),
    (group(betas={"$tuple": [0.9]}), r"\.betas: expected a tuple of 2"),
    (group(weight_decay=NAN), r"\.weight_decay: expected a finite number"),
    (group(initial_lr="x"), r"\.initial_lr: expected a finite number"),
    *((group(**{name: value}), rf"\.{name}: expected .*, as the new optimizer has")
      for name in ("amsgrad", "capturable", "foreach", "fused", "maximize", "differentiable")
      for value in (True, "x")),
    (group(params=[0, 1]), r"\.params: expected \[0, 1, 2\]"),
    (group(params=[0, 1, 10**9]), r"\.params: expected"),
    (group(more=1), r"param_groups\[0\]: expected an object with"),
    (field(param_groups=[]), "param_groups: expected a list of 1"),
    (field(param_groups=[1]), r"param_groups\[0\]: expected an object"),
    (field(more=1), "state: expected an object with"),
    (field(state=[]), "state: expected an object"),
    (lambda state: state["state"]["$dict"][0][1].update(more=1), "state 0: expected an object"),
    (entry(0, ["__class__", {}]), "expected the tensors|indices of 3 parameters"),
]  # fmt: skip
TENSORS: list[tuple[str, Any, str]] = [
    *(("exp_avg", value, "exp_avg: expected values that are finite in torch.float32")
      for value in (torch.nan, torch.inf, -torch.inf, 1e300)),
    ("exp_avg_sq", torch.nan, "exp_avg_sq: expected values that are finite"),
    ("exp_avg_sq", -1.0, "exp_avg_sq: expected values of at least 0, got -1.0"),
    *(("step", value, "step: expected one whole number of at least 0")
      for value in (-1.0, torch.nan, torch.inf, 0.5, torch.ones(1000))),
    ("exp_avg", torch.zeros(96, 4), r"exp_avg: expected shape \[4, 96\], got \[96, 4\]"),
]  # fmt: skip
SCHEDULER: list[tuple[Change, str]] = [
    (field(optimizer="x"), "state: expected an object with"),
    (field(step=5), "state: expected an object with"),
    (field(get_lr=5), "state: expected an object with"),
    (lambda state: state.pop("_step_count"), "state: expected an object with"),
    *((field(last_epoch=value), r"last_epoch: expected an integer of at least 0")
      for value in ("x", 1.5, -1, True, 10**30, NAN, None)),
    (field(_step_count="x"), "_step_count: expected an integer"),
    *((field(base_lrs=value), "base_lrs: expected a list of 1") for value in ([], 3, [0.1, 0.1])),
    (field(base_lrs=[NAN]), r"base_lrs\[0\]: expected a finite number"),
    (field(_last_lr="x"), "_last_lr: expected a list of 1"),
    (field(_last_lr=[-1.0]), r"_last_lr\[0\]: expected a finite number of at least 0"),
    (field(lr_lambdas=[]), "lr_lambdas: expected a list of 1"),
    (field(lr_lambdas=[{"__code__": 1}]), r"lr_lambdas\[0\]: expected a NoneType"),
    (field(_is_initial=1), "_is_initial: expected a bool"),
]  # fmt: skip
RNG: list[tuple[Change, str]] = [
    *((numpy(2, value), "numpy: expected a position from 0 to 624, got")
      for value in (625, 10**9, -1, -(10**9), 2**62, True, 1.0, "x", None)),
    (numpy(0, "PCG64"), "numpy: expected MT19937"),
    (numpy(3, 2), "numpy: expected a finite number"),
    (numpy(4, NAN), "numpy: expected a finite number"),
    (field(python=3), "python: expected a tuple of 3"),
    (python(0, 2), "python: expected version 3"),
    (python(2, "x"), "python: expected a finite number"),
    (python(2, INFINITE), "python: expected a finite number"),
    (python(1, [1]), "python: expected a tuple of 625"),
    (word(0, -1), "python: expected version 3 and integers of 32 bits"),
    (word(0, 2**32), "python: expected version 3 and integers of 32 bits"),
    (word(0, 0.5), "python: expected version 3 and integers of 32 bits"),
    *((word(624, value), "python: expected a position from 0 to 624, got")
      for value in (625, -1, 10**9)),
    *((field(unlogged_loss=value), "unlogged_loss: expected a finite number")
      for value in (NAN, INFINITE, "x", None, True)),
    *((field(recent_losses=value), "recent_losses: expected a list of finite numbers")
      for value in ([NAN], ["x"], [None], 3, None)),
]  # fmt: skip


def line(**fields: Any) -> Change:
    return lambda state: state["log_history"].__setitem__(0, fields)


STATE: list[tuple[Change, str]] = [
    *((field(global_step=value), "global_step: expected an integer of at least 1")
      for value in (True, 0, -1, "2", 2.0, None, 10**30)),
    (field(max_steps=1), "global_step: expected at most max_steps 1, got 2"),
    *((field(log_history=value), "log_history") for value in (3, "x", {"a": 1}, [1], [None])),
    *((line(loss=1.0, **step), r"log_history\[0\]: expected an object with a step from 0 to 2")
      for step in ({}, {"step": "y"}, {"step": True}, {"step": 3}, {"step": -1}, {"step": 1.0})),
    (line(step=1, loss="x"), r"log_history\[0\]\.loss: expected a number"),
    (line(step=1, loss=[1.0]), r"log_history\[0\]\.loss: expected a number"),
    *((field(**{name: "x"}), f"{name}: expected a finite")
      for name in ("epoch", "max_steps", "logging_steps", "eval_steps", "save_steps",
                   "train_batch_size", "num_train_epochs", "num_input_tokens_seen", "total_flos",
                   "best_metric", "best_global_step")),
    (field(best_model_checkpoint=3), "best_model_checkpoint: expected"),
    (field(train_batch_size=0), "train_batch_size: expected at least 1"),
    (field(epoch=10**400), "epoch: expected a finite"),
    (field(stateful_callbacks=[1]), "callbacks"),
    *((field(stateful_callbacks={"TrainerControl": control}), "TrainerControl: expected args of")
      for control in (3, {"args": {"x": True}}, {"args": {"should_log": "y"}},
                      {"args": {}, "attributes": {"should_training_stop": True}})),
    (field(more=1), "more"),
]  # fmt: skip
CASES = [
    (name, change, match)
    for name, cases in (
        ("optimizer", OPTIMIZER), ("scheduler", SCHEDULER), ("rng_state_0", RNG),
        ("trainer_state", STATE),
    )
    for change, match in cases
]  # fmt: skip


@pytest.fixture
def directory(good: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(good["training"], tmp_path / "training")


def edit(file: Path, change: Change) -> None:
    content = json.loads(file.read_text())
    change(content if file.name == "trainer_state.json" else content["state"])
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "change", "match"), CASES, ids=[f"{name}-{match[:40]}" for name, _, match in CASES]
)
def test_a_faulty_field_is_named_with_its_file(name, change, match, directory, kinds, watch):
    file = directory / f"{name}.json"
    edit(file, change)
    watch.refused(kinds["training"].read, directory, directory / name, match)


@pytest.mark.parametrize(("name", "value", "match"), TENSORS, ids=str)
def test_a_faulty_tensor_is_named_with_its_file(
    name, value, match, directory, kinds, watch, save_tensors
):
    file = directory / "optimizer.safetensors"
    tensors = load_file(file)
    key = f"state/1/{name}"
    if not isinstance(value, torch.Tensor):
        value = torch.full_like(tensors[key], value, dtype=torch.float64)
    save_tensors({**tensors, key: value}, file)
    match = f"no state of this optimizer: state 1: {match}"
    watch.refused(kinds["training"].read, directory, directory / "optimizer.json", match)


def test_a_checkpoint_has_as_many_steps_as_its_name_says(directory, kinds, watch):
    named = directory.rename(directory.with_name("checkpoint-2"))
    kinds["training"].read(named)
    edit(named / "trainer_state.json", field(global_step=3))
    match = "global_step: expected 2, as the directory's name says, got 3"
    watch.refused(kinds["training"].read, named, named / "trainer_state.json", match)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("numpy", (1,)), ("numpy", [1]), ("python", None), ("torch", 3), ("cuda", 3),
        ("numpy", ("MT19937", 3, 0, 0, 0.0)),
        ("numpy", ("MT19937", torch.zeros(623, dtype=torch.int64), 0, 0, 0.0)),
        ("numpy", ("MT19937", torch.full((624,), -1), 0, 0, 0.0)),
        ("numpy", ("MT19937", torch.full((624,), 1 << 32), 0, 0, 0.0)),
        ("torch", torch.zeros(9, dtype=torch.uint8)),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_generator_s_state_of_another_kind(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        training_state.set_rng_state({**training_state.rng_state(), name: value})


@pytest.mark.parametrize("entries", [{}, 3, None, {"exp_avg": torch.zeros(4, 96)}])
def test_a_parameter_without_adams_state(entries, directory):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.randn(4, 96)) for _ in range(3)])
    state = {**optimizer.state_dict(), "state": {0: entries}}
    with pytest.raises(ValueError, match=r"state 0: expected an object with \['exp_avg'"):
        check_optimizer(state, optimizer)


def test_no_generator_changes_before_all_are_known_to_be_good(directory):
    """The last one is at fault."""
    before = training_state.rng_state()
    state = {**before, "torch": before["torch"][:-1]}
    random.random(), np.random.rand(), torch.rand(1)
    now = training_state.rng_state()
    with pytest.raises(ValueError, match="torch: expected a tensor"):
        training_state.set_rng_state(state)
    after = training_state.rng_state()
    assert after["python"] == now["python"] and torch.equal(after["torch"], now["torch"])
    assert (
        torch.equal(after["numpy"][1], now["numpy"][1]) and after["numpy"][2:] == now["numpy"][2:]
    )


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adamax])
def test_other_optimizers_are_read(kind, tmp_path):
    """Their own state is theirs; NaN in it is refused as well."""

    def make() -> torch.optim.Optimizer:
        torch.manual_seed(0)
        return kind([nn.Parameter(torch.randn(3, 2))], lr=0.1)

    trained = make()
    for parameter in trained.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    trained.step()
    for suffix, content in state_files.to_files(trained.state_dict()).items():
        (tmp_path / f"optimizer{suffix}").write_bytes(content)
    training_state.load_optimizer(make(), tmp_path)
