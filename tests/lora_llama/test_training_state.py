"""Optimizer, schedule and generators: saved and read back, they go on as if nothing had been."""

import os
import random
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import get_cosine_schedule_with_warmup

from lora_llama import state_files
from lora_llama.training_state import (
    load_optimizer,
    load_rng,
    load_scheduler,
    preserved_rng,
    rng_state,
    saved_ranks,
)


def write(directory: Path, name: str, state: Any) -> None:
    directory.mkdir(exist_ok=True)
    for suffix, content in state_files.to_files(state).items():
        (directory / f"{name}{suffix}").write_bytes(content)


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,))]


def step(optimizer: torch.optim.Optimizer, count: int) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index in range(count):
        for weight in weights:
            weight.grad = torch.sin(weight.detach() * (index + 2))
        optimizer.step()


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "AdamW, lr a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), foreach=False),
    "two groups": lambda p: torch.optim.AdamW([{"params": [q], "lr": 0.1 * q.dim()} for q in p]),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_to_the_last_bit(name, tmp_path):
    weights = parameters()
    optimizer = OPTIMIZERS[name](weights)
    step(optimizer, 3)
    write(tmp_path, "optimizer", optimizer.state_dict())
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    step(optimizer, 3)
    other = OPTIMIZERS[name](copies)
    load_optimizer(other, tmp_path)
    step(other, 3)
    for weight, copy in zip(weights, copies, strict=True):
        assert torch.equal(weight, copy)
    # Without its state it is another one.
    anew = parameters()
    fresh = OPTIMIZERS[name](anew)
    step(fresh, 3)
    assert not torch.equal(anew[0], weights[0])


def spoiled(change: str, state: dict[str, Any]) -> Any:
    if change == "no object":
        return [1]
    if change == "fewer parameters":
        state["param_groups"][0]["params"].pop()
    if change == "a moment of another shape":
        state["state"][0]["exp_avg"] = torch.zeros(3, 4)
    if change == "a parameter too many":
        state["state"][2] = state["state"][0]
    if change == "no groups":
        del state["param_groups"]
    if change == "no dict":
        state["state"][0] = 1
    return state


@pytest.mark.parametrize(
    "change",
    ["no object", "fewer parameters", "a moment of another shape", "a parameter too many",
     "no groups", "no dict"],
)  # fmt: skip
def test_a_state_of_another_optimizer_names_its_file(change, tmp_path):
    optimizer = torch.optim.AdamW(parameters())
    step(optimizer, 1)
    write(tmp_path, "optimizer", spoiled(change, optimizer.state_dict()))
    with pytest.raises(ValueError) as caught:
        load_optimizer(torch.optim.AdamW(parameters()), tmp_path)
    assert str(caught.value).startswith(
        f"{tmp_path / 'optimizer.json'}: no state of this optimizer"
    )


