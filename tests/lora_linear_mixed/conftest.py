"""Mixed batches drawn at random, and the oracle: every adapter run alone on its own rows."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lora_kernels.lora_linear import reference

# Which adapter each of m rows has; -1 is the base alone.
LAYOUTS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "random": lambda m, a, g: torch.randint(-1, a, (m,), generator=g),
    "sequences": lambda m, a, g: (torch.arange(m) * (2 * a + 3) // m) % (a + 1) - 1,
    "long runs": lambda m, a, g: (torch.arange(m) // 40) % (a + 1) - 1,
    "falling": lambda m, a, g: torch.arange(m).flip(0) * a // max(m, 1),
    "first only": lambda m, a, g: torch.zeros(m, dtype=torch.long),
    "last and base": lambda m, a, g: torch.where(torch.arange(m) % 3 == 0, -1, a - 1),
    "all base": lambda m, a, g: torch.full((m,), -1),
}


@dataclass
class Mixed:
    """One batch. `scalings` are no numbers of few bits: a narrower dtype on the way would show."""

    x: Tensor
    weight: Tensor
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    bias: Tensor
    dy: Tensor
    scalings: list[float]
    ids: Tensor

    def leaves(self) -> list[Tensor]:
        return [self.x, *self.lora_as, *self.lora_bs, self.bias]

    def to(self, dtype: torch.dtype) -> "Mixed":
        def moved(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

        return Mixed(
            moved(self.x), moved(self.weight), [moved(t) for t in self.lora_as],
            [moved(t) for t in self.lora_bs], moved(self.bias), moved(self.dy), self.scalings,
            self.ids,
        )  # fmt: skip

    def arguments(self, *rest) -> tuple:
        return (
            self.x, self.weight, self.lora_as, self.lora_bs, self.scalings, self.ids, self.bias,
            *rest,
        )  # fmt: skip

    def results(self, function: Callable[..., Tensor], *rest) -> list[Tensor]:
        """y and the gradient of every leaf."""
        y = function(*self.arguments(*rest))
        return [y.detach(), *torch.autograd.grad(y, self.leaves(), self.dy)]

    def alone(self) -> list[Tensor]:
        """The same from separate runs of each adapter over its rows, and of the base over its."""
        y = torch.empty_like(self.dy)
        dx, d_bias = torch.zeros_like(self.x), torch.zeros_like(self.bias)
        d_as = [torch.zeros_like(t) for t in self.lora_as]
        d_bs = [torch.zeros_like(t) for t in self.lora_bs]
        for a in range(-1, len(self.lora_as)):
            rows = (self.ids == a).nonzero()[:, 0]
            x = self.x.detach()[rows].requires_grad_()
            factors = [t.detach().requires_grad_() for t in (self.lora_as[a], self.lora_bs[a])]
            bias = self.bias.detach().requires_grad_()
            if a < 0:
                part = torch.nn.functional.linear(x, self.weight, bias)
                factors = []
            else:
                part = reference.lora_linear(x, self.weight, *factors, self.scalings[a], bias)
            y[rows] = part.detach()
            gradients = torch.autograd.grad(part, [x, bias, *factors], self.dy[rows])
            dx[rows] = gradients[0]
            d_bias += gradients[1]
            if a >= 0:
                d_as[a], d_bs[a] = gradients[2:]
        return [y, dx, *d_as, *d_bs, d_bias]


@pytest.fixture
def draw(device) -> Callable[..., Mixed]:
    """draw(m, n, k, ranks, layout, dtype, seed): sizes that make base and adapters equally large"""

    def drawn(m, n, k, ranks, layout="random", dtype=torch.float64, seed=0) -> Mixed:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0, trained: bool = True) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            return values.to(device, dtype).requires_grad_(trained)

        return Mixed(
            normal(m, k),
            normal(n, k, scale=k**-0.5, trained=False),
            [normal(r, k, scale=k**-0.5) for r in ranks],
            [normal(n, r, scale=r**-0.5) for r in ranks],
            normal(n),
            normal(m, n, trained=False),
            [0.7 + a / 3 for a in range(len(ranks))],
            LAYOUTS[layout](m, len(ranks), generator).to(device),
        )

    return drawn
