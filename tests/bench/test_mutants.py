"""The mutation run: its mutants fit the sources, and it tells killed, survived and broken apart."""

import os
import subprocess
import sys

import pytest

from bench import mutants_run
from bench.mutants import all_mutants, check_matches, sample
from bench.mutants_run import ROOT, Job, run_jobs
from bench.mutants_source import Mutant, mutated_source

SOURCE = """
def double(x):
    y = x + x
    return y


def triple(x):
    y = x + x
    return y + x
"""


def mutant(function="double", old="x + x", new="x", tests=()):
    return Mutant("a name", "a file", function, old, new, tests)


def test_every_mutant_matches_the_sources_once():
    """And every one's tests exist. Where sources change, their mutants must follow."""
    mutants = all_mutants()
    assert len(mutants) >= 60
    check_matches(mutants)


def test_every_kernel_and_operation_has_mutants():
    functions = {(one.file, one.function) for one in all_mutants()}
    kernels = {
        ("lora_linear/triton_forward.py", "one_pass_kernel"),
        ("lora_linear/triton_forward.py", "shrink_kernel"),
        ("lora_linear/triton_forward.py", "expand_kernel"),
        ("lora_linear/triton_decode.py", "decode_kernel"),
        ("lora_linear/triton_backward.py", "dy_b_kernel"),
        ("lora_linear/triton_backward.py", "reduce_p_kernel"),
        ("lora_linear/triton_backward.py", "dx_kernel"),
        ("lora_linear/triton_backward.py", "d_a_kernel"),
        ("lora_linear/triton_descriptor.py", "project"),
        ("lora_linear/triton_descriptor.py", "dx_descriptor_kernel"),
        ("rope/triton_kernel.py", "_rotate_kernel"),
        ("rms_norm/triton_forward.py", "forward_kernel"),
        ("rms_norm/triton_backward.py", "backward_kernel"),
        ("swiglu/triton_kernel.py", "_forward_kernel"),
        ("swiglu/triton_kernel.py", "_backward_kernel"),
        ("linear_cross_entropy/triton_kernel.py", "_cross_entropy_kernel"),
    }
    assert kernels <= functions
    for operation in ("lora_linear", "rope", "rms_norm", "swiglu", "linear_cross_entropy"):
        files = {file for file, _ in functions if file.startswith(f"{operation}/")}
        assert {f"{operation}/op.py", f"{operation}/eager.py"} <= files


def test_only_the_named_function_is_changed():
    before, kept, after = SOURCE.partition("def triple")
    assert mutated_source(mutant(), SOURCE) == before.replace("x + x", "x") + kept + after


@pytest.mark.parametrize(
    "faulty, message",
    (
        (mutant(old="x * x"), r"double: expected 'x \* x' exactly once, found 0"),
        (mutant(old="x"), "exactly once, found 3"),
        (mutant(function="quadruple"), "expected one 'quadruple', found 0"),
        (mutant(new="x + x"), "the replacement is the text itself"),
        (mutant(new="(x"), "this is no Python"),
    ),
)
def test_a_mutant_that_does_not_fit_is_an_error(faulty, message):
    with pytest.raises(ValueError, match=message):
        mutated_source(faulty, SOURCE)


def test_a_test_that_does_not_exist_is_an_error():
    known = all_mutants()[0]
    for tests in (("swiglu/no_such_file.py::test",), ("swiglu/test_op.py::no_such_test[1]",)):
        with pytest.raises(ValueError, match="no test"):
            check_matches([Mutant("x", known.file, known.function, known.old, known.new, tests)])


def test_a_sample_is_spread_over_the_list():
    numbers = list(range(100))
    assert sample(numbers, 4) == [0, 25, 50, 75]
    assert sample(numbers[:3], 6) == [0, 1, 2]


def test_verdicts():
    """A fault, no fault at all, a program that does not run, and tests that do not."""
    tests = ("swiglu/test_forward.py::test_float64_is_exact[triton]",)

    def job(name, new):
        old = "gate * tl.sigmoid(gate) * up"
        fault = Mutant(name, "swiglu/triton_kernel.py", "_forward_kernel", old, new, tests)
        return Job(name, tests, fault)

    jobs = [
        job("fault", "gate * up"),
        job("none", "tl.sigmoid(gate) * gate * up"),
        job("no program", "gait * up"),
        Job("no such test", ("swiglu/test_forward.py::test_float64_is_exact[cuda]",)),
        Job("skipped", ("rope/test_op.py::test_more_tokens_than_65_535",)),
    ]
    outcomes = {job.name: outcome for job, outcome in run_jobs(jobs, 1)}
    verdicts = {name: outcome.verdict for name, outcome in outcomes.items()}
    assert verdicts == {
        "fault": "killed",
        "none": "survived",
        "no program": "broken",
        "no such test": "broken",
        "skipped": "broken",
    }
    assert "AssertionError" in outcomes["fault"].reason
    assert "NameError" in outcomes["no program"].reason


def test_a_process_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(mutants_run, "PROCESS_SECONDS", 0.0)
    slow = Job("slow", ("lora_linear/test_accuracy.py::test_any_shape",))
    ((_, outcome),) = run_jobs([slow], 1)
    assert outcome.verdict == "broken" and outcome.reason == "its process ended with exit code -9"


def test_a_sample_is_killed():
    """One from each part of the list; all of them take minutes: python -m bench.mutants."""
    command = [sys.executable, "-m", "bench.mutants", "--sample", "6", "--jobs", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "6/6 mutants killed"
    assert sum(line.startswith("killed ") for line in done.stdout.splitlines()) == 6


def test_a_survivor_fails_the_run(monkeypatch, capsys):
    from bench import mutants

    known = next(one for one in all_mutants() if one.name == "swiglu: up is missing")
    harmless = Mutant(
        "harmless", known.file, known.function, "gate * tl.sigmoid(gate)",
        "tl.sigmoid(gate) * gate", known.tests,
    )  # fmt: skip
    monkeypatch.setattr(mutants, "all_mutants", lambda: [harmless])
    assert mutants.main(["--jobs", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0/1 mutants killed"
    assert any(line.startswith("survived  harmless") for line in lines)
