"""One shape to tune: its tensors, how a configuration runs on them, whether the result is right.

    shrink, one_pass, split, decode     forward, by parts: S, or y_g with and without S given
    dy_b, dx, d_a                       backward, by parts
    library                             forward and backward out of library GEMMs

Every part has tensors of its own as inputs, so that each is judged alone: against the same products
in float64, by the ratio of its error to plain torch's (`lora_kernels/testing.py`).

Shapes: x[M, K]  weight_g[N_g, K]  lora_a[G R, K]  lora_b_g[N_g, R]  S, P [M, G R]  dy_g[M, N_g]
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.lora_linear import eager
from lora_kernels.lora_linear.compile_cases import Config
from lora_kernels.lora_linear.plan import for_ranks
from lora_kernels.testing import MAX_RATIO, compare

SCALING = 0.75
# Rows on which a result is checked: ragged, and more than one chunk has.
CHECKED_ROWS = 1100


@dataclass(frozen=True)
class Bucket:
    """A shape whose entry is timed: n holds the outputs of each projection."""

    m: int
    n: tuple[int, ...]
    k: int
    r: int

    @property
    def key(self) -> str:
        return f"m {self.m}, n {'+'.join(map(str, self.n))}, k {self.k}, r {self.r}"


@dataclass
class Tensors:
    """The inputs of all the parts."""

    x: Tensor
    weights: list[Tensor]
    lora_a: Tensor
    lora_bs: list[Tensor]
    s: Tensor
    p: Tensor
    dys: list[Tensor]
    ranks: list[int] = field(default_factory=list)

    @classmethod
    def draw(
        cls, bucket: Bucket, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> "Tensors":
        """Random, so scaled that every product's outputs are of about the same size."""
        generator = torch.Generator(device=device).manual_seed(seed)
        m, k, r, count = bucket.m, bucket.k, bucket.r, len(bucket.n)

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(rows, columns, generator=generator, device=device)
            return drawn.mul_(scale).to(dtype)

        return cls(
            x=normal(m, k),
            weights=[normal(n, k, k**-0.5) for n in bucket.n],
            lora_a=normal(count * r, k, k**-0.5),
            lora_bs=[normal(n, r, r**-0.5) for n in bucket.n],
            s=normal(m, count * r),
            p=normal(m, count * r),
            dys=[normal(m, n) for n in bucket.n],
            ranks=[r] * count,
        )

    def to(self, dtype: torch.dtype) -> "Tensors":
        def converted(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(dtype)
            return [converted(part) for part in value] if isinstance(value, list) else value

        return Tensors(**{name: converted(value) for name, value in vars(self).items()})

    @property
    def bytes(self) -> int:
        values = [self.x, *self.weights, self.lora_a, *self.lora_bs, self.s, self.p, *self.dys]
        return sum(tensor.nbytes for tensor in values)


def run(part: str, config: Config | None, t: Tensors) -> list[Tensor]:
    """The results of a part, by the kernels with this configuration or by the library."""
    from lora_kernels.lora_linear import triton_backward, triton_decode, triton_forward

    scalings = [SCALING] * len(t.weights)
    if part == "library_forward":
        ys, s = eager.forward(t.x, t.weights, t.lora_a, t.lora_bs, None, None, scalings, None, None)
        return [*ys, s]
    if part == "library_backward":
        dx, d_a, d_bs, _ = eager.backward(
            t.dys, t.x, t.weights, t.lora_a, t.lora_bs, t.s, scalings, None, None,
            (True, True, True, False),
        )  # fmt: skip
        assert dx is not None and d_a is not None and d_bs is not None
        return [dx, d_a, *d_bs]
    assert config is not None
    ranks, stacked = t.ranks, [sum(t.ranks)]
    launched: Any = config
    if part == "split":
        launched = for_ranks(launched, ranks)
        return triton_forward.expand(t.x, t.weights, t.s, t.lora_bs, None, None, launched)
    if part in ("shrink", "dx", "d_a"):
        launched = for_ranks(launched, stacked)
    if part == "shrink":
        return [triton_forward.shrink(t.x, t.lora_a, ranks, scalings, None, launched)]
    if part == "one_pass":
        ys, kept = triton_forward.one_pass(
            t.x, t.weights, t.lora_a, t.lora_bs, None, None, scalings, None, launched, True
        )
        assert kept is not None
        return [*ys, kept]
    if part == "decode":
        return triton_decode.decode(
            t.x, t.weights, t.lora_a, t.lora_bs, None, None, scalings, None, launched
        )
    if part == "dx":
        return [triton_backward.dx(t.dys, t.weights, t.p, t.lora_a, tuple(ranks), launched)]
    if part == "d_a":
        return [triton_backward.d_a(t.p, t.x, tuple(ranks), launched)]
    assert part == "dy_b"
    p, d_bs, _ = triton_backward.dy_b(
        t.dys, t.lora_bs, t.s, scalings, None, launched, (True, True, False)
    )
    assert p is not None and d_bs is not None
    return [p, *d_bs]


def specification(part: str, t: Tensors) -> list[Tensor]:
    """What `run` computes, in plain torch and the tensors' dtype."""
    s = SCALING * (t.x @ t.lora_a.t())
    base = [t.x @ weight.t() for weight in t.weights]
    if part == "shrink":
        return [s]
    if part in ("one_pass", "decode", "split"):
        low = (t.s if part == "split" else s).split(t.ranks, 1)
        ys = [y + s_g @ b.t() for y, s_g, b in zip(base, low, t.lora_bs, strict=True)]
        return [*ys, s] if part == "one_pass" else ys
    if part == "dx":
        products = [dy @ weight for dy, weight in zip(t.dys, t.weights, strict=True)]
        return [torch.stack([*products, t.p @ t.lora_a]).sum(0)]
    if part == "d_a":
        return [t.p.t() @ t.x]
    assert part == "dy_b"
    p = [SCALING * (dy @ b) for dy, b in zip(t.dys, t.lora_bs, strict=True)]
    d_bs = [dy.t() @ s_g for dy, s_g in zip(t.dys, t.s.split(t.ranks, 1), strict=True)]
    return [torch.cat(p, 1), *d_bs]


class Checker:
    """Judges configurations on one shape; what they are compared with is computed once a part."""

    def __init__(self, bucket: Bucket, dtype: torch.dtype, device: torch.device) -> None:
        rows = min(bucket.m, CHECKED_ROWS)
        self.tensors = Tensors.draw(replace(bucket, m=rows), dtype, device)
        self.exact = self.tensors.to(torch.float64)
        self.expected: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def fault(
        self,
        part: str,
        config: Config,
        launch: Callable[[str, Config | None, Tensors], list[Tensor]] = run,
    ) -> str | None:
        """Why a configuration must not be used here, or None."""
        if part not in self.expected:
            plain, oracle = (specification(part, t) for t in (self.tensors, self.exact))
            self.expected[part] = plain, oracle
        try:
            results = launch(part, config, self.tensors)
            ratios = [
                compare(result, plain, oracle).ratio
                for result, plain, oracle in zip(results, *self.expected[part], strict=True)
            ]
        except Exception as error:
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if max(ratios) > MAX_RATIO:
            return f"{max(ratios):.3g} times plain torch's error"
        return None
