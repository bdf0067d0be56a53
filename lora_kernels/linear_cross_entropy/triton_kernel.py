"""Linear cross-entropy with one kernel between the two library products of every chunk of rows.

    logits[C, V] = hidden weightᵀ                                library product, into the buffer
    loss_i = log sum_j exp(logits_ij) - logits_it                t = label_i
    dlogits_ij = exp(logits_ij) / sum_k exp(logits_ik) - [j = t] kernel, over the logits
    dx[C, H] = dlogits weight                                    library product

Computing dx in the forward pass, where the logits still exist, is the scheme of Liger Kernel
(arXiv:2410.10989). The kernel reads a row twice and writes it once: the first reading finds the
maximum and the sum (the online softmax of Milakov and Gimelshein, arXiv:1805.02867), the second the
gradient. The target stays out of the sum, so that its gradient, minus the probability of all the
others, suffers no cancellation where the model is sure.

Shapes: hidden [M, H], weight [V, H], labels [M]; C = chunk_rows. A program handles one row.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.compile_cases import CompileCase

# Elements of a row that a program holds at a time, and how many of them a thread does, beside a
# running maximum and sum for each. With 8 or 16 a thread, one configuration or another spilled on
# sm_80, sm_90 or sm_100, whatever the size of the block.
_BLOCK = 2048
_PER_THREAD = 4

# Rows of the buffer begin at multiples of this many elements: wide loads for any vocabulary.
_ALIGNMENT = 64


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    stride_row,
    ignore_index,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_row
    label = tl.load(labels_ptr + row)
    offsets = tl.arange(0, BLOCK)

    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros((BLOCK,), dtype=logits_ptr.dtype.element_ty)
            for start in range(0, VOCAB, BLOCK):
                columns = start + offsets
                tl.store(logits_ptr + columns, zeros, mask=columns < VOCAB)
    else:
        # A label outside the vocabulary reads nothing outside the row; NaN tells of it.
        known = (label >= 0) & (label < VOCAB)
        target = tl.where(known, label, 0).to(tl.int32)
        target_logit = tl.load(logits_ptr + target).to(ACC)
        target_logit = tl.where(known, target_logit, float("nan"))

        # Every lane keeps a maximum and a sum of its own: no reduction inside the loop. The
        # maximum starts finite, because -inf - (-inf) is NaN.
        maxima = tl.full((BLOCK,), -3.0e38, dtype=ACC)
        sums = tl.zeros((BLOCK,), dtype=ACC)
        for start in range(0, VOCAB, BLOCK):
            columns = start + offsets
            x = tl.load(logits_ptr + columns, mask=columns < VOCAB, other=float("-inf")).to(ACC)
            difference = tl.where(columns == target, float("-inf"), x) - maxima
            ratio = tl.exp(-tl.abs(difference))
            grows = difference > 0
            sums = tl.where(grows, sums * ratio + 1.0, sums + ratio)
            maxima = tl.where(grows, x, maxima)
        maximum = tl.maximum(tl.max(maxima, axis=0), target_logit)
        others = tl.sum(sums * tl.exp(maxima - maximum), axis=0)
        total = others + tl.exp(target_logit - maximum)
        tl.store(losses_ptr + row, tl.log(total) + (maximum - target_logit))

        if GRADIENT:
            inverse = 1.0 / total
            for start in range(0, VOCAB, BLOCK):
                columns = start + offsets
                mask = columns < VOCAB
                x = tl.load(logits_ptr + columns, mask=mask, other=float("-inf")).to(ACC)
                gradient = tl.exp(x - maximum) * inverse
                gradient = tl.where(columns == target, -others * inverse, gradient)
                tl.store(logits_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


def _launch_arguments(vocab: int) -> tuple[int, int]:
    """BLOCK and the number of warps."""
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    return block, max(1, block // (32 * _PER_THREAD))


def cross_entropy(
    logits: Tensor, labels: Tensor, losses: Tensor, ignore_index: int, gradient: bool
) -> None:
    """Writes the losses, and with `gradient` replaces the logits by their gradients.

    Args:
        logits: [C, V], the last dimension contiguous.
        labels: int64 [C], contiguous. Rows labelled `ignore_index` get loss and gradient zero;
            labels outside the vocabulary get NaN.
        losses: [C], contiguous, in float32 (float64 for float64 logits).
    """
    assert logits.stride(1) == 1 and labels.is_contiguous() and losses.is_contiguous()
    rows, vocab = logits.shape
    block, num_warps = _launch_arguments(vocab)
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        _cross_entropy_kernel[(rows,)](
            logits,
            labels,
            losses,
            logits.stride(0),
            ignore_index,
            VOCAB=vocab,
            BLOCK=block,
            GRADIENT=gradient,
            ACC=tl.float64 if logits.dtype == torch.float64 else tl.float32,
            num_warps=num_warps,
            num_stages=1,
        )


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
    acc_dtype = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(rows, dtype=acc_dtype)
    dx = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_dx else None
    labels = labels.contiguous()
    padded = triton.cdiv(vocab, _ALIGNMENT) * _ALIGNMENT
    buffer = hidden.new_empty(min(rows, chunk_rows), padded)[:, :vocab]
    for start in range(0, rows, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        x = hidden[chunk]
        logits = buffer[: x.shape[0]]
        torch.mm(x, weight.t(), out=logits)
        cross_entropy(logits, labels[chunk], losses[chunk], ignore_index, need_dx)
        if dx is not None:
            torch.mm(logits, weight, out=dx[chunk])
    return losses, dx


def compile_cases() -> Iterator[CompileCase]:
    """The kernel with the vocabularies of well-known models, for compiling it without a GPU."""
    configurations = (
        # name, dtype, VOCAB, GRADIENT
        ("smollm2", "bf16", 49_152, True),
        ("llama2", "fp16", 32_000, True),
        ("llama3", "bf16", 128_256, True),
        ("llama3", "bf16", 128_256, False),
        ("llama3", "fp32", 128_256, True),
        ("qwen2", "bf16", 151_936, True),
        ("gemma", "bf16", 262_144, True),
        ("gpt2_odd", "bf16", 50_257, True),
        ("gpt2_odd", "fp32", 50_257, False),
        ("small_odd", "fp16", 101, True),
    )
    for name, dtype, vocab, gradient in configurations:
        block, num_warps = _launch_arguments(vocab)
        constexprs = {"VOCAB": vocab, "BLOCK": block, "GRADIENT": gradient, "ACC": tl.float32}
        yield CompileCase(
            name=f"linear_cross_entropy_{name}_{dtype}_{'gradient' if gradient else 'loss'}",
            kernel=_cross_entropy_kernel,
            signature={
                "logits_ptr": f"*{dtype}",
                "labels_ptr": "*i64",
                "losses_ptr": "*fp32",
                "stride_row": "i32",
                "ignore_index": "i32",
                **dict.fromkeys(constexprs, "constexpr"),
            },
            constexprs=constexprs,
            num_warps=num_warps,
            num_stages=1,
            divisible=("logits_ptr", "stride_row"),
        )
