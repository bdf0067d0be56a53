"""Every operation by every peer: correct first, then timed side by side."""

import pytest

from bench.run import BenchRun, clock
from bench.shapes import OpCase


@pytest.mark.benchmark(timer=clock)
def test_operation(
    op_and_peer: tuple[OpCase, str], run: BenchRun, request: pytest.FixtureRequest
) -> None:
    case, peer = op_and_peer
    run.replay(run.measure_op(case), peer, request)
