"""What is given to an operation stays as it is, and what it returns is its own.

Triton's writes do not count as changes for autograd, which would let a wrong gradient pass without
an error: inputs, incoming gradients and everything that is saved for the backward pass are compared
with copies, bit by bit, after one backward pass and after a second over the same graph.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

IMPLS = (pytest.param("triton", marks=pytest.mark.kernel), "eager")
LAYOUTS = ("contiguous", "transposed", "contiguous", "sliced")
SIZES = (18, 34, 17, 5)


class Saved:
    """Every tensor that autograd keeps, with a copy of what it held."""

    def __init__(self) -> None:
        self.tensors: list[tuple[Tensor, Tensor]] = []

    def pack(self, tensor: Tensor) -> Tensor:
        self.tensors.append((tensor, tensor.detach().clone()))
        return tensor

    def unchanged(self) -> bool:
        return all(torch.equal(tensor, copy) for tensor, copy in self.tensors)


def storages(tensors) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_given_or_saved_is_written(operation, impl, device, figure):
    case = operation.draw(*SIZES, layouts=LAYOUTS, device=device).to(torch.float32)
    leaves, dys = case.placed()
    trained = [leaves[name] for name in operation.trained]
    given = [*leaves.values(), *dys, *case.labels.values()]
    copies = [tensor.detach().clone() for tensor in given]
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        outputs = case.call(leaves, impl)
    assert saved.tensors
    results = [y.detach().clone() for y in outputs]
    first = torch.autograd.grad(outputs, trained, dys, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(outputs, trained, dys)

    assert all(torch.equal(one, two) for one, two in zip(kept, second, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(given, copies, strict=True))
    assert saved.unchanged()
    assert all(torch.equal(y, copy) for y, copy in zip(outputs, results, strict=True))
    # The first gradients are not the second's memory, and nothing is a window on something else.
    assert all(torch.equal(one, two) for one, two in zip(first, kept, strict=True))
    assert not storages(outputs) & storages(given)
    assert len(storages(outputs)) == sum(1 for y in outputs if y.numel())
    figure(14, "calls that write nothing, by operation and path", 1, combine="sum")


@pytest.mark.parametrize("impl", IMPLS)
def test_an_output_may_be_written_or_torch_says_why_not(operation, impl, device):
    """An output that backward needs is refused loudly after a change; any other may be changed."""
    case = operation.draw(*SIZES, device=device).to(torch.float32)
    leaves, dys = case.placed()
    changed = [y.add_(0.0) for y in case.call(leaves, impl)]
    trained = [leaves[name] for name in operation.trained]
    # The gradient of a norm needs the sum that it returns.
    if operation.name == "rms_norm_residual":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(changed, trained, dys)
        return
    gradients = torch.autograd.grad(changed, trained, dys)
    expected = case.results(impl)
    for name, gradient in zip(operation.trained, gradients, strict=True):
        assert torch.equal(gradient, expected[f"d_{name}"]), name


def digest(results: dict[str, Tensor]) -> str:
    """One text for all bits of all results."""
    content = hashlib.sha256()
    for name in sorted(results):
        content.update(name.encode() + results[name].contiguous().cpu().numpy().tobytes())
    return content.hexdigest()


@pytest.mark.long
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_a_hundred_repeats_have_the_same_bits(operation, dtype, device, figure):
    case = operation.draw(*SIZES, layouts=LAYOUTS, device=device).to(dtype)
    first = digest(case.results("triton"))
    different = sum(digest(case.results("triton")) != first for _ in range(99))
    figure(12, "differing results in 100 repeats", different, 0.0)
    assert not different
    # The control: another seed has another digest.
    assert (
        digest(operation.draw(*SIZES, seed=1, device=device).to(dtype).results("triton")) != first
    )


PROCESS = """
import importlib.util, os, sys
if sys.argv[3] == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
import torch
modules = []
for name, path in (("helpers", sys.argv[1]), ("this", sys.argv[2])):
    spec = importlib.util.spec_from_file_location(name, path)
    modules.append(importlib.util.module_from_spec(spec))
    sys.modules[name] = modules[-1]
    spec.loader.exec_module(modules[-1])
helpers, this = modules
for operation in helpers.OPERATIONS:
    case = operation.draw(*this.SIZES, layouts=this.LAYOUTS, device=sys.argv[3]).to(torch.float32)
    print(operation.name, *(this.digest(case.results(impl)) for impl in ("triton", "eager")))
"""


@pytest.mark.long
@pytest.mark.kernel
def test_two_processes_have_the_same_bits(device, figure):
    here = Path(__file__)
    command = [sys.executable, "-c", PROCESS, str(here.parent / "conftest.py"), str(here)]
    printed = [
        subprocess.run(
            [*command, device.type],
            capture_output=True,
            text=True,
            check=True,
            # Another order of everything that is hashed.
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed in (1, 2)
    ]
    lines = printed[0].splitlines()
    assert len(lines) == 9 and len({line.split()[1] for line in lines}) == 9
    different = sum(one != two for one, two in zip(lines, printed[1].splitlines(), strict=True))
    figure(12, "operations that differ between two processes", different, 0.0)
    assert not different
