"""Tensors of more than 2³¹ elements: offsets that 32 bits do not hold, really executed.

One tensor at a time is that large. Only the last rows are compared with the float64 oracle, where
the offsets are the largest; the gradient that comes in is zero everywhere else, or the same in all
rows, so that sums over the rows can be compared too.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_kernels as lk
from bench.verify_rows import (
    Case,
    Row,
    Setting,
    Timer,
    comparison_row,
    free_memory,
    within,
)
from lora_kernels import testing
from lora_kernels.lora_linear import reference
from lora_kernels.rms_norm.reference import rms_norm
from lora_kernels.rope.reference import rotate

CHECK = "more than 2^31 elements"
EPS = 1e-5
# Three tensors of 2³¹ 16-bit elements, and the small ones beside them.
NEEDED_BYTES = 13_500_000_000
TAIL = 100

Compared = dict[str, testing.Comparison]


def large(setting: Setting, timer: Timer) -> Iterator[Row]:
    """Every operation with one such tensor: forward, and backward where memory allows."""
    if not setting.tiny:
        free = min(torch.cuda.mem_get_info(setting.device)[0], setting.memory_bytes)
        if free < NEEDED_BYTES:
            reason = f"needs {NEEDED_BYTES / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            yield Row(CHECK, "all operations", "skipped", reason)
            return
    runs: dict[str, Callable[[Setting], Compared]] = {
        "lora_linear, x and dx": lambda s: _lora_linear(s, k=1024, n=64),
        "lora_linear, y and dy": lambda s: _lora_linear(s, k=64, n=1024),
        "apply_rotary_pos_emb, q": _rope,
        "rms_norm, x, y and dx": _rms_norm,
        "swiglu, gate, out and d_gate": _swiglu,
        "linear_cross_entropy, hidden and its gradient": _cross_entropy,
    }

    def case(name: str) -> Iterable[Row]:
        yield comparison_row(CHECK, name, runs[name](setting))
        free_memory(setting.device)

    cases: list[Case] = [(name, partial(case, name)) for name in runs]
    with lk.implementation("triton"):
        yield from within(timer, CHECK, cases)


def _rows(width: int, setting: Setting) -> int:
    return 70 if setting.tiny else 2**31 // width + 8


def _tail(setting: Setting) -> int:
    return 20 if setting.tiny else TAIL


def _dtype(setting: Setting) -> torch.dtype:
    return torch.float16 if setting.tiny else torch.bfloat16


def _random(*shape: int, setting: Setting) -> Tensor:
    """Made on the device in its dtype: a float32 draw would be twice as large."""
    return torch.randn(shape, device=setting.device, dtype=_dtype(setting))


def _three(
    function: Callable[..., tuple[Tensor, ...]], ours: tuple[Tensor, ...], inputs: list[Tensor]
) -> Compared:
    """`ours` against `function` in the inputs' dtype and in float64, output by output."""
    plain, exact = function(*inputs), function(*(tensor.double() for tensor in inputs))
    return {
        f"output {index}": testing.compare(*three)
        for index, three in enumerate(zip(ours, plain, exact, strict=True))
    }


