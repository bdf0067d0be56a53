"""Breaks the code on purpose, one fault at a time, and counts the faults that the tests notice.

    python -m bench.mutants [--jobs N] [--filter TEXT] [--sample N]

A mutant replaces one piece of text in one function of one source file. It is applied to a copy of
`lora_kernels` that comes first on the path of a process of its own, where the tests chosen for it
run until one fails. Before that the same tests must all pass on a copy without a fault, else they
would prove nothing.

    killed     a chosen test failed: the fault was noticed
    survived   all of them passed: a test is missing
    broken     neither says anything: the mutant or a test does not load, or a test ran too long

Prints one line a mutant and, last, killed/total. The exit code is 0 if all were killed, else 1.
Everything runs on the CPU, the kernels through Triton's interpreter.
"""

import argparse
import ast
import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lora_kernels"

# What every test process needs, imported once and shared by forking.
PRELOADED = [
    "torch", "torch.testing", "triton", "triton.language", "triton.runtime.interpreter", "numpy",
    "pytest", "hypothesis", "torch.autograd.gradcheck", "torch.utils.checkpoint",
    "transformers.models.llama.modeling_llama", "transformers.loss.loss_utils",
]  # fmt: skip
# A failure with one of these says that the mutant is no working program, not that it is wrong.
NO_VERDICT = ("NameError", "UnboundLocalError", "ImportError", "SyntaxError", "Timeout")
TIMEOUT_SECONDS = 120
COMPILED = shutil.ignore_patterns("__pycache__", "*.pyc")

Verdict = Literal["killed", "survived", "broken"]


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: what is wrong, unique.
        file: a source file, relative to the package.
        function: the function (or class) that holds `old`, by name.
        old: text that occurs exactly once in that function.
        new: what replaces it.
        tests: pytest's names of them, relative to `tests/`, where a * stands for any text; the
            sharpest and fastest first.
    """

    name: str
    file: str
    function: str
    old: str
    new: str
    tests: tuple[str, ...]


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


def mutated_source(mutant: Mutant, source: str) -> str:
    """The source with the fault.

    Raises:
        ValueError: `function` or `old` is not there exactly once, or the result is no Python: the
            sources have changed and the mutant must follow.
    """
    place = f"mutant {mutant.name!r}: {mutant.file}"
    spans = _functions(source).get(mutant.function, [])
    if len(spans) != 1:
        raise ValueError(f"{place}: expected one {mutant.function!r}, found {len(spans)}")
    begin, end = spans[0]
    lines = source.splitlines(keepends=True)
    body = "".join(lines[begin:end])
    if (found := body.count(mutant.old)) != 1:
        raise ValueError(
            f"{place}: {mutant.function}: expected {mutant.old!r} exactly once, found {found}"
        )
    if mutant.old == mutant.new:
        raise ValueError(f"{place}: the replacement is the text itself")
    changed = body.replace(mutant.old, mutant.new)
    try:
        ast.parse(textwrap.dedent(changed))
    except SyntaxError as error:
        raise ValueError(f"{place}: with {mutant.new!r} this is no Python: {error}") from error
    return "".join([*lines[:begin], changed, *lines[end:]])


@lru_cache
def _functions(source: str) -> dict[str, list[tuple[int, int]]]:
    """The first and the last line of every function and class, by name."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.end_lineno is not None
            spans.setdefault(node.name, []).append((node.lineno - 1, node.end_lineno))
    return spans


def all_mutants() -> list[Mutant]:
    """Every mutant. ValueError: two have one name."""
    mutants = [
        mutant
        for module in ("bench.mutants_lora_linear", "bench.mutants_ops")
        for mutant in importlib.import_module(module).MUTANTS
    ]
    names = [mutant.name for mutant in mutants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"mutants: expected different names, got {twice[0]!r} twice")
    return mutants


def check_matches(mutants: Sequence[Mutant]) -> None:
    """ValueError: one of the mutants does not match the sources, or a test of it is not there."""
    for mutant in mutants:
        mutated_source(mutant, (ROOT / PACKAGE / mutant.file).read_text())
    for test in {test for mutant in mutants for test in mutant.tests}:
        file, _, name = test.partition("::")
        path = ROOT / "tests" / file
        if not path.is_file() or f"def {name.partition('[')[0]}(" not in path.read_text():
            users = [mutant.name for mutant in mutants if test in mutant.tests]
            raise ValueError(f"mutant {users[0]!r}: no test {test}")


