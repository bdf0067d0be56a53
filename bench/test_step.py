"""Whole training steps by every peer, and their memory. The dtype that is emulated comes last."""

import pytest

from bench.run import BenchRun, clock
from bench.shapes import StepCase


@pytest.mark.benchmark(timer=clock)
def test_step(
    step_and_peer: tuple[StepCase, str], run: BenchRun, request: pytest.FixtureRequest
) -> None:
    case, peer = step_and_peer
    run.replay(run.measure_step(case), peer, request)


def test_memory(run: BenchRun) -> None:
    faults = [f"{e['peer']}: {e['fault']}" for e in run.measure_memory() if "fault" in e]
    assert not faults, "; ".join(faults)


@pytest.mark.benchmark(timer=clock)
def test_step_in_an_emulated_dtype(
    emulated_step_and_peer: tuple[StepCase, str], run: BenchRun, request: pytest.FixtureRequest
) -> None:
    case, peer = emulated_step_and_peer
    run.replay(run.measure_step(case), peer, request)
