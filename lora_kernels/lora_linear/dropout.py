"""The dropout multiplier of the LoRA branch, rebuilt from a seed in forward and in backward.

    keep[M, K] = 0 with probability p, else 1 / (1 - p)          x_lora = x * keep

Only the seed (one int64 a projection, on the tensor's device) is ever stored. Two streams exist:
torch's own generator, fast on every device torch supports, which eager and reference use; and
Philox4x32-10 counted by element, which the Triton kernels compute in registers and `philox_keep`
states here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_PHILOX_KEY = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUND = (0xD2511F53, 0xCD9E8D57)
_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout:
    """The masks of a group of LoRA branches: one int64 seed each, [G], and the probability."""

    seeds: Tensor
    p: float


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """Non-negative int64 seeds, shape [count], from torch's default generator on `device`."""
    return torch.randint(0, 2**62, (count,), dtype=torch.int64, device=device)


def drop_threshold(p: float) -> int:
    """A 31-bit random number below this drops its element."""
    return min(round(p * 2**31), 2**31 - 1)


def generator_keep(seed: Tensor, p: float, x: Tensor) -> Tensor:
    """The multiplier in x's shape and dtype, from torch's generator on x's device.

    Reading the seed on the host waits for the device, so this does not run inside a CUDA graph.
    """
    generator = torch.Generator(device=x.device).manual_seed(int(seed.item()))
    keep = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return keep.bernoulli_(1.0 - p, generator=generator).div_(1.0 - p)


def philox_keep(seed: Tensor, p: float, m: int, k: int, dtype: torch.dtype) -> Tensor:
    """The multiplier [m, k] that the Triton kernels use: one Philox4x32-10 draw per element.

    The counter is the element's row-major index, the key the seed's two halves; the first of the
    four numbers decides. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
    (SC 2011), with the constants and the counter layout of `triton.language.randint4x`.
    """
    index = torch.arange(m * k, dtype=torch.int64, device=seed.device)
    c0, c1 = index & _LOW_32, index >> 32
    c2, c3 = torch.zeros_like(index), torch.zeros_like(index)
    key = seed.to(torch.int64)
    k0, k1 = key & _LOW_32, (key >> 32) & _LOW_32
    for _ in range(10):
        # A signed product of two 32-bit numbers wraps modulo 2**64: both its halves stay right.
        even, odd = c0 * _PHILOX_ROUND[0], c2 * _PHILOX_ROUND[1]
        c0, c2 = ((odd >> 32) & _LOW_32) ^ c1 ^ k0, ((even >> 32) & _LOW_32) ^ c3 ^ k1
        c1, c3 = odd & _LOW_32, even & _LOW_32
        k0, k1 = (k0 + _PHILOX_KEY[0]) & _LOW_32, (k1 + _PHILOX_KEY[1]) & _LOW_32
    kept = (c0 >> 1 >= drop_threshold(p)).reshape(m, k)
    return kept.to(dtype) / (1.0 - p)
