"""Which implementation of an operation runs: the names, the override, and what Triton can do here.

Every operation has the same three implementations:

    reference   the mathematics in plain differentiable torch: the specification
    eager       forward and backward out of library GEMMs: the CPU path
    triton      the fused kernels

and `auto`, which lets the operation's plan choose. An explicit request never falls back.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter

IMPLEMENTATIONS = ("auto", "triton", "eager", "reference")

# Compute capability below which the kernels are neither compiled nor tested (no bf16 tensor cores).
MINIMUM_CAPABILITY = (8, 0)

_forced: str | None = None


def check_impl(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {IMPLEMENTATIONS}, got {impl!r}")


@contextmanager
def implementation(impl: str) -> Iterator[None]:
    """Forces one implementation of every operation while the context is open.

    It overrides the `impl` argument of the calls made inside, for tests and debugging. A backward
    pass uses the implementation that its forward pass used. The override holds for the whole
    process, not only for the calling thread.

    Args:
        impl: "auto", "triton", "eager" or "reference".

    Raises:
        ValueError: `impl` is none of these.
    """
    global _forced
    check_impl(impl)
    previous = _forced
    _forced = impl
    try:
        yield
    finally:
        _forced = previous


def requested(impl: str) -> str:
    """The implementation asked for: the override if one is open, else the call's own `impl`."""
    check_impl(impl)
    return impl if _forced is None else _forced


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, through Triton's interpreter (TRITON_INTERPRET=1)."""
    if not _triton_installed():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why Triton kernels cannot run on `device` with `dtype`, or None if they can."""
    if not _triton_installed():
        return "triton is not installed"
    if interpreting():
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 products wrongly"
        if dtype in (torch.float16, torch.float32, torch.float64):
            return None
        return f"the kernels take float16, bfloat16 or float32, not {dtype}"
    if device.type != "cuda":
        return f"no Triton kernels on device {device.type!r} (TRITON_INTERPRET=1 interprets them)"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 or float32, not {dtype}"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return (
                f"compute capability {capability[0]}.{capability[1]} is below "
                f"{MINIMUM_CAPABILITY[0]}.{MINIMUM_CAPABILITY[1]}"
            )
    return None


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """Turns what was `requested` into what can run: "triton", "eager" or "reference".

    It reads no override, so forward and backward come to the same. Custom ops call it in their
    bodies, which torch.compile does not trace.

    Raises:
        ValueError: "triton" is asked for by name and cannot run; the message says why.
    """
    if impl in ("eager", "reference"):
        return impl
    # The interpreter is for tests: it is asked for by name, never chosen.
    if impl == "auto" and device.type != "cuda":
        return "eager"
    reason = why_not_triton(device, dtype)
    if impl == "triton" and reason is not None:
        raise ValueError(f"impl='triton' cannot run here: {reason}")
    return "triton" if reason is None else "eager"


def calls_directly(*tensors: Tensor | None) -> bool:
    """Whether nothing can be tracing, and torch.library's dispatch may be left out.

    On one core it takes 0.1 ms forward and backward, 0.3 ms where the arithmetic has emptied the
    caches, beside 2 to 3 ms of arithmetic (512 tokens of SmolLM2-135M). On a GPU, where it runs
    ahead of the kernels, it stays.
    """
    return not torch.compiler.is_compiling() and all(
        x is None or (type(x) in (Tensor, Parameter) and x.device.type == "cpu") for x in tensors
    )
