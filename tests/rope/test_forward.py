"""The rotation itself: against transformers and a float64 oracle, in every layout and shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as transformers_rope

from lora_kernels.rope.op import apply_rotary_pos_emb

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel

# Triton's interpreter computes bfloat16 wrongly; the kernels take no float64 on a GPU.
TRITON_DTYPES = (torch.float16, torch.float32, torch.bfloat16 if CUDA else torch.float64)
WIDEST = torch.float32 if CUDA else torch.float64

IMPLS = ("reference", "eager", pytest.param("triton", marks=kernel))
IMPLS_AND_DTYPES = (
    *(
        pytest.param(impl, dtype, id=f"{impl}-{dtype}")
        for impl in ("reference", "eager")
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    ),
    *(pytest.param("triton", dtype, id=f"triton-{dtype}", marks=kernel) for dtype in TRITON_DTYPES),
)


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def angles(positions, rotary_dim, dtype=torch.float32, theta=10_000.0):
    """cos and sin [B, T, rotary_dim] of positions [B, T], computed in float64."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    angle = torch.as_tensor(positions, dtype=torch.float64)[..., None] * theta**-exponents
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)


def qk(batch=2, seq_len=3, heads_q=4, heads_k=2, head_dim=16, dtype=torch.float32):
    """q and k as a projection gives them: transposed views of [B, T, H, D]."""
    q = randn(batch, seq_len, heads_q, head_dim, dtype=dtype, seed=1).transpose(1, 2)
    k = randn(batch, seq_len, heads_k, head_dim, dtype=dtype, seed=2).transpose(1, 2)
    return q, k


def tables(batch=2, seq_len=3, rotary_dim=16, dtype=torch.float32):
    """cos and sin without structure: the halves differ, and cos² + sin² is not 1."""
    return (randn(batch, seq_len, rotary_dim, dtype=dtype, seed=seed) for seed in (3, 4))


def oracle(q, k, cos, sin, unsqueeze_dim=1):
    """transformers' function in float64, on the rotary part alone."""
    q, k, cos, sin = (x.double() for x in (q, k, cos, sin))
    rotary_dim = cos.shape[-1]
    rotated = transformers_rope(
        q[..., :rotary_dim], k[..., :rotary_dim], cos, sin, unsqueeze_dim=unsqueeze_dim
    )
    return [torch.cat((r, x[..., rotary_dim:]), -1) for r, x in zip(rotated, (q, k), strict=True)]


@pytest.mark.parametrize("unsqueeze_dim", (1, 2))
@pytest.mark.parametrize("impl", IMPLS)
def test_equals_transformers(impl, unsqueeze_dim):
    q, k = qk(dtype=WIDEST)
    cos, sin = tables(dtype=WIDEST)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    actual = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, impl=impl)
    expected = transformers_rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    assert_close(actual, expected)


