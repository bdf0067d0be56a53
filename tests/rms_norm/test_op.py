"""The operation's surroundings: messages, dispatch, imports, torch.compile and the launches."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from lora_kernels import dispatch
from lora_kernels.rms_norm import op
from lora_kernels.rms_norm.op import rms_norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel
EPS = 1e-5

OP_IMPLS = ("eager", pytest.param("triton", marks=kernel))


def inputs(*shape, device=DEVICE):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device)

    return {"x": randn(*shape), "weight": randn(shape[-1]), "residual": randn(*shape), "eps": EPS}


WRONG = {
    "scalar": ({"x": torch.zeros(())}, ValueError, r"x: expected \[..., H\] .* got shape \(\)"),
    "no_features": (
        {"x": torch.zeros(3, 0)}, ValueError, r"x: expected \[..., H\] .* got shape \(3, 0\)",
    ),
    "weight_size": (
        {"weight": torch.zeros(7)}, ValueError,
        r"weight: expected shape \(8,\), x's last dimension, got \(7,\)",
    ),
    "weight_dims": (
        {"weight": torch.zeros(1, 8)}, ValueError, r"weight: expected shape \(8,\), .* \(1, 8\)",
    ),
    "residual_shape": (
        {"residual": torch.zeros(1, 8)}, ValueError,
        r"residual: expected x's shape \(3, 8\), got \(1, 8\)",
    ),
    "residual_dtype": (
        {"residual": torch.zeros(3, 8).half()}, TypeError,
        "residual: expected x's dtype torch.float32, got torch.float16",
    ),
    "eps_negative": ({"eps": -1e-6}, ValueError, "eps: expected a number .* got -1e-06"),
    "eps_nan": ({"eps": float("nan")}, ValueError, "eps: expected a number .* got nan"),
    "eps_tensor": (
        {"eps": torch.tensor(1e-5)}, TypeError, "eps: expected a float, got Tensor",
    ),
    "eps_bool": ({"eps": True}, TypeError, "eps: expected a float, got bool"),
    "x_not_a_tensor": ({"x": [1.0]}, TypeError, r"x: expected a torch\.Tensor, got list"),
    "weight_not_a_tensor": (
        {"weight": 1.0}, TypeError, r"weight: expected a torch\.Tensor, got float",
    ),
    "residual_not_a_tensor": (
        {"residual": 0.0}, TypeError, r"residual: expected a torch\.Tensor, got float",
    ),
    "unknown_impl": ({"impl": "cuda"}, ValueError, r"impl: expected one of .* got 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    changes, error, message = WRONG[case]
    arguments = inputs(3, 8, device="cpu") | changes
    with pytest.raises(error, match=message):
        rms_norm(**arguments)


@pytest.mark.parametrize("name", ("x", "weight", "residual"))
def test_wrong_dtypes_and_devices(name):
    arguments = inputs(3, 8, device="cpu")
    with pytest.raises(TypeError, match=f"{name}: expected a dtype of .* got torch.int64"):
        rms_norm(**arguments | {name: arguments[name].long()})
    if name != "x":
        with pytest.raises(ValueError, match=f"{name}: expected x's device cpu, got meta"):
            rms_norm(**arguments | {name: arguments[name].to("meta")})


def test_triton_by_name_does_not_fall_back(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device, dtype: "no Triton")
    with pytest.raises(ValueError, match="impl='triton' cannot run here: no Triton"):
        rms_norm(**inputs(3, 8), impl="triton")


@kernel
@pytest.mark.skipif(CUDA, reason="bfloat16 is refused by the interpreter alone")
@pytest.mark.parametrize("names", (("weight",), ("x", "residual")))
def test_interpreter_refuses_bfloat16(names):
    arguments = inputs(3, 8)
    arguments |= {name: arguments[name].bfloat16() for name in names}
    with pytest.raises(ValueError, match="bfloat16"):
        rms_norm(**arguments, impl="triton")


def test_auto_on_the_cpu_is_eager(monkeypatch):
    arguments = inputs(3, 8, device="cpu")
    expected = rms_norm(**arguments, impl="eager")
    calls, forward = [], op.eager.forward
    monkeypatch.setattr(op.eager, "forward", lambda *args: (calls.append(1), forward(*args)))
    assert_close(rms_norm(**arguments), expected, rtol=0, atol=0)
    assert calls == [1]


@kernel
def test_auto_takes_eager_where_one_dtype_cannot_use_triton(monkeypatch):
    from lora_kernels.rms_norm import triton_kernel

    calls = []
    monkeypatch.setattr(triton_kernel, "forward", lambda *args: calls.append(1))
    monkeypatch.setattr(
        op, "resolve", lambda impl, device, dtype: "triton" if dtype == torch.float32 else "eager"
    )
    x, weight = inputs(3, 8)["x"], inputs(3, 8)["weight"]
    rms_norm(x, weight, EPS)
    assert len(calls) == 1
    rms_norm(x.half(), weight, EPS)
    rms_norm(x, weight.half(), EPS)
    assert len(calls) == 1


def test_importing_the_operation_imports_no_triton():
    code = "import sys, lora_kernels.rms_norm.op; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "impl, backend, with_residual",
    (
        ("auto", "aot_eager", False),
        ("auto", "inductor", True),
        ("reference", "aot_eager", True),
        ("eager", "aot_eager", True),
        pytest.param("triton", "aot_eager", False, marks=kernel),
        pytest.param("triton", "aot_eager", True, marks=kernel),
    ),
)
def test_compiles_without_graph_breaks(impl, backend, with_residual):
    torch._dynamo.reset()

    def function(x, weight, residual):
        if with_residual:
            return rms_norm(x, weight, EPS, residual, impl=impl)
        return (rms_norm(x, weight, EPS, impl=impl),)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    arguments = inputs(3, 8)
    for weight_needs in (False, True):
        leaves = [arguments[name].detach() for name in ("x", "weight", "residual")]
        needing = [leaves[0].requires_grad_()]
        if weight_needs:
            needing.append(leaves[1].requires_grad_())
        if with_residual:
            needing.append(leaves[2].requires_grad_())
        outputs, expected = compiled(*leaves), function(*leaves)
        assert_close(outputs, expected)
        actual_gradients, expected_gradients = (
            torch.autograd.grad(sum(x.square().sum() for x in results), needing)
            for results in (outputs, expected)
        )
        assert_close(actual_gradients, expected_gradients)


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_compiled_number_of_rows_is_dynamic(impl):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(x, weight, residual):
        return rms_norm(x, weight, EPS, residual, impl=impl)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9, 2):
            arguments = inputs(rows, 8)
            x, weight, residual = arguments["x"], arguments["weight"], arguments["residual"]
            x.requires_grad_()
            actual = compiled(x, weight, residual)
            expected = rms_norm(x, weight, EPS, residual, impl="reference")
            assert_close(actual, expected)
            assert_close(
                torch.autograd.grad(actual[0].square().sum(), x),
                torch.autograd.grad(expected[0].square().sum(), x),
            )


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_nothing_but_the_total_and_its_statistics_is_saved(impl):
    arguments = inputs(4, 6)
    x, weight, residual = (arguments[name] for name in ("x", "weight", "residual"))
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, total = rms_norm(x, weight, EPS, residual, impl=impl)
    assert sorted(tuple(t.shape) for t in saved) == [(4,), (4, 6), (6,)]
    assert {t.data_ptr() for t in saved} >= {total.data_ptr(), weight.data_ptr()}
    assert y.data_ptr() not in {t.data_ptr() for t in saved}


# The launches


class Launches:
    """Stands in for a kernel and records how it would have been launched."""

    def __init__(self):
        self.grids, self.arguments = [], []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: self.arguments.append(kwargs)


@pytest.fixture
def launches(monkeypatch):
    from lora_kernels.rms_norm import triton_kernel

    forward, backward = Launches(), Launches()
    monkeypatch.setattr(triton_kernel, "forward_kernel", forward)
    monkeypatch.setattr(triton_kernel, "backward_kernel", backward)
    return forward, backward


@kernel
def test_one_launch_a_pass_with_rows_on_axis_0(launches, figure):
    forward, backward = launches
    arguments = inputs(70_000, 2)
    for name in ("x", "weight", "residual"):
        arguments[name].requires_grad_()
    y, total = rms_norm(**arguments, impl="triton")
    assert len(forward.grids) == 1 and len(backward.grids) == 0
    (y.sum() + total.sum()).backward()
    assert len(forward.grids) == len(backward.grids) == 1
    assert all(len(grid) == 1 for grid in forward.grids + backward.grids)
    assert backward.arguments[0]["HAS_D_TOTAL"] and backward.arguments[0]["NEED_WEIGHT"]
    assert not forward.arguments[0]["INT64"]
    figure(8, "largest grid, all of it on axis 0", forward.grids[0][0])


@kernel
def test_nothing_is_launched_for_empty_inputs(launches):
    arguments = inputs(0, 8)
    arguments["x"].requires_grad_()
    rms_norm(**arguments, impl="triton")[0].sum().backward()
    assert launches[0].grids == launches[1].grids == []


@kernel
@pytest.mark.parametrize("rows", (1, 2, 7, 64, 513, 4_096, 100_003))
@pytest.mark.parametrize("columns", (1, 64, 576, 4_096, 8_192, 16_384, 20_000))
def test_launches_cover_every_row_and_column(rows, columns):
    from lora_kernels.rms_norm.triton_kernel import backward_launch, forward_launch

    launches = [
        forward_launch(rows, columns),
        *(backward_launch(rows, columns, need_weight) for need_weight in (False, True)),
    ]
    for launch in launches:
        assert launch.padded_rows - rows < launch.tiles * launch.block_m
        assert launch.padded_rows >= rows
        for block in (launch.block_m, launch.block_h):
            assert block & (block - 1) == 0
        assert launch.block_m * launch.block_h <= 16_384
        # A row is read in one tile, or else by a program that takes one tile of rows.
        assert launch.block_h >= columns or launch.tiles == 1
    for launch in launches[:2]:
        assert launch.tiles == 1
    # The parts of d_weight are small beside what is read.
    assert launches[2].programs * 8 <= rows + 8 * launches[2].tiles * launches[2].block_m


@kernel
@pytest.mark.parametrize("columns", (10, 40))
@pytest.mark.parametrize("way", ("held", "wide"))
def test_64_bit_offsets_give_the_same_bits(monkeypatch, columns, way, same_bits):
    from lora_kernels.rms_norm import triton_kernel

    if way == "wide":
        monkeypatch.setattr(triton_kernel, "_WIDEST_FORWARD", 0)
        monkeypatch.setattr(triton_kernel, "_WIDEST_BACKWARD", 0)
        monkeypatch.setattr(triton_kernel, "_TILE_WIDE", 128)
    arguments = inputs(6, columns)
    x, weight, residual = (arguments[name] for name in ("x", "weight", "residual"))
    x, dy = x.t().contiguous().t(), x * 2 + 1
    results = []
    for int64 in (False, True):
        y, total, rstd = torch.empty_like(dy), torch.empty_like(dy), dy.new_empty(6)
        triton_kernel.forward(x, residual, weight, EPS, y, total, rstd, int64=int64)
        gradients = triton_kernel.backward(dy, x, total, weight, rstd, True, True, int64=int64)
        results.append((y, total, rstd, *gradients))
    same_bits(7, "tensors that forced 64-bit offsets change", *results)


@kernel
def test_64_bit_offsets_are_chosen_in_time():
    from lora_kernels.rms_norm.triton_kernel import Launch, needs_int64

    def meta(shape, strides):
        return torch.empty(1, device="meta").as_strided(shape, strides)

    launch = Launch(block_m=4, block_h=8, tiles=2, programs=1)
    # 8 padded rows and, of 5 columns, at most 5 + 7 in masked lanes: the last offset is 11.
    near, far = meta((3, 5), ((2**31 - 12) // 7, 1)), meta((3, 5), ((2**31 - 12) // 7 + 1, 1))
    assert not needs_int64(launch, near) and needs_int64(launch, far)
    assert needs_int64(launch, near, far) and needs_int64(launch, far, near)
    assert needs_int64(launch, meta((3, 5), (1, 2**28)))
    # A broadcast dimension reaches nowhere.
    assert not needs_int64(launch, meta((2**31, 5), (0, 1)))


@kernel
def test_offsets_beyond_32_bits(monkeypatch, figure):
    """Rows 2**30 elements apart: only the pages that are used take up memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        base = torch.empty(2**31 + 48, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    far = base.as_strided((3, 16), (2**30, 1))
    arguments = inputs(3, 16)
    x, weight, dy = (arguments[name].half() for name in ("x", "weight", "residual"))

    def run(x, dy):
        x = x.detach().requires_grad_()
        y, total = rms_norm(x, weight, EPS, x.detach(), impl="triton")
        return y.detach(), total.detach(), *torch.autograd.grad(y, x, dy)

    expected = run(x, dy)
    far.copy_(x)
    assert_close(run(far, dy), expected, rtol=0, atol=0)
    far.copy_(dy)
    assert_close(run(x, far), expected, rtol=0, atol=0)
    figure(7, "largest offset that ran, in elements", 2 * 2**30 + 15)


@kernel
@pytest.mark.parametrize("columns", (9, 33))
@pytest.mark.parametrize("way", ("held", "wide"))
def test_every_element_is_written_and_none_beyond(monkeypatch, columns, way):
    from lora_kernels.rms_norm import triton_kernel

    if way == "wide":
        monkeypatch.setattr(triton_kernel, "_WIDEST_FORWARD", 0)
        monkeypatch.setattr(triton_kernel, "_TILE_WIDE", 16)
    arguments = inputs(5, columns)
    x, weight, residual = (arguments[name] for name in ("x", "weight", "residual"))
    bands = [torch.full((7, columns), torch.nan, device=DEVICE) for _ in range(2)]
    y, total = (band[1:6] for band in bands)
    triton_kernel.forward(x, residual, weight, EPS, y, total, x.new_empty(5))
    expected = rms_norm(x, weight, EPS, residual, impl="reference")
    assert_close((y, total), expected)
    assert all(band.isfinite().sum() == x.numel() for band in bands)


@pytest.fixture
def compile_cases():
    from lora_kernels.rms_norm import triton_kernel

    return list(triton_kernel.compile_cases())


@kernel
def test_compile_cases_are_what_is_launched(compile_cases, launches):
    """A launch of the shape that a case stands for has the case's configuration."""
    from lora_kernels.rms_norm import triton_kernel

    assert len({case.name for case in compile_cases}) == len(compile_cases)
    for case in compile_cases:
        backward = "tiles" in case.kernel.arg_names
        constexprs = case.constexprs
        x = torch.empty(2048, constexprs["H"], device="meta")
        weight, rstd = x[0], x[:, 0].contiguous()
        if backward:
            triton_kernel.backward(
                x, x if constexprs["HAS_D_TOTAL"] else None, x, weight, rstd,
                constexprs["NEED_X"], constexprs["NEED_WEIGHT"],
            )  # fmt: skip
        else:
            residual = x if constexprs["HAS_RESIDUAL"] else None
            triton_kernel.forward(x, residual, weight, EPS, x, x, rstd)
        launched = launches[backward].arguments[-1]
        assert launched["num_warps"] == case.num_warps
        assert launched["num_stages"] == case.num_stages
        for name in ("H", "BLOCK_M", "BLOCK_H", "ACC"):
            assert launched[name] == constexprs[name]
        assert set(case.signature) == set(case.kernel.arg_names)
