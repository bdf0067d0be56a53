"""Interleaved timing: every round times every variant once, and ratios are taken round by round.

    round 0: A B C    round 1: B C A    round 2: C A B    ...    ratio_i = time_A,i / time_C,i

A machine that slows down slows all variants of a round, so the median of the paired ratios is far
steadier than the ratio of two medians that were taken one after the other. A variant is a
function of a call's index, by which it picks one of several sets of inputs: together they exceed
the cache, so no call finds its inputs there.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

Call = Callable[[int], Any]

# Time between two CUDA events around several calls; below this the events' own resolution shows.
CUDA_SAMPLE_SECONDS = 5e-3


@dataclass(frozen=True)
class Spread:
    """The median of some samples, their quartiles and their number."""

    median: float
    q1: float
    q3: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """ValueError: there is no sample."""
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        q1, _, q3 = quantiles(samples, n=4, method="inclusive")
        return cls(median(samples), q1, q3, len(samples))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of numerator_i / denominator_i, both measured in round i."""
    return Spread.of([n / d for n, d in zip(numerator, denominator, strict=True)])


def interleave(
    variants: Mapping[str, Callable[[int], float]],
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 50,
    deadline: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Rounds of all variants until `seconds` have passed.

    Args:
        variants: by name, a function of the round's number that returns the seconds it measured.
        seconds: no round starts later than this, once `min_rounds` are done.
        deadline: no round starts later than this time of the clock, once one is done.

    Returns:
        By name, one sample per round.
    """
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for turn in range(max_rounds):
            if turn >= min_rounds and clock() - start >= seconds:
                break
            if turn and clock() >= deadline:
                break
            # Each round starts with another variant, so that none always follows the same one.
            for offset in range(len(names)):
                name = names[(turn + offset) % len(names)]
                samples[name].append(variants[name](turn))
    finally:
        if collecting:
            gc.enable()
    return samples


def host_seconds(call: Call) -> Callable[[int], float]:
    """Times one call by the host's clock: for work that is done when the call returns."""

    def timed(turn: int) -> float:
        start = time.perf_counter()
        call(turn)
        return time.perf_counter() - start

    return timed


def cuda_seconds(call: Call, calls: int) -> Callable[[int], float]:
    """Times `calls` calls between two CUDA events; the seconds of one.

    The GPU waits where the host launches too slowly, so launch-bound work shows as such.
    """

    def timed(turn: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for index in range(calls):
            call(turn * calls + index)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return timed


def cuda_calls(call: Call, inputs: int) -> int:
    """How many calls a CUDA sample takes: long enough, and over all sets of inputs."""
    call(0)
    needed = max(1, round(CUDA_SAMPLE_SECONDS / max(cuda_seconds(call, 1)(0), 1e-6)))
    return -(-needed // inputs) * inputs


def graphed(call: Call, calls: int) -> Call:
    """`calls` calls as one CUDA graph, replayed by one call. RuntimeError: it cannot be captured.

    The warm-up on a side stream is what torch.cuda.graphs asks for before a capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for index in range(max(3, calls)):
            call(index)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index)
    return lambda _: graph.replay()


def timed_variants(
    calls: Mapping[str, Call], device: torch.device, inputs: int = 1, warmup: int = 1
) -> dict[str, Callable[[int], float]]:
    """The variants of `interleave` for calls on a device, each warmed up by `warmup` calls.

    Args:
        inputs: the number of sets of inputs that the calls walk through.
    """
    for call in calls.values():
        for index in range(warmup):
            call(index)
    if device.type != "cuda":
        return {name: host_seconds(call) for name, call in calls.items()}
    return {name: cuda_seconds(call, cuda_calls(call, inputs)) for name, call in calls.items()}


def graphed_variants(
    calls: Mapping[str, Call], inputs: int = 1
) -> tuple[dict[str, Callable[[int], float]], dict[str, str]]:
    """As `timed_variants`, each as a CUDA graph; and by name, why some cannot be captured."""
    variants: dict[str, Callable[[int], float]] = {}
    refused: dict[str, str] = {}
    for name, call in calls.items():
        count = cuda_calls(call, inputs)
        try:
            replay = graphed(call, count)
        except RuntimeError as error:
            torch.cuda.synchronize()
            refused[name] = str(error).splitlines()[0]
            continue
        variants[name] = _shared_among(count, cuda_seconds(replay, 1))
    return variants, refused


def _shared_among(calls: int, timed: Callable[[int], float]) -> Callable[[int], float]:
    return lambda turn: timed(turn) / calls


class RecordedClock:
    """A clock that moves by recorded samples: how interleaved samples reach pytest-benchmark.

    pytest-benchmark times one function after another and cannot interleave several. So the samples
    are taken first, by `interleave`, and pytest-benchmark then reads them off this clock.
    """

    __name__ = "recorded"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, samples: Sequence[float]) -> Callable[[], None]:
        """A function that moves the clock by the next sample each time it is called."""
        remaining = iter(samples)

        def step() -> None:
            self._now += next(remaining)

        return step
