"""A peer of one operation: a function of fixed tensors, run, differentiated and restored.

An operation's recipe has the inputs, what the outputs should be (the specification, which the
check runs in float64), plain torch in the working dtype, and how each peer is built on the inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Function = Callable[[Inputs], tuple[Tensor, ...]]


@dataclass
class Peer:
    """One peer's function of fixed tensors.

    Attributes:
        trained: the tensors that get gradients, by name.
        restore: (own tensor, original) of a peer that writes into its inputs.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    trained: dict[str, Tensor]
    dys: tuple[Tensor, ...] = ()
    restore: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def run(self, backward: bool) -> tuple[Tensor, ...]:
        """One call: the gradients, or without backward the outputs."""
        outputs = self.forward()
        if not backward:
            return outputs
        return torch.autograd.grad(outputs, list(self.trained.values()), self.dys)

    def results(self, training: bool = True) -> dict[str, Tensor]:
        """Outputs and gradients by name: "y0", ..., "d_x", ...; on the original inputs.

        Without `training` the outputs alone, of a call without autograd.
        """
        self.refresh()
        with torch.set_grad_enabled(training):
            outputs = self.forward()
        named = {f"y{index}": y.detach().clone() for index, y in enumerate(outputs)}
        if training:
            gradients = torch.autograd.grad(outputs, list(self.trained.values()), self.dys)
            # Copies: a peer may have put a gradient where its input was.
            named |= {
                f"d_{name}": gradient.clone()
                for name, gradient in zip(self.trained, gradients, strict=True)
            }
        self.refresh()
        return named

    def refresh(self) -> None:
        """Undoes what the peer has written into its inputs and into dy."""
        with torch.no_grad():
            for own, original in self.restore:
                own.copy_(original)


Builder = Callable[[Inputs], Peer]


@dataclass
class Recipe:
    """Inputs, which of them get gradients, what the outputs should be, and the peers' builders."""

    inputs: dict[str, Tensor]
    trained: list[str]
    specification: Function
    plain: Function
    builders: dict[str, Builder]


@dataclass
class Op:
    """One case with its inputs drawn and its peers built on them."""

    recipe: Recipe
    dys: tuple[Tensor, ...]
    peers: dict[str, Peer]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.recipe.inputs.values(), *self.dys))

    def evaluate(self, function: Function, dtype: torch.dtype) -> dict[str, Tensor]:
        """A function's results on the inputs converted to `dtype`, named as a peer's."""
        inputs = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.recipe.inputs.items()
        }
        peer = functional(function, self.recipe.trained)(inputs)
        outputs = peer.forward()
        peer.dys = tuple(dy.to(y.dtype) for dy, y in zip(self.dys, outputs, strict=True))
        return peer.results()


def functional(function: Function, trained: list[str]) -> Builder:
    """A peer without parameters of its own; its leaves share the inputs' memory."""

    def build(inputs: Inputs) -> Peer:
        leaves = {
            name: tensor.detach().requires_grad_(name in trained) for name, tensor in inputs.items()
        }
        return Peer(lambda: function(leaves), {name: leaves[name] for name in trained})

    return build


def writing(function: Function, trained: list[str]) -> Builder:
    """As `functional`, for a peer that writes into its inputs: it gets copies of its own."""

    def build(inputs: Inputs) -> Peer:
        own = {name: tensor.clone() for name, tensor in inputs.items()}
        peer = functional(function, trained)(own)
        peer.restore = [(own[name], inputs[name]) for name in inputs]
        return peer

    return build
