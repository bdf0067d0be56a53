"""What a verification consists of: checks with a time budget each, and the rows they leave.

A check is a function of the `Setting` and of a `Timer` that yields rows. A row is

    passed     it was run, all of it, and held
    failed     it was run and did not hold, or an error came instead
    skipped    it was not run, or not all of it; the detail says why. Never counted as passed
    dry        it would have passed; only the code of the check was exercised, at tiny sizes

Time that a check leaves unused goes to those after it.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from lora_kernels import testing

Status = Literal["passed", "failed", "skipped", "dry"]


@dataclass
class Row:
    """One line of the table.

    Attributes:
        check: the check it belongs to.
        name: what was checked.
        detail: the figure that was found, or why it failed or was skipped.
        figures: the same and more, as JSON.
    """

    check: str
    name: str
    status: Status
    detail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
        tiny: sizes for Triton's interpreter, which only exercise the checks themselves.
        memory_bytes: what the run may allocate on the device.
    """

    device: torch.device
    tiny: bool
    memory_bytes: int

    @property
    def dtypes(self) -> list[torch.dtype]:
        """What the kernels take here: the interpreter computes bfloat16 wrongly."""
        if self.device.type == "cpu":
            return [torch.float32, torch.float16]
        return [torch.bfloat16, torch.float16, torch.float32]


class Timer:
    """Counts down a check's seconds."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


@dataclass(frozen=True)
class Check:
    """One check and its share of the run's time."""

    name: str
    seconds: float
    run: Callable[[Setting, Timer], Iterable[Row]]


# A case: its name, and what makes its rows.
Case = tuple[str, Callable[[], Iterable[Row]]]


def within(timer: Timer, check: str, cases: Sequence[Case]) -> Iterator[Row]:
    """The rows of the cases that the time allows, and one row for all that were left out.

    An error in a case is a failed row of its own and does not end the check.
    """
    for index, (name, case) in enumerate(cases):
        if timer.left <= 0:
            yield Row(
                check,
                f"{len(cases) - index} of {len(cases)} cases",
                "skipped",
                f"no time was left, from {name!r} on",
                {"left_out": [name for name, _ in cases[index:]]},
            )
            return
        try:
            yield from case()
        except Exception as error:
            yield Row(check, name, "failed", error_line(error))


def verdict(check: str, name: str, held: bool, detail: str, **figures: Any) -> Row:
    """A row that passed or failed."""
    return Row(check, name, "passed" if held else "failed", detail, figures)


def comparison_row(check: str, name: str, compared: Mapping[str, testing.Comparison]) -> Row:
    """A row of outputs against the oracle: the worst ratio, and whose it is."""
    ratios = {key: comparison.ratio for key, comparison in compared.items()}
    worst = max(ratios, key=ratios.__getitem__)
    return verdict(
        check,
        name,
        ratios[worst] <= testing.MAX_RATIO,
        f"{worst} {ratios[worst]:.3g}",
        ratios=ratios,
        errors={key: comparison.error for key, comparison in compared.items()},
    )


def error_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def run_checks(
    checks: Sequence[Check], setting: Setting, report: Callable[[Row], None]
) -> list[Row]:
    """Runs the checks in order and hands each row to `report` when it is there."""
    rows: list[Row] = []
    due = time.monotonic()
    for check in checks:
        due += check.seconds
        last = time.monotonic()
        for row in _rows_of(check, setting, Timer(due - last)):
            now = time.monotonic()
            row.seconds, last = round(now - last, 2), now
            if setting.tiny and row.status == "passed":
                row.status = "dry"
            rows.append(row)
            report(row)
        free_memory(setting.device)
    return rows


def _rows_of(check: Check, setting: Setting, timer: Timer) -> Iterator[Row]:
    """The check's rows; where it raises, a failed one; where it has none, a skipped one."""
    count = 0
    try:
        for row in check.run(setting, timer):
            count += 1
            yield row
    except Exception as error:
        yield Row(check.name, check.name, "failed", error_line(error))
        return
    if not count:
        yield Row(check.name, check.name, "skipped", "it has no case here")


def free_memory(device: torch.device) -> None:
    """Gives what no tensor holds back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(rows: Sequence[Row]) -> str:
    """A line for each check, then every row that was skipped or failed, then the counts."""
    lines = [("check", "rows", "seconds", "")]
    for check in dict.fromkeys(row.check for row in rows):
        own = [row for row in rows if row.check == check]
        lines.append((check, summary(own), f"{sum(row.seconds for row in own):.1f}", _worst(own)))
    text = _aligned(lines)
    text.insert(1, "-" * max(map(len, text)))
    notable = [
        (row.status, row.check, row.name, row.detail)
        for status in ("skipped", "failed")
        for row in rows
        if row.status == status
    ]
    return "\n".join([*text, *([""] if notable else []), *_aligned(notable), "", summary(rows)])


def _worst(rows: Sequence[Row]) -> str:
    """The largest ratio of a check's rows, or the detail of its only row."""
    ratios = [
        (ratio, f"{key} of {row.name}")
        for row in rows
        for key, ratio in row.figures.get("ratios", {}).items()
    ]
    if ratios:
        ratio, where = max(ratios)
        return f"worst ratio {ratio:.3g}: {where}"
    return rows[0].detail if len(rows) == 1 else ""


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def summary(rows: Sequence[Row]) -> str:
    """How many rows passed, failed and were skipped."""
    counts = {
        status: sum(row.status == status for row in rows)
        for status in ("passed", "dry", "failed", "skipped")
    }
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "no rows"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in asdict(row).items() if value not in ("", {})} for row in rows
    ]
