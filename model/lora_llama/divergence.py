"""A training that diverges is stopped before the optimizer step that would spoil the weights.

    NaN or Inf     in the loss of any forward pass, in any gradient after its backward pass, or in
                   the norm of all gradients, by which clipping would make them zero
    exploded       the mean loss of the last 8 optimizer steps (or all, if fewer) is above 2 ln V
    unlearned      the mean loss of the last 8 steps (or half of them, if fewer than 15) is above
                   ln V, and 1.5 above the lowest such mean of the last 64 steps

A model that takes each of V tokens for equally likely has the loss ln V. A step with few tokens
may be worse by chance; eight are not. A new model begins near ln V, and may stay there; a
pretrained one is so far below (V = 32,000: 2 of 10.4) that no batch brings it back. Only a model
that has left ln V by 1.5, which is a perplexity 4.5 times as low, can unlearn. By chance alone that
takes a step's loss to vary with a standard deviation above 0.5: of 200 steps around ln V with just
that, one training in 1,000 is stopped; with 0.33, as two rows of six tokens have, none.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lora_kernels.sharding import whole

WINDOW = 8
MEMORY = 64
UNLEARNED = 1.5


class DivergenceError(ValueError):
    """The loss or a gradient is not finite, or the loss has exploded."""


class LossWatch:
    """Follows the loss over forward passes and optimizer steps.

    Args:
        vocab_size: V.

    Attributes:
        steps: the losses of the last optimizer steps: all that a judgement depends on.
    """

    def __init__(self, vocab_size: int) -> None:
        self.guessing = math.log(vocab_size)
        self.limit = 2 * self.guessing
        self.steps: deque[float] = deque(maxlen=MEMORY)
        self.step = 0.0

    def fault(self, loss: float, completes_step: bool) -> str | None:
        """What is wrong with the loss after a forward pass, or None.

        Args:
            loss: its share of the optimizer step's loss.
            completes_step: whether it is the step's last forward pass.
        """
        if not math.isfinite(loss):
            return self.judge(loss)
        self.step += loss
        if not completes_step:
            return None
        fault = self.judge(self.step)
        self.steps.append(self.step)
        self.step = 0.0
        return fault

    def judge(self, loss: float) -> str | None:
        """What would be wrong if the next step had this loss, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        losses = [*self.steps, loss]
        recent = losses[-WINDOW:]
        mean = sum(recent) / len(recent)
        if mean > self.limit:
            over = f"over {len(recent)} steps" if len(recent) > 1 else "of this step"
            return (
                f"the loss is {loss:.4g}, and the mean {over} {mean:.4g}, above {self.limit:.4g}, "
                "twice that of guessing"
            )
        if len(losses) < 3:
            return None
        width = min(WINDOW, (len(losses) + 1) // 2)
        means = [sum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]
        if means[-1] <= max(self.guessing, min(means) + UNLEARNED):
            return None
        return (
            f"the loss is {loss:.4g}, and the mean over {width} steps {means[-1]:.4g}, above "
            f"{self.guessing:.4g}, that of guessing, after {min(means):.4g}"
        )


def gradient_fault(model: nn.Module) -> str | None:
    """What is wrong with the gradients after a backward pass, or None.

    NaN or Inf in one of them: the first in the backward pass is named. A faulty gradient spreads
    from the last layers to the first, so that is the last parameter. Or finite ones whose norm is
    not: clipping by it would make every step zero.
    """
    gradients = {
        name: _local(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    # One number for all of them: almost always this is all there is to do.
    norm = get_total_norm(gradients.values())
    if torch.isfinite(norm):
        return None
    for name, gradient in reversed(gradients.items()):
        if not torch.isfinite(gradient).all():
            return f"the gradient of {name} has NaN or Inf"
    norms = {name: gradient.double().norm().item() for name, gradient in gradients.items()}
    largest = max(norms, key=norms.__getitem__)
    return (
        f"the norm of the gradients is {math.hypot(*norms.values()):.1e}, beyond {norm.dtype}; "
        f"that of {largest} is the largest"
    )


def nonfinite_parameter(model: nn.Module) -> str | None:
    """The name of the model's first parameter with NaN or Inf, or None.

    Those of a sharded model are gathered, one at a time: every process calls this.
    """
    # Each is gathered in every process, also after the first that is found.
    faulty = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not torch.isfinite(whole(parameter.detach())).all()
    ]
    return faulty[0] if faulty else None


def first_nonfinite(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Where NaN or Inf begins: a parameter, or the first module whose output is not finite.

    Args:
        model: not sharded, as the other processes may not be here to run it with this one.
        forward: runs the model on the batch in question.
    """
    name = nonfinite_parameter(model)
    if name is not None:
        return f"the parameter {name}"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if not found and not all(torch.isfinite(t).all() for t in _floats(output)):
                found.append(name)

        return hook

    # Not the whole model, nor its head, whose logits the loss does without.
    head = getattr(model, "lm_head", None)
    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if name and module is not head
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return (
        f"the output of {found[0]}"
        if found
        else "the loss itself, after finite outputs of every module"
    )


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _floats(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    return [t for part in output for t in _floats(part)] if isinstance(output, list | tuple) else []
