"""The operation's surroundings: messages, dispatch, imports and torch.compile."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from lora_kernels import dispatch
from lora_kernels.linear_cross_entropy import eager
from lora_kernels.linear_cross_entropy.op import linear_cross_entropy

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel

OP_IMPLS = ("eager", pytest.param("triton", marks=kernel))


def inputs(batch=2, seq_len=4, vocab=11, width=5, device=DEVICE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, seq_len, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    labels = torch.randint(vocab, (batch, seq_len), generator=generator)
    labels[:, :2] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


WRONG = {
    "weight_dims": (
        {"weight": (11,)}, {}, r"weight: expected shape \[V, 5\] .* \(2, 4, 5\), got \(11,\)",
    ),
    "weight_width": ({"weight": (11, 4)}, {}, r"weight: expected .* got \(11, 4\)"),
    "weight_without_rows": ({"weight": (0, 5)}, {}, r"weight: expected .* got \(0, 5\)"),
    "labels_tokens": (
        {"labels": (2, 3)}, {},
        r"labels: expected shape \(2, 4\) for hidden \(2, 4, 5\), got \(2, 3\)",
    ),
    "labels_flat": ({"labels": (8,)}, {"shift": False}, r"labels: expected .* got \(8,\)"),
    "hidden_flat": (
        {"hidden": (8, 5), "labels": (8,)}, {},
        r"hidden: expected \[B, T, H\] with shift=True, got shape \(8, 5\); shift=False takes",
    ),
    "hidden_scalar": ({"hidden": ()}, {"shift": False}, r"hidden: expected \[\.\.\., H\]"),
    "num_items": (
        {}, {"num_items": torch.ones(2)}, r"num_items: expected one element, got shape \(2,\)",
    ),
    "impl": ({}, {"impl": "cuda"}, "impl: expected one of .* got 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_named(case):
    shapes, options, message = WRONG[case]
    tensors = dict(zip(("hidden", "weight", "labels"), inputs(), strict=True))
    tensors |= {
        name: torch.zeros(shape, dtype=tensors[name].dtype, device=DEVICE)
        for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**tensors, **options)


def test_wrong_dtypes_and_devices():
    tensors = dict(zip(("hidden", "weight", "labels"), inputs(), strict=True))
    for name in ("hidden", "weight"):
        with pytest.raises(TypeError, match=f"{name}: expected a dtype of .* got torch.int64"):
            linear_cross_entropy(**tensors | {name: tensors[name].long()})
    with pytest.raises(TypeError, match=r"labels: expected torch.int64, got torch.int32"):
        linear_cross_entropy(**tensors | {"labels": tensors["labels"].int()})
    message = "weight: expected hidden's dtype torch.float32, got torch.float16"
    with pytest.raises(TypeError, match=message):
        linear_cross_entropy(**tensors | {"weight": tensors["weight"].half()})
    for name in ("weight", "labels"):
        with pytest.raises(ValueError, match=f"{name}: expected hidden's device .* got meta"):
            linear_cross_entropy(**tensors | {name: tensors[name].to("meta")})
        with pytest.raises(TypeError, match=rf"{name}: expected a torch\.Tensor, got list"):
            linear_cross_entropy(**tensors | {name: [1]})
    with pytest.raises(TypeError, match="num_items: expected a number, a tensor or None, got str"):
        linear_cross_entropy(**tensors, num_items="7")


@pytest.mark.skipif(CUDA, reason="on a GPU such labels give NaN, which another test sees")
@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("label", (11, -1, -101, 2**40))
def test_label_outside_the_vocabulary_is_named(impl, label):
    hidden, weight, labels = inputs()
    labels[1, 3] = label
    message = rf"labels: expected ignore_index -100 or a token from 0 to 10 .* got {label}$"
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, labels, impl=impl)
    # The first label of a sequence is no target.
    labels[1, 3], labels[1, 0] = 10, label
    assert linear_cross_entropy(hidden, weight, labels, impl=impl).isfinite()


def test_triton_by_name_does_not_fall_back(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device, dtype: "no Triton")
    with pytest.raises(ValueError, match="impl='triton' cannot run here: no Triton"):
        linear_cross_entropy(*inputs(), impl="triton")


@kernel
@pytest.mark.skipif(CUDA, reason="bfloat16 is refused by the interpreter alone")
def test_interpreter_refuses_bfloat16():
    with pytest.raises(ValueError, match="bfloat16"):
        linear_cross_entropy(*inputs(dtype=torch.bfloat16), impl="triton")


@kernel
def test_implementation_is_the_one_asked_for(monkeypatch):
    from lora_kernels.linear_cross_entropy import triton_kernel

    calls = []
    for module in (eager, triton_kernel):
        forward = module.forward
        monkeypatch.setattr(
            module,
            "forward",
            lambda *args, module=module, forward=forward: (calls.append(module), forward(*args))[1],
        )
    tensors = inputs(device="cpu")
    for impl in ("auto", "eager", "triton", "reference"):
        linear_cross_entropy(*tensors, impl=impl)
    with dispatch.implementation("triton"):
        linear_cross_entropy(*tensors, impl="eager")
    assert calls == [eager, eager, triton_kernel, triton_kernel]


def test_importing_the_operation_imports_no_triton():
    code = "import sys, lora_kernels.linear_cross_entropy.op; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "impl, backend, num_items",
    (
        ("auto", "inductor", None),
        ("auto", "aot_eager", 3),
        ("reference", "aot_eager", None),
        ("eager", "aot_eager", None),
        ("eager", "aot_eager", "tensor"),
        pytest.param("triton", "aot_eager", None, marks=kernel),
    ),
)
def test_compiles_without_graph_breaks(impl, backend, num_items):
    torch._dynamo.reset()
    if num_items == "tensor":
        num_items = torch.tensor(5, device=DEVICE)

    def function(hidden, weight, labels):
        # Neighbours on both sides, so that there is a graph around the operation.
        return 2 * linear_cross_entropy(hidden * 3, weight, labels, num_items=num_items, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    hidden, weight, labels = inputs()
    for needs in (True, False):
        hidden = hidden.detach().requires_grad_(needs)
        actual, expected = compiled(hidden, weight, labels), function(hidden, weight, labels)
        assert_close(actual, expected)
        if needs:
            assert_close(torch.autograd.grad(actual, hidden), torch.autograd.grad(expected, hidden))


@pytest.mark.parametrize("impl", OP_IMPLS)
def test_compiled_sequence_length_is_dynamic(impl):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels, impl=impl)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for seq_len in (7, 9, 3):
            hidden, weight, labels = inputs(seq_len=seq_len)
            hidden.requires_grad_()
            actual = compiled(hidden, weight, labels)
            expected = linear_cross_entropy(hidden, weight, labels, impl="reference")
            assert_close(actual, expected)
            assert_close(torch.autograd.grad(actual, hidden), torch.autograd.grad(expected, hidden))
