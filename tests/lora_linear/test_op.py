"""The public operation: bad input, dtypes, scaling, dispatch, torch.compile, 64-bit offsets."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels import testing
from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear import op
from lora_kernels.lora_linear.op import lora_linear

KERNEL = pytest.param("triton", marks=pytest.mark.kernel)


def arguments(dtype=torch.float32, device="cpu", m=17, n=33, k=20, r=5):
    t = testing.lora_linear_inputs(m, n, k, r, dtype, device)
    return [t[name] for name in ("x", "weight", "lora_a", "lora_b")], t["bias"], t["dy"]


BAD_SHAPES = {
    "x": (lambda a: a.__setitem__(0, a[0][:, :-1]), r"x: expected shape \(17, 20\).*\(17, 19\)"),
    "weight": (lambda a: a.__setitem__(1, a[1][0]), r"weight: expected 2 dimensions"),
    "lora_a": (lambda a: a.__setitem__(2, a[2][:, :-1]), r"lora_a: expected shape \(5, 20\)"),
    "lora_b": (lambda a: a.__setitem__(3, a[3].t()), r"lora_b: expected shape \(33, 5\)"),
    "rank 0": (lambda a: a.__setitem__(2, a[2][:0]), r"lora_a: expected a rank of at least 1"),
    "scalar x": (lambda a: a.__setitem__(0, torch.tensor(1.0)), r"x: expected at least 1 dim"),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_bad_shapes(name):
    tensors, _, _ = arguments()
    breaks, message = BAD_SHAPES[name]
    breaks(tensors)
    with pytest.raises(ValueError, match=message):
        lora_linear(*tensors)


def test_bad_arguments():
    tensors, bias, _ = arguments()
    with pytest.raises(ValueError, match=r"bias: expected shape \(33,\).*\(32,\)"):
        lora_linear(*tensors, bias=bias[:-1])
    with pytest.raises(ValueError, match=r"dropout_p: expected a probability in \[0, 1\), got 1"):
        lora_linear(*tensors, dropout_p=1)
    with pytest.raises(ValueError, match=r"impl: expected one of .*'fast'"):
        lora_linear(*tensors, impl="fast")
    with pytest.raises(TypeError, match="scaling: expected a float or a tensor, got str"):
        lora_linear(*tensors, "2")
    with pytest.raises(ValueError, match=r"scaling: .* one element, got .* shape \(2,\)"):
        lora_linear(*tensors, torch.ones(2))
    with pytest.raises(ValueError, match="scaling: expected requires_grad=False"):
        lora_linear(*tensors, torch.ones((), requires_grad=True))
    with pytest.raises(TypeError, match=r"lora_b: expected a torch.Tensor, got NoneType"):
        lora_linear(*tensors[:3], None)
    with pytest.raises(
        TypeError, match=r"lora_a: expected a floating-point dtype, got torch.int64"
    ):
        lora_linear(*tensors[:2], tensors[2].long(), tensors[3])
    with pytest.raises(TypeError, match=r"weight: expected x's dtype torch.float32, got .*float64"):
        lora_linear(tensors[0], tensors[1].double(), *tensors[2:])
    with pytest.raises(TypeError, match=r"bias: expected x's dtype"):
        lora_linear(*tensors, bias=bias.half())
    with pytest.raises(ValueError, match=r"lora_a: expected x's device cpu, got meta"):
        lora_linear(*tensors[:2], tensors[2].to("meta"), tensors[3])


def test_a_trainable_weight_is_refused():
    """A weight that asks for a gradient would silently get none."""
    tensors, _, _ = arguments()
    tensors[1].requires_grad_()
    with pytest.raises(ValueError, match="weight: expected requires_grad=False"):
        lora_linear(*tensors)
    with torch.no_grad():
        lora_linear(*tensors)


@pytest.mark.parametrize("impl", [KERNEL, "eager", "reference"])
def test_leading_dimensions(impl, device):
    tensors, bias, _ = arguments(device=device, m=24)
    flat = lora_linear(*tensors, 0.5, bias, impl=impl)
    cube = lora_linear(tensors[0].view(2, 3, 4, 20), *tensors[1:], 0.5, bias, impl=impl)
    vector = lora_linear(tensors[0][0], *tensors[1:], 0.5, bias, impl=impl)
    assert cube.shape == (2, 3, 4, 33) and vector.shape == (33,)
    assert torch.equal(cube.view(24, 33), flat)
    torch.testing.assert_close(vector, flat[0])


@pytest.mark.parametrize("impl", [KERNEL, "eager", "reference"])
def test_scaling_may_be_a_tensor(impl, device):
    """A float and a tensor of one element give the same, forward and backward."""
    tensors, bias, dy = arguments(device=device)
    results = []
    for scaling in (0.75, torch.tensor(0.75, device=device), torch.tensor([0.75], device=device)):
        leaves = [t.clone().requires_grad_(i != 1) for i, t in enumerate(tensors)]
        y = lora_linear(*leaves, scaling, bias, impl=impl)
        y.backward(dy)
        results.append([y, *(t.grad for t in leaves if t.requires_grad)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter compiles nothing")
def test_a_new_scale_compiles_nothing():
    from lora_kernels.lora_linear.triton_forward import one_pass_kernel

    tensors, _, _ = arguments(device="cuda")
    lora_linear(*tensors, 0.5, impl="triton")
    before = sum(len(cache[0]) for cache in one_pass_kernel.device_caches.values())
    lora_linear(*tensors, 1.7, impl="triton")
    assert sum(len(cache[0]) for cache in one_pass_kernel.device_caches.values()) == before


def test_delta_is_added_to_the_base():
    tensors, bias, _ = arguments()
    x, weight, lora_a, lora_b = tensors
    base = torch.nn.functional.linear(x, weight, bias)
    for impl in ("eager", "reference"):
        y = lora_linear(x, weight, lora_a, lora_b * 0, 2.0, bias, impl=impl)
        assert torch.equal(y, base)
        y = lora_linear(x, weight, lora_a, lora_b, 2.0, bias, impl=impl)
        torch.testing.assert_close(y - base, 2.0 * x @ lora_a.t() @ lora_b.t())


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_outputs_and_gradients(dtype, autocast, adapter_dtype):
    """y has x's dtype, or autocast's; each gradient has its own tensor's dtype."""
    tensors, bias, _ = arguments(dtype)
    x, weight, lora_a, lora_b = (t.detach().clone() for t in tensors)
    lora_a, lora_b = lora_a.to(adapter_dtype), lora_b.to(adapter_dtype)
    leaves = [t.requires_grad_() for t in (x, lora_a, lora_b, bias)]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        expected = torch.nn.functional.linear(x, weight, bias)
        y = lora_linear(x, weight, lora_a, lora_b, 0.5, bias)
    assert y.dtype == expected.dtype == (autocast or dtype)
    y.float().sum().backward()
    for leaf in leaves:
        assert leaf.grad.dtype == leaf.dtype
        assert torch.isfinite(leaf.grad).all() and leaf.grad.any()


