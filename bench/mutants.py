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
import importlib
import os
import sys
import time
from collections.abc import Sequence

from bench.mutants_run import ROOT, Job, Outcome, run_jobs
from bench.mutants_source import PACKAGE, Mutant, mutated_source


def all_mutants() -> list[Mutant]:
    """Every mutant. ValueError: two have one name."""
    mutants = [
        mutant
        for module in ("bench.mutants_lora_linear", "bench.mutants_mixed", "bench.mutants_ops")
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
