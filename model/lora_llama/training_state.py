"""What a training consists of besides its weights: optimizer, schedule, random generators.

    optimizer.json/.safetensors         torch's state_dict of the optimizer, sharded tensors whole
    scheduler.json                      of the learning rate's schedule
    scaler.json                         of the gradient scaler, if there is one
    rng_state_RANK.json/.safetensors    of each process: its generators, its share of the loss since
                                        the last line of the log, and the losses of the last steps
    training.json                       which training it is of (`resuming.training_record`), and
                                        the save's place in the order of saving

All are read and written by `state_files.py`; transformers' own files for them are pickles.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed

from lora_kernels.sharding import sharded_like
from lora_llama import state_files
from lora_llama.state_checks import check_alike, check_optimizer, check_rng, is_number

OPTIMIZER = "optimizer"
SCHEDULER = "scheduler"
SCALER = "scaler"
TRAINING = "training"
# What older versions, and transformers itself, write in their place.
PICKLES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")
# What restoring a state raises that is none.
_NO_STATE = (LookupError, AttributeError, TypeError, ValueError, RuntimeError, OverflowError)


def rng_name(rank: int) -> str:
    """The name of a process's file."""
    return f"rng_state_{rank}"


def load_optimizer(optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Reads an optimizer's state; a sharded parameter's moments are sharded as it is.

    Raises:
        OSError, ValueError: a file is missing or faulty, or it is another optimizer's or another
            model's; the message names the file.
    """
    file = directory / f"{OPTIMIZER}.json"
    state = state_files.read(directory, OPTIMIZER)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        check_optimizer(state, optimizer)
        for index, entries in state["state"].items():
            for name, value in entries.items():
                parameter = parameters[index]
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    entries[name] = sharded_like(value, parameter)
        optimizer.load_state_dict(state)
    except _NO_STATE as error:
        raise ValueError(f"{file}: no state of this optimizer: {error}") from error


def load_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Reads a schedule's state; where the peak learning rate is another one now, this one counts.

    Raises:
        OSError, ValueError: the file is missing or faulty; the message names it.
    """
    file = directory / f"{SCHEDULER}.json"
    state = state_files.read(directory, SCHEDULER)
    wanted = list(getattr(scheduler, "base_lrs", []))
    try:
        check_alike(state, scheduler.state_dict(), "state")
        scheduler.load_state_dict(state)
        saved = list(getattr(scheduler, "base_lrs", []))
        if saved != wanted and len(saved) == len(wanted):
            scheduler.base_lrs = wanted
            for group, old, new in zip(optimizer.param_groups, saved, wanted, strict=True):
                group["initial_lr"] = new
                group["lr"] = group["lr"] * (new / old) if old else new
            scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    except _NO_STATE as error:
        raise ValueError(f"{file}: no state of this schedule: {error}") from error


def rng_state() -> dict[str, Any]:
    """The state of every generator that a training may draw from."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = list(torch.cuda.get_rng_state_all())
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Sets the generators to what `rng_state` returned; a GPU that it does not know keeps its own.

    Raises:
        ValueError: it is no such state; no generator has changed.
    """
    check_rng(state, rng_state())
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, generator in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(generator, device)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn inside, the generators go on afterwards as if it had not been."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def load_rng(
    directory: Path, rank: int, world_size: int, seed: int, step: int
) -> tuple[float, list[float]]:
    """Sets this process's generators.

    A process that had no part in the saved training is seeded from the seed, its rank and the step.
    If there were more or fewer processes, each has the means of their losses, as the log has.

    Returns:
        Its share of the loss since the log's last line, and its losses of the last steps.

    Raises:
        OSError, ValueError: a file is missing or faulty; the message names it.
    """
    ranks = saved_ranks(directory)
    shares: dict[int, float] = {}
    recent: list[list[float]] = []
    for saved in ranks if len(ranks) != world_size else [rank]:
        name = rng_name(saved)
        state = state_files.read(directory, name)
        try:
            if not isinstance(state, dict) or not is_number(state.get("unlogged_loss")):
                raise ValueError("unlogged_loss: expected a finite number")
            shares[saved] = float(state["unlogged_loss"])
            losses = state.get("recent_losses")
            if not isinstance(losses, list) or not all(map(is_number, losses)):
                raise ValueError("recent_losses: expected a list of finite numbers")
            recent.append([float(loss) for loss in losses])
            if saved == rank:
                set_rng_state(state)
        except _NO_STATE as error:
            file = directory / f"{name}.json"
            raise ValueError(f"{file}: no state of random generators: {error}") from error
    if rank not in shares:
        # A hash, so that no other rank, seed or step has the same numbers.
        digest = hashlib.sha256(f"{seed} {rank} {step}".encode()).digest()
        set_seed(int.from_bytes(digest[:4], "big"))
    count = max(len(shares), 1)
    means = [sum(losses) / count for losses in zip(*recent, strict=False)]
    return sum(shares.values()) / count, means


def saved_ranks(directory: Path) -> list[int]:
    """The ranks of the processes whose generators a checkpoint has."""
    prefix = rng_name(0).removesuffix("0")
    ranks = (path.stem.removeprefix(prefix) for path in directory.glob(f"{prefix}*.json"))
    return sorted(int(rank) for rank in ranks if rank.isdecimal())


def gather_files(files: dict[str, bytes], accelerator: Any) -> dict[str, bytes]:
    """Every process's files of generators, by name, in each process.

    Bytes travel as tensors: objects would be pickled.

    Args:
        files: this process's, by suffix; all processes have the same suffixes.
    """
    if accelerator.num_processes == 1:
        return {f"{rng_name(0)}{suffix}": content for suffix, content in files.items()}
    gathered = {}
    for suffix, content in files.items():
        sizes = accelerator.gather(torch.tensor([len(content)], device=accelerator.device))
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        rows = accelerator.gather(padded[None].to(accelerator.device)).cpu()
        for rank, (row, size) in enumerate(zip(rows, sizes.tolist(), strict=True)):
            gathered[f"{rng_name(rank)}{suffix}"] = row[:size].numpy().tobytes()
    return gathered
