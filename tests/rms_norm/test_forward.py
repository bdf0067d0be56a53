"""RMSNorm itself: against transformers and a float64 oracle, in every layout and shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_kernels.rms_norm import eager
from lora_kernels.rms_norm.op import rms_norm
from lora_kernels.testing import MAX_RATIO, compare

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel

# Triton's interpreter computes bfloat16 wrongly; the kernels take no float64 on a GPU.
TRITON_DTYPES = (torch.float16, torch.float32) + ((torch.bfloat16,) if CUDA else ())
WIDEST = torch.float32 if CUDA else torch.float64
EPS = 1e-5

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


def inputs(*shape, dtype=torch.float32, weight_dtype=None):
    """x, residual and weight; the weights are about 1, of either sign."""
    x, residual = randn(*shape, dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2)
    return x, residual, randn(shape[-1], dtype=weight_dtype or dtype, seed=3)


def transformers_norm(x, weight, eps=EPS):
    norm = LlamaRMSNorm(x.shape[-1], eps).to(x.device)
    norm.weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        return norm(x)


def oracle(x, weight, eps=EPS):
    x = x.double()
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.fixture
def wide(monkeypatch):
    """The kernels' way with rows wider than they hold in registers, at widths that test quickly."""
    from lora_kernels.rms_norm import triton_kernel

    monkeypatch.setattr(triton_kernel, "_WIDEST_FORWARD", 0)
    monkeypatch.setattr(triton_kernel, "_TILE_WIDE", 16)