def sample(mutants: Sequence[Mutant], count: int) -> list[Mutant]:
    """`count` mutants, evenly spread over the list."""
    count = min(count, len(mutants))
    return [mutants[index * len(mutants) // count] for index in range(count)]


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
            *("-W", "ignore", f"--rootdir={ROOT}", f"--timeout={TIMEOUT_SECONDS}"),
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


def run_jobs(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Outcome]]:
    """Runs each job in a fresh process, `processes` at a time; yields them as they finish."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting = list(jobs)
    running: dict[Any, tuple[Any, Connection, Job, float, str]] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                copy = tempfile.mkdtemp(dir=folder)
                shutil.copytree(ROOT / PACKAGE, Path(copy, PACKAGE), ignore=COMPILED)
                if job.mutant is not None:
                    path = Path(copy, PACKAGE, job.mutant.file)
                    path.write_text(mutated_source(job.mutant, path.read_text()))
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run_tests, args=(copy, job.tests, job.mutant is not None, sender)
                )
                process.start()
                sender.close()
                running[process.sentinel] = (process, receiver, job, time.monotonic(), copy)
            for sentinel in wait(list(running)):
                process, receiver, job, begin, copy = running.pop(sentinel)
                process.join()
                shutil.rmtree(copy)
                yield job, _received(process, receiver, time.monotonic() - begin)


def _received(process: Any, receiver: Connection, seconds: float) -> Outcome:
    try:
        outcome = receiver.recv()
    except EOFError:
        return Outcome("broken", f"its process ended with exit code {process.exitcode}", seconds)
    finally:
        receiver.close()
    return replace(outcome, seconds=seconds)


def sound_tests(mutants: Sequence[Mutant], processes: int) -> dict[str, Outcome]:
    """What is wrong with the tests themselves: those that do not pass without a fault, by name."""
    by_file: dict[str, list[str]] = {}
    for test in dict.fromkeys(test for mutant in mutants for test in mutant.tests):
        by_file.setdefault(test.partition("::")[0], []).append(test)
    jobs = [Job(f"without a fault: {file}", tuple(tests)) for file, tests in by_file.items()]
    outcomes = {job.name: outcome for job, outcome in run_jobs(jobs, processes)}
    return {name: outcome for name, outcome in outcomes.items() if outcome.verdict != "survived"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--filter", default="", help="only mutants whose name contains this")
    parser.add_argument("--sample", type=int, help="only so many, spread over the list")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    # One thread each: the tests are small, and there is a process for each core.
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        mutants = all_mutants()
        check_matches(mutants)
    except ValueError as error:
        print(f"bench.mutants: error: {error}", file=sys.stderr)
        return 1
    mutants = [mutant for mutant in mutants if options.filter in mutant.name]
    if options.sample is not None:
        mutants = sample(mutants, options.sample)
    if not mutants:
        print(f"bench.mutants: error: no mutant's name contains {options.filter!r}")
        return 1
    for name, outcome in (unsound := sound_tests(mutants, options.jobs)).items():
        print(f"{name}: {outcome.reason}")
    if unsound:
        print("the tests do not pass without a fault: nothing is proved")
        return 1
    print(f"without a fault all chosen tests pass ({time.monotonic() - begin:.0f} s)", flush=True)

    killed, cpu = 0, 0.0
    jobs = [Job(mutant.name, mutant.tests, mutant) for mutant in mutants]
    for job, outcome in run_jobs(jobs, options.jobs):
        killed += outcome.verdict == "killed"
        cpu += outcome.cpu_seconds
        print(
            f"{outcome.verdict:8}  {job.name:58}  {outcome.seconds:5.1f} s  {outcome.reason}",
            flush=True,
        )
    seconds = time.monotonic() - begin
    print(f"{seconds:.0f} s on {options.jobs} processes, {cpu:.0f} s of the cores for the mutants")
    print(f"{killed}/{len(mutants)} mutants killed")
    return 0 if killed == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