@pytest.mark.parametrize("impl, dtype", IMPLS_AND_DTYPES)
@pytest.mark.parametrize("scale", (1.0, 1000.0))
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(impl, dtype, scale):
    q, k = (x * scale for x in qk(seq_len=4, heads_q=7, head_dim=64, dtype=dtype))
    cos, sin = angles([[0, 1, 2, 3], [7, 100, 1000, 4000]], 64, dtype)
    expected = oracle(q, k, cos, sin)
    baseline = transformers_rope(q, k, cos, sin)
    actual = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    for ours, theirs, exact in zip(actual, baseline, expected, strict=True):
        assert ours.dtype == dtype
        error, reference_error = ((x - exact).abs().max().item() for x in (ours, theirs))
        if dtype == torch.float64:
            assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max().item()
        else:
            assert 0 < reference_error
            assert error <= 2 * reference_error


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "heads_q, heads_k", ((4, 4), (9, 3), (4, 1), (1, 1), (130, 1)), ids=lambda n: f"{n}heads"
)
def test_numbers_of_heads(impl, heads_q, heads_k):
    q, k = qk(batch=1, heads_q=heads_q, heads_k=heads_k, head_dim=32, dtype=WIDEST)
    cos, sin = tables(1, 3, 32, dtype=WIDEST)
    actual = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    assert_close(actual, tuple(oracle(q, k, cos, sin)), check_dtype=False)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "head_dim, rotary_dim",
    (
        (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (6, 6), (10, 10), (2, 2),
        (64, 32), (80, 32), (256, 64), (128, 2), (10, 6), (11, 10), (4096, 4096),
    ),
)  # fmt: skip
def test_head_dims_and_partial_rotary(impl, head_dim, rotary_dim):
    q, k = qk(batch=1, seq_len=2, head_dim=head_dim, dtype=WIDEST)
    cos, sin = tables(1, 2, rotary_dim, dtype=WIDEST)
    actual = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    assert_close(actual, tuple(oracle(q, k, cos, sin)), check_dtype=False)
    for ours, x in zip(actual, (q, k), strict=True):
        assert torch.equal(ours[..., rotary_dim:], x[..., rotary_dim:])


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.cat((x, x, x), dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "last_dim_strided": lambda x: x.repeat_interleave(3, dim=-1)[..., 1::3],
    "reversed_dims": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "expanded_batch": lambda x: x[:1].expand(x.shape),
    "expanded_heads": lambda x: x[:, :1].expand(x.shape),
    "expanded_tokens": lambda x: x[:, :, :1].expand(x.shape),
    "expanded_features": lambda x: x[..., :1].expand(x.shape),
    "one_element": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_q_and_k(impl, layout):
    q, k = (LAYOUTS[layout](x) for x in qk())
    cos, sin = tables()
    actual = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    expected = apply_rotary_pos_emb(q.contiguous(), k.contiguous(), cos, sin, impl=impl)
    if impl == "triton":
        assert_close(actual, expected, rtol=0, atol=0)
    else:
        assert_close(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_dimension_of_size_one_with_a_huge_stride(impl):
    q, k = qk(batch=1, seq_len=1)
    cos, sin = tables(1, 1)
    expected = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    q = q.as_strided(q.shape, (2**40, q.stride(1), 2**40, 1))
    assert_close(apply_rotary_pos_emb(q, k, cos, sin, impl=impl), expected, rtol=0, atol=0)


TABLE_LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.cat((x, x), dim=1)[:, x.shape[1] :],
    "last_dim_strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded_batch": lambda x: x[:1].expand(x.shape),
    "expanded_tokens": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", TABLE_LAYOUTS)
def test_layouts_of_cos_and_sin(impl, layout):
    q, k = qk()
    cos, sin = (TABLE_LAYOUTS[layout](x) for x in tables())
    expected = apply_rotary_pos_emb(q, k, cos.contiguous(), sin.contiguous(), impl=impl)
    assert_close(apply_rotary_pos_emb(q, k, cos, sin, impl=impl), expected, rtol=0, atol=0)
    # cos and sin need not share a layout.
    actual = apply_rotary_pos_emb(q, k, cos.contiguous(), sin, impl=impl)
    assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_table_row_serves_the_batch(impl):
    q, k = qk(batch=3)
    cos, sin = tables(1)
    expected = apply_rotary_pos_emb(q, k, cos.repeat(3, 1, 1), sin.repeat(3, 1, 1), impl=impl)
    actual = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_of_each_row_are_used(impl):
    """Two packed sequences in row 0, left padding in row 1: each token turns by its own angle."""
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]])
    q, k = qk(seq_len=5)
    actual = apply_rotary_pos_emb(q, k, *angles(positions, 16), impl=impl)
    for row in range(2):
        for token in range(5):
            here = (slice(row, row + 1), slice(None), slice(token, token + 1))
            table = angles(positions[row : row + 1, token : token + 1], 16)
            alone = apply_rotary_pos_emb(q[here], k[here], *table, impl=impl)
            assert_close([x[here] for x in actual], list(alone))


@pytest.mark.parametrize("impl", IMPLS)
def test_norms_are_preserved(impl):
    q, k = qk(seq_len=4, dtype=WIDEST)
    cos, sin = angles([[0, 1, 8192, 10**6]] * 2, 16, WIDEST)
    actual = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    for ours, x in zip(actual, (q, k), strict=True):
        assert_close(ours.norm(dim=-1), x.norm(dim=-1))
        # Position 0 is not turned; the others are.
        assert torch.equal(ours[:, :, 0], x[:, :, 0])
        assert ((ours - x).abs().amax(-1)[:, :, 1:] > 1e-3).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_rotation_by_the_negative_angle_is_the_inverse(impl):
    q, k = qk(dtype=WIDEST)
    cos, sin = angles([[1, 17, 8192], [2, 3, 10**6]], 16, WIDEST)
    there = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    assert_close(apply_rotary_pos_emb(*there, cos, -sin, impl=impl), (q, k))


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_depend_on_the_distance_alone(impl):
    q, k = (x[:, :, :1].expand(2, 2, 3, 16) for x in qk(heads_q=2, dtype=WIDEST))

    def scores(shift):
        table = angles([[shift, shift + 5, shift + 11]], 16, WIDEST)
        q_rotated, k_rotated = apply_rotary_pos_emb(q, k, *table, impl=impl)
        return q_rotated @ k_rotated.transpose(-1, -2)

    assert_close(scores(20_000), scores(0), rtol=1e-4, atol=1e-5)
    distance = scores(0)[0, 0]
    assert (distance[0, 1] - distance[0, 2]).abs() > 1e-2