def test_autocast_computes_what_the_casts_say():
    tensors, bias, _ = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(*tensors, 0.5, bias)
    assert torch.equal(y, lora_linear(*(t.bfloat16() for t in tensors), 0.5, bias.bfloat16()))


@pytest.mark.parametrize("impl", [KERNEL, "eager"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", [{}, {"tensor_scaling": True}, {"dropout": True}], ids=str)
def test_opcheck(impl, count, options, device):
    x, weights, lora_as, lora_bs, biases = None, [], [], [], []
    for g in range(count):
        (x, weight, lora_a, lora_b), bias, _ = arguments(device=device, m=9, n=33 - g, r=5 + g)
        weights.append(weight)
        for tensors, tensor in ((lora_as, lora_a), (lora_bs, lora_b), (biases, bias)):
            tensors.append(tensor.requires_grad_())
    scaling = torch.full((count,), 0.5, device=device) if "tensor_scaling" in options else None
    seeds = torch.arange(3, 3 + count, device=device) if "dropout" in options else None
    p = 0.0 if seeds is None else 0.25
    scalings = [0.5] * count
    sample = (
        x.requires_grad_(), weights, lora_as, lora_bs, biases, [], scalings, scaling, seeds, p, impl
    )  # fmt: skip
    torch.library.opcheck(op._forward_op, (*sample, True))
    ys, s = op._forward_op(*sample, True)
    a, b = ([t.detach() for t in tensors] for tensors in (lora_as, lora_bs))
    saved = ([y.detach() for y in ys], x.detach(), weights, a, b, s.detach(), scalings, scaling)
    torch.library.opcheck(op._gradients_op, (*saved, seeds, p, impl, [True, True, False, True]))


@pytest.mark.parametrize("impl", [KERNEL, "eager", "auto"])
def test_torch_compile_has_no_graph_break(impl, device):
    """fullgraph, dynamic numbers of rows, forward and backward equal to eager's."""
    compiled = torch.compile(
        lambda *t: lora_linear(*t[:4], 0.5, t[4], impl=impl).sin(), fullgraph=True, dynamic=True
    )
    for m in (12, 19):
        (x, *rest), bias, _ = arguments(device=device, m=m)
        results = []
        for function in (compiled, lambda *t: lora_linear(*t[:4], 0.5, t[4], impl=impl).sin()):
            leaves = [t.clone().requires_grad_(i != 1) for i, t in enumerate((x, *rest, bias))]
            y = function(*leaves)
            y.sum().backward()
            results.append([y, *(t.grad for t in leaves if t.requires_grad)])
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two)


def test_torch_compile_of_a_whole_layer():
    layer = lk.LoraLinear.from_linear(
        torch.nn.Linear(20, 33), lk.LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.5)
    )
    x = torch.randn(3, 7, 20)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled.eval()(x), layer(x))
    layer.train()
    assert not torch.equal(compiled(x), compiled(x))


