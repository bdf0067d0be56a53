"""Correct before fast: what a peer computes, before it is timed. A fault excludes its figures.

operations   every output and gradient within twice plain torch's error against float64
steps        loss and gradients against PEFT's step in the next wider dtype, the gradients
             within the dtype's tolerance or twice the error of PEFT's step in that dtype
both         every gradient is there, finite and not zero; ours gives the same bits twice
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.models import StepPeer
from bench.peer import Op
from lora_kernels.testing import MAX_RATIO, compare

# A loss is one number: its error says little, so it is bounded by its dtype instead. The mean over
# the tokens is taken in float32 by all peers.
LOSS_TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
# Up to here a step's gradients are right. Thirty layers amplify one rounding by chance: on
# SmolLM2-135M in float32, 128 or 512 tokens, errors are about 1e-5 and 0.6 to 2.0 times PEFT's.
# One adapter of its 210 scaled by 1.1 makes 5e-3.
GRADIENT_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
# No rounding makes a gradient this wrong: a guard for the yardstick itself.
MAX_GRADIENT_ERROR = 0.5


@dataclass
class Checked:
    """One peer's verdict.

    Attributes:
        fault: why its figures do not count, or None.
        error_ratio: the worst error over plain torch's (operations) or PEFT's (steps).
        gradient_norms: the 2-norms by name (operations), or the least, the median and the largest
            over all adapters' gradients (steps).
    """

    fault: str | None = None
    error_ratio: float | None = None
    gradient_norms: dict[str, float] = field(default_factory=dict)
    loss: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}


def gradient_fault(gradients: Mapping[str, Tensor | None]) -> str | None:
    """Names the gradients that are missing, zero or not finite."""
    faults = []
    for name, gradient in gradients.items():
        if gradient is None:
            faults.append(f"{name}: no gradient")
        elif not torch.isfinite(gradient).all():
            faults.append(f"{name}: gradient has NaN or Inf")
        elif not gradient.any():
            faults.append(f"{name}: gradient is zero")
    if not gradients:
        faults.append("no gradients at all")
    if len(faults) > 3:
        faults[3:] = [f"and {len(faults) - 3} more"]
    return "; ".join(faults) or None


def output_fault(outputs: Mapping[str, Tensor]) -> str | None:
    """Names the outputs that are not finite."""
    wrong = [name for name, output in outputs.items() if not torch.isfinite(output).all()]
    return f"{', '.join(wrong)}: NaN or Inf" if wrong else None


def first_line(error: Exception) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def check_op(op: Op, training: bool = True) -> dict[str, Checked]:
    """By peer. Without `training` the outputs alone, of a call without autograd."""
    oracle = op.evaluate(op.recipe.specification, torch.float64)
    plain = op.evaluate(op.recipe.plain, next(iter(op.recipe.inputs.values())).dtype)
    return {name: _check_peer(op, name, plain, oracle, training) for name in op.peers}


def _check_peer(
    op: Op, name: str, plain: Mapping[str, Tensor], oracle: Mapping[str, Tensor], training: bool
) -> Checked:
    checked = Checked()
    try:
        results = op.peers[name].results(training)
    except Exception as error:
        checked.fault = first_line(error)
        return checked
    gradients = {key: value for key, value in results.items() if key.startswith("d_")}
    checked.gradient_norms = {key: value.double().norm().item() for key, value in gradients.items()}
    outputs = {key: value for key, value in results.items() if key not in gradients}
    checked.fault = output_fault(outputs) or (gradient_fault(gradients) if training else None)
    # The frozen layer computes something else, and is torch itself.
    if checked.fault is None and name != "frozen":
        ratios = {
            key: compare(value, plain[key], oracle[key]).ratio for key, value in results.items()
        }
        worst = max(ratios, key=ratios.__getitem__)
        checked.error_ratio = ratios[worst]
        if checked.error_ratio > MAX_RATIO:
            checked.fault = (
                f"wrong: {worst} has {checked.error_ratio:.3g} times plain torch's error"
            )
    if checked.fault is None and name == "ours":
        again = op.peers[name].results(training)
        if not all(torch.equal(again[key], value) for key, value in results.items()):
            checked.fault = "not deterministic: two calls gave different bits"
    return checked


@dataclass
class StepReference:
    """PEFT's step in the next wider dtype, and how far PEFT in the working dtype is from it."""

    loss: float
    gradients: dict[str, Tensor]
    peft_error: float = 0.0

    @classmethod
    def of(cls, peft: StepPeer) -> "StepReference":
        loss = peft.step().item()
        gradients = {name: g.cpu() for name, g in peft.gradients().items() if g is not None}
        peft.release()
        return cls(loss, gradients)

    def error(self, gradients: Mapping[str, Tensor | None]) -> float:
        """The root mean square, over all tensors, of a gradient's relative error in the 2-norm.

        Every tensor counts alike, so that an error in a small one shows.

        ValueError: the gradients are not of the same tensors.
        """
        if gradients.keys() != self.gradients.keys():
            names = sorted(gradients.keys() ^ self.gradients.keys())
            raise ValueError(f"gradients: expected the reference's, differing in {names[:3]}")
        squares = []
        for name, gradient in gradients.items():
            assert gradient is not None
            exact = self.gradients[name].double()
            difference = gradient.detach().cpu().double() - exact
            squares.append((difference.norm() / exact.norm()).item() ** 2)
        return math.sqrt(sum(squares) / len(squares))


