"""Linear cross-entropy in plain differentiable torch: the specification and the tests' oracle.

    logits[M, V] = hidden weightᵀ        loss = sum_i -log softmax(logits_i)[labels_i] / items

over the positions i whose label is not `ignore_index`; `items` is their number unless given.
Shapes: hidden [M, H], weight [V, H], labels [M].
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """The loss in float32 (float64 for float64), of logits rounded to hidden's dtype."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if num_items is None:
        return F.cross_entropy(logits, labels, ignore_index=ignore_index)
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum") / num_items