def schedule(peak: float) -> tuple[Any, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(parameters(), lr=peak)
    return get_cosine_schedule_with_warmup(optimizer, 3, 20), optimizer


def rates(scheduler: Any, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_a_schedule_goes_on(tmp_path):
    scheduler, optimizer = schedule(0.1)
    expected = rates(scheduler, 5)
    write(tmp_path, "scheduler", scheduler.state_dict())
    write(tmp_path, "optimizer", optimizer.state_dict())
    expected = rates(scheduler, 10)
    scheduler, optimizer = schedule(0.1)
    load_optimizer(optimizer, tmp_path)
    load_scheduler(scheduler, optimizer, tmp_path)
    assert rates(scheduler, 10) == expected


def test_another_learning_rate_counts_where_the_training_goes_on(tmp_path):
    scheduler, optimizer = schedule(0.1)
    rates(scheduler, 5)
    write(tmp_path, "scheduler", scheduler.state_dict())
    write(tmp_path, "optimizer", optimizer.state_dict())
    scheduler, _ = schedule(0.025)
    rates(scheduler, 5)
    expected = rates(scheduler, 10)
    scheduler, optimizer = schedule(0.025)
    load_optimizer(optimizer, tmp_path)
    load_scheduler(scheduler, optimizer, tmp_path)
    assert rates(scheduler, 10) == pytest.approx(expected, rel=1e-12)


def test_a_schedule_that_is_none_names_its_file(tmp_path):
    scheduler, optimizer = schedule(0.1)
    for state in ([1], {"base_lrs": 3}, {}):
        write(tmp_path, "scheduler", state)
        with pytest.raises(ValueError) as caught:
            load_scheduler(scheduler, optimizer, tmp_path)
        assert str(caught.value).startswith(
            f"{tmp_path / 'scheduler.json'}: no state of this sched"
        )


def draw() -> list[Any]:
    """From every generator; the normal ones keep a second number for the next time."""
    return [
        random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()),
        *torch.randn(3).tolist(), *torch.randperm(20).tolist(),
    ]  # fmt: skip


def test_generators_go_on_to_the_last_bit(tmp_path):
    draw()
    losses = {"unlogged_loss": 0.1, "recent_losses": [0.1, 0.2]}
    write(tmp_path, "rng_state_0", rng_state() | losses)
    expected = draw() + draw()
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    loaded = load_rng(tmp_path, rank=0, world_size=1, seed=0, step=0)
    assert loaded == (0.1, [0.1, 0.2])
    assert draw() + draw() == expected


def test_what_is_drawn_meanwhile_is_forgotten():
    with preserved_rng():
        expected = draw()
    with pytest.raises(RuntimeError), preserved_rng():
        draw()
        raise RuntimeError
    assert draw() == expected


@pytest.mark.parametrize("key", ["python", "numpy", "torch", "unlogged_loss", "recent_losses"])
@pytest.mark.parametrize("value", [None, 1, "x", [[]], torch.zeros(3, 3)])
def test_generators_that_are_none_name_their_file(key, value, tmp_path):
    if key == "unlogged_loss" and isinstance(value, int):
        value = "no number"
    state = rng_state() | {"unlogged_loss": 0.0, "recent_losses": []}
    state[key] = value
    if value is None:
        del state[key]
    write(tmp_path, "rng_state_0", state)
    with preserved_rng(), pytest.raises(ValueError) as caught:
        load_rng(tmp_path, rank=0, world_size=1, seed=0, step=0)
    assert str(caught.value).startswith(f"{tmp_path / 'rng_state_0.json'}: no state of random gen")


def test_more_processes_than_before(tmp_path):
    for rank, loss in enumerate((1.0, 3.0)):
        torch.manual_seed(rank)
        losses = {"unlogged_loss": loss, "recent_losses": [loss, 5 * loss]}
        write(tmp_path, f"rng_state_{rank}", rng_state() | losses)
    assert saved_ranks(tmp_path) == [0, 1]

    def load(rank: int, seed: int = 5, step: int = 9) -> list[Any]:
        loaded = load_rng(tmp_path, rank, world_size=4, seed=seed, step=step)
        assert loaded == (2.0, [2.0, 10.0])
        return draw()

    torch.manual_seed(1)
    own = torch.randn(3).tolist()
    assert load(1)[4:7] == own
    drawn = [load(2), load(3), load(2, seed=6), load(2, step=10), load(0), load(1)]
    assert load(2) == drawn[0]
    for index in range(7):
        assert len({row[index] for row in drawn[:4]}) == 4


# Parameters that are sharded over processes.


def sharded_step(rank: int, directory: str, port: int, world_size: int) -> None:
    """Saves AdamW over sharded parameters, and loads it over other shards."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        mesh = init_device_mesh("cpu", (world_size,))
        plain = parameters()
        optimizer = torch.optim.AdamW(plain, lr=0.1)

        def shard(weights: list[Tensor], placements: list[Any]) -> list[nn.Parameter]:
            return [
                nn.Parameter(distribute_tensor(weight.detach(), mesh, [placement]))
                for weight, placement in zip(weights, placements, strict=True)
            ]

        first = shard(plain, [Shard(0), Shard(0)])
        ours = torch.optim.AdamW(first, lr=0.1)
        step(optimizer, 3)
        step(ours, 3)
        files = state_files.to_files(ours.state_dict())
        if rank == 0:
            for suffix, content in files.items():
                (Path(directory) / f"optimizer{suffix}").write_bytes(content)
        dist.barrier()
        second = shard([weight.full_tensor() for weight in first], [Shard(1), Replicate()])
        resumed = torch.optim.AdamW(second, lr=0.1)
        load_optimizer(resumed, Path(directory))
        for weight in second:
            moment = resumed.state[weight]["exp_avg"]
            assert isinstance(moment, DTensor) and moment.placements == weight.placements
            assert not isinstance(resumed.state[weight]["step"], DTensor)
        step(optimizer, 3)
        step(resumed, 3)
        for weight, expected in zip(second, plain, strict=True):
            assert torch.equal(weight.full_tensor(), expected)
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.long
def test_an_optimizer_over_sharded_parameters(tmp_path):
    torch.multiprocessing.spawn(sharded_step, (str(tmp_path), free_port(), 2), nprocs=2)
    state = state_files.read(tmp_path, "optimizer")
    assert [list(state["state"][i]["exp_avg"].shape) for i in (0, 1)] == [[4, 3], [5]]
