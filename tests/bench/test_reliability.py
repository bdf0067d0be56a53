"""The table of reliability: which tests are in which row, and what is made of their outcomes."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bench import reliability
from bench.machine import ROOT
from bench.reliability import FAULT_CLASSES, FaultClass, Recorder, combined, markdown

ONLY_ON_GPUS = {11, 15}
MACHINE = {
    "name": "cpu", "device": "cpu", "packages": {"torch": "2"}, "commit": "abc", "date": "today",
}  # fmt: skip


def names_of_tests() -> list[str]:
    """ "tests/file.py::function" of every test in the tree."""
    names = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        names += [
            f"{path.relative_to(ROOT)}::{node.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
    return names


def test_every_row_has_tests_or_says_where_they_are():
    names = names_of_tests()
    assert [fault.number for fault in FAULT_CLASSES] == list(range(1, 31))
    for fault in FAULT_CLASSES:
        found = any(re.search(fault.tests, name) for name in names)
        assert found == (fault.number not in ONLY_ON_GPUS), fault.name
        assert found or fault.elsewhere


def report(name: str, when: str = "call", outcome: str = "passed", markers=(), figures=()):
    return SimpleNamespace(
        nodeid=name, when=when, outcome=outcome, keywords=dict.fromkeys(markers, 1),
        user_properties=[("figure", figure) for figure in figures],
        failed=outcome == "failed", skipped=outcome == "skipped", passed=outcome == "passed",
    )  # fmt: skip


def row_of(*reports, marker: str = ""):
    recorder = Recorder()
    for one in reports:
        recorder.pytest_runtest_logreport(one)
    (row,) = recorder.rows([FaultClass(1, "fault", "wanted", marker)])
    return row


@pytest.mark.parametrize(
    ("reports", "status", "counts"),
    (
        ([], "not run", (0, 0, 0)),
        ([report("other")], "not run", (0, 0, 0)),
        ([report("wanted", outcome="skipped", when="setup")], "not run", (0, 0, 1)),
        ([report("wanted")], "held", (1, 0, 0)),
        ([report("wanted"), report("wanted2", outcome="skipped")], "held", (1, 0, 1)),
        ([report("wanted"), report("wanted2", outcome="failed")], "failed", (1, 1, 0)),
        # An error before or after the test itself.
        ([report("wanted", "setup", "failed")], "failed", (0, 1, 0)),
        ([report("wanted"), report("wanted", "teardown", "failed")], "failed", (0, 1, 0)),
        ([report("wanted", "setup"), report("wanted", "teardown")], "not run", (0, 0, 0)),
    ),
)
def test_status(reports, status, counts):
    row = row_of(*reports)
    assert row.status == status
    assert (row.passed, row.failed, row.skipped) == counts


def test_a_marker_belongs_to_a_row():
    assert row_of(report("other", markers=["kernel"]), marker="kernel").passed == 1
    assert row_of(report("other", markers=["slow"]), marker="kernel").passed == 0


@pytest.mark.parametrize(
    ("value", "status"), ((1.9, "held"), (2.1, "failed"), (float("nan"), "failed"))
)
def test_a_figure_beyond_its_limit_is_a_failure(value, status):
    figure = {"row": 1, "name": "ratio", "value": value, "combine": "max", "limit": 2.0}
    done = report("elsewhere", "teardown", figures=[figure])
    assert row_of(report("wanted"), done).status == status


def test_tests_of_a_kind_are_counted():
    recorder = Recorder()
    for name, outcome in (("wanted_a", "passed"), ("wanted_b", "passed"), ("wanted_b2", "failed"),
                          ("other_b", "passed"), ("wanted_c", "skipped")):  # fmt: skip
        recorder.pytest_runtest_logreport(report(name, outcome=outcome))
    fault = FaultClass(1, "fault", "wanted", counted=(("cases", ""), ("bs", "b"), ("none", "z")))
    (row,) = recorder.rows([fault])
    assert row.figures == {"cases": {"value": 2, "of": 4}, "bs": {"value": 1, "of": 2}}
    table = markdown({"rows": [dataclasses.asdict(row)], "tests": 4, "machine": MACHINE})
    assert "| cases: 2 of 4; bs: 1 of 2 |" in table


def test_what_is_counted_is_there():
    names = names_of_tests()
    for fault in FAULT_CLASSES:
        own = [name for name in names if re.search(fault.tests, name)]
        for what, pattern in fault.counted:
            assert any(re.search(pattern, name) for name in own), (fault.name, what)


def test_rows_have_figures():
    """A row's tests record a number, or are counted."""
    recorded = set()
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text()
        recorded |= {int(row) for row in re.findall(r"(?:figure|same_bits)\(\s*(\d+)", text)}
        recorded |= {int(row) for row in re.findall(r'"row": (\d+)', text)}
    counted = {fault.number for fault in FAULT_CLASSES if fault.counted}
    rows = {fault.number for fault in FAULT_CLASSES}
    assert rows - (recorded | counted) == ONLY_ON_GPUS


def test_figures_of_one_name_are_combined():
    def figure(name, value, combine="max", **limit):
        return {"row": 1, "name": name, "value": value, "combine": combine, **limit}

    found = combined(
        [figure("a", 1.0, limit=3.0), figure("a", 2.0, limit=2.5), figure("n", 3, "sum"),
         figure("n", 4, "sum"), figure("least", 3, "min"), figure("least", 2, "min")]
    )  # fmt: skip
    assert found == {"a": {"value": 2.0, "limit": 2.5}, "n": {"value": 7}, "least": {"value": 2}}


TESTS = """
import pytest

@pytest.mark.parametrize("value", (0.5, 1.5))
def test_gradcheck(record_property, value):
    figure = {"row": 3, "name": "error", "value": value, "combine": "max", "limit": 2.0}
    record_property("figure", figure)

@pytest.mark.skip(reason="no GPU")
def test_64_bit():
    pass
"""


@pytest.mark.parametrize("processes", ("0", "2"))
def test_a_run_leaves_its_table(processes, tmp_path):
    """As a plugin, in one process and in several."""
    (tmp_path / "test_it.py").write_text(TESTS)
    file = tmp_path / "table.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(tmp_path), "-p", "bench.reliability",
         f"--reliability={file}", "-n", processes, "-q", "-c", "/dev/null",
         f"--rootdir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(file.read_text())
    rows = {row["number"]: row for row in content["rows"]}
    assert content["tests"] == 2
    assert rows[3]["status"] == "held" and rows[3]["passed"] == 2
    assert rows[3]["figures"] == {
        "error": {"value": 1.5, "limit": 2.0},
        "gradchecks in float64": {"value": 2, "of": 2},
    }
    assert rows[7]["status"] == "not run" and rows[7]["skipped"] == 1
    assert markdown(content) in done.stdout
    assert "1 held, 0 failed, 29 not run. 2 tests ran on" in done.stdout


def test_the_table_of_an_earlier_run(tmp_path, capsys):
    assert reliability.main([str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
    row = {
        "number": 7, "name": "large", "status": "held", "passed": 1234, "failed": 0, "skipped": 2,
        "figures": {"offset": {"value": 3e10}, "ratio": {"value": 1.234, "limit": 2.0}},
        "elsewhere": "a GPU",
    }  # fmt: skip
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"machine": MACHINE, "tests": 1, "rows": [row]}))
    assert reliability.main([str(file)]) == 0
    line = (
        "| 7 | large | held | 1,234 passed, 2 skipped | offset: 30,000,000,000; ratio: 1.2 (≤ 2); "
        "not here: a GPU |"
    )
    assert line in capsys.readouterr().out
