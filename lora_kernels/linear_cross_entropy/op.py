"""The language-model head and its loss in one operation, without the logits of all tokens.

    logits[M, V] = hidden weightᵀ        loss = sum_i -log softmax(logits_i)[t_i] / N
    dhidden[M, H] = (softmax(logits) - onehot(t)) weight / N

t are the labels and N counts the positions that are not ignored, unless `num_items` is given. The
head is frozen, so the gradient of hidden is all that backward needs. The forward pass computes it,
undivided, while it has the logits of a chunk of rows; backward multiplies it by a scalar. Dividing
afterwards keeps softmax(logits) / N, which underflows in float16, out of the products.

Shapes: hidden [M, H], weight [V, H], labels [M].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.dispatch import requested, resolve
from lora_kernels.linear_cross_entropy import eager, reference

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Bytes of one chunk's logits, in hidden's dtype, and the fewest rows that keep the products
# efficient. A CPU's 32 MiB are what glibc keeps for the next call instead of mapping it afresh: on
# two AVX-512 cores (float32, 512 tokens, H = 576, V = 49,152) 128 rows at a time take 250 ms, 64
# rows 325 ms, all at once 258 ms (best of nine).
_CHUNK_BYTES = {"cpu": 32 * 2**20, "gpu": 256 * 2**20}
_MINIMUM_ROWS = {"cpu": 128, "gpu": 512}


def chunk_rows(rows: int, vocab: int, dtype: torch.dtype, device_type: str) -> int:
    """How many rows are processed at a time: chunks of nearly one size, in steps of 64 rows."""
    kind = "cpu" if device_type == "cpu" else "gpu"
    limit = max(_MINIMUM_ROWS[kind], _CHUNK_BYTES[kind] // (vocab * dtype.itemsize) // 64 * 64)
    chunks = max(1, -(-rows // limit))
    return min(limit, max(64, -(-rows // (64 * chunks)) * 64))


def _scored_positions(labels: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """The positions whose labels are not ignored, on a CPU, where asking for them is no wait.

    Raises:
        ValueError: one of these labels is no token of the vocabulary.
    """
    kept = (labels != ignore_index).nonzero().squeeze(1)
    if kept.numel():
        counted = labels if kept.numel() == labels.numel() else labels[kept]
        low, high = (extreme.item() for extreme in counted.aminmax())
        if low < 0 or high >= vocab:
            raise ValueError(
                f"labels: expected ignore_index {ignore_index} or a token from 0 to {vocab - 1} "
                f"(weight has {vocab} rows), got {low if low < 0 else high}"
            )
    return kept


@torch.library.custom_op("lora_kernels::linear_cross_entropy", mutates_args=())
def _total_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, impl: str, need_dx: bool
) -> tuple[Tensor, Tensor]:
    """The sum of the losses and its gradient dx[M, H], which has no rows unless it is needed."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    weight = weight.to(hidden.dtype)
    x, targets, kept = hidden, labels, None
    # On a GPU the number of scored rows is known to the device alone, and finding it out would
    # make the host wait for everything before. There ignored rows are computed and set to zero.
    if hidden.device.type == "cpu":
        kept = _scored_positions(labels, vocab, ignore_index)
        if kept.numel() == rows:
            kept = None
        else:
            x, targets = hidden.index_select(0, kept), labels.index_select(0, kept)

    size = chunk_rows(x.shape[0], vocab, x.dtype, x.device.type)
    if resolve(impl, x.device, x.dtype) == "triton":
        from lora_kernels.linear_cross_entropy import triton_kernel

        forward = triton_kernel.forward
    else:
        forward = eager.forward
    losses, dx = forward(x, weight, targets, ignore_index, need_dx, size)
    if dx is None:
        dx = hidden.new_empty(0, hidden.shape[1])
    elif kept is not None:
        dx = hidden.new_zeros(hidden.shape).index_copy_(0, kept, dx)
    return losses.sum(), dx


@_total_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, impl: str, need_dx: bool
) -> tuple[Tensor, Tensor]:
    total = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return total, hidden.new_empty(hidden.shape[0] if need_dx else 0, hidden.shape[1])


@torch.library.custom_op("lora_kernels::linear_cross_entropy_backward", mutates_args=())
def _scale(dx: Tensor, labels: Tensor, ignore_index: int, dy: Tensor) -> Tensor:
    """dx[M, H] times the scalar dy, which does not reach the rows that are ignored.

    As in torch, those rows stay zero where dy is infinite, as after a division by no items at all.
    """
    factors = torch.where(labels != ignore_index, dy, 0.0).unsqueeze(1)
    out = torch.empty_like(dx)
    # A factor for every row promotes the product to float32; a scalar would take dx's dtype.
    return torch.mul(dx, factors, out=out)