def test_triton_by_name_never_falls_back(monkeypatch):
    tensors, _, _ = arguments(torch.bfloat16)
    if interpreting():
        with pytest.raises(ValueError, match=r"impl='triton' cannot run here: .*bfloat16"):
            lora_linear(*tensors, impl="triton")
    monkeypatch.setattr("lora_kernels.dispatch.interpreting", lambda: False)
    with pytest.raises(ValueError, match="impl='triton' cannot run here: no Triton kernels on"):
        lora_linear(*tensors, impl="triton")
    monkeypatch.setattr("lora_kernels.dispatch._triton_installed", lambda: False)
    with pytest.raises(ValueError, match="impl='triton' cannot run here: triton is not installed"):
        lora_linear(*tensors, impl="triton")
    lora_linear(*tensors)


@pytest.mark.kernel
def test_implementation_forces_every_call(device, monkeypatch):
    tensors, _, _ = arguments(device=device)
    calls = []
    from lora_kernels.lora_linear import eager, reference, triton_forward

    for module, name in (
        (eager, "forward"),
        (triton_forward, "forward"),
        (reference, "lora_linear"),
    ):
        original = getattr(module, name)

        def record(*args, module=module, original=original, **kwargs):
            calls.append(module.__name__.rpartition(".")[2])
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, record)
    for impl, expected in (("triton", "triton_forward"), ("eager", "eager"), ("reference",) * 2):
        with lk.implementation(impl):
            lora_linear(*tensors, impl="eager")
        assert calls.pop() == expected
    with pytest.raises(ValueError, match="impl: expected one of"), lk.implementation("cuda"):
        pass
    lora_linear(*tensors, impl="eager")
    assert calls == ["eager"]


@pytest.mark.kernel
def test_backward_uses_the_forward_passes_implementation(device, monkeypatch):
    from lora_kernels.lora_linear import triton_backward

    tensors, _, dy = arguments(device=device)
    called = []
    original = triton_backward.backward
    monkeypatch.setattr(triton_backward, "backward", lambda *a: called.append(1) or original(*a))
    tensors[2].requires_grad_()
    with lk.implementation("triton"):
        y = lora_linear(*tensors)
    with lk.implementation("eager"):
        y.backward(dy)
    assert called


@pytest.mark.kernel
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_64_bit_offsets_change_no_bit(bias, seed, device, monkeypatch, same_bits):
    """Forced on small inputs; `needs_int64` decides alone on large ones."""
    from lora_kernels.lora_linear import triton_backward, triton_forward

    inputs = testing.lora_linear_inputs(17, 33, 20, 5, torch.float32, device, bias)
    rate = 0.0 if seed is None else 0.4

    def run():
        torch.manual_seed(seed or 0)
        return testing.outputs_and_gradients(lora_linear, inputs, 0.75, rate, "triton")

    narrow = run()
    for module in (triton_forward, triton_backward):
        monkeypatch.setattr(module, "needs_int64", lambda *tensors: True)
    wide = run()
    assert narrow.keys() == wide.keys()
    same_bits(7, "tensors that forced 64-bit offsets change", wide.values(), narrow.values())


def test_needs_int64_is_decided_by_the_largest_offset():
    from lora_kernels.lora_linear.triton_common import needs_int64

    meta = torch.device("meta")
    assert not needs_int64(torch.empty(2**15, 2**15, device=meta))
    assert needs_int64(torch.empty(2**16, 2**15, device=meta))
    assert needs_int64(torch.empty(8, 2**31, device=meta)[:, ::4])
    assert not needs_int64(torch.empty(1, 1, device=meta).expand(2**15, 2**15))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 5 GB of GPU memory")
def test_more_than_2_31_elements():
    rows = 2**31 // 1024 + 8
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    small = testing.lora_linear_inputs(1, 64, 1024, 8, torch.bfloat16, "cuda")
    tensors = [small[name] for name in ("weight", "lora_a", "lora_b")]
    y = lora_linear(x, *tensors, impl="triton")
    tail = lora_linear(x[-100:].clone(), *tensors, impl="triton")
    torch.testing.assert_close(y[-100:], tail, rtol=1e-2, atol=1e-2)
