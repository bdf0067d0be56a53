"""One run of the suite: its machine, its time, what it has measured, and the files it writes."""

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.cases import emulated_step, memory_case, memory_lengths, op_cases, step_cases
from bench.harness import RecordedClock
from bench.machine import (
    bench_device,
    ceilings,
    describe,
    dtype_of,
    free_bytes,
    native_16bit,
    result_stem,
)
from bench.measure import (
    Measurement,
    measure_op,
    measure_step,
    needed_op_seconds,
    needed_step_seconds,
)
from bench.memory import MEMORY_PEERS, memory_by_length
from bench.models import step_peers
from bench.ops import op_peers
from bench.plots import draw
from bench.shapes import LLAMA_8B, SMOLLM2, OpCase, StepCase
from bench.targets import verdicts

# A CPU run must end within six minutes: what does not fit is left out, and the results say so.
CPU_SECONDS = 330
# Timed seconds of a case. Every case has at least three rounds, however long they take.
OP_SECONDS = {"cpu": 1.0, "cuda": 0.4}
LARGE_OP_SECONDS = {"cpu": 3.0, "cuda": 0.4}
STEP_SECONDS = {"cpu": 45.0, "cuda": 5.0}
BLOCK_SECONDS = {"cpu": 6.0, "cuda": 5.0}
# What the processes of the memory test take together.
MEMORY_SECONDS = 45.0

clock = RecordedClock()


class BenchRun:
    """What a pytest session measures.

    Attributes:
        dtype: the working dtype: bfloat16 where the hardware multiplies it, else float32.
        emulated: bfloat16 where it is emulated, for the small model's step alone; else None.
    """

    def __init__(self, sizes: str) -> None:
        start = time.perf_counter()
        self.sizes = sizes
        self.device = bench_device()
        self.rates = ceilings(self.device, [dtype_of("float32"), dtype_of("bfloat16")])
        self.deadline = start + CPU_SECONDS if self.device.type == "cpu" else math.inf
        native = self.device.type == "cuda" or native_16bit(self.rates)
        self.dtype = "bfloat16" if native else "float32"
        self.emulated = None if native else "bfloat16"
        free = free_bytes(self.device)
        self.op_cases = op_cases(self.device, free, self.dtype, sizes)
        self.step_cases = step_cases(self.device, free, self.dtype, sizes)
        self.emulated_cases = [emulated_step(self.emulated, sizes)] if self.emulated else []
        self.results: dict[str, Any] = {
            "machine": describe(self.device),
            "ceilings": self.rates,
            "cases": [],
            "memory": [],
            "not_measured": [],
        }
        self._measured: dict[str, Measurement | Exception] = {}

    def op_parameters(self) -> list[tuple[OpCase, str]]:
        return [(c, peer) for c in self.op_cases for peer in op_peers(c, self.device)]

    def step_parameters(self, emulated: bool) -> list[tuple[StepCase, str]]:
        cases = self.emulated_cases if emulated else self.step_cases
        return [(c, peer) for c in cases for peer in step_peers(c, self.device)]

    def measure_op(self, case: OpCase) -> Measurement:
        large = case.shape is LLAMA_8B
        seconds = self._scaled((LARGE_OP_SECONDS if large else OP_SECONDS)[self.device.type])
        peers = len(op_peers(case, self.device))
        common = (self.device, self.rates, seconds, self.deadline)
        self.require_time_for(case.id, needed_op_seconds(case, self.rates, peers, seconds))
        return self._once(case.id, partial(measure_op, case, *common))

    def measure_step(self, case: StepCase) -> Measurement:
        small = case.shape is SMOLLM2
        seconds = self._scaled((STEP_SECONDS if small else BLOCK_SECONDS)[self.device.type])
        peers = len(step_peers(case, self.device))
        common = (self.device, self.rates, seconds, self.deadline)
        self.require_time_for(case.id, needed_step_seconds(case, self.rates, peers, seconds))
        return self._once(case.id, partial(measure_step, case, *common))

    def measure_memory(self) -> list[dict[str, Any]]:
        if not self.results["memory"]:
            self.require_time_for("memory by length", self._scaled(MEMORY_SECONDS))
            case = memory_case(self.device, self.dtype, self.sizes)
            lengths = memory_lengths(self.device, self.sizes)
            self.results["memory"] = memory_by_length(case, lengths, self.device, MEMORY_PEERS)
        return self.results["memory"]

    def require_time_for(self, name: str, needed: float) -> None:
        """Skips a test, with a line in the results, where it does not fit a CPU run's time.

        Args:
            name: of what the test measures; what is measured already needs no more time.
            needed: seconds.
        """
        if name in self._measured:
            return
        left = self.deadline - time.perf_counter()
        if needed > left:
            line = f"{name}: would take about {needed:.0f} s, {max(left, 0):.0f} s are left"
            if not any(known.startswith(f"{name}: ") for known in self.results["not_measured"]):
                self.results["not_measured"].append(line)
            pytest.skip(line)

    def replay(self, measurement: Measurement, peer: str, request: pytest.FixtureRequest) -> None:
        """Hands one peer's samples to pytest-benchmark; fails where the peer has a fault."""
        if peer in measurement.faults:
            pytest.fail(f"{measurement.record['id']}: {peer}: {measurement.faults[peer]}")
        if peer in measurement.refused:
            line = f"{measurement.record['id']}: {peer}: {measurement.refused[peer]}"
            self.results["not_measured"].append(line)
            pytest.skip(line)
        benchmark = request.getfixturevalue("benchmark")
        samples = measurement.samples[peer]
        benchmark.group = measurement.record["id"]
        benchmark.extra_info.update(measurement.record["peers"][peer])
        benchmark.pedantic(clock.advance(samples), rounds=len(samples))

    def finish(self, directory: Path) -> list[Path]:
        """Writes the JSON and the plots; their paths."""
        self.results["targets"] = [vars(verdict) for verdict in verdicts(self.results)]
        directory.mkdir(parents=True, exist_ok=True)
        stem = result_stem(self.results["machine"])
        path = directory / f"{stem}.json"
        path.write_text(json.dumps(self.results, indent=1) + "\n")
        return [path, *draw(self.results, directory, stem)]

    def _scaled(self, seconds: float) -> float:
        return 0.05 if self.sizes == "tiny" else seconds

    def _once(self, name: str, measure: Callable[[], Measurement]) -> Measurement:
        """Measures a case once for all its peers' tests; an error is every one's."""
        if name not in self._measured:
            try:
                measurement = measure()
            except Exception as error:
                self._measured[name] = error
                raise
            self._measured[name] = measurement
            self.results["cases"].append(measurement.record)
        measured = self._measured[name]
        if isinstance(measured, Exception):
            raise measured
        return measured