@_scale.register_fake
def _(dx: Tensor, labels: Tensor, ignore_index: int, dy: Tensor) -> Tensor:
    return torch.empty_like(dx)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, labels, ctx.ignore_index, _, _ = inputs
    _, dx = output
    ctx.mark_non_differentiable(dx)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dx, labels)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    # Autograd records a backward pass only for differentiating it again. The gradient that was
    # computed in the forward pass would come out as a constant.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy cannot be differentiated twice (backward was called with "
            "create_graph=True); impl='reference' can"
        )
    if dy is None:
        return (None,) * 6
    dx, labels = ctx.saved_tensors
    return _scale(dx, labels, ctx.ignore_index, dy), None, None, None, None, None


_total_loss.register_autograd(_backward, setup_context=_setup_context)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: float | Tensor | None,
    shift: bool,
) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name}: expected hidden's device {hidden.device}, got {tensor.device}"
            )
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected a dtype of {_DTYPES}, got {tensor.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected torch.int64, got {labels.dtype}")
    if hidden.dim() < 1:
        raise ValueError("hidden: expected [..., H], got a scalar")
    if shift and hidden.dim() != 3:
        raise ValueError(
            f"hidden: expected [B, T, H] with shift=True, got shape {tuple(hidden.shape)}; "
            f"shift=False takes any shape with labels that are already aligned"
        )
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected shape [V, {hidden.shape[-1]}] with V at least 1 for hidden "
            f"{tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: expected shape {tuple(hidden.shape[:-1])} for hidden {tuple(hidden.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError(
            "weight: expected requires_grad=False (the head is frozen and gets no gradient), got "
            "requires_grad=True"
        )
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: expected one element, got shape {tuple(num_items.shape)}")
    elif num_items is not None and not isinstance(num_items, int | float):
        raise TypeError(
            f"num_items: expected a number, a tensor or None, got {type(num_items).__name__}"
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    impl: str = "auto",
    *,
    shift: bool = True,
) -> Tensor:
    """The cross-entropy of a frozen language-model head, without storing [tokens, V] logits.

    By default labels are the token ids themselves, as transformers' models take them: position t
    is scored against labels[:, t + 1], and the last position of every sequence is not scored. With
    shift=False labels[..., t] is the target of hidden[..., t, :].

    The logits are rounded to hidden's dtype, if at all, and everything after is in float32 (float64
    for float64), as in transformers. Nothing is written into an input. On a CPU ignored positions
    cost nothing; on a GPU, where counting them would make the host wait, they cost as others do.

    Args:
        hidden: [B, T, H], the last hidden states; with shift=False [..., H]. float16, bfloat16,
            float32 or float64, any strides.
        weight: [V, H], the head's, frozen, in hidden's dtype; under autocast any floating dtype.
        labels: int64 [B, T]; with shift=False [...]. Each is `ignore_index` or from 0 to V - 1.
        ignore_index: the label of positions that are not scored.
        num_items: what the sum of the losses is divided by, a number or a tensor with one element:
            transformers' `num_items_in_batch`, for gradient accumulation. None: the number of
            positions that are scored.
        impl: "auto", "triton", "eager" or "reference".
        shift: whether labels are token ids still to be shifted.

    Returns:
        The loss, a scalar in float32 (float64 for float64). Where no position is scored it is NaN,
        or 0 with num_items, and the gradient is zero, as from torch. Gradients reach hidden. Only
        "reference" can be differentiated twice.

    Raises:
        ValueError: shapes or devices do not fit, weight requires a gradient, `impl` is unknown or
            cannot run here; on a CPU, a label is no token of the vocabulary ("reference" leaves
            that to torch, which raises IndexError). On a GPU, where looking at labels would make
            the host wait, such a label makes the loss and its position's gradient NaN.
        TypeError: an argument is no tensor or has a wrong dtype.

    Source: transformers' ForCausalLMLoss and fixed_cross_entropy (loss/loss_utils.py).
    """
    _check(hidden, weight, labels, num_items, shift)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    elif weight.dtype != hidden.dtype:
        raise TypeError(f"weight: expected hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if shift:
        # As in transformers: shifting the labels spares a copy of hidden.
        labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    labels = labels.reshape(-1)
    hidden = hidden.reshape(labels.shape[0], hidden.shape[-1])
    if isinstance(num_items, Tensor):
        acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
        num_items = num_items.to(hidden.device, acc_dtype).reshape(())

    impl = requested(impl)
    if impl == "reference":
        weight = weight.to(hidden.dtype)
        return reference.linear_cross_entropy(hidden, weight, labels, ignore_index, num_items)
    need_dx = torch.is_grad_enabled() and hidden.requires_grad
    total, _ = _total_loss(hidden, weight, labels, ignore_index, impl, need_dx)
    if num_items is None:
        return total / (labels != ignore_index).sum()
    return total / num_items
