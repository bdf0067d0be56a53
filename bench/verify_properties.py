"""What holds bit by bit: no uninitialised memory, repeats, graphs, and what the compiler needs.

Every operation runs forward and backward by its kernels, on the inputs of the benchmark's recipes
(`op_recipes.py`), at sizes that no tile divides.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import lora_kernels as lk
from bench.machine import name_of
from bench.op_recipes import EPS, SCALING, call_dora, call_mixed
from bench.ops import build_op
from bench.peer import Function, Inputs, Op
from bench.shapes import ELEMENTWISE, GROUPS, VARIANTS, LlamaShape, OpCase
from bench.verify_rows import Case, Row, Setting, Timer, verdict, within

PARTS = (*GROUPS, *ELEMENTWISE, "head", *VARIANTS)
REPEATS = 250
SHAPE = LlamaShape("odd", 613, 1001, 5, 1, 80, 1, 1013)
TINY_SHAPE = LlamaShape("odd tiny", 37, 53, 3, 1, 10, 1, 71)


def built(part: str, setting: Setting, tokens: int | None = None, seed: int = 0) -> Op:
    """One operation with the kernels as its only peer, in the first dtype of the setting."""
    shape = TINY_SHAPE if setting.tiny else SHAPE
    tokens = tokens or (5 if setting.tiny else 331)
    case = OpCase(shape, part, tokens, name_of(setting.dtypes[0]), r=3 if setting.tiny else 16)
    return build_op(case, setting.device, seed, ["ours"])


def call(part: str, t: Inputs, dropout_p: float = 0.0) -> tuple[Tensor, ...]:
    """The public function of one part, on the inputs of its recipe."""
    if part in GROUPS:
        projections = [
            (t[f"weight{g}"], t[f"lora_a{g}"], t[f"lora_b{g}"], SCALING, None)
            for g in range(len(GROUPS[part]))
        ]
        return lk.lora_linear_grouped(t["x"], projections, dropout_p=dropout_p)
    if part == "rope":
        return lk.apply_rotary_pos_emb(t["q"], t["k"], t["cos"], t["sin"])
    if part == "rms_norm":
        return (lk.rms_norm(t["x"], t["weight"], EPS),)
    if part == "rms_norm_residual":
        return lk.rms_norm(t["x"], t["weight"], EPS, residual=t["residual"])
    if part == "swiglu":
        return (lk.swiglu(t["gate"], t["up"]),)
    if part == "dora":
        return call_dora(t)
    if part == "mixed":
        return call_mixed(t)
    return (lk.linear_cross_entropy(t["hidden"], t["weight"], t["labels"]),)


def leaves_of(op: Op) -> dict[str, Tensor]:
    """The inputs as autograd's leaves."""
    return {
        name: tensor.detach().requires_grad_(name in op.recipe.trained)
        for name, tensor in op.recipe.inputs.items()
    }


def differentiated(function: Function, op: Op) -> dict[str, Tensor]:
    """Outputs and gradients of a function of the inputs, by the kernels."""
    leaves, trained = leaves_of(op), op.recipe.trained
    with lk.implementation("triton"):
        outputs = function(leaves)
        found = torch.autograd.grad(outputs, [leaves[name] for name in trained], op.dys)
    named = {f"y{g}": y.detach() for g, y in enumerate(outputs)}
    return named | {f"d_{name}": d for name, d in zip(trained, found, strict=True)}


def results(op: Op) -> dict[str, Tensor]:
    """Outputs and gradients by the kernels."""
    with lk.implementation("triton"):
        return op.peers["ours"].results()


