"""Every output and gradient of every operation beside plain torch: error over error, at most 2.

Both errors are against the reference in float64. The inputs are ordinary ones, large ones, and
pairs of rows that cancel. `figure` keeps the worst ratio of each dtype.
"""

from dataclasses import replace

import pytest
import torch

from lora_kernels.testing import MAX_RATIO, compare

CUDA = torch.cuda.is_available()
KERNEL_DTYPES = (torch.float16, torch.bfloat16 if CUDA else torch.float32)
INTERPRETED = (pytest.mark.kernel, pytest.mark.long)
IMPLS_AND_DTYPES = (
    *(pytest.param("triton", dtype, id=f"triton-{dtype}", marks=INTERPRETED)
      for dtype in KERNEL_DTYPES),
    *(pytest.param("eager", dtype, id=f"eager-{dtype}")
      for dtype in (torch.float16, torch.bfloat16, torch.float32)),
)  # fmt: skip
# The second half of the features nearly cancels the first, in every product with a row of ones.
REGIMES = ("ordinary", "large", "cancelling")
# Of a loss, a single number, a few draws say nothing.
DRAWS = {"loss": 16}


def drawn(operation, regime: str, seed: int, device):
    case = operation.draw(37, 53, 42, 10, seed=seed, device=device)
    inputs = dict(case.inputs)
    for name in operation.rows:
        if regime == "large":
            inputs[name] = inputs[name] * 30
        if regime == "cancelling":
            value = inputs[name]
            half = value.shape[-1] // 2
            first = value[..., :half]
            tail = value[..., 2 * half :]
            nearly = -first * (1 + value[..., half : 2 * half] / 64)
            inputs[name] = torch.cat((first, nearly, tail), dim=-1)
    return replace(case, inputs=inputs)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("impl", "dtype"), IMPLS_AND_DTYPES)
def test_error_is_at_most_twice_plain_torchs(operation, impl, dtype, regime, device, figure):
    cases = [
        drawn(operation, regime, seed, device).to(dtype)
        for seed in range(DRAWS.get(operation.name, 2))
    ]
    ours, plain, oracle = (
        [run(case) for case in cases]
        for run in (
            lambda case: case.results(impl),
            lambda case: case.results("reference"),
            lambda case: case.oracle(),
        )
    )
    compared = {
        name: compare(*(torch.stack([one[name] for one in all_]) for all_ in (ours, plain, oracle)))
        for name in oracle[0]
    }
    short = str(dtype).removeprefix("torch.")
    for name, comparison in compared.items():
        kind = "gradient" if name.startswith("d_") else "output"
        figure(1, f"worst ratio, {impl}, {short}, {kind}", comparison.ratio, MAX_RATIO)
        figure(1, f"RMS error, {impl}, {short}, {kind}", comparison.error)
    bad = {name: found for name, found in compared.items() if found.ratio > MAX_RATIO}
    assert not bad, bad
