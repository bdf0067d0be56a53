"""The oracle comparison that tests, benchmarks and users' own checks share.

An implementation is judged by its error against the same computation in float64, relative to the
error that plain torch makes in the implementation's own dtype: a ratio needs no tolerance.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels.lora_linear import reference
from lora_kernels.lora_linear.op import lora_linear

# Twice low-precision torch's own error: the bound that flash-attention and others use.
MAX_RATIO = 2.0


@dataclass(frozen=True)
class Comparison:
    """One output against the float64 oracle, and plain torch's in the same dtype beside it.

    Attributes:
        error: root mean square of (output - oracle), over the oracle's.
        torch_error: the same of plain torch in the output's dtype.
        max_error: largest |output - oracle| over the oracle's largest magnitude.
        torch_max_error: the same of plain torch.
        rounding: the relative error of rounding once to the dtype; torch's own error on a small or
            exact case can be nothing, and no output can be asked to be better than rounded.
    """

    error: float
    torch_error: float
    max_error: float
    torch_max_error: float
    rounding: float

    @property
    def ratio(self) -> float:
        """The worse of the two ratios, of root mean squares and of maxima."""
        return max(
            self.error / max(self.torch_error, self.rounding / 2),
            self.max_error / max(self.torch_max_error, self.rounding),
        )


def compare(output: Tensor, low_precision: Tensor, oracle: Tensor) -> Comparison:
    """Compares an output with the float64 oracle of the same shape.

    Args:
        output: the implementation's, any floating dtype.
        low_precision: plain torch's, from the same inputs in the working dtype.
        oracle: the same computation in float64.

    Raises:
        ValueError: shapes differ, or the output has NaN or Inf.
    """
    if output.shape != oracle.shape or low_precision.shape != oracle.shape:
        raise ValueError(
            f"output: expected shape {tuple(oracle.shape)}, got {tuple(output.shape)} and, from "
            f"plain torch, {tuple(low_precision.shape)}"
        )
    if not torch.isfinite(output).all():
        raise ValueError("output: expected finite values, got NaN or Inf")
    exact = oracle.detach().double()

    def errors(value: Tensor) -> tuple[float, float]:
        difference = value.detach().double() - exact
        scale = exact.norm().item() or 1.0
        largest = exact.abs().max().item() or 1.0
        return difference.norm().item() / scale, difference.abs().max().item() / largest

    error, max_error = errors(output)
    torch_error, torch_max_error = errors(low_precision)
    rounding = torch.finfo(low_precision.dtype).eps / 2
    return Comparison(error, torch_error, max_error, torch_max_error, rounding)


def lora_linear_inputs(
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    bias: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random x[m, k], weight[n, k], lora_a[r, k], lora_b[n, r], bias[n] and dy[m, n].

    Scaled so that the base and the low-rank product have outputs of about the same size: an error
    in either shows.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    tensors = {
        "x": draw(m, k),
        "weight": draw(n, k, scale=k**-0.5),
        "lora_a": draw(r, k, scale=k**-0.5),
        "lora_b": draw(n, r, scale=r**-0.5),
        "dy": draw(m, n),
    }
    if bias:
        tensors["bias"] = draw(n)
    return tensors


TRAINED = ("x", "lora_a", "lora_b", "bias")


def outputs_and_gradients(
    function: Callable[..., Tensor], inputs: Mapping[str, Tensor], *arguments: object
) -> dict[str, Tensor]:
    """y and the gradients of x, lora_a, lora_b and bias under the output gradient inputs["dy"].

    `function(x, weight, lora_a, lora_b, scaling, bias, ...)`, as `lora_linear` and its reference.
    """
    leaves = {
        name: tensor.detach().clone().requires_grad_(name in TRAINED)
        for name, tensor in inputs.items()
        if name != "dy"
    }
    trained = [name for name in TRAINED if name in leaves]
    y = function(
        leaves["x"], leaves["weight"], leaves["lora_a"], leaves["lora_b"], arguments[0],
        leaves.get("bias"), *arguments[1:],
    )  # fmt: skip
    gradients = torch.autograd.grad(y, [leaves[name] for name in trained], inputs["dy"])
    return {"y": y.detach()} | {
        f"d_{name}": gradient for name, gradient in zip(trained, gradients, strict=True)
    }


def check_lora_linear(
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    impl: str = "auto",
    device: torch.device | str = "cpu",
    scaling: float = 0.75,
    bias: bool = True,
    draws: int = 4,
) -> dict[str, Comparison]:
    """Compares one implementation of `lora_linear`, forward and backward, with the oracle.

    Args:
        draws: how many sets of inputs are compared as one, so that the ratio of a small case is
            not that of two single rounding errors.

    Returns:
        By output ("y", "d_x", "d_lora_a", "d_lora_b", "d_bias"): a `Comparison`. Its `ratio` should
        be at most `MAX_RATIO`.
    """
    results: dict[str, list[dict[str, Tensor]]] = {"oracle": [], "plain": [], "ours": []}
    for seed in range(draws):
        inputs = lora_linear_inputs(m, n, k, r, dtype, device, bias, seed)
        exact = {name: tensor.double() for name, tensor in inputs.items()}
        results["oracle"].append(outputs_and_gradients(reference.lora_linear, exact, scaling))
        results["plain"].append(outputs_and_gradients(reference.lora_linear, inputs, scaling))
        results["ours"].append(outputs_and_gradients(lora_linear, inputs, scaling, 0.0, impl))
    stacked = {
        kind: {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}
        for kind, drawn in results.items()
    }
    return {
        name: compare(stacked["ours"][name], stacked["plain"][name], oracle)
        for name, oracle in stacked["oracle"].items()
    }
