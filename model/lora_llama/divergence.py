"""A training that diverges is stopped before the optimizer step that would spoil the weights.

    NaN or Inf     in the loss of any forward pass, or in any gradient after its backward pass
    exploded       the mean loss of the last 8 optimizer steps (or all, if fewer) is above 2 ln V

A model that takes each of V tokens for equally likely has the loss ln V. A step with few tokens
may be worse by chance; eight are not.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lora_kernels.sharding import is_sharded

WINDOW = 8


class DivergenceError(ValueError):
    """The loss or a gradient is not finite, or the loss has exploded."""


class LossWatch:
    """Follows the loss over forward passes and optimizer steps.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self.limit = 2 * math.log(vocab_size)
        self.steps: deque[float] = deque(maxlen=WINDOW)
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
        losses = [*self.steps, loss][-WINDOW:]
        mean = sum(losses) / len(losses)
        if mean <= self.limit:
            return None
        over = f"over {len(losses)} steps" if len(losses) > 1 else "of this step"
        return (
            f"the loss is {loss:.4g}, and the mean {over} {mean:.4g}, above {self.limit:.4g}, "
            "twice that of guessing"
        )


def nonfinite_gradient(model: nn.Module) -> str | None:
    """The name of the parameter, first in the backward pass, whose gradient has NaN or Inf.

    A faulty gradient spreads from the last layers to the first, so the last one is named.
    """
    gradients = {
        name: _local(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    # One number for all of them: almost always this is all there is to do.
    if math.isfinite(get_total_norm(gradients.values()).item()):
        return None
    for name, gradient in reversed(gradients.items()):
        if not torch.isfinite(gradient).all():
            return name
    # Only their norm is beyond the range of their dtype.
    return None


def first_nonfinite(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Where NaN or Inf begins: a parameter, or the first module whose output is not finite.

    Args:
        forward: runs the model on the batch in question.
    """
    if is_sharded(model):
        # The other processes may not be here, to run a sharded model with this one.
        return "a place that is not looked for in a sharded model"
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
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
