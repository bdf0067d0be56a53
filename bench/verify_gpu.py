"""Verifies the kernels on a CUDA GPU, in one command.

    python -m bench.verify_gpu [--minutes 8] [--memory-gb 14] [--only TEXT] [--tune MINUTES]
                               [--no-benchmarks] [--dry-run]

Errors of every output against the float64 oracle, by every method and every entry of this GPU's
table; NaN-poisoned memory; 250 bitwise equal repeats; tensors of more than 2^31 elements; opcheck;
torch.compile; CUDA graphs; all tests marked `kernel`; then, if asked for, the tables' regeneration;
then the benchmarks in the time that is left. A check that runs out of time is skipped, and says so.

Prints every row when it is there and one table of the checks last, and writes all rows to
bench/results/<gpu>-<date>-<commit>.json, under the key "verification", beside what the benchmarks
write there. The exit code is 1 if a row failed, 2 where there is no CUDA GPU. What the process may
allocate is capped: an excess is an error.

--dry-run runs the code of every check on the CPU, through Triton's interpreter, at tiny sizes. Its
rows are marked "dry", and nothing is written.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.verify_rows import Check, Row, Setting

# The checks' seconds are written for a run of so many minutes. The interpreter is slower.
MINUTES = 8.0
DRY_MINUTES = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    # Both are read when torch and triton are first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.dry_run:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    import torch

    if not options.dry_run and (not torch.cuda.is_available() or torch.version.cuda is None):
        print("bench.verify_gpu: no CUDA GPU here; --dry-run exercises the checks without one")
        return 2
    from bench.machine import describe, result_stem
    from bench.report import RESULTS
    from bench.verify_limit import limit_memory
    from bench.verify_rows import Setting, as_json, run_checks, summary, table

    device = torch.device("cpu")
    if not options.dry_run:
        device = torch.device("cuda", torch.cuda.current_device())
    setting = Setting(device, options.dry_run, int(options.memory_gb * 1e9))
    machine = describe(device)
    if device.type == "cuda":
        limit_memory(setting.memory_bytes, device)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) if options.dry_run else RESULTS
        checks = _checks(options, results)
        rows = run_checks(checks, setting, _report)
    rows += _memory_row(setting)
    seconds = time.monotonic() - begin
    failed = any(row.status == "failed" for row in rows)
    print(f"\n{table(rows)}\n")
    print(f"{machine['name']}, commit {machine['commit']}, {seconds:.0f} s: {summary(rows)}")
    if not options.dry_run:
        content = {
            "seconds": round(seconds, 1),
            "minutes": options.minutes,
            "memory_bytes": setting.memory_bytes,
            "summary": summary(rows),
            "rows": as_json(rows),
        }
        print(f"written: {write(RESULTS / f'{result_stem(machine)}.json', machine, content)}")
    return int(failed)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.verify_gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--minutes", type=float, help=f"for all but the tuning; {MINUTES:g} where it is not given"
    )
    parser.add_argument("--memory-gb", type=float, default=14.0, help="cap on allocated memory")
    parser.add_argument("--only", default="", help="only checks whose name contains this")
    parser.add_argument(
        "--tune", type=float, metavar="MINUTES", help="also bench.tune, for so long"
    )
    parser.add_argument("--no-benchmarks", action="store_true", help="leave the benchmarks out")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    options = parser.parse_args(arguments)
    for name in ("minutes", "memory_gb", "tune"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: expected more than 0, got {value}")
    if options.minutes is None:
        options.minutes = DRY_MINUTES if options.dry_run else MINUTES
    return options


def _checks(options: argparse.Namespace, results: Path) -> "list[Check]":
    """All checks in their order, cheap and telling ones first."""
    from bench import verify_commands, verify_large, verify_plans, verify_properties, verify_ratios
    from bench.verify_rows import Check

    scale = options.minutes / MINUTES
    shares = [
        ("NaN-poisoned memory", 10, verify_properties.poisoned),
        ("ratio by rank", 45, verify_ratios.ranks),
        ("ratio", 70, verify_ratios.operations),
        ("ratio, decode", 20, verify_ratios.decoding),
        ("table", 40, verify_plans.tables),
        ("determinism", 20, verify_properties.repeated),
        ("more than 2^31 elements", 20, verify_large.large),
        ("opcheck", 15, verify_properties.checked_by_torch),
        ("torch.compile", 25, verify_properties.compiled),
        ("CUDA graph", 10, verify_properties.captured),
        ("kernel tests", 165, verify_commands.kernel_tests),
    ]
    checks = [Check(name, seconds * scale, run) for name, seconds, run in shares]
    if options.tune is not None:
        checks.append(Check("tables' regeneration", options.tune * 60, verify_commands.tuning))
        checks.append(Check("table, regenerated", 40 * scale, verify_plans.tables))
    if not options.no_benchmarks:
        run = partial(verify_commands.benchmarks, results=results)
        checks.append(Check("benchmarks", 40 * scale, run))
    return [check for check in checks if options.only in check.name]


def _report(row: "Row") -> None:
    print(f"{row.status:8}{row.seconds:7.1f} s  {row.check}: {row.name}: {row.detail}", flush=True)


def _memory_row(setting: "Setting") -> "list[Row]":
    """The most that this process has taken from the GPU. More than the cap was an error before."""
    import torch

    from bench.verify_rows import verdict

    if setting.device.type != "cuda":
        return []
    peak = torch.cuda.max_memory_reserved(setting.device)
    detail = f"{peak / 1e9:.2f} of {setting.memory_bytes / 1e9:.2f} GB"
    return [verdict("memory", "peak", peak <= setting.memory_bytes, detail, peak_bytes=peak)]


def write(path: Path, machine: dict[str, Any], verification: dict[str, Any]) -> Path:
    """Adds the verification to the run's JSON, which the benchmarks may have begun."""
    content: dict[str, Any] = {"machine": machine}
    if path.exists():
        content = json.loads(path.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"verification": verification}, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