def _lora_linear(setting: Setting, k: int, n: int) -> Compared:
    if setting.tiny:
        k, n = k // 16, n // 16
    rows, tail = _rows(max(k, n), setting), _tail(setting)
    small = testing.lora_linear_inputs(1, n, k, 8, _dtype(setting), setting.device, bias=False)
    weight, lora_a, lora_b = (small[name] for name in ("weight", "lora_a", "lora_b"))
    x = _random(rows, k, setting=setting).requires_grad_()
    lora_a.requires_grad_()
    lora_b.requires_grad_()
    y = lk.lora_linear(x, weight, lora_a, lora_b, 0.5)
    dy = torch.zeros_like(y)
    dy[-tail:] = _random(tail, n, setting=setting)
    y_tail = y[-tail:].detach().clone()
    gradients = torch.autograd.grad(y, (x, lora_a, lora_b), dy)
    ours = (y_tail, gradients[0][-tail:], *gradients[1:])

    def function(x: Tensor, a: Tensor, b: Tensor, w: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        x, a, b = (tensor.detach().requires_grad_() for tensor in (x, a, b))
        y = reference.lora_linear(x, w, a, b, 0.5)
        return (y, *torch.autograd.grad(y, (x, a, b), d))

    inputs = [x.detach()[-tail:], lora_a.detach(), lora_b.detach(), weight, dy[-tail:]]
    return _three(function, ours, inputs)


def _rope(setting: Setting) -> Compared:
    heads, head_dim = (4, 16) if setting.tiny else (32, 128)
    tokens, tail = _rows(heads * head_dim, setting), _tail(setting)
    q, k = (
        _random(1, tokens, count, head_dim, setting=setting).transpose(1, 2) for count in (heads, 1)
    )
    cos, sin = (_random(1, tokens, head_dim, setting=setting) for _ in range(2))
    ours = tuple(x[:, :, -tail:] for x in lk.apply_rotary_pos_emb(q, k, cos, sin))

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return rotate(q, cos, sin), rotate(k, cos, sin)

    inputs = [q[:, :, -tail:], k[:, :, -tail:], cos[:, -tail:], sin[:, -tail:]]
    return _three(function, ours, inputs)


def _rms_norm(setting: Setting) -> Compared:
    width = 64 if setting.tiny else 1024
    rows, tail = _rows(width, setting), _tail(setting)
    x = _random(rows, width, setting=setting).requires_grad_()
    weight, dy = _random(width, setting=setting), _random(width, setting=setting)

    def gradient(y: Tensor, x: Tensor, dy: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, dy.expand_as(y))[0]

    y = lk.rms_norm(x, weight, EPS)
    y_tail, graph = y[-tail:].detach().clone(), torch.autograd.graph.get_gradient_edge(y)
    expanded = dy.expand_as(y)
    del y
    (dx,) = torch.autograd.grad(graph, x, expanded)

    def function(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y = rms_norm(x, weight, EPS)
        return y, gradient(y, x, dy)

    return _three(function, (y_tail, dx[-tail:]), [x.detach()[-tail:], weight, dy])


def _swiglu(setting: Setting) -> Compared:
    width = 64 if setting.tiny else 1024
    rows, tail = _rows(width, setting), _tail(setting)
    gate = _random(rows, width, setting=setting).requires_grad_()
    dout = _random(width, setting=setting)
    out = lk.swiglu(gate, gate.detach())
    out_tail, graph = out[-tail:].detach().clone(), torch.autograd.graph.get_gradient_edge(out)
    expanded = dout.expand_as(out)
    del out
    (d_gate,) = torch.autograd.grad(graph, gate, expanded)

    def function(gate: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        gate = gate.detach().requires_grad_()
        out = F.silu(gate) * gate.detach()
        return out, torch.autograd.grad(out, gate, dout.expand_as(out))[0]

    return _three(function, (out_tail, d_gate[-tail:]), [gate.detach()[-tail:], dout])


def _cross_entropy(setting: Setting) -> Compared:
    width, vocabulary = (64, 71) if setting.tiny else (1024, 128)
    rows, tail = _rows(width, setting), _tail(setting)
    hidden = _random(rows, width, setting=setting).requires_grad_()
    weight = _random(vocabulary, width, setting=setting) * width**-0.5
    labels = torch.full((rows,), -100, device=setting.device)
    labels[-tail:] = torch.arange(tail, device=setting.device) % vocabulary
    loss = lk.linear_cross_entropy(hidden, weight, labels, shift=False)
    (d_hidden,) = torch.autograd.grad(loss, hidden)
    last = labels[-tail:]

    def function(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        hidden = hidden.detach().requires_grad_()
        logits = F.linear(hidden, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, last)
        return loss, torch.autograd.grad(loss, hidden)[0]

    ours = (loss.detach(), d_hidden[-tail:])
    return _three(function, ours, [hidden.detach()[-tail:], weight])
