"""Properties of every operation on sizes, layouts, dtypes and ranks drawn at random.

Outputs and all gradients of the kernels and of the library path are compared with the reference in
float64. In float64 the difference is rounding alone. In float32 and float16 the numbers are such
that nothing is rounded, and every bit must be the oracle's; operations with a square root or a
logarithm, which must round, are at most twice as far from it as plain torch. Kernels run on
poisoned memory: what they do not write is NaN, and so is what lies between the elements of a sliced
input.

Some draws are made so that they are of every kind: sizes of 0 one at a time, and the rest without
any, of each dtype in turn. The others are hypothesis's. All are the same in every run, and in each
the inputs and gradients have all layouts between them.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import lora_kernels as lk
from lora_kernels.testing import MAX_RATIO, compare

CUDA = torch.cuda.is_available()
DTYPES = (torch.float16, torch.float32, torch.bfloat16 if CUDA else torch.float64)
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
RANKS = (1, 2, 4, 8, 12, 16, 24, 64)
# Interpreted, a kernel takes seconds where all sizes are large: the long tier has those.
SMALL, LARGE = (15, 16, 17, 33), (2, 15, 16, 17, 31, 33, 63, 65, 127, 129)

# Sums of up to 129 products of numbers near 1, or of two such sums: 2e-13 was the largest seen.
FLOAT64 = 1e-12
# A ratio of two errors needs some: the smallest side, over several draws, adds up to so much.
RATIO_SIDES, RATIO_DRAWS = 64, 8
# Where all but cancels, or few numbers are rounded, a ratio is chance. It is not asked for up to
# one rounding of a 16-bit number of size 1, or the 128 roundings of a float32 sum of 129 products.
CHANCE = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-17}


@dataclass(frozen=True)
class Draw:
    m: int
    n: int
    k: int
    r: int
    layouts: tuple[str, ...]
    dtype: torch.dtype
    seed: int


def draws(name: str, sizes: tuple[int, ...], ranks: tuple[int, ...], count: int) -> Iterator[Draw]:
    """`count` draws without an empty side for an operation, then one with each alone empty.

    One side in eight is 1, but in the first draw of each dtype.
    """
    generator = random.Random(name)
    for i in range(count + 3):
        m, n, k = (
            1 if i >= len(DTYPES) and not generator.randrange(8) else generator.choice(sizes)
            for _ in range(3)
        )
        sides = {"m": m, "n": n, "k": k} | ({"mnk"[i - count]: 0} if i >= count else {})
        yield Draw(
            **sides,
            r=generator.choice(ranks),
            layouts=tuple(generator.sample(LAYOUTS, len(LAYOUTS))),
            dtype=DTYPES[i % len(DTYPES) if i < count else -1],
            seed=generator.randrange(2**16),
        )


def largest_difference(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    """Over the oracle's largest magnitude, which counts as 1 if it is less."""
    assert actual.shape == oracle.shape
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - oracle).abs().max().item()
    return difference / max(1.0, oracle.abs().max().item())


def in_float64(operation, impl: str, draw: Draw, device) -> dict[str, float]:
    case = operation.draw(
        draw.m, draw.n, draw.k, draw.r, seed=draw.seed, layouts=draw.layouts, device=device
    )
    oracle = case.oracle()
    worst = {
        name: largest_difference(value, oracle[name]) for name, value in case.results(impl).items()
    }
    assert all(error <= FLOAT64 for error in worst.values()), worst
    return {"difference from the oracle, float64": max(worst.values())}


def where_nothing_rounds(operation, impl: str, draw: Draw, device) -> dict[str, float]:
    case = operation.draw(
        draw.m, draw.n, draw.k, draw.r, seed=draw.seed, layouts=draw.layouts, device=device,
        exact=True,
    ).to(draw.dtype)  # fmt: skip
    oracle = case.oracle()
    for name, value in case.results(impl).items():
        assert torch.equal(value.double(), oracle[name].to(value.dtype).double()), name
    return {"differing bits where nothing rounds": 0.0}


def beside_plain_torch(operation, impl: str, draw: Draw, device) -> dict[str, float]:
    ours: dict[str, list[torch.Tensor]] = {}
    plain: dict[str, list[torch.Tensor]] = {}
    oracles: dict[str, list[torch.Tensor]] = {}
    # The gradient of a norm of one number is all but nothing, and DoRA rounds one scale for each of
    # N; neither is there for K = 0.
    m, n, k = draw.m, draw.n and max(draw.n, 15), max(draw.k, 2)
    # Of a float32 nearly all is within CHANCE.
    several = min(RATIO_DRAWS, math.ceil(RATIO_SIDES / max(1, min(m, n, k))))
    for i in range(1 if draw.dtype == torch.float32 else several):
        case = operation.draw(
            m, n, k, draw.r, seed=draw.seed + i, layouts=draw.layouts, device=device
        ).to(draw.dtype)
        for kept, results in (
            (ours, case.results(impl)),
            (plain, case.results("reference")),
            (oracles, case.oracle()),
        ):
            for name, value in results.items():
                kept.setdefault(name, []).append(value)
    ratios = {}
    for name in oracles:
        mine, torchs, oracle = (torch.stack(kept[name]) for kept in (ours, plain, oracles))
        assert mine.dtype == torchs.dtype and mine.shape == oracle.shape, name
        assert mine.isfinite().all(), name
        if largest_difference(mine, oracle) > CHANCE[draw.dtype]:
            ratios[name] = compare(mine, torchs, oracle).ratio
    assert all(ratio <= MAX_RATIO for ratio in ratios.values()), ratios
    return {"error over plain torch's where it rounds": max(ratios.values(), default=0.0)}


