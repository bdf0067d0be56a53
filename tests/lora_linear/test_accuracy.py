"""Error against the float64 oracle: at most twice what plain torch makes in the same dtype."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_kernels import testing
from lora_kernels.lora_linear import reference
from lora_kernels.lora_linear.op import lora_linear

# bfloat16 is silently wrong in the interpreter, so a CPU checks the other two.
KERNEL_DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    KERNEL_DTYPES.append(torch.bfloat16)

# Tiles of 16 x 32 x 16 under the interpreter: aligned, ragged, one row, ranks on both sides of 16,
# and one beyond what one pass takes.
SHAPES = [
    (32, 64, 48, 16),
    (33, 53, 37, 5),
    (1, 17, 16, 1),
    (17, 96, 130, 64),
    (40, 50, 36, 130),
]


def assert_accurate(comparisons: dict[str, testing.Comparison]) -> None:
    bad = {name: c for name, c in comparisons.items() if c.ratio > testing.MAX_RATIO}
    assert not bad, bad


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_kernels(shape, dtype, bias, device):
    # With one row and rank 1 an error is that of a few numbers: more draws make it a statistic.
    draws = 32 if shape[0] == 1 else 4
    assert_accurate(
        testing.check_lora_linear(*shape, dtype, "triton", device, bias=bias, draws=draws)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager(shape, dtype, device):
    draws = 32 if shape[0] == 1 else 4
    assert_accurate(testing.check_lora_linear(*shape, dtype, "eager", device, draws=draws))


SIZES = st.sampled_from([1, 2, 15, 16, 17, 31, 33, 63, 65])


@pytest.mark.kernel
@given(
    m=SIZES,
    n=SIZES,
    k=SIZES,
    r=st.sampled_from([1, 2, 4, 8, 12, 16, 24, 64]),
    seed=st.integers(0, 99),
)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_shape(m, n, k, r, seed, device):
    """float64 through the interpreter agrees to rounding; on a GPU, float32 within the bound."""
    if device.type == "cuda":
        assert_accurate(testing.check_lora_linear(m, n, k, r, torch.float32, "triton", device))
        return
    inputs = testing.lora_linear_inputs(m, n, k, r, torch.float64, device, seed=seed)
    ours = testing.outputs_and_gradients(lora_linear, inputs, 1.7, 0.0, "triton")
    oracle = testing.outputs_and_gradients(reference.lora_linear, inputs, 1.7)
    for name, value in ours.items():
        torch.testing.assert_close(value, oracle[name], rtol=1e-12, atol=1e-12, msg=name)


ADVERSARIAL = {
    "large": lambda t: t | {"x": t["x"] * 100},
    "cancelling": lambda t: t | {"lora_b": t["lora_b"] * 0 + 1, "lora_a": t["lora_a"].sign()},
    "zero_b": lambda t: t | {"lora_b": torch.zeros_like(t["lora_b"])},
    "one_hot": lambda t: t | {"x": torch.eye(*t["x"].shape).to(t["x"])},
}


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_adversarial_inputs(kind, dtype, device):
    inputs = ADVERSARIAL[kind](testing.lora_linear_inputs(33, 53, 37, 5, dtype, device))
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    oracle = testing.outputs_and_gradients(reference.lora_linear, exact, 0.75)
    plain = testing.outputs_and_gradients(reference.lora_linear, inputs, 0.75)
    ours = testing.outputs_and_gradients(lora_linear, inputs, 0.75, 0.0, "triton")
    assert_accurate({name: testing.compare(ours[name], plain[name], oracle[name]) for name in ours})


@pytest.mark.kernel
def test_float32_adapters_over_a_16_bit_base(device):
    """The products run in x's dtype; the adapter's gradients come back in float32."""
    inputs = testing.lora_linear_inputs(33, 53, 37, 5, torch.float16, device)
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    mixed = inputs | {name: inputs[name].float() for name in ("lora_a", "lora_b")}
    oracle = testing.outputs_and_gradients(reference.lora_linear, exact, 0.75)
    plain = testing.outputs_and_gradients(reference.lora_linear, inputs, 0.75)
    for impl in ("triton", "eager"):
        ours = testing.outputs_and_gradients(lora_linear, mixed, 0.75, 0.0, impl)
        assert ours["y"].dtype == ours["d_x"].dtype == ours["d_bias"].dtype == torch.float16
        assert ours["d_lora_a"].dtype == ours["d_lora_b"].dtype == torch.float32
        assert_accurate(
            {name: testing.compare(ours[name], plain[name], oracle[name]) for name in ours}
        )


def test_compare_refuses_nan_and_other_shapes():
    value = torch.ones(3)
    with pytest.raises(ValueError, match="NaN or Inf"):
        testing.compare(value * float("nan"), value, value.double())
    with pytest.raises(ValueError, match="expected shape"):
        testing.compare(torch.ones(1), value, value.double())


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.02, -1.0])
@pytest.mark.parametrize("name", ["y", "d_x", "d_lora_a", "d_lora_b", "d_bias"])
def test_the_bound_sees_a_wrong_output(name, scale):
    """The check itself can fail: a zero, halved, 2 % off or negated output breaks the bound."""
    inputs = testing.lora_linear_inputs(33, 53, 37, 5, torch.float16)
    exact = {key: tensor.double() for key, tensor in inputs.items()}
    oracle = testing.outputs_and_gradients(reference.lora_linear, exact, 0.75)
    plain = testing.outputs_and_gradients(reference.lora_linear, inputs, 0.75)
    assert testing.compare(plain[name], plain[name], oracle[name]).ratio <= 1
    assert testing.compare(plain[name] * scale, plain[name], oracle[name]).ratio > 2
