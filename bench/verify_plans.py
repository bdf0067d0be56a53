"""Every way a plan can go, made to happen: each method, and each entry of this GPU's table.

A plan reads its tiles from a table or from the heuristic. Here both are replaced, so that an entry
serves every shape and its method is the one wanted; the rest is the plan's own doing.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

import lora_kernels as lk
from bench.verify_rows import Case, Row, Setting, Timer, comparison_row, within
from lora_kernels import testing
from lora_kernels.lora_linear import op as op_module
from lora_kernels.lora_linear import plan as plan_module
from lora_kernels.lora_linear.op import architecture
from lora_kernels.lora_linear.plan import Plan
from lora_kernels.lora_linear.tables import Entry, Table, load_table

METHODS = ("one_pass", "split", "library")
# N and K of an entry's checks: multiples of all tiles, and of 16 alone.
SIZES = ((1024, 1536), (1008, 784))


class PlanIsAnother(Exception):
    """A method was asked for that the plan does not have for these sizes."""


@contextmanager
def forced(method: str, entry: Entry | None = None) -> Iterator[None]:
    """Inside, plans of the kernels have this method, and the tiles of `entry` if given.

    The library is no plan of the kernels: its GEMMs are the implementation "eager".

    Raises:
        PlanIsAnother: at the first call whose plan has another method all the same, because the
            sizes rule it out.
    """
    table, heuristic = plan_module.load_table, plan_module.heuristic
    original = op_module.plan_for

    def forced_table(arch: str) -> Table | None:
        found = table(arch)
        if found is None and entry is None:
            return None
        if found is None:
            assert entry is not None
            rates = plan_module.FLOPS, plan_module.BYTES_PER_SECOND, plan_module.MULTIPROCESSORS
            found = Table(arch, *rates, None, ())
        entries = found.entries if entry is None else (entry,)
        return replace(found, entries=tuple(replace(one, method=method) for one in entries))

    def forced_heuristic(*arguments: Any) -> Entry:
        return replace(heuristic(*arguments), method=method)

    def checked(*arguments: Any, **options: Any) -> Plan:
        plan = original(*arguments, **options)
        if plan.method != method:
            raise PlanIsAnother(f"the plan is {plan}")
        return plan

    replacements = (
        patch.object(plan_module, "load_table", forced_table),
        patch.object(plan_module, "heuristic", forced_heuristic),
        patch.object(op_module, "plan_for", checked),
    )
    with ExitStack() as stack:
        for replacement in replacements if method != "library" else ():
            stack.enter_context(replacement)
        plan_module.plan.cache_clear()
        stack.callback(plan_module.plan.cache_clear)
        yield


def entries_here(setting: Setting) -> tuple[Entry, ...]:
    """The distinct entries of this architecture's table; for the interpreter, two of its own."""
    if setting.device.type == "cpu":
        return tuple(
            plan_module.heuristic(19, (64,), 48, r, torch.float32, "interpreter", False)
            for r in (5, 20)
        )
    # The file may have been written anew in this run.
    load_table.cache_clear()
    table = load_table(architecture(setting.device))
    entries: dict[tuple[object, ...], Entry] = {}
    for entry in table.entries if table is not None else ():
        # Entries with the same tiles run the same kernels.
        tiles = (entry.bits, entry.r, entry.one_pass, entry.split, entry.dx)
        entries.setdefault((*tiles, entry.shrink, entry.dy_b, entry.d_a, entry.decode), entry)
    return tuple(entries.values())


def tables(setting: Setting, timer: Timer) -> Iterator[Row]:
    """Each entry alone, by both methods of the kernels and in decoding, against the oracle."""
    check = "table"
    entries = entries_here(setting)
    if not entries:
        yield Row(check, "entries", "skipped", f"no table for {architecture(setting.device)}")
        return
    cases: list[Case] = []
    for n, k in ((64, 48),) if setting.tiny else SIZES:
        for entry in entries:
            m = 9 if setting.tiny else min(entry.m, 300)
            for method in ("one_pass", "split"):
                name = f"{entry.bits} bits, {m} x {n} x {k}, r {entry.r}, {method}, of m {entry.m}"
                run = partial(_entry, check, name, entry, method, (m, n, k), setting)
                cases.append((name, run))
    yield from within(timer, check, cases)


def _entry(
    check: str,
    name: str,
    entry: Entry,
    method: str,
    sizes: tuple[int, int, int],
    setting: Setting,
) -> Iterable[Row]:
    dtype = torch.float32 if entry.bits == 32 else torch.bfloat16
    try:
        with forced(method, entry):
            compared = testing.check_lora_linear(
                *sizes, entry.r, dtype, "triton", setting.device, bias=False, draws=2
            )
            if sizes[0] <= plan_module.DECODE_MAX_ROWS and method == "one_pass":
                compared |= _decoded(*sizes, entry.r, dtype, setting)
    except PlanIsAnother as error:
        yield Row(check, name, "skipped", str(error))
        return
    yield comparison_row(check, name, compared)


@torch.no_grad()
def _decoded(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, setting: Setting
) -> dict[str, testing.Comparison]:
    """The forward pass alone, which few rows run by another kernel."""
    from lora_kernels.lora_linear import reference

    drawn = []
    for seed in range(4):
        inputs = testing.lora_linear_inputs(m, n, k, r, dtype, setting.device, False, seed)
        x, weight, a, b = (inputs[name] for name in ("x", "weight", "lora_a", "lora_b"))
        exact = [tensor.double() for tensor in (x, weight, a, b)]
        ours = lk.lora_linear(x, weight, a, b, 0.75, impl="triton")
        drawn.append(
            (
                ours,
                reference.lora_linear(x, weight, a, b, 0.75),
                reference.lora_linear(exact[0], exact[1], exact[2], exact[3], 0.75),
            )
        )
    stacked = [torch.stack(part) for part in zip(*drawn, strict=True)]
    return {"y, decode": testing.compare(stacked[0], stacked[1], stacked[2])}
