"""The operation's surroundings: messages, dispatch, imports, torch.compile and the launch."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from lora_kernels import dispatch
from lora_kernels.rope import op
from lora_kernels.rope.op import apply_rotary_pos_emb

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel

OP_IMPLS = ("eager", pytest.param("triton", marks=kernel))


def inputs(batch=2, seq_len=3, heads_q=4, heads_k=2, head_dim=16, device=DEVICE):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device)

    return (
        randn(batch, heads_q, seq_len, head_dim),
        randn(batch, heads_k, seq_len, head_dim),
        randn(batch, seq_len, head_dim),
        randn(batch, seq_len, head_dim),
    )


WRONG = {
    "q_without_batch": (
        {"q": (4, 3, 16)}, ValueError, r"q: expected \[B, heads, T, D\], got shape \(4, 3, 16\)",
    ),
    "k_without_batch": (
        {"k": (2, 3, 16)}, ValueError, r"k: expected \[B, heads, T, D\], got shape \(2, 3, 16\)",
    ),
    "k_batch": (
        {"k": (1, 2, 3, 16)}, ValueError,
        r"k: expected q's shape \(2, 4, 3, 16\) but for dimension 1 \(heads\), "
        r"got shape \(1, 2, 3, 16\)",
    ),
    "k_tokens": ({"k": (2, 2, 4, 16)}, ValueError, r"k: expected .* got shape \(2, 2, 4, 16\)"),
    "k_head_dim": ({"k": (2, 2, 3, 8)}, ValueError, r"k: expected .* got shape \(2, 2, 3, 8\)"),
    "cos_dims": (
        {"cos": (3, 16)}, ValueError,
        r"cos: expected shape \[2 or 1, 3, rotary_dim\], got \(3, 16\)",
    ),
    "cos_batch": ({"cos": (3, 3, 16)}, ValueError, r"cos: expected .* got \(3, 3, 16\)"),
    "cos_tokens": ({"cos": (2, 1, 16)}, ValueError, r"cos: expected .* got \(2, 1, 16\)"),
    "sin_tokens": ({"sin": (2, 4, 16)}, ValueError, r"sin: expected .* got \(2, 4, 16\)"),
    "sin_batch": (
        {"sin": (1, 3, 16)}, ValueError,
        r"sin: expected cos's shape \(2, 3, 16\), got \(1, 3, 16\)",
    ),
    "sin_rotary_dim": (
        {"sin": (2, 3, 8)}, ValueError, r"sin: expected cos's shape \(2, 3, 16\), got \(2, 3, 8\)",
    ),
    "odd_rotary_dim": (
        {"cos": (2, 3, 15), "sin": (2, 3, 15)}, ValueError,
        r"cos: expected an even rotary_dim \(last dimension\) from 2 to head_dim 16, got 15",
    ),
    "rotary_dim_zero": (
        {"cos": (2, 3, 0), "sin": (2, 3, 0)}, ValueError, "cos: expected an even .* got 0",
    ),
    "rotary_dim_beyond_head_dim": (
        {"cos": (2, 3, 18), "sin": (2, 3, 18)}, ValueError, "cos: expected an even .* got 18",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_shapes_are_named(case):
    shapes, error, message = WRONG[case]
    tensors = dict(zip(("q", "k", "cos", "sin"), inputs(), strict=True))
    tensors |= {name: torch.zeros(shape, device=DEVICE) for name, shape in shapes.items()}
    with pytest.raises(error, match=message):
        apply_rotary_pos_emb(**tensors)


@pytest.mark.parametrize("unsqueeze_dim", (0, 3, -1, None))
def test_wrong_unsqueeze_dim(unsqueeze_dim):
    with pytest.raises(ValueError, match=f"unsqueeze_dim: expected 1 or 2, got {unsqueeze_dim}"):
        apply_rotary_pos_emb(*inputs(), unsqueeze_dim=unsqueeze_dim)


def test_layout_in_the_message_follows_unsqueeze_dim():
    q, k, cos, sin = inputs()
    q = q.transpose(1, 2)
    with pytest.raises(ValueError, match=r"dimension 2 \(heads\), got shape \(2, 2, 3, 16\)"):
        apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)


@pytest.mark.parametrize("name", ("q", "k", "cos", "sin"))
def test_wrong_dtypes_and_devices(name):
    tensors = dict(zip(("q", "k", "cos", "sin"), inputs(), strict=True))
    with pytest.raises(TypeError, match=f"{name}: expected a dtype of .* got torch.int64"):
        apply_rotary_pos_emb(**tensors | {name: tensors[name].long()})
    if name != "q":
        message = f"{name}: expected q's device {tensors['q'].device}, got meta"
        with pytest.raises(ValueError, match=message):
            apply_rotary_pos_emb(**tensors | {name: tensors[name].to("meta")})


@pytest.mark.parametrize("name", ("cos", "sin"))
@pytest.mark.parametrize("impl", ("reference", *OP_IMPLS))
def test_tables_take_no_gradient(name, impl):
    tensors = dict(zip(("q", "k", "cos", "sin"), inputs(), strict=True))
    tensors[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: expected a table without gradient"):
        apply_rotary_pos_emb(**tensors, impl=impl)


def test_unknown_implementation():
    with pytest.raises(ValueError, match=r"impl: expected one of .* got 'cuda'"):
        apply_rotary_pos_emb(*inputs(), impl="cuda")


def test_triton_by_name_does_not_fall_back(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device, dtype: "no Triton")
    with pytest.raises(ValueError, match="impl='triton' cannot run here: no Triton"):
        apply_rotary_pos_emb(*inputs(), impl="triton")


@kernel
@pytest.mark.skipif(CUDA, reason="bfloat16 is refused by the interpreter alone")
@pytest.mark.parametrize("name", ("q", "k", "cos", "sin"))
def test_interpreter_refuses_bfloat16(name):
    tensors = dict(zip(("q", "k", "cos", "sin"), inputs(), strict=True))
    tensors[name] = tensors[name].bfloat16()
    with pytest.raises(ValueError, match="bfloat16"):
        apply_rotary_pos_emb(**tensors, impl="triton")


def test_auto_on_the_cpu_is_eager():
    tensors = inputs(device="cpu")
    actual = apply_rotary_pos_emb(*tensors)
    assert_close(actual, apply_rotary_pos_emb(*tensors, impl="eager"), rtol=0, atol=0)


@kernel
def test_auto_takes_eager_where_one_dtype_cannot_use_triton(monkeypatch):
    from lora_kernels.rope import triton_kernel

    calls = []
    monkeypatch.setattr(triton_kernel, "rotate", lambda *args: calls.append(args))
    monkeypatch.setattr(
        op, "resolve", lambda impl, device, dtype: "triton" if dtype == torch.float32 else "eager"
    )
    tensors = dict(zip(("q", "k", "cos", "sin"), inputs(), strict=True))
    apply_rotary_pos_emb(**tensors)
    assert len(calls) == 1
    for name in tensors:
        apply_rotary_pos_emb(**tensors | {name: tensors[name].half()})
    assert len(calls) == 1


def test_importing_the_operation_imports_no_triton():
    code = "import sys, lora_kernels.rope.op; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "impl, backend",
    (
        ("auto", "aot_eager"),
        ("auto", "inductor"),
        ("reference", "aot_eager"),
        ("eager", "aot_eager"),
        pytest.param("triton", "aot_eager", marks=kernel),
    ),
)
def test_compiles_without_graph_breaks(impl, backend):
    torch._dynamo.reset()

    def function(q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    q, k, cos, sin = inputs()
    for q_needs, k_needs in ((True, True), (True, False)):
        q, k = q.detach().requires_grad_(q_needs), k.detach().requires_grad_(k_needs)
        needing = [x for x in (q, k) if x.requires_grad]
        outputs, expected = compiled(q, k, cos, sin), function(q, k, cos, sin)
        assert_close(outputs, expected)
        actual_gradients, expected_gradients = (
            torch.autograd.grad(sum(x.sum() for x in results), needing)
            for results in (outputs, expected)
        )
        assert_close(actual_gradients, expected_gradients)


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_compiled_sequence_length_is_dynamic(impl):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(*args):
        return apply_rotary_pos_emb(*args, impl=impl)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for seq_len in (5, 9, 2):
            q, k, cos, sin = inputs(seq_len=seq_len)
            q.requires_grad_()
            actual = compiled(q, k, cos, sin)
            expected = apply_rotary_pos_emb(q, k, cos, sin, impl="reference")
            assert_close(actual, expected)
            assert_close(
                torch.autograd.grad(actual[0].sum(), q), torch.autograd.grad(expected[0].sum(), q)
            )


@kernel
def test_compiled_function_follows_the_forced_implementation(monkeypatch):
    from lora_kernels.rope import triton_kernel

    calls, rotate = [], triton_kernel.rotate
    monkeypatch.setattr(triton_kernel, "rotate", lambda *args: (calls.append(1), rotate(*args)))
    torch._dynamo.reset()
    compiled = torch.compile(apply_rotary_pos_emb, fullgraph=True, backend="aot_eager")
    compiled(*inputs(), impl="eager")
    assert len(calls) == 0
    with dispatch.implementation("triton"):
        compiled(*inputs(), impl="eager")
    assert len(calls) == 1


@kernel
@pytest.mark.parametrize("rotary_dim", (16, 6))
@pytest.mark.parametrize("transpose", (False, True))
def test_64_bit_offsets_give_the_same_bits(rotary_dim, transpose, same_bits):
    from lora_kernels.rope.triton_kernel import rotate

    q, k, cos, sin = inputs()
    q, cos, sin = q.transpose(1, 3).contiguous().transpose(1, 3), cos[..., :rotary_dim], sin[:1]
    results = []
    for int64 in (False, True):
        outputs = torch.empty(q.shape, device=DEVICE), torch.empty(k.shape, device=DEVICE)
        rotate(q, k, cos, sin[..., :rotary_dim], *outputs, transpose, int64=int64)
        results.append(outputs)
    same_bits(7, "tensors that forced 64-bit offsets change", *results)


@kernel
def test_64_bit_offsets_are_chosen_in_time():
    from lora_kernels.rope.triton_kernel import needs_int64

    def meta(shape, strides):
        return torch.empty(1, device="meta").as_strided(shape, strides)

    # Padded lanes reach up to twice as far as the tensor.
    near, far = meta((2, 4), (2**30 - 4, 1)), meta((2, 4), (2**30 - 3, 1))
    assert not needs_int64(near) and needs_int64(far)
    assert needs_int64(near, far) and needs_int64(far, near)
    assert needs_int64(meta((1, 32, 2**18, 256), (2**31, 2**26, 256, 1)))
    # Neither a broadcast dimension nor one of size 1 reaches anywhere.
    assert not needs_int64(meta((2**20, 1, 2**12, 4), (0, 2**40, 4, 1)))
    assert not needs_int64(torch.empty(1).expand(2**31, 4))


@kernel
def test_offsets_beyond_32_bits(monkeypatch, figure):
    """Heads 2**30 elements apart: only the pages that are used take up memory."""
    with monkeypatch.context() as unfilled:
        unfilled.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        try:
            base = torch.empty(2**31 + 48, dtype=torch.float16, device=DEVICE)
        except RuntimeError:
            pytest.skip("no 4 GiB of address space")
    far = base.as_strided((1, 3, 3, 16), (0, 2**30, 16, 1))
    q, k, cos, sin = (x.half() for x in inputs(batch=1, heads_q=3))
    far.copy_(q)
    expected = apply_rotary_pos_emb(q, k, cos, sin, impl="triton")
    assert_close(apply_rotary_pos_emb(far, k, cos, sin, impl="triton"), expected, rtol=0, atol=0)
    expected = apply_rotary_pos_emb(k, q, cos, sin, impl="triton")
    assert_close(apply_rotary_pos_emb(k, far, cos, sin, impl="triton"), expected, rtol=0, atol=0)
    figure(7, "largest offset that ran, in elements", 2 * 2**30 + 2 * 16 + 15)


class Launches:
    """Stands in for the kernel and records how it would have been launched."""

    def __init__(self):
        self.grids, self.arguments = [], []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: self.arguments.append(kwargs)


@kernel
def test_one_launch_with_tokens_on_axis_0(monkeypatch, figure):
    from lora_kernels.rope import triton_kernel

    launches = Launches()
    monkeypatch.setattr(triton_kernel, "_rotate_kernel", launches)
    apply_rotary_pos_emb(*inputs(batch=2, seq_len=70_000, head_dim=2), impl="triton")
    assert launches.grids == [(140_000,)]
    figure(8, "largest grid, all of it on axis 0", launches.grids[0][0])
    assert launches.arguments[0]["INT64"] is False


@kernel
@pytest.mark.parametrize("sizes", ({"batch": 0}, {"seq_len": 0}, {"heads_q": 0, "heads_k": 0}))
def test_nothing_is_launched_for_empty_inputs(monkeypatch, sizes):
    from lora_kernels.rope import triton_kernel

    launches = Launches()
    monkeypatch.setattr(triton_kernel, "_rotate_kernel", launches)
    apply_rotary_pos_emb(*inputs(**sizes), impl="triton")
    assert launches.grids == []


@kernel
@pytest.mark.skipif(not CUDA, reason="70,000 programs take the interpreter minutes")
def test_more_tokens_than_65_535():
    tensors = inputs(batch=2, seq_len=70_000, heads_q=1, heads_k=1, head_dim=64)
    actual = apply_rotary_pos_emb(*tensors, impl="triton")
    assert_close(actual, apply_rotary_pos_emb(*tensors, impl="reference"))


@kernel
@pytest.mark.parametrize("rotary_dim", (16, 10, 6))
def test_every_element_is_written_and_none_beyond(rotary_dim):
    from lora_kernels.rope.triton_kernel import rotate

    q, k, cos, sin = inputs(heads_q=5, heads_k=3)
    cos, sin = cos[..., :rotary_dim], sin[..., :rotary_dim]
    bands = [torch.full((4, x.shape[1] + 2, 5, 18), torch.nan, device=DEVICE) for x in (q, k)]
    outputs = [band[1:3, 1:-1, 1:4, 1:17] for band in bands]
    rotate(q, k, cos, sin, *outputs, False)
    expected = apply_rotary_pos_emb(q, k, cos, sin, impl="reference")
    assert_close(tuple(outputs), expected)
    for band, x in zip(bands, (q, k), strict=True):
        assert band.isfinite().sum() == x.numel()
