"""Linear cross-entropy out of library products, a chunk of rows at a time: the CPU path.

    logits[C, V] = hidden weightᵀ      log_p = log_softmax(logits)      loss_i = -log_p[i, label_i]
    dlogits = exp(log_p) - onehot      dx[C, H] = dlogits weight

dlogits takes the place of the logits, so one buffer of [C, V] serves all chunks.
Shapes: hidden [M, H], weight [V, H], labels [M]; C = chunk_rows.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

# Bytes of weight that are widened at a time where the products run in a wider dtype.
_BLOCK_BYTES = 8 * 2**20


@cache
def _product_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the library's products are fastest, at least as precise as `dtype`.

    A CPU without bfloat16 instructions emulates them: on two AVX-512 cores (512 tokens, H = 576,
    V = 49,152) head and loss in torch, forward and backward, took 1.17 s in bfloat16 and 0.34 s in
    float32.
    """
    if device_type != "cpu" or dtype in (torch.float32, torch.float64):
        return dtype
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype if native and dtype == torch.bfloat16 else torch.float32


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """weight[V, H] in `dtype`: whole if that is its own, else block after block of its rows."""
    vocab, width = weight.shape
    if weight.dtype == dtype:
        yield slice(0, vocab), weight
        return
    rows = max(1, _BLOCK_BYTES // (dtype.itemsize * max(1, width)))
    for start in range(0, vocab, rows):
        block = slice(start, min(start + rows, vocab))
        yield block, weight[block].to(dtype)


def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    need_dx: bool,
    chunk_rows: int,
) -> tuple[Tensor, Tensor | None]:
    """The losses [M] in float32 (float64 for float64) and their sum's gradient dx [M, H] or None.

    Ignored rows have loss and gradient zero. Labels outside the vocabulary give NaN.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    dtype = _product_dtype(hidden.device.type, hidden.dtype)
    acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(rows, dtype=acc_dtype)
    dx = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_dx else None
    logits_buffer = hidden.new_empty(min(rows, chunk_rows), vocab, dtype=dtype)
    scores_buffer = (
        logits_buffer if dtype == acc_dtype else torch.empty_like(logits_buffer, dtype=acc_dtype)
    )
    targets = labels.clamp(0, vocab - 1).unsqueeze(1)

    for start in range(0, rows, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        x, target = hidden[chunk].to(dtype), targets[chunk]
        logits, scores = logits_buffer[: x.shape[0]], scores_buffer[: x.shape[0]]
        for block, w in _widened(weight, dtype):
            torch.mm(x, w.t(), out=logits[:, block])
        if dtype != acc_dtype:
            scores.copy_(logits)
        # ATen's kernels, for CPU and for CUDA, write a row's elements after its reductions, each
        # where it was read: the result can replace the input.
        torch.log_softmax(scores, dim=-1, out=scores)
        log_p = scores.gather(1, target)
        losses[chunk] = -log_p.squeeze(1)
        if dx is None:
            continue
        scores.exp_().scatter_(1, target, log_p.expm1())
        if dtype != acc_dtype:
            logits.copy_(scores)
        if weight.dtype == dtype:
            torch.mm(logits, weight, out=dx[chunk])
        else:
            wide_dx = torch.zeros_like(x)
            for block, w in _widened(weight, dtype):
                wide_dx.addmm_(logits[:, block], w)
            dx[chunk] = wide_dx

    ignored = labels == ignore_index
    unknown = ~ignored & ((labels < 0) | (labels >= vocab))
    losses.masked_fill_(ignored, 0.0).masked_fill_(unknown, torch.nan)
    if dx is not None:
        dx.masked_fill_(ignored.unsqueeze(1), 0.0).masked_fill_(unknown.unsqueeze(1), torch.nan)
    return losses, dx
