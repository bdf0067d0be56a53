"""Runs tests on copies of the package, each in a process of its own, with a fault or without.

A process imports `lora_kernels` from a temporary copy that comes first on its path, runs the chosen
tests through pytest until one fails, and sends back what it saw. The processes are forked from one
that has imported torch, Triton and pytest already.
"""

import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from bench.mutants_source import PACKAGE, Mutant, mutated_source

ROOT = Path(__file__).resolve().parents[1]

# What every test process needs, imported once and shared by forking.
PRELOADED = [
    "torch", "torch.testing", "triton", "triton.language", "triton.runtime.interpreter", "numpy",
    "pytest", "hypothesis", "torch.autograd.gradcheck", "torch.utils.checkpoint",
    "transformers.models.llama.modeling_llama", "transformers.loss.loss_utils",
]  # fmt: skip
# A failure with one of these says that the mutant is no working program, not that it is wrong.
NO_VERDICT = ("NameError", "UnboundLocalError", "ImportError", "SyntaxError", "Timeout")
# A test, and a process with all of its tests, may take so long.
TEST_SECONDS, PROCESS_SECONDS = 120, 600
COMPILED = shutil.ignore_patterns("__pycache__", "*.pyc")

Verdict = Literal["killed", "survived", "broken"]


@dataclass(frozen=True)
class Outcome:
    """A verdict, and why: the test that failed and its error, or what is broken.

    Attributes:
        seconds: wall time of the process, with its start.
        cpu_seconds: what it took of a core, without its start.
    """

    verdict: Verdict
    reason: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class ChosenTests:
    """A pytest plugin: keeps the chosen tests, and records what passed and the first failure."""

    def __init__(self, tests: Sequence[str]) -> None:
        # Without its parameters a name stands for all of them.
        self.patterns = {
            test: re.compile(".*".join(map(re.escape, f"tests/{test}".split("*"))) + r"(\[.*)?")
            for test in tests
        }
        self.passed: list[str] = []
        self.failure: tuple[str, str] | None = None
        self.not_collected: str | None = None

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        patterns = self.patterns.values()
        items[:] = [i for i in items if any(p.fullmatch(i.nodeid) for p in patterns)]

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        if report.when == "collect":
            self.not_collected = f"{report.nodeid}: {call.excinfo.exconly()}"
        elif self.failure is None:
            error = call.excinfo.value
            # The interpreter and hypothesis wrap what went wrong.
            while error.__cause__ is not None:
                error = error.__cause__
            late = str(error).startswith("Timeout")
            self.failure = (report.nodeid, "Timeout" if late else type(error).__name__)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def idle(self) -> list[str]:
        """The tests of which nothing has passed."""
        return [
            test
            for test, pattern in self.patterns.items()
            if not any(pattern.fullmatch(name) for name in self.passed)
        ]


def _run_tests(folder: str, tests: Sequence[str], until_failure: bool, result: Connection) -> None:
    """In a process of its own: runs the tests on the package in `folder`; sends an `Outcome`."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"
    os.chdir(ROOT)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.path.insert(0, folder)
    package = importlib.import_module(PACKAGE)
    assert package.__file__ is not None and package.__file__.startswith(folder), package.__file__

    import hypothesis
    import pytest

    # A falsifying example is enough; shrinking it takes time.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutants", phases=phases, database=None)
    hypothesis.settings.load_profile("mutants")
    chosen = ChosenTests(tests)
    code = pytest.main(
        [
            *(["-x"] if until_failure else []),
            *("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"),
            *("-W", "ignore", f"--rootdir={ROOT}", f"--timeout={TEST_SECONDS}"),
            *dict.fromkeys(f"tests/{test.partition('[')[0]}" for test in tests),
        ],
        plugins=[chosen],
    )
    outcome = _outcome(int(code), chosen)
    result.send(replace(outcome, cpu_seconds=time.process_time()))


def _outcome(code: int, chosen: ChosenTests) -> Outcome:
    if chosen.not_collected:
        return Outcome("broken", chosen.not_collected)
    if chosen.failure:
        test, error = chosen.failure
        verdict: Verdict = "broken" if error in NO_VERDICT else "killed"
        return Outcome(verdict, f"{test.removeprefix('tests/')}: {error}")
    if idle := chosen.idle():
        return Outcome("broken", f"{idle[0]}: no such test, or none of it ran")
    if code != 0:
        return Outcome("broken", f"pytest's exit code {code}")
    return Outcome("survived", f"{len(chosen.passed)} tests passed")


@dataclass(frozen=True)
class Job:
    """The tests of one mutant, or of a copy without a fault."""

    name: str
    tests: tuple[str, ...]
    mutant: Mutant | None = None


class _Running:
    """A job in its process, on its copy of the package."""

    def __init__(self, job: Job, folder: str, context: Any) -> None:
        self.job, self.begin = job, time.monotonic()
        self.copy = tempfile.mkdtemp(dir=folder)
        shutil.copytree(ROOT / PACKAGE, Path(self.copy, PACKAGE), ignore=COMPILED)
        if job.mutant is not None:
            path = Path(self.copy, PACKAGE, job.mutant.file)
            path.write_text(mutated_source(job.mutant, path.read_text()))
        self.receiver, sender = context.Pipe(duplex=False)
        arguments = (self.copy, job.tests, job.mutant is not None, sender)
        self.process = context.Process(target=_run_tests, args=arguments)
        self.process.start()
        sender.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def finish(self) -> Outcome:
        """Waits for the end of the process."""
        self.process.join()
        shutil.rmtree(self.copy)
        try:
            return replace(self.receiver.recv(), seconds=self.seconds)
        except EOFError:
            reason = f"its process ended with exit code {self.process.exitcode}"
            return Outcome("broken", reason, self.seconds)
        finally:
            self.receiver.close()


def run_jobs(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Outcome]]:
    """Runs each job in a fresh process, `processes` at a time; yields them as they finish."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting = list(jobs)
    running: dict[int, _Running] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        while waiting or running:
            while waiting and len(running) < processes:
                one = _Running(waiting.pop(0), folder, context)
                running[one.process.sentinel] = one
            for sentinel in wait(list(running), timeout=1.0):
                one = running.pop(sentinel)  # type: ignore[arg-type]
                yield one.job, one.finish()
            for one in running.values():
                if one.seconds > PROCESS_SECONDS:
                    one.process.kill()
