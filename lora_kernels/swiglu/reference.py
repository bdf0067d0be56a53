"""SwiGLU in plain differentiable torch: the specification and the tests' oracle.

    out = silu(gate) * up        silu(g) = g / (1 + exp(-g))

Shapes: gate, up and out [..., N], one dtype.
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As transformers computes it: in 16 bits silu(gate) is rounded before it meets `up`."""
    return F.silu(gate) * up
