"""The tests themselves: every fault that is put into the kernels on purpose is noticed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.timeout(14_400)
def test_mutants_are_killed(figure):
    done = subprocess.run(
        [sys.executable, "-m", "bench.mutants", "--jobs", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    counts = re.search(r"^(\d+)/(\d+) mutants killed$", done.stdout, re.MULTILINE)
    assert counts, done.stdout[-2000:] + done.stderr[-2000:]
    killed, total = map(int, counts.groups())
    figure(2, "mutants", total, combine="sum")
    figure(2, "mutants that survive", total - killed, 0.0)
    assert done.returncode == 0 and total > 0, done.stdout[-4000:]