@pytest.mark.parametrize("impl", IMPLS)
def test_far_positions_in_float32(impl):
    q, k = qk(seq_len=4, head_dim=64)
    cos, sin = angles([[8_192, 131_071, 999_999, 10**6]] * 2, 64)
    actual = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    expected = oracle(q, k, cos, sin)
    baseline = transformers_rope(q, k, cos, sin)
    for ours, theirs, exact in zip(actual, baseline, expected, strict=True):
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_results_have_their_inputs_dtype(impl):
    q, k = qk()
    cos, sin = tables()
    exact_q, exact_k = oracle(q.half(), k, cos, sin)
    actual_q, actual_k = apply_rotary_pos_emb(q.half(), k, cos, sin, impl=impl)
    assert actual_q.dtype == torch.float16 and actual_k.dtype == torch.float32
    assert_close(actual_q.double(), exact_q, rtol=2e-3, atol=2e-3)
    assert_close(actual_k.double(), exact_k, rtol=1e-5, atol=1e-5)
    # A narrower table does not lower the precision of the arithmetic.
    exact_q, _ = oracle(q, k, cos.half(), sin.half())
    actual_q, _ = apply_rotary_pos_emb(q, k, cos.half(), sin.half(), impl=impl)
    assert_close(actual_q.double(), exact_q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)))
def test_empty_inputs(impl, shape):
    q, k = qk(*shape)
    cos, sin = tables(*shape[:2])
    actual = apply_rotary_pos_emb(q, k, cos, sin, impl=impl)
    assert [x.shape for x in actual] == [q.shape, k.shape]
    assert_close(actual, tuple(oracle(q, k, cos, sin)), check_dtype=False)


@pytest.mark.parametrize("impl", ("eager", pytest.param("triton", marks=kernel)))
def test_memory_order_of_heads_and_tokens_is_kept(impl):
    cos, sin = tables()
    q, k = qk()
    for x in apply_rotary_pos_emb(q, k, cos, sin, impl=impl):
        assert x.transpose(1, 2).is_contiguous()
    for x in apply_rotary_pos_emb(q.contiguous(), k.contiguous(), cos, sin, impl=impl):
        assert x.is_contiguous()
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    for x in apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2, impl=impl):
        assert x.is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rotary_dim", (16, 8))
def test_inputs_are_neither_written_nor_aliased(impl, rotary_dim):
    inputs = (*qk(), *tables(rotary_dim=rotary_dim))
    copies = [x.clone() for x in inputs]
    outputs = apply_rotary_pos_emb(*inputs, impl=impl)
    for x, copy in zip(inputs, copies, strict=True):
        assert torch.equal(x, copy) and x._version == 0
    storages = {x.untyped_storage().data_ptr() for x in (*inputs, *outputs)}
    assert len(storages) == 6


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_head_and_token(impl):
    q, k = qk()
    q[1, 2, 0, 3] = torch.nan
    actual_q, actual_k = apply_rotary_pos_emb(q, k, *tables(), impl=impl)
    assert actual_q[1, 2, 0].isnan().sum() == 2
    assert actual_q.isnan().sum() == 2 and not actual_k.isnan().any()


@kernel
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    seq_len=st.integers(1, 2),
    heads_q=st.integers(0, 6),
    heads_k=st.integers(0, 3),
    half=st.integers(1, 17),
    tail=st.integers(0, 9),
    shared_table=st.booleans(),
    order=st.permutations(range(4)),
)
def test_kernel_on_any_shape(batch, seq_len, heads_q, heads_k, half, tail, shared_table, order):
    q, k = qk(batch, seq_len, heads_q, heads_k, 2 * half + tail)
    # Laid out in memory in any order of the dimensions.
    inverse = torch.tensor(order).argsort().tolist()
    q, k = (x.permute(order).contiguous().permute(inverse) for x in (q, k))
    cos, sin = tables(1 if shared_table else batch, seq_len, 2 * half)
    actual = apply_rotary_pos_emb(q, k, cos, sin, impl="triton")
    expected = apply_rotary_pos_emb(q, k, cos, sin, impl="reference")
    assert_close(actual, expected)