@pytest.mark.parametrize("impl", ("reference", "eager"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("weight_dtype", (None, torch.float32), ids=str)
@pytest.mark.parametrize("scale", (1.0, 0.003, 300.0))
def test_bits_are_those_of_transformers(impl, dtype, weight_dtype, scale):
    x, _, weight = inputs(7, 5, 97, dtype=dtype, weight_dtype=weight_dtype)
    x = x * scale
    actual = rms_norm(x, weight, EPS, impl=impl)
    expected = transformers_norm(x, weight)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl, dtype", IMPLS_AND_DTYPES)
@pytest.mark.parametrize("scale", (1.0, 0.003, 3000.0))
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(impl, dtype, scale):
    x, _, weight = inputs(12, 96, dtype=dtype)
    x = x * scale
    actual = rms_norm(x, weight, EPS, impl=impl)
    comparison = compare(actual, transformers_norm(x, weight), oracle(x, weight))
    assert actual.dtype == dtype
    assert comparison.ratio <= MAX_RATIO, comparison


@pytest.mark.parametrize("impl", IMPLS)
def test_float64_is_exact_and_eps_is_not_rounded(impl):
    if impl == "triton" and CUDA:
        pytest.skip("the kernels take float64 under the interpreter only")
    x, _, weight = inputs(6, 33, dtype=torch.float64)
    # 0.1 in float32 is off by 1.5e-9, which would show.
    assert_close(
        rms_norm(x, weight, 0.1, impl=impl), oracle(x, weight, 0.1), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("impl, dtype", IMPLS_AND_DTYPES)
def test_normalised_value_is_rounded_before_a_wider_weight_multiplies_it(impl, dtype):
    x, _, weight = inputs(8, 64, dtype=dtype, weight_dtype=torch.float32)
    actual = rms_norm(x, weight, EPS, impl=impl)
    assert actual.dtype == torch.float32
    # y / weight is a number of x's dtype, to the rounding of one float32 product.
    normalised = actual.double() / weight.double()
    assert_close(normalised, normalised.to(dtype).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl, dtype", IMPLS_AND_DTYPES)
def test_residual_is_added_first(impl, dtype):
    x, residual, weight = inputs(5, 40, dtype=dtype)
    y, total = rms_norm(x, weight, EPS, residual, impl=impl)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, EPS, impl=impl))


@kernel
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("columns", (97, 48, 16, 5))
@pytest.mark.parametrize("with_residual", (False, True))
def test_rows_wider_than_a_tile(wide, dtype, columns, with_residual):
    x, residual, weight = inputs(3, columns, dtype=dtype)
    if with_residual:
        y, total = rms_norm(x, weight, EPS, residual, impl="triton")
        assert torch.equal(total, x + residual)
        x = total
    else:
        y = rms_norm(x, weight, EPS, impl="triton")
    comparison = compare(y, transformers_norm(x, weight), oracle(x, weight))
    assert comparison.ratio <= MAX_RATIO, comparison


@kernel
def test_statistics_of_wide_rows(wide):
    """rstd is written once a row, whichever way the row is read."""
    from lora_kernels.rms_norm import triton_kernel

    x, _, weight = inputs(5, 70)
    outputs = torch.empty_like(x), x.new_empty(0), x.new_full((7,), torch.nan)
    triton_kernel.forward(x, None, weight, EPS, *outputs[:2], outputs[2][1:6])
    expected = (x.double().square().mean(-1) + EPS).rsqrt()
    assert_close(outputs[2][1:6].double(), expected, rtol=1e-6, atol=0)
    assert outputs[2][[0, 6]].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((1, 1), (9, 1), (1, 7), (70, 3), (33, 64), (3, 130), (5,)))
def test_shapes(impl, shape):
    x, residual, weight = inputs(*shape, dtype=WIDEST)
    assert_close(
        rms_norm(x, weight, EPS, impl=impl), oracle(x, weight).to(WIDEST), rtol=1e-5, atol=1e-6
    )
    y, total = rms_norm(x, weight, EPS, residual, impl=impl)
    assert y.shape == total.shape == shape
    assert_close(y, oracle(x + residual, weight).to(WIDEST), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((0, 8), (2, 0, 8)))
def test_no_rows(impl, shape):
    x, residual, weight = inputs(*shape)
    assert rms_norm(x, weight, EPS, impl=impl).shape == shape
    y, total = rms_norm(x, weight, EPS, residual, impl=impl)
    assert y.shape == total.shape == shape


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
def test_layouts_of_x_and_residual(impl, layout):
    x, residual, weight = inputs(3, 4, 10)
    x, residual = LAYOUTS[layout](x), LAYOUTS[layout](residual)
    expected = rms_norm(x.contiguous(), weight, EPS, residual.contiguous(), impl=impl)
    for first, second in ((x, residual), (x.contiguous(), residual), (x, residual.contiguous())):
        actual = rms_norm(first, weight, EPS, second, impl=impl)
        assert_close(actual, expected, rtol=0 if impl == "triton" else 1e-6, atol=0)
        if impl != "reference":
            assert all(output.is_contiguous() for output in actual)
    alone = rms_norm(x, weight, EPS, impl=impl)
    assert_close(alone, rms_norm(x.contiguous(), weight, EPS, impl=impl), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_of_weight(impl):
    x, _, weight = inputs(3, 10)
    expected = rms_norm(x, weight, EPS, impl=impl)
    strided = weight.repeat_interleave(2)[::2]
    assert torch.equal(rms_norm(x, strided, EPS, impl=impl), expected)
    expanded = weight[:1].expand(10)
    expected = rms_norm(x, expanded.contiguous(), EPS, impl=impl)
    assert torch.equal(rms_norm(x, expanded, EPS, impl=impl), expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("rows", (1, 7, 8))
def test_blocks_of_rows_give_the_same_bits(monkeypatch, dtype, rows):
    x, residual, weight = inputs(rows, 12, dtype=dtype)
    expected = rms_norm(x, weight, EPS, residual, impl="eager")
    monkeypatch.setattr(eager, "_UNDIVIDED", 0)
    for block, rows_of_a_block in ((1, 1), (30, 2), (48, 4)):
        monkeypatch.setattr(eager, "_BLOCK", block)
        blocks = list(eager._blocks(torch.float32, x))
        # float32 needs no copies, and so no blocks.
        expected_blocks = 1 if dtype == torch.float32 else -(-rows // rows_of_a_block)
        assert len(blocks) == expected_blocks
        actual = rms_norm(x, weight, EPS, residual, impl="eager")
        assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_squares_may_exceed_float16(impl):
    x, _, weight = inputs(4, 64)
    x = x / x.abs().max() * 60_000
    actual = rms_norm(x.half(), weight.half(), EPS, impl=impl)
    comparison = compare(
        actual,
        transformers_norm(x.half(), weight.half()),
        oracle(x.half(), weight.half()),
    )
    assert comparison.ratio <= MAX_RATIO, comparison


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_of_zeros_gives_zeros(impl):
    x, _, weight = inputs(3, 16)
    x[1] = 0.0
    actual = rms_norm(x, weight, EPS, impl=impl)
    assert torch.equal(actual[1], torch.zeros_like(actual[1]))
    assert actual.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_nan_and_infinity_stay_in_their_row(impl, value):
    x, _, weight = inputs(40, 16)
    x[17, 3] = value
    actual = rms_norm(x, weight, EPS, impl=impl)
    assert actual[17, 3].isnan()
    actual[17] = 0.0
    assert actual.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_neither_written_nor_aliased(impl):
    tensors = inputs(4, 3, 10)
    copies = [x.clone() for x in tensors]
    x, residual, weight = tensors
    outputs = (
        rms_norm(x, weight, EPS, impl=impl),
        *rms_norm(x, weight, EPS, residual, impl=impl),
    )
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy) and tensor._version == 0
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*tensors, *outputs)}
    assert len(storages) == 6


@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_give_the_same_bits(impl):
    x, residual, weight = inputs(20, 70)
    first = rms_norm(x, weight, EPS, residual, impl=impl)
    for _ in range(3):
        again = rms_norm(x, weight, EPS, residual, impl=impl)
        assert_close(again, first, rtol=0, atol=0)


@kernel
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 5),
    columns=st.integers(1, 140),
    order=st.permutations(range(3)),
    with_residual=st.booleans(),
)
def test_kernel_on_any_shape(batch, rows, columns, order, with_residual):
    x, residual, weight = inputs(batch, rows, columns, dtype=WIDEST)
    # Laid out in memory in any order of the dimensions.
    inverse = torch.tensor(order).argsort().tolist()
    x, residual = (t.permute(order).contiguous().permute(inverse) for t in (x, residual))
    added = residual if with_residual else None
    actual = rms_norm(x, weight, EPS, added, impl="triton")
    assert_close(actual, rms_norm(x, weight, EPS, added, impl="reference"))