def check_step(name: str, peer: StepPeer, reference: StepReference, dtype: str) -> Checked:
    """Runs one step of a peer and judges it. PEFT must be checked before the others."""
    checked = Checked()
    try:
        checked.loss = peer.step().item()
    except Exception as raised:
        checked.fault = first_line(raised)
        return checked
    gradients = peer.gradients()
    checked.fault = gradient_fault(gradients)
    if checked.fault is not None:
        return checked
    norms = sorted(g.double().norm().item() for g in gradients.values() if g is not None)
    checked.gradient_norms = {
        "least": norms[0],
        "median": norms[len(norms) // 2],
        "largest": norms[-1],
    }
    if name == "frozen":
        if not math.isfinite(checked.loss):
            checked.fault = f"loss is {checked.loss}"
        return checked
    difference = abs(checked.loss - reference.loss) / abs(reference.loss)
    if not difference <= LOSS_TOLERANCE[dtype]:
        checked.fault = (
            f"wrong: loss {checked.loss:.6f}, expected {reference.loss:.6f} (PEFT, wider dtype)"
        )
        return checked
    error = reference.error(gradients)
    if name == "peft":
        reference.peft_error = error
    checked.error_ratio = error / max(reference.peft_error, torch.finfo(torch.float32).eps)
    allowed = max(MAX_RATIO * reference.peft_error, GRADIENT_TOLERANCE[dtype])
    if error > min(allowed, MAX_GRADIENT_ERROR):
        checked.fault = (
            f"wrong: the gradients' error is {error:.2e}, PEFT's own in {dtype} is "
            f"{reference.peft_error:.2e}"
        )
    elif name == "ours" and not _same_bits(peer, gradients):
        checked.fault = "not deterministic: two steps gave different bits"
    return checked


def _same_bits(peer: StepPeer, gradients: Mapping[str, Tensor | None]) -> bool:
    """Whether a second step gives the same gradients.

    A GPU's attention adds its gradients in any order unless it is told otherwise, so there both
    steps run in torch's deterministic mode.
    """
    once = dict(gradients)
    on_gpu = any(g is not None and g.is_cuda for g in once.values())
    with _deterministic() if on_gpu else nullcontext():
        if on_gpu:
            peer.step()
            once = peer.gradients()
        peer.step()
    pairs = ((once[name], again) for name, again in peer.gradients().items())
    return all(one is not None and two is not None and torch.equal(one, two) for one, two in pairs)


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
