"""Errors against the float64 oracle, over plain torch's in the same dtype: at most twice as large.

    ratio = max(rms(ours - oracle) / rms(plain - oracle), max|ours - oracle| / max|plain - oracle|)

for every output: y, dx, d_lora_a, d_lora_b, d_bias; rotated q and k; the norm and the new residual;
the gated activation; the loss; y of DoRA and of rows under different adapters; and the gradient of
every one's inputs. `lora_kernels.testing` makes the comparison. The inputs and what is right come
from the benchmark's recipes (`op_recipes.py`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

import lora_kernels as lk
from bench.machine import name_of
from bench.ops import build_op
from bench.peer import Op
from bench.shapes import (
    ELEMENTWISE,
    GROUPS,
    LLAMA_1B,
    LLAMA_8B,
    SMOLLM2,
    TINY,
    VARIANTS,
    LlamaShape,
    OpCase,
)
from bench.verify_plans import METHODS, PlanIsAnother, forced
from bench.verify_rows import (
    Case,
    Row,
    Setting,
    Timer,
    comparison_row,
    free_memory,
    within,
)
from lora_kernels import testing

# Sizes that no tile, vector or warp divides; one head of k and v.
ODD = LlamaShape("odd", 613, 1001, 5, 1, 80, 1, 1013)
ODD_TINY = LlamaShape("odd tiny", 37, 53, 3, 1, 10, 1, 71)
PARTS = (*GROUPS, *ELEMENTWISE, "head", *VARIANTS)
RANKS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 100, 128, 256)
DECODE_ROWS = (1, 2, 4, 7, 16)
# M, N and K: multiples of the tiles, and of nothing.
RANK_SHAPES = ((256, 512, 384), (131, 250, 203))


def operations(setting: Setting, timer: Timer) -> Iterator[Row]:
    """Every operation at the models' shapes and at odd ones, projections by every method."""
    check = "ratio"
    if setting.tiny:
        # The interpreter's plans split for large ranks alone.
        sizes: Sequence[tuple[LlamaShape, int, int]] = ((TINY, 17, 5), (ODD_TINY, 19, 70))
    else:
        sizes = ((ODD, 331, 16), (SMOLLM2, 1000, 8), (LLAMA_1B, 1024, 64), (LLAMA_8B, 1024, 16))
    cases: list[Case] = []
    for shape, tokens, r in sizes:
        for dtype in setting.dtypes:
            for part in PARTS:
                # The float64 logits of a large vocabulary take the most memory of all.
                rows = min(tokens, 512) if part == "head" else tokens
                case = OpCase(shape, part, rows, name_of(dtype), r=r)
                cases.append((case.id, partial(_operation, check, case, setting)))
    yield from within(timer, check, cases)


def _operation(check: str, case: OpCase, setting: Setting) -> Iterator[Row]:
    op = build_op(case, setting.device, 0, ["ours"])
    oracle = op.evaluate(op.recipe.specification, torch.float64)
    plain = op.evaluate(op.recipe.plain, getattr(torch, case.dtype))
    name = f"{case.shape.name} {case.part} x {case.tokens} {case.dtype}"
    for method in METHODS if case.part in GROUPS else ("triton",):
        yield ratio_row(check, f"{name}, {method}", by_method(op, method), plain, oracle)
    del op, oracle, plain
    free_memory(setting.device)


def by_method(op: Op, method: str) -> dict[str, Tensor] | str:
    """The outputs and gradients by the kernels, by one method; or why the plan has no such one."""
    forcing = nullcontext() if method == "triton" else forced(method)
    try:
        with lk.implementation("eager" if method == "library" else "triton"), forcing:
            return op.peers["ours"].results()
    except PlanIsAnother as error:
        return str(error)


def ratio_row(
    check: str,
    name: str,
    ours: Mapping[str, Tensor] | str,
    plain: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
) -> Row:
    """The worst ratio and whose it is. `ours` may be the reason why there is nothing."""
    if isinstance(ours, str):
        return Row(check, name, "skipped", ours)
    return comparison_row(
        check, name, {key: testing.compare(ours[key], plain[key], oracle[key]) for key in oracle}
    )


def ranks(setting: Setting, timer: Timer) -> Iterator[Row]:
    """One projection with bias at ranks from 1 to 256; and in float32 by TF32."""
    check = "ratio by rank"
    shapes = ((19, 53, 37),) if setting.tiny else RANK_SHAPES
    cases: list[Case] = []
    for dtype in setting.dtypes:
        for r in (5, 20) if setting.tiny else RANKS:
            for m, n, k in shapes:
                name = f"{m} x {n} x {k}, rank {r}, {name_of(dtype)}"
                cases.append((name, partial(_rank, check, name, (m, n, k, r), dtype, setting)))
    for m, n, k in shapes:
        name = f"{m} x {n} x {k}, rank 16, TF32"
        cases.append((name, partial(_tf32, check, name, (m, n, k, 16), setting)))
    yield from within(timer, check, cases)


def _rank(
    check: str, name: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, setting: Setting
) -> Iterable[Row]:
    draws = 2 if setting.tiny else 4
    compared = testing.check_lora_linear(*sizes, dtype, "triton", setting.device, draws=draws)
    yield comparison_row(check, name, compared)


def _tf32(
    check: str, name: str, sizes: tuple[int, int, int, int], setting: Setting
) -> Iterable[Row]:
    """torch's own products and the kernels' follow the same switch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield from _rank(check, name, sizes, torch.float32, setting)
    finally:
        torch.set_float32_matmul_precision(before)


def decoding(setting: Setting, timer: Timer) -> Iterator[Row]:
    """A few rows without gradients, as in generation."""
    check = "ratio, decode"
    shapes = (TINY,) if setting.tiny else (SMOLLM2, LLAMA_1B, LLAMA_8B, ODD)
    cases: list[Case] = []
    for shape in shapes:
        for dtype in setting.dtypes:
            for part in GROUPS:
                name = f"{shape.name} {part} {name_of(dtype)}"
                run = partial(_decoding, check, name, shape, part, name_of(dtype), setting)
                cases.append((name, run))
    yield from within(timer, check, cases)


def _decoding(
    check: str, name: str, shape: LlamaShape, part: str, dtype: str, setting: Setting
) -> Iterable[Row]:
    rows = (1, 3) if setting.tiny else DECODE_ROWS
    compared = {}
    for m in rows:
        # Several draws are one comparison: a row alone is too few numbers for a ratio.
        draws = [decoded(OpCase(shape, part, m, dtype), seed, setting) for seed in range(4)]
        for key in draws[0][0]:
            ours, plain, oracle = (torch.stack([d[i][key] for d in draws]) for i in range(3))
            compared[f"{key}, {m} rows"] = testing.compare(ours, plain, oracle)
    yield comparison_row(check, name, compared)
    free_memory(setting.device)


@torch.no_grad()
def decoded(case: OpCase, seed: int, setting: Setting) -> tuple[dict[str, Tensor], ...]:
    """The outputs of one forward pass: ours, plain torch's and the oracle's."""
    op = build_op(case, setting.device, seed, ["ours"])
    inputs = op.recipe.inputs
    exact = {key: tensor.double() for key, tensor in inputs.items()}
    with lk.implementation("triton"):
        ours = op.peers["ours"].forward()
    outputs = (ours, op.recipe.plain(inputs), op.recipe.specification(exact))
    return tuple({f"y{g}": y for g, y in enumerate(ys)} for ys in outputs)
