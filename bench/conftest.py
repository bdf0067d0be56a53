"""Set-up of the benchmark run: its cases, its options, its summary."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from bench.report import RESULTS, markdown
from bench.run import BenchRun

RUN = pytest.StashKey[BenchRun]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lora_kernels benchmarks")
    group.addoption(
        "--bench-sizes",
        choices=("full", "tiny"),
        default="full",
        help="tiny: sizes that only check the suite itself",
    )
    group.addoption(
        "--bench-results", type=Path, default=RESULTS, help="where the JSON and the plots go"
    )


def run_of(config: pytest.Config) -> BenchRun:
    """The session's run; its first use measures the machine's ceilings."""
    if RUN not in config.stash:
        config.stash[RUN] = BenchRun(config.getoption("--bench-sizes"))
    return config.stash[RUN]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parameters = {
        "op_and_peer": lambda run: run.op_parameters(),
        "step_and_peer": lambda run: run.step_parameters(False),
        "emulated_step_and_peer": lambda run: run.step_parameters(True),
    }
    for name, of_run in parameters.items():
        if name in metafunc.fixturenames:
            pairs = of_run(run_of(metafunc.config))
            metafunc.parametrize(name, pairs, ids=[f"{case.id}-{peer}" for case, peer in pairs])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What matters most comes first, because a CPU run leaves out what no longer fits its time."""
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    callspec = getattr(item, "callspec", None)
    parameters = callspec.params if callspec is not None else {}
    if "step_and_peer" in parameters:
        return 3 if parameters["step_and_peer"][0].inner else 0
    if "op_and_peer" in parameters:
        return 2
    return 4 if "emulated_step_and_peer" in parameters else 1


@pytest.fixture
def run(request: pytest.FixtureRequest) -> BenchRun:
    return run_of(request.config)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config: pytest.Config) -> None:
    run = config.stash.get(RUN, None)
    if run is None or not (run.results["cases"] or run.results["memory"]):
        return
    files = run.finish(config.getoption("--bench-results"))
    terminalreporter.section("lora_kernels against its peers")
    terminalreporter.write_line(markdown(run.results))
    for path in files:
        terminalreporter.write_line(f"written: {path}")
