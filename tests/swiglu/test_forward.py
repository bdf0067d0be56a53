"""SwiGLU itself: against transformers and a float64 oracle, in every layout and shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.activations import ACT2FN

from lora_kernels.swiglu.op import swiglu
from lora_kernels.testing import MAX_RATIO, compare

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel

# Triton's interpreter computes bfloat16 wrongly; the kernels take no float64 on a GPU.
TRITON_DTYPES = (torch.float16, torch.float32) + ((torch.bfloat16,) if CUDA else ())
WIDEST = torch.float32 if CUDA else torch.float64

IMPLS = ("reference", "eager", pytest.param("triton", marks=kernel))
IMPLS_AND_DTYPES = (
    *(
        pytest.param(impl, dtype, id=f"{impl}-{dtype}")
        for impl in ("reference", "eager")
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    ),
    *(pytest.param("triton", dtype, id=f"triton-{dtype}", marks=kernel) for dtype in TRITON_DTYPES),
)


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def inputs(*shape, dtype=torch.float32):
    return randn(*shape, dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2)


def transformers_swiglu(gate, up):
    return ACT2FN["silu"](gate) * up


def oracle(gate, up):
    gate, up = gate.double(), up.double()
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("impl", ("reference", "eager"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("scale", (1.0, 30.0))
def test_bits_are_those_of_transformers(impl, dtype, scale):
    gate, up = inputs(7, 5, 97, dtype=dtype)
    gate = gate * scale
    actual = swiglu(gate, up, impl=impl)
    assert actual.dtype == dtype
    assert torch.equal(actual, transformers_swiglu(gate, up))


@pytest.mark.parametrize("impl, dtype", IMPLS_AND_DTYPES)
@pytest.mark.parametrize("scale", (1.0, 0.01, 20.0))
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(impl, dtype, scale):
    gate, up = inputs(12, 96, dtype=dtype)
    gate = gate * scale
    actual = swiglu(gate, up, impl=impl)
    comparison = compare(actual, transformers_swiglu(gate, up), oracle(gate, up))
    assert actual.dtype == dtype
    assert comparison.ratio <= MAX_RATIO, comparison


@pytest.mark.parametrize("impl", IMPLS)
def test_float64_is_exact(impl):
    if impl == "triton" and CUDA:
        pytest.skip("the kernels take float64 under the interpreter only")
    gate, up = inputs(6, 33, dtype=torch.float64)
    assert_close(swiglu(gate, up, impl=impl), oracle(gate, up), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_tails_of_the_sigmoid(impl):
    """Relative accuracy, also where sigmoid is next to 0; no overflow where exp would."""
    gate = torch.tensor([-100.0, -80.0, -30.0, -5.0, -0.0, 0.0, 5.0, 30.0, 100.0, 1000.0])
    gate = gate.to(DEVICE)
    up = torch.full_like(gate, 3.0)
    actual = swiglu(gate, up, impl=impl)
    assert_close(actual[1:].double(), oracle(gate, up)[1:], rtol=3e-6, atol=0)
    assert actual[0].abs() < 1e-37


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((1, 1), (9, 1), (1, 7), (70, 3), (3, 1025), (2, 3, 5), (5,)))
@pytest.mark.parametrize("layout", ("contiguous", "rows"))
def test_shapes(impl, shape, layout):
    gate, up = inputs(*shape, dtype=WIDEST)
    if layout == "rows":
        gate, up = torch.cat((gate, up), dim=-1).chunk(2, dim=-1)
    actual = swiglu(gate, up, impl=impl)
    assert actual.shape == shape
    assert_close(actual, oracle(gate, up).to(WIDEST))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((0, 8), (2, 0, 8), (3, 0)))
def test_empty_inputs(impl, shape):
    assert swiglu(*inputs(*shape), impl=impl).shape == shape


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features_outermost": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "sliced": lambda x: torch.cat((x, x, x), dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "last_dim_strided": lambda x: x.repeat_interleave(3, dim=-1)[..., 1::3],
    "expanded_rows": lambda x: x[:1, :1].expand(x.shape),
    "expanded_batch": lambda x: x[:1].expand(x.shape),
    "expanded_features": lambda x: x[..., :1].expand(x.shape),
    "one_element": lambda x: x[:1, :1, :1].expand(x.shape),
    "size_1_with_a_huge_stride": lambda x: x[:1].as_strided(
        (1, *x.shape[1:]), (2**40, x.stride(1), 1)
    ),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(impl, layout):
    gate, up = (LAYOUTS[layout](x) for x in inputs(3, 4, 10))
    expected = swiglu(gate.contiguous(), up.contiguous(), impl=impl)
    # gate and up need not share a layout.
    for first, second in ((gate, up), (gate.contiguous(), up), (gate, up.contiguous())):
        actual = swiglu(first, second, impl=impl)
        assert_close(actual, expected, rtol=0 if impl == "triton" else 1e-6, atol=0)
        if impl != "reference":
            assert actual.is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("name", ("gate", "up"))
def test_nan_and_infinity_stay_in_their_element(impl, value, name):
    gate, up = inputs(40, 16)
    {"gate": gate, "up": up}[name][17, 3] = value
    actual = swiglu(gate, up, impl=impl)
    assert not actual[17, 3].isfinite()
    actual[17, 3] = 0.0
    assert actual.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_neither_written_nor_aliased(impl):
    tensors = inputs(4, 3, 10)
    copies = [x.clone() for x in tensors]
    out = swiglu(*tensors, impl=impl)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy) and tensor._version == 0
    assert len({x.untyped_storage().data_ptr() for x in (*tensors, out)}) == 3


@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_give_the_same_bits(impl):
    gate, up = inputs(20, 70)
    first = swiglu(gate, up, impl=impl)
    assert all(torch.equal(swiglu(gate, up, impl=impl), first) for _ in range(3))


@kernel
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    order=st.permutations(range(3)),
    other_order=st.permutations(range(3)),
)
def test_kernel_on_any_shape(batch, rows, columns, order, other_order):
    # Laid out in memory in any order of the dimensions.
    gate, up = (
        x.permute(o).contiguous().permute(torch.tensor(o).argsort().tolist())
        for x, o in zip(
            inputs(batch, rows, columns, dtype=WIDEST), (order, other_order), strict=True
        )
    )
    assert_close(swiglu(gate, up, impl="triton"), swiglu(gate, up, impl="reference"))