LIMITS = {
    "difference from the oracle, float64": FLOAT64,
    "differing bits where nothing rounds": 0.0,
    "error over plain torch's where it rounds": MAX_RATIO,
}


@pytest.fixture
def check_draw(operation, figure, device):
    """Compares an implementation with the oracle in a draw; the figures of all are kept."""
    figures: dict[str, float] = {}
    count = 0

    def check(impl: str, draw: Draw) -> None:
        nonlocal count
        compared: Any = beside_plain_torch
        if draw.dtype == torch.float64:
            compared = in_float64
        elif operation.integers:
            compared = where_nothing_rounds
        if CUDA and compared is not where_nothing_rounds and draw.dtype.itemsize > 2:
            # Products of float32 are TF32's there, and float64's not the kernels'.
            return
        for name, value in compared(operation, impl, draw, device).items():
            figures[name] = max(value, figures.get(name, 0.0))
        count += 1

    yield check
    figure(5, "examples", count, combine="sum")
    for name, value in figures.items():
        figure(5, name, value, LIMITS[name])


@pytest.mark.parametrize(
    ("sizes", "ranks", "count"), [(SMALL, RANKS[:6], 5), (LARGE, RANKS, 20)], ids=["small", "large"]
)
def test_the_draws_are_of_every_kind(operation, sizes, ranks, count):
    drawn = list(draws(operation.name, sizes, ranks, count))
    assert len(set(drawn)) == count + 3
    full = [draw for draw in drawn if min(draw.m, draw.n, draw.k) > 1]
    assert {draw.dtype for draw in full} == set(DTYPES)
    empty = [(draw.m > 0, draw.n > 0, draw.k > 0) for draw in drawn[count:]]
    assert empty == [(False, True, True), (True, False, True), (True, True, False)]
    assert all(min(draw.m, draw.n, draw.k) > 0 for draw in drawn[:count])
    assert len({draw.r for draw in drawn}) >= 3
    # No tensor of the operation is of one layout in all draws.
    for place in range(len(LAYOUTS)):
        assert len({draw.layouts[place] for draw in full}) > 1


@pytest.mark.kernel
def test_kernels_on_any_input(check_draw, operation):
    for draw in draws(operation.name, SMALL, RANKS[:6], 5):
        check_draw("triton", draw)


def test_library_path_on_any_input(check_draw, operation):
    for draw in draws(operation.name, LARGE, RANKS, 20):
        check_draw("eager", draw)


def unrounded(operation, draw: Draw) -> Draw:
    """Of the errors of some inputs the ratio is chance: hypothesis's are not judged by it."""
    return draw if operation.integers else replace(draw, dtype=torch.float64)


def hypotheses(sizes: tuple[int, ...], ranks: tuple[int, ...], count: int) -> Callable[..., Any]:
    """Calls a test with `count` draws of hypothesis's."""
    side = st.sampled_from((0, 1, *sizes))
    drawn = st.builds(
        Draw, m=side, n=side, k=side, r=st.sampled_from(ranks),
        layouts=st.permutations(LAYOUTS).map(tuple), dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**16),
    )  # fmt: skip
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    # Looking for a smaller failing example takes minutes; the first is small enough.
    return lambda test: settings(
        max_examples=count, deadline=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=checks,
    )(given(draw=drawn)(test))  # fmt: skip


@pytest.mark.kernel
@hypotheses(SMALL, RANKS[:6], 5)
def test_kernels_on_any_input_of_hypothesis(check_draw, operation, draw):
    check_draw("triton", unrounded(operation, draw))


@hypotheses(LARGE, RANKS, 20)
def test_library_path_on_any_input_of_hypothesis(check_draw, operation, draw):
    check_draw("eager", unrounded(operation, draw))


@pytest.mark.long
@pytest.mark.kernel
@pytest.mark.timeout(3600)
@hypotheses(LARGE, RANKS, 36)
def test_kernels_on_many_inputs(check_draw, operation, draw):
    check_draw("triton", unrounded(operation, draw))


@pytest.mark.long
@hypotheses(LARGE, RANKS, 300)
def test_library_path_on_many_inputs(check_draw, operation, draw):
    check_draw("eager", unrounded(operation, draw))


