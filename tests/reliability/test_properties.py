"""Properties of every operation on sizes, layouts, dtypes and ranks drawn at random.

Outputs and all gradients of the kernels and of the library path are compared with the reference in
float64. In float64 the difference is rounding alone. In float32 and float16 the numbers are such
that nothing is rounded, and every bit must be the oracle's; operations with a square root or a
logarithm, which must round, run in float64 instead. Kernels run on poisoned memory: what they do
not write is NaN, and so is what lies between the elements of a sliced input.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import lora_kernels as lk

CUDA = torch.cuda.is_available()
DTYPES = (torch.float16, torch.float32, torch.bfloat16 if CUDA else torch.float64)
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
RANKS = (1, 2, 4, 8, 12, 16, 24, 64)
# Interpreted, a kernel takes seconds where all sizes are large: the long tier has those.
SMALL, LARGE = (0, 1, 15, 16, 17, 33), (0, 1, 2, 15, 16, 17, 31, 33, 63, 65, 127, 129)

# Sums of up to 129 products of numbers near 1, or of two such sums: 2e-13 was the largest seen.
FLOAT64 = 1e-12


def examples(sizes: tuple[int, ...], ranks: tuple[int, ...], count: int):
    """Draws the arguments of a test `count` times, the same ones in every run."""

    def decorate(test):
        size = st.sampled_from(sizes)
        drawn = given(
            m=size,
            n=size,
            k=size,
            r=st.sampled_from(ranks),
            layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=7),
            dtype=st.sampled_from(DTYPES),
            seed=st.integers(0, 2**16),
        )
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        return settings(
            max_examples=count,
            deadline=None,
            derandomize=True,
            # Looking for a smaller failing example takes minutes; the first is small enough.
            phases=[Phase.generate],
            suppress_health_check=checks,
        )(drawn(test))

    return decorate


def largest_difference(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    """Over the oracle's largest magnitude, which counts as 1 if it is less."""
    assert actual.shape == oracle.shape
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - oracle).abs().max().item()
    return difference / max(1.0, oracle.abs().max().item())


def check(operation, impl, m, n, k, r, layouts, dtype, seed, device) -> dict[str, float]:
    """Asserts the comparison; returns the figure that it found, by its name."""
    options = {"layouts": layouts, "device": device}
    if not operation.integers and CUDA:
        pytest.skip("what rounds here is judged beside plain torch, in test_ratios.py")
    if dtype == torch.float64 or not operation.integers:
        case = operation.draw(m, n, k, r, seed=seed, **options)
        oracle = case.oracle()
        worst = {
            name: largest_difference(value, oracle[name])
            for name, value in case.results(impl).items()
        }
        assert all(error <= FLOAT64 for error in worst.values()), worst
        return {"difference from the oracle, float64": max(worst.values())}
    case = operation.draw(m, n, k, r, exact=True, seed=seed, **options).to(dtype)
    oracle = case.oracle()
    for name, value in case.results(impl).items():
        assert torch.equal(value.double(), oracle[name].to(value.dtype).double()), name
    return {"differing bits where nothing rounds": 0.0}


LIMITS = {
    "difference from the oracle, float64": FLOAT64,
    "differing bits where nothing rounds": 0.0,
}


@pytest.fixture
def checked(operation, figure, device):
    """`check` for an operation, of which the largest figures are kept."""
    figures: dict[str, float] = {}
    count = 0

    def run(impl: str, **arguments) -> None:
        nonlocal count
        for name, value in check(operation, impl, device=device, **arguments).items():
            figures[name] = max(value, figures.get(name, 0.0))
        count += 1

    yield run
    figure(5, "examples", count, combine="sum")
    for name, value in figures.items():
        figure(5, name, value, LIMITS[name])


@pytest.mark.kernel
@examples(SMALL, RANKS[:5], 10)
def test_kernels_on_any_input(checked, **arguments):
    checked("triton", **arguments)


@examples(LARGE, RANKS, 40)
def test_library_path_on_any_input(checked, **arguments):
    checked("eager", **arguments)


@pytest.mark.long
@pytest.mark.kernel
@pytest.mark.timeout(3600)
@examples(LARGE, RANKS, 60)
def test_kernels_on_many_inputs(checked, **arguments):
    checked("triton", **arguments)


@pytest.mark.long
@examples(LARGE, RANKS, 1000)
def test_library_path_on_many_inputs(checked, **arguments):
    checked("eager", **arguments)


@pytest.mark.parametrize("impl", (pytest.param("triton", marks=pytest.mark.kernel), "eager"))
def test_a_nan_row_touches_that_row_alone(operation, impl, device, figure):
    """Forward and backward: all other tokens' outputs and gradients keep every bit."""
    m, row = 20, 17
    clean = operation.draw(m, 33, 18, 4, device=device).to(torch.float32)
    inputs = dict(clean.inputs)
    for name in operation.rows:
        inputs[name] = inputs[name].clone()
        inputs[name][..., row, :] = torch.nan
    spoilt = replace(clean, inputs=inputs)
    expected, actual = clean.results(impl), spoilt.results(impl)
    others = torch.arange(m, device=device) != row
    by_token = 0
    for name, value in expected.items():
        if value.dim() < 2 or value.shape[-2] != m:
            continue
        by_token += 1
        assert torch.equal(actual[name][..., others, :], value[..., others, :]), name
        assert actual[name][..., row, :].isnan().any() or name.startswith("d_"), name
    # At least the gradient of each input that has rows.
    assert by_token >= len(operation.rows)
    figure(10, "NaN rows that touch no other, by operation and path", 1, combine="sum")


@pytest.mark.kernel
@settings(max_examples=15, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
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
