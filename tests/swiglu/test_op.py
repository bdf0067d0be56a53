"""The operation's surroundings: messages, dispatch, imports, torch.compile and the launches."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from lora_kernels import dispatch
from lora_kernels.swiglu import op
from lora_kernels.swiglu.op import swiglu

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel

OP_IMPLS = ("eager", pytest.param("triton", marks=kernel))


def inputs(*shape, device=DEVICE):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(device) for _ in range(2))


ZEROS = torch.zeros(3, 8)
WRONG = {
    "scalars": (
        (torch.zeros(()), torch.zeros(())), ValueError, "gate: expected at least 1 dimension",
    ),
    "shapes": (
        (ZEROS, torch.zeros(1, 8)), ValueError, r"up: expected gate's shape \(3, 8\), got \(1, 8\)",
    ),
    "dtypes": (
        (ZEROS, ZEROS.half()), TypeError,
        "up: expected gate's dtype torch.float32, got torch.float16",
    ),
    "gate_dtype": (
        (ZEROS.long(), ZEROS), TypeError, "gate: expected a dtype of .* got torch.int64",
    ),
    "up_dtype": ((ZEROS, ZEROS.long()), TypeError, "up: expected a dtype of .* got torch.int64"),
    "devices": (
        (ZEROS, ZEROS.to("meta")), ValueError, "up: expected gate's device cpu, got meta",
    ),
    "gate_not_a_tensor": ((1.0, ZEROS), TypeError, r"gate: expected a torch\.Tensor, got float"),
    "up_not_a_tensor": ((ZEROS, None), TypeError, r"up: expected a torch\.Tensor, got NoneType"),
    "unknown_impl": ((ZEROS, ZEROS, "cuda"), ValueError, r"impl: expected one of .* got 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        swiglu(*arguments)


def test_triton_by_name_does_not_fall_back(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device, dtype: "no Triton")
    with pytest.raises(ValueError, match="impl='triton' cannot run here: no Triton"):
        swiglu(*inputs(3, 8), impl="triton")


@kernel
@pytest.mark.skipif(CUDA, reason="bfloat16 is refused by the interpreter alone")
def test_interpreter_refuses_bfloat16():
    with pytest.raises(ValueError, match="bfloat16"):
        swiglu(*(x.bfloat16() for x in inputs(3, 8)), impl="triton")


def test_auto_on_the_cpu_is_eager(monkeypatch):
    calls, forward = [], op.eager.forward
    monkeypatch.setattr(op.eager, "forward", lambda *args: (calls.append(1), forward(*args)))
    arguments = inputs(3, 8, device="cpu")
    actual = swiglu(*arguments)
    assert calls == [1]
    assert torch.equal(actual, swiglu(*arguments, impl="eager"))


def test_importing_the_operation_imports_no_triton():
    code = "import sys, lora_kernels.swiglu.op; sys.exit('triton' in sys.modules)"
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
    compiled = torch.compile(swiglu, fullgraph=True, backend=backend)
    for needs in ((True, True), (True, False), (False, True)):
        leaves = [
            x.detach().requires_grad_(need) for x, need in zip(inputs(3, 8), needs, strict=True)
        ]
        needing = [x for x in leaves if x.requires_grad]
        out, expected = compiled(*leaves, impl), swiglu(*leaves, impl)
        assert_close(out, expected)
        actual_gradients, expected_gradients = (
            torch.autograd.grad(result.square().sum(), needing) for result in (out, expected)
        )
        assert_close(actual_gradients, expected_gradients)


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_compiled_number_of_rows_is_dynamic(impl):
    torch._dynamo.reset()
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9, 2):
            leaves = [x.requires_grad_() for x in inputs(rows, 8)]
            actual, expected = compiled(*leaves, impl), swiglu(*leaves, "reference")
            assert_close(actual, expected)
            assert_close(
                torch.autograd.grad(actual.square().sum(), leaves),
                torch.autograd.grad(expected.square().sum(), leaves),
            )


# The launches


class Launches:
    """Stands in for a kernel and records how it would have been launched."""

    def __init__(self):
        self.grids, self.positional, self.arguments = [], [], []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: (self.positional.append(args), self.arguments.append(kwargs))


@pytest.fixture
def compile_cases():
    from lora_kernels.swiglu import triton_kernel

    return list(triton_kernel.compile_cases())


@pytest.fixture
def launches(monkeypatch):
    from lora_kernels.swiglu import triton_kernel

    forward, backward = Launches(), Launches()
    monkeypatch.setattr(triton_kernel, "_forward_kernel", forward)
    monkeypatch.setattr(triton_kernel, "_backward_kernel", backward)
    return forward, backward


@kernel
@pytest.mark.parametrize(
    "layout, programs", (("contiguous", 137), ("rows", 70_000), ("expanded", 70_000))
)
def test_one_launch_a_pass_on_axis_0(launches, layout, programs):
    """Contiguous tensors are cut into blocks; rows of two elements take a program each."""
    forward, backward = launches
    gate, up = inputs(70_000, 2)
    if layout == "rows":
        gate, up = torch.cat((gate, up), 1).chunk(2, 1)
    if layout == "expanded":
        up = up[:1].expand(70_000, 2)
    gate.requires_grad_()
    out = swiglu(gate, up, impl="triton")
    out.backward(torch.ones_like(out))
    assert forward.grids == backward.grids == [(programs,)]
    assert not forward.arguments[0]["INT64"] and not backward.arguments[0]["INT64"]


@kernel
def test_nothing_is_launched_for_empty_inputs(launches):
    gate, up = (x.requires_grad_() for x in inputs(0, 8))
    swiglu(gate, up, impl="triton").sum().backward()
    assert launches[0].grids == launches[1].grids == []


@kernel
@pytest.mark.parametrize("layout", ("contiguous", "rows", "strided"))
def test_64_bit_offsets_give_the_same_bits(layout, same_bits):
    from lora_kernels.swiglu import triton_kernel

    gate, up = inputs(6, 1030)
    if layout == "rows":
        gate, up = torch.cat((gate, up), 1).chunk(2, 1)
    if layout == "strided":
        gate = gate.t().contiguous().t()
    results = []
    for int64 in (False, True):
        out, d_gate, d_up = (torch.empty(6, 1030, device=DEVICE) for _ in range(3))
        triton_kernel.forward(gate, up, out, int64=int64)
        triton_kernel.backward(up * 2, gate, up, d_gate, d_up, int64=int64)
        results.append((out, d_gate, d_up))
    same_bits(7, "tensors that forced 64-bit offsets change", *results)


@kernel
def test_64_bit_offsets_are_chosen_in_time():
    from lora_kernels.swiglu.triton_kernel import _BLOCK, needs_int64

    def meta(shape, strides):
        return torch.empty(1, device="meta").as_strided(shape, strides)

    # Masked lanes reach one block beyond the last column.
    last = 2**31 - 1
    near, far = (meta((1, last - _BLOCK + extra), (1, 1)) for extra in (1, 2))
    assert not needs_int64(near) and needs_int64(far)
    assert needs_int64(near, far) and needs_int64(far, near)
    assert needs_int64(meta((3, 4), (2**30, 1)))
    # A broadcast dimension reaches nowhere.
    assert not needs_int64(meta((2**31, 4), (0, 1)))


@kernel
def test_offsets_beyond_32_bits(monkeypatch, figure):
    """Rows 2**30 elements apart: only the pages that are used take up memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        base = torch.empty(2**31 + 48, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    far = base.as_strided((3, 16), (2**30, 1))
    gate, up = (x.half() for x in inputs(3, 16))
    dout = gate * 2 + 1

    def run(gate, up, dout):
        gate, up = (x.detach().requires_grad_() for x in (gate, up))
        out = swiglu(gate, up, impl="triton")
        return out.detach(), *torch.autograd.grad(out, (gate, up), dout)

    tensors = {"gate": gate, "up": up, "dout": dout}
    expected = run(**tensors)
    for name, x in tensors.items():
        far.copy_(x)
        assert_close(run(**tensors | {name: far}), expected, rtol=0, atol=0)
    figure(7, "largest offset that ran, in elements", 2 * 2**30 + 15)


@kernel
@pytest.mark.parametrize("columns", (9, 1500))
@pytest.mark.parametrize("layout", ("contiguous", "rows"))
def test_every_element_is_written_and_none_beyond(columns, layout):
    from lora_kernels.swiglu import triton_kernel

    gate, up = inputs(5, columns)
    if layout == "rows":
        gate, up = torch.cat((gate, up), 1).chunk(2, 1)
    bands = [torch.full((7, columns), torch.nan, device=DEVICE) for _ in range(3)]
    out, d_gate, d_up = (band[1:6] for band in bands)
    triton_kernel.forward(gate, up, out)
    triton_kernel.backward(up, gate, up, d_gate, d_up)
    assert_close(out, swiglu(gate, up, impl="reference"))
    assert all(band.isfinite().sum() == gate.numel() for band in bands)


@kernel
def test_compile_cases_are_what_is_launched(compile_cases, launches):
    """A launch of the layout that a case stands for has the case's configuration."""
    from lora_kernels.swiglu import triton_kernel

    strides = {"contiguous": (4096, 1), "rows": (8192, 1), "strided": (3, 3 * 64)}
    assert len({case.name for case in compile_cases}) == len(compile_cases)
    for case in compile_cases:
        layout = next(name for name in strides if name in case.name)
        x = torch.empty(1, device="meta").as_strided((64, 4096), strides[layout])
        dense = torch.empty(64, 4096, device="meta")
        backward = "NEED_UP" in case.constexprs
        if backward:
            d_gate = dense if case.constexprs["NEED_GATE"] else None
            triton_kernel.backward(
                x, x, x, d_gate, dense if case.constexprs["NEED_UP"] else None,
                int64=case.constexprs["INT64"],
            )  # fmt: skip
        else:
            triton_kernel.forward(x, x, dense, int64=case.constexprs["INT64"])
        launched, positional = launches[backward].arguments[-1], launches[backward].positional[-1]
        values = dict(zip(case.kernel.arg_names, positional, strict=False)) | launched
        assert launched["num_warps"] == case.num_warps
        assert launched["num_stages"] == case.num_stages
        assert {name: values[name] for name in case.constexprs} == case.constexprs
        assert set(case.signature) == set(case.kernel.arg_names)
