"""The statistics of interleaved timing, on timers that lie in known ways."""

import gc

import pytest
import torch

from bench import harness
from bench.harness import (
    RecordedClock,
    Spread,
    cuda_calls,
    cuda_seconds,
    interleave,
    paired_ratio,
    timed_variants,
)


class Machine:
    """A clock and variants whose seconds are given by the number of calls made so far."""

    def __init__(self, slowness=lambda call: 1.0):
        self.now = 0.0
        self.calls = []
        self.slowness = slowness

    def variant(self, name, seconds):
        def timed(turn):
            took = seconds * self.slowness(len(self.calls))
            self.calls.append((turn, name))
            self.now += took
            return took

        return timed

    def clock(self):
        return self.now


def test_every_round_times_every_variant_once_and_starts_with_another():
    machine = Machine()
    variants = {name: machine.variant(name, 1.0) for name in "abc"}
    samples = interleave(variants, seconds=0, min_rounds=4, clock=machine.clock)
    order = ["".join(name for turn, name in machine.calls if turn == t) for t in range(4)]
    assert order == ["abc", "bca", "cab", "abc"]
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 4, "c": 4}


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(0.0, 3), (7.9, 4), (8.0, 4), (8.1, 5), (1000.0, 6)]
)
def test_rounds_stop_with_the_time_within_their_bounds(seconds, rounds):
    machine = Machine()
    variants = {name: machine.variant(name, 1.0) for name in "ab"}
    samples = interleave(variants, seconds, min_rounds=3, max_rounds=6, clock=machine.clock)
    assert len(samples["a"]) == len(samples["b"]) == rounds


@pytest.mark.parametrize(("deadline", "rounds"), [(-1.0, 1), (3.0, 2), (4.1, 3), (100.0, 5)])
def test_after_the_deadline_no_round_but_the_first_starts(deadline, rounds):
    machine = Machine()
    variants = {name: machine.variant(name, 1.0) for name in "ab"}
    limits = {"min_rounds": 5, "deadline": deadline, "clock": machine.clock}
    assert len(interleave(variants, 0.0, **limits)["a"]) == rounds


def test_a_machine_that_slows_down_does_not_change_the_paired_ratio():
    """It slows from round to round; the ratio of separately taken medians would be far off."""
    machine = Machine(slowness=lambda call: 2.0 ** (call // 2))
    variants = {"slow": machine.variant("slow", 3.0), "fast": machine.variant("fast", 2.0)}
    samples = interleave(variants, seconds=0, min_rounds=9, clock=machine.clock)
    ratio = paired_ratio(samples["slow"], samples["fast"])
    assert (ratio.median, ratio.q1, ratio.q3, ratio.count) == (1.5, 1.5, 1.5, 9)
    early, late = samples["slow"][:4], samples["fast"][4:]
    assert Spread.of(early).median / Spread.of(late).median < 0.2


def test_spread_is_the_median_and_the_quartiles():
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="samples: expected at least one"):
        Spread.of([])


def test_ratios_of_different_numbers_of_rounds_are_refused():
    with pytest.raises(ValueError):
        paired_ratio([1.0, 2.0], [1.0])


def test_garbage_collection_is_off_while_timing_and_on_again_after_an_error():
    seen = []

    def fails(turn):
        seen.append(gc.isenabled())
        raise RuntimeError("peer")

    with pytest.raises(RuntimeError, match="peer"):
        interleave({"a": fails}, seconds=0)
    assert seen == [False]
    assert gc.isenabled()


def test_a_call_is_timed_by_the_host_and_warmed_up_over_all_sets_of_inputs():
    indices = []
    variants = timed_variants({"a": indices.append}, torch.device("cpu"), inputs=3, warmup=3)
    assert indices == [0, 1, 2]
    assert 0 <= variants["a"](7) < 1
    assert indices == [0, 1, 2, 7]


class Gpu:
    """A GPU that finishes what is queued in order, each call after `seconds` of it."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.indices = 0.0, seconds, []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(self, index):
        self.indices.append(index)
        self.now += self.seconds


def test_a_cuda_sample_is_the_mean_of_calls_that_rotate_through_the_inputs(monkeypatch):
    gpu = Gpu(monkeypatch, seconds=1e-3)
    timed = cuda_seconds(gpu.call, calls=4)
    assert timed(3) == pytest.approx(1e-3)
    assert gpu.indices == [12, 13, 14, 15]


@pytest.mark.parametrize(
    ("seconds", "inputs", "calls"), [(1e-3, 1, 5), (1e-3, 4, 8), (1.0, 1, 1), (1.0, 3, 3)]
)
def test_a_cuda_sample_is_long_enough_and_covers_all_inputs(monkeypatch, seconds, inputs, calls):
    gpu = Gpu(monkeypatch, seconds)
    assert cuda_calls(gpu.call, inputs) == calls


def test_a_peer_that_no_graph_takes_is_refused_and_the_others_are_timed(monkeypatch):
    gpu = Gpu(monkeypatch, seconds=1e-3)

    def capture(call, calls):
        if call is refused:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return lambda index: [call(i) for i in range(calls)]

    def refused(index):
        gpu.call(index)

    monkeypatch.setattr(harness, "graphed", capture)
    variants, reasons = harness.graphed_variants({"good": gpu.call, "bad": refused}, inputs=2)
    assert reasons == {"bad": "operation not permitted"}
    assert list(variants) == ["good"]
    # Six calls of a replay last 6 ms; one of them is what is reported.
    assert variants["good"](0) == pytest.approx(1e-3)


def test_the_recorded_clock_gives_back_the_samples():
    clock = RecordedClock()
    samples = [0.25, 2.0, 0.5]
    advance = clock.advance(samples)
    read = []
    for _ in samples:
        before = clock()
        advance()
        read.append(clock() - before)
    assert read == samples
    with pytest.raises(StopIteration):
        advance()
