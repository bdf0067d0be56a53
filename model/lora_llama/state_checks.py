"""Checks of a checkpoint's states against those of the training that goes on from it.

torch and transformers take over whatever such a state holds, and fail (or train on in vain) where
it is used. Each check here names the field, what was expected and what came.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerControl, TrainerState

from lora_kernels.field_checks import shown

# State of these names has the parameter's shape, whichever optimizer it is.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
# What counts steps is exact in a float.
_MAX_COUNT = 1 << 53
_NUMPY_WORDS = 624
_ADAM = {"step", "exp_avg", "exp_avg_sq"}
_STATE_FIELDS: dict[str, tuple[type, ...]] = {
    "epoch": (float, int, type(None)), "max_steps": (int,), "logging_steps": (float, int),
    "eval_steps": (float, int), "save_steps": (float, int), "train_batch_size": (int, type(None)),
    "num_train_epochs": (float, int), "num_input_tokens_seen": (int,), "total_flos": (float, int),
    "log_history": (list,), "best_metric": (float, int, type(None)),
    "best_global_step": (int, type(None)), "best_model_checkpoint": (str, type(None)),
    "stateful_callbacks": (dict, type(None)),
}  # fmt: skip


def wrong(where: str, expected: str, value: object) -> ValueError:
    return ValueError(f"{where}: expected {expected}, got {shown(value)}")


def is_number(value: object, least: float = -math.inf) -> bool:
    """Whether a value is an int or float, finite as a float, and not below `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    largest = sys.float_info.max
    return max(least, -largest) <= value <= largest


def is_count(value: object, least: int = 0, most: int = _MAX_COUNT) -> bool:
    return type(value) is int and least <= value <= most


def check_alike(saved: Any, fresh: Any, where: str) -> None:
    """Checks that a value has the structure of a new one: keys, lengths and types.

    A number may be another finite one, of the same sign if the new one is not negative.

    Raises:
        ValueError: naming the place.
    """
    if isinstance(fresh, dict):
        if not isinstance(saved, dict) or saved.keys() != fresh.keys():
            raise wrong(where, f"an object with {list(fresh)}", saved)
        for key, value in fresh.items():
            check_alike(saved[key], value, f"{where}.{key}")
    elif isinstance(fresh, list | tuple):
        if type(saved) is not type(fresh) or len(saved) != len(fresh):
            raise wrong(where, f"a {type(fresh).__name__} of {len(fresh)}", saved)
        for index, value in enumerate(fresh):
            check_alike(saved[index], value, f"{where}[{index}]")
    elif type(fresh) is int:
        if not is_count(saved, 0 if fresh >= 0 else -_MAX_COUNT):
            raise wrong(where, "an integer of at least 0 below 2**53", saved)
    elif type(fresh) is float:
        if not is_number(saved, 0 if fresh >= 0 else -math.inf):
            raise wrong(where, "a finite number of at least 0", saved)
    elif type(saved) is not type(fresh):
        raise wrong(where, f"a {type(fresh).__name__}", saved)


def check_optimizer(state: Any, optimizer: torch.optim.Optimizer) -> None:
    """Checks a state_dict against the optimizer that is to have it.

    Its groups are those of the optimizer, switches equal and numbers in range. Adam's parameters
    have Adam's state; every tensor is finite in its parameter's dtype.

    Raises:
        ValueError: naming the field.
    """
    fresh = optimizer.state_dict()
    if not isinstance(state, dict) or state.keys() != fresh.keys():
        raise wrong("state", f"an object with {list(fresh)}", state)
    groups = state["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(fresh["param_groups"]):
        raise wrong("param_groups", f"a list of {len(fresh['param_groups'])}", groups)
    for number, (saved, new) in enumerate(zip(groups, fresh["param_groups"], strict=True)):
        _check_group(saved, new, f"param_groups[{number}]")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [
        _ADAM | ({"max_exp_avg_sq"} if group["amsgrad"] else set())
        if isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.Adam)
        else None
        for group in optimizer.param_groups
        for _ in group["params"]
    ]
    if not isinstance(state["state"], dict):
        raise wrong("state", "an object", state["state"])
    for index, entries in state["state"].items():
        where = f"state {index}"
        if not is_count(index, 0, len(parameters) - 1):
            raise wrong("state", f"indices of {len(parameters)} parameters", index)
        if not isinstance(entries, dict) or names[index] not in (None, entries.keys()):
            raise wrong(where, f"an object with {sorted(names[index] or ())}", entries)
        for name, value in entries.items():
            _check_entry(f"{where}: {name}", name, value, parameters[index])


def _check_group(saved: Any, fresh: Mapping[str, Any], where: str) -> None:
    # A schedule adds its peak; the optimizer may not have one yet.
    peak = {"initial_lr": 0.0}
    if not isinstance(saved, dict) or saved.keys() | peak.keys() != fresh.keys() | peak.keys():
        raise wrong(where, f"an object with {list(fresh)}", saved)
    for name, value in saved.items():
        new = {**peak, **fresh}[name]
        is_switch = new is None or isinstance(new, bool | str)
        if (is_switch or name == "params") and value != new:
            raise wrong(f"{where}.{name}", f"{shown(new)}, as the new optimizer has", value)
        # A whole number may have been given where the new optimizer has another.
        expected = float(new) if type(new) is int else new
        if name != "params":
            check_alike(value, expected, f"{where}.{name}")
        if name == "betas" and not all(beta < 1 for beta in value):
            raise wrong(f"{where}.betas", "numbers below 1", value)


def _check_entry(where: str, name: str, value: Any, parameter: Tensor) -> None:
    if not isinstance(value, Tensor):
        if name in MOMENTS or not (value is None or is_number(value, 0)):
            raise wrong(where, "a tensor, or a finite number of at least 0", value)
        return
    if name in MOMENTS and value.shape != parameter.shape:
        raise wrong(where, f"shape {list(parameter.shape)}", list(value.shape))
    if name == "step":
        if value.numel() != 1 or not is_number(value.item(), 0) or value.item() % 1:
            raise wrong(where, "one whole number of at least 0", value)
    elif value.is_floating_point() and not value.to(parameter.dtype).isfinite().all():
        raise ValueError(f"{where}: expected values that are finite in {parameter.dtype}")
    elif name.endswith("_sq") and (value < 0).any():
        raise wrong(where, "values of at least 0", value.min().item())


def check_rng(state: Any, fresh: Mapping[str, Any]) -> None:
    """Checks the states of all generators: numpy itself reads wherever its position says.

    Args:
        fresh: the present ones; a GPU's are compared with each other's length.

    Raises:
        ValueError: naming the generator.
    """
    if not isinstance(state, dict) or not {"python", "numpy", "torch"} <= state.keys():
        raise wrong("generators", "an object with python, numpy and torch", state)
    version, words, gauss = _items(state["python"], 3, "python")
    words = _items(words, _NUMPY_WORDS + 1, "python")
    if version != fresh["python"][0] or not _are_words(words[:-1]):
        raise wrong("python", f"version {fresh['python'][0]} and integers of 32 bits", "others")
    _check_position("python", words[-1], gauss is None or is_number(gauss))
    name, keys, position, has_gauss, cached = _items(state["numpy"], 5, "numpy")
    if name != fresh["numpy"][0]:
        raise wrong("numpy", fresh["numpy"][0], name)
    _check_bytes("numpy", keys, fresh["numpy"][1])
    if not _are_words(keys.tolist()):
        raise wrong("numpy", "integers of 32 bits", "others")
    _check_position("numpy", position, is_count(has_gauss, 0, 1) and is_number(cached))
    _check_bytes("torch", state["torch"], fresh["torch"])
    if not isinstance(state.get("cuda", []), list):
        raise wrong("cuda", "a list", state["cuda"])
    for saved in state.get("cuda", []) if fresh.get("cuda") else []:
        _check_bytes("cuda", saved, fresh["cuda"][0])


def _items(value: Any, count: int, where: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) != count:
        raise wrong(where, f"a tuple of {count}", value)
    return value


def _are_words(values: Iterable[Any]) -> bool:
    return all(is_count(value, 0, (1 << 32) - 1) for value in values)


def _check_position(where: str, position: Any, gauss: bool) -> None:
    if not is_count(position, 0, _NUMPY_WORDS):
        raise wrong(where, f"a position from 0 to {_NUMPY_WORDS}", position)
    if not gauss:
        raise wrong(where, "a finite number, if any, as its next normal one", "another")


def _check_bytes(where: str, saved: Any, fresh: Tensor) -> None:
    alike = isinstance(saved, Tensor) and saved.shape == fresh.shape and saved.dtype == fresh.dtype
    if not alike:
        raise wrong(where, f"a tensor {list(fresh.shape)} of {fresh.dtype}", saved)


def check_trainer_state(state: TrainerState, steps: int | None) -> None:
    """Checks what transformers' Trainer takes over from trainer_state.json.

    Args:
        steps: of the checkpoint, as its directory says; None where it does not.

    Raises:
        ValueError: naming the field.
    """
    for name, kinds in _STATE_FIELDS.items():
        value = getattr(state, name)
        if type(value) not in kinds or (type(value) in (int, float) and not is_number(value)):
            kind = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise wrong(name, f"a finite {kind}", value)
    if not is_count(state.global_step, 1):
        raise wrong("global_step", "an integer of at least 1", state.global_step)
    if steps is not None and state.global_step != steps:
        raise wrong("global_step", f"{steps}, as the directory's name says", state.global_step)
    if 0 < state.max_steps < state.global_step:
        raise wrong("global_step", f"at most max_steps {state.max_steps}", state.global_step)
    if state.train_batch_size is not None and state.train_batch_size < 1:
        raise wrong("train_batch_size", "at least 1", state.train_batch_size)
    for index, line in enumerate(state.log_history):
        where = f"log_history[{index}]"
        if not isinstance(line, dict) or not is_count(line.get("step"), 0, state.global_step):
            raise wrong(where, f"an object with a step from 0 to {state.global_step}", line)
        for name, value in line.items():
            if type(value) not in (int, float):
                raise wrong(f"{where}.{name}", "a number", value)
    control = (state.stateful_callbacks or {}).get("TrainerControl", {"args": {}, "attributes": {}})
    flags = {field.name for field in fields(TrainerControl)}
    arguments = control.get("args") if isinstance(control, dict) else None
    plain = isinstance(arguments, dict) and all(
        name in flags and isinstance(value, bool) for name, value in arguments.items()
    )
    if not plain or control.get("attributes"):
        raise wrong("stateful_callbacks.TrainerControl", f"args of {sorted(flags)}", control)