IMPLS = (pytest.param("triton", marks=pytest.mark.kernel), "eager")
# Rows, the one with NaN, features, rank: a tile and a tail; and the kernels for up to 16 rows.
NAN_CASES = (
    pytest.param(20, 17, 18, 4, torch.float32, id="float32"),
    pytest.param(16, 3, 17, 1, torch.float16, id="decode-float16"),
)


@pytest.mark.parametrize(("m", "row", "k", "r", "dtype"), NAN_CASES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_row_touches_that_row_alone(operation, impl, m, row, k, r, dtype, device, figure):
    """Forward and backward: all other tokens' outputs and gradients keep every bit."""
    check_nan_row(operation.draw(m, 33, k, r, device=device).to(dtype), impl, row)
    figure(10, "NaN rows that touch no other, by operation and path", 1, combine="sum")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_row_touches_that_row_alone_where_others_are_dropped(dropped, impl, device, figure):
    case = dropped.draw(20, 33, 18, 4, device=device).to(torch.float16)
    case = replace(case, labels={**case.labels, "dropout_p": torch.tensor(0.5)})
    assert not torch.equal(seeded(case, impl, 0)["y0"], seeded(case, impl, 1)["y0"])
    check_nan_row(case, impl, 0)
    figure(10, "NaN rows that touch no other, by operation and path", 1, combine="sum")


def seeded(case: Any, impl: str, seed: int) -> dict[str, torch.Tensor]:
    """Its results, with the elements that this seed drops."""
    torch.manual_seed(seed)
    return case.results(impl)


def check_nan_row(clean: Any, impl: str, row: int) -> None:
    inputs = dict(clean.inputs)
    for name in clean.operation.rows:
        inputs[name] = inputs[name].clone()
        inputs[name][..., row, :] = torch.nan
    expected = seeded(clean, impl, 0)
    actual = seeded(replace(clean, inputs=inputs), impl, 0)
    m = inputs[clean.operation.rows[0]].shape[-2]
    others = torch.arange(m, device=inputs[clean.operation.rows[0]].device) != row
    by_token = 0
    for name, value in expected.items():
        if value.dim() < 2 or value.shape[-2] != m:
            continue
        by_token += 1
        assert torch.equal(actual[name][..., others, :], value[..., others, :]), name
        assert actual[name][..., row, :].isnan().any() or name.startswith("d_"), name
    # At least the gradient of each input that has rows.
    assert by_token >= len(clean.operation.rows)


@pytest.mark.kernel
@settings(max_examples=15, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@example(position=2**20, distance=2**17, shift=2**20, half=33, tail=3, heads=1, seed=1)
@example(position=2**20, distance=1, shift=2**20 - 1, half=1, tail=0, heads=1, seed=2)
@example(position=2**20, distance=0, shift=2**17, half=16, tail=0, heads=3, seed=3)
@given(
    position=st.integers(0, 2**20),
    distance=st.integers(0, 2**17),
    shift=st.integers(0, 2**17),
    half=st.integers(1, 33),
    tail=st.integers(0, 5),
    heads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_rotations(position, distance, shift, half, tail, heads, seed, device, rope_figures):
    """Norms are kept, R(−θ) R(θ) = 1, and scores depend on the distance alone, up to 2^20."""
    dtype = torch.float32 if CUDA else torch.float64
    generator = torch.Generator().manual_seed(seed)
    shape = (1, heads, 1, 2 * half + tail)
    q, k = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)

    def rotated(x, at: int):
        # One key head, whatever the number of query heads.
        angle = (at * frequencies).repeat(2).to(device)[None, None]
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return lk.apply_rotary_pos_emb(x, x[:, :1], cos, sin, impl="triton")

    limit = 1e-5 if CUDA else 1e-12
    turned, single = rotated(q, position)
    # The fastest pair turns by as many radians as the position is far: no identity passes.
    expected = q[..., 0] * math.cos(position) - q[..., half] * math.sin(position)
    assert (turned[..., 0] - expected).abs().max() <= limit * q.norm()
    assert torch.equal(turned[:, :1], single)
    back, _ = rotated(turned, -position)
    scale = q.norm().item()
    errors = {
        "change of a norm": abs(turned.norm().item() - scale) / scale,
        "R(-t) R(t) - 1": (back - q).abs().max().item() / scale,
    }

    def score(at: int) -> float:
        return (rotated(q, at + distance)[0] * rotated(k, at)[0]).sum().item()

    product = scale * k.norm().item()
    errors["change of a score with position"] = (
        abs(score(position) - score(position + shift)) / product
    )
    # Angles of 2^20 are themselves known to 2^20 roundings.
    reach = (position + shift + distance) * math.ulp(1.0)
    for name, error in errors.items():
        allowed = limit + (reach if "score" in name else 0.0)
        assert error <= allowed, (name, error)
        rope_figures[name] = max(error, rope_figures.get(name, 0.0))


@pytest.fixture
def rope_figures(figure):
    found: dict[str, float] = {}
    yield found
    for name, value in found.items():
        figure(23, name, value)
