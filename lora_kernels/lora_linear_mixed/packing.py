"""The adapters of a mixed batch as one argument: factors end to end, numbers by adapter.

lora_a[ΣR K]    lora_a_a[R_a, K], one after the other, each row-major
lora_b[N ΣR]    lora_b_a[N, R_a] likewise
first_r[A + 1]  Σ of the ranks before adapter a: its factors begin at first_r[a] K, first_r[a] N
scalings[A]     s_a
thresholds[A], inverse_keeps[A]     of dropout: a random number below the first drops its
                                    element, the second is 1 / (1 - p_a)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lora_kernels.lora_linear.dropout import drop_threshold, generator_keep


@dataclass(frozen=True)
class MixedDropout:
    """One mask for the layer: an int64 seed [1], and the probability of each adapter's rows."""

    seed: Tensor
    ps: tuple[float, ...]


@dataclass(frozen=True)
class Packed:
    """All adapters, in x's dtype; numbers in the accumulator's."""

    lora_a: Tensor
    lora_b: Tensor
    ranks: tuple[int, ...]
    first_r: Tensor
    scalings: Tensor
    seed: Tensor | None = None
    thresholds: Tensor | None = None
    inverse_keeps: Tensor | None = None


def pack(
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float],
    scaling_tensor: Tensor | None,
    dropout: MixedDropout | None,
    dtype: torch.dtype,
) -> Packed:
    """`scaling_tensor` [A], where it is given, holds the scalings in place of the floats."""
    device = lora_as[0].device
    ranks = tuple(lora_a.shape[0] for lora_a in lora_as)
    first_r = (0, *(sum(ranks[: a + 1]) for a in range(len(ranks))))
    number = torch.float64 if dtype == torch.float64 else torch.float32
    if scaling_tensor is None:
        factors = constant(tuple(scalings), number, device)
    else:
        factors = scaling_tensor.to(number).contiguous()
    packed = Packed(
        _end_to_end(lora_as, dtype),
        _end_to_end(lora_bs, dtype),
        ranks,
        constant(first_r, torch.int32, device),
        factors,
    )
    if dropout is None:
        return packed
    thresholds = tuple(drop_threshold(p) for p in dropout.ps)
    inverse_keeps = tuple(1.0 / (1.0 - p) for p in dropout.ps)
    return Packed(
        packed.lora_a, packed.lora_b, ranks, packed.first_r, factors, dropout.seed,
        constant(thresholds, torch.int32, device), constant(inverse_keeps, number, device),
    )  # fmt: skip


def _end_to_end(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One copy and at most one cast, however many there are."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).to(dtype)


@lru_cache(maxsize=1024)
def constant(
    values: tuple[float, ...] | tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor that nobody writes to, copied to its device once and not in every call."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def mixed_keep(dropout: MixedDropout, row_adapters: Tensor, x: Tensor) -> Tensor:
    """The multiplier [M, K] from torch's generator: a row's probability is its adapter's.

    Rows without an adapter have a multiplier too, which nothing reads.
    """
    if len(set(dropout.ps)) == 1:
        return generator_keep(dropout.seed, dropout.ps[0], x)
    kept = torch.tensor([1.0 - p for p in dropout.ps], dtype=x.dtype, device=x.device)
    shares = kept[row_adapters.clamp(0, len(dropout.ps) - 1).long()][:, None]
    generator = torch.Generator(device=x.device).manual_seed(int(dropout.seed.item()))
    keep = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return keep.bernoulli_(shares.expand_as(x), generator=generator).div_(shares)