def different(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that differ in a bit. NaN differs from everything."""
    return [name for name in one if not torch.equal(one[name], two[name])]


def _each(
    check: str, setting: Setting, timer: Timer, run: Callable[[str, Setting], Row]
) -> Iterator[Row]:
    def case(part: str) -> Iterable[Row]:
        yield run(part, setting)

    cases: list[Case] = [(part, partial(case, part)) for part in PARTS]
    yield from within(timer, check, cases)


def poisoned(setting: Setting, timer: Timer) -> Iterator[Row]:
    """Whatever is allocated holds NaN: results stay finite and keep every bit."""
    check = "NaN-poisoned memory"

    def run(part: str, setting: Setting) -> Row:
        op = built(part, setting)
        clean = results(op)
        with _poison():
            found = results(op)
        wrong = [name for name, value in found.items() if not torch.isfinite(value).all()]
        wrong += [f"{name} (other bits)" for name in different(clean, found)]
        return verdict(check, part, not wrong, ", ".join(wrong) or f"{len(found)} results clean")

    with _poison():
        sees = all(
            tensor.isnan().all()
            for like in (torch.zeros(3, device=setting.device),)
            for tensor in (torch.empty_like(like), like.new_empty(64), like.new_empty(8, 8)[1:])
        )
    yield verdict(
        check, "new tensors are NaN", sees, "torch fills them" if sees else "they are not"
    )
    if sees:
        yield from _each(check, setting, timer, run)


class _poison:
    """torch fills uninitialised memory with NaN where it is told to be deterministic."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


def repeated(setting: Setting, timer: Timer) -> Iterator[Row]:
    """The same bits every time, forward and backward; also by dropout with one seed."""
    check, repeats = "determinism", 3 if setting.tiny else REPEATS

    def run(part: str, setting: Setting) -> Row:
        op = built(part, setting)
        first = results(op)
        for turn in range(1, repeats):
            if timer.left <= 0:
                return Row(check, part, "skipped", f"time for {turn} of {repeats} repeats")
            if wrong := different(first, results(op)):
                return verdict(check, part, False, f"repeat {turn}: {', '.join(wrong)} differ")
        return verdict(check, part, True, f"{repeats} repeats, the same bits", repeats=repeats)

    yield from _each(check, setting, timer, run)
    yield from within(timer, check, [("dropout", lambda: [_same_seed(check, setting)])])


def _same_seed(check: str, setting: Setting) -> Row:
    """One seed gives one result, the next draw another."""
    op = built("qkv", setting)
    function = partial(call, "qkv", dropout_p=0.1)
    torch.manual_seed(3)
    first, other = differentiated(function, op), differentiated(function, op)
    torch.manual_seed(3)
    wrong = different(first, differentiated(function, op))
    held = not wrong and len(different(first, other)) == len(first)
    return verdict(check, "dropout", held, ", ".join(wrong) or "one seed, one result")


class _Recorder(TorchDispatchMode):
    """Keeps the calls of this project's operations, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "lora_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def checked_by_torch(setting: Setting, timer: Timer) -> Iterator[Row]:
    """torch.library.opcheck of every operation, forward and backward, as they are really called."""
    check = "opcheck"

    def run(part: str, setting: Setting) -> Row:
        op = built(part, setting, tokens=3 if setting.tiny else 33)
        recorder = _Recorder()
        # On a CPU some operations go around torch.library, unless they are being compiled.
        with recorder, patch.object(torch.compiler, "is_compiling", lambda: True):
            results(op)
        names = [func.name().removeprefix("lora_kernels::") for func, _ in recorder.calls]
        for name, (func, arguments) in zip(names, recorder.calls, strict=True):
            if "_backward" in name:
                # It has no derivative of its own, so nothing may ask for one.
                arguments = tree_map_only(Tensor, Tensor.detach, arguments)
            torch.library.opcheck(func, arguments)
        # A forward and a backward call at least, else the recording saw nothing.
        return verdict(check, part, len(names) >= 2, ", ".join(names) or "no call was seen")

    yield from _each(check, setting, timer, run)


def compiled(setting: Setting, timer: Timer) -> Iterator[Row]:
    """torch.compile without a graph break, at two numbers of tokens, equal to the plain call."""
    check = "torch.compile"
    sizes = (5, 7) if setting.tiny else (331, 200)

    def run(part: str, setting: Setting) -> Row:
        return _compiled(check, part, (part,), sizes, "aot_eager", setting)

    yield from _each(check, setting, timer, run)
    if not setting.tiny:
        # Inductor takes seconds for each graph, so it gets all operations as one.
        name = "all in one graph"
        case: Case = (
            name,
            lambda: [_compiled(check, name, PARTS, sizes[:1], "inductor", setting)],
        )
        yield from within(timer, check, [case])


def _compiled(
    check: str,
    name: str,
    parts: tuple[str, ...],
    sizes: tuple[int, ...],
    backend: str,
    setting: Setting,
) -> Row:
    def together(*inputs: Inputs) -> list[tuple[Tensor, ...]]:
        return [call(part, t) for part, t in zip(parts, inputs, strict=True)]

    torch._dynamo.reset()
    function = torch.compile(together, fullgraph=True, dynamic=True, backend=backend)
    for tokens in sizes:
        ops = {part: built(part, setting, tokens) for part in parts}
        leaves = {part: leaves_of(op) for part, op in ops.items()}
        with lk.implementation("triton"):
            outputs = function(*leaves.values())
            # One graph has one backward pass, for all of its outputs.
            gradients = torch.autograd.grad(
                [y for ys in outputs for y in ys],
                [leaves[part][name] for part, op in ops.items() for name in op.recipe.trained],
                [dy for op in ops.values() for dy in op.dys],
            )
        remaining = iter(gradients)
        for (part, op), ys in zip(ops.items(), outputs, strict=True):
            found = {f"y{g}": y for g, y in enumerate(ys)}
            found |= {f"d_{key}": next(remaining) for key in op.recipe.trained}
            for key, value in differentiated(partial(call, part), op).items():
                torch.testing.assert_close(found[key], value, msg=_named(f"{part} {key}"))
    return verdict(check, name, True, f"no graph break, {backend}")


def _named(what: str) -> Callable[[str], str]:
    return lambda message: f"{what}: {message}"


def captured(setting: Setting, timer: Timer) -> Iterator[Row]:
    """A CUDA graph of forward and backward, replayed on new inputs: the bits of the plain call."""
    check = "CUDA graph"

    def run(part: str, setting: Setting) -> Row:
        op, other = built(part, setting), built(part, setting, seed=1)
        expected = results(other)
        replay, outputs = _capture(op, setting)
        for name, tensor in op.recipe.inputs.items():
            tensor.copy_(other.recipe.inputs[name])
        for dy, new in zip(op.dys, other.dys, strict=True):
            dy.copy_(new)
        replay()
        wrong = different(expected, outputs)
        return verdict(check, part, not wrong, ", ".join(wrong) or "replayed on new inputs")

    yield from _each(check, setting, timer, run)


def _capture(op: Op, setting: Setting) -> tuple[Callable[[], object], dict[str, Tensor]]:
    """A graph's replay and its results; without a GPU a plain call takes the graph's place."""
    outputs: dict[str, Tensor] = {}
    if setting.device.type != "cuda":
        return lambda: outputs.update(results(op)), outputs
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            results(op)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs.update(results(op))
    return graph.replay, outputs
