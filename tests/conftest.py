"""Set-up for all tests: Triton's interpreter where there is no GPU, poisoned memory, no network."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

# Read when triton is first imported, so this comes before any test module is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two test processes share two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-kernel-tests",
        action="store_true",
        help="fail the run if no test marked `kernel` passed",
    )


class KernelTestCounter:
    """Counts passed kernel tests where the reports arrive: in xdist's controller, or here."""

    def __init__(self) -> None:
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and "kernel" in report.keywords:
            self.passed += 1

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.write_line(f"kernel tests passed: {self.passed}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        required = session.config.getoption("--require-kernel-tests")
        if required and not self.passed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(KernelTestCounter())


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest):
    """Kernel tests find NaN in every tensor that a launcher allocates and does not write."""
    if request.node.get_closest_marker("kernel") is None:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU through the interpreter."""
    return torch.device(DEVICE)


@pytest.fixture
def figure(record_property) -> Callable[..., None]:
    """figure(row, name, value, limit=None, combine="max"): a number for the table of reliability.

    `row` is the fault class's number in bench/reliability.py. The values that several tests give
    one name are combined by "max", "min" or "sum". A limit is the largest value that is allowed.
    """

    def record(
        row: int, name: str, value: float, limit: float | None = None, combine: str = "max"
    ) -> None:
        content = {"row": row, "name": name, "value": float(value), "combine": combine}
        record_property("figure", content if limit is None else {**content, "limit": limit})

    return record


@pytest.fixture
def same_bits(figure) -> Callable[..., None]:
    """same_bits(row, name, actual, expected): none of the tensors differs from its twin."""

    def check(row: int, name: str, actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
        different = sum(not torch.equal(*pair) for pair in zip(actual, expected, strict=True))
        figure(row, name, different, 0.0, combine="sum")
        assert not different, name

    return check


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled SmolLM2-135M-Instruct as a safetensors checkpoint (converted once)."""
    from lora_llama.loading import bundled_model

    return bundled_model()
