"""`lora_linear_mixed`: rows of one batch under different adapters, forward and backward.

    x[M, K]  weight[N, K] (frozen)  lora_a_a[R_a, K]  lora_b_a[N, R_a]  bias[N]  s_a = scaling
    y[m] = x[m] weightᵀ + bias + s_a (dropout(x[m]) lora_a_aᵀ) lora_b_aᵀ,   a = row_adapters[m]

Training several adapters in one pass gives each the gradients that it would get alone on its rows:
sums over them. As in `lora_linear/op.py` the dtypes are settled here and nowhere else.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.dispatch import calls_directly, requested, resolve
from lora_kernels.lora_linear.checks import widest_dtype
from lora_kernels.lora_linear.dropout import draw_seeds
from lora_kernels.lora_linear.op import architecture
from lora_kernels.lora_linear_mixed import eager, reference
from lora_kernels.lora_linear_mixed.checks import check_arguments, rows_of
from lora_kernels.lora_linear_mixed.packing import MixedDropout, mixed_keep, pack
from lora_kernels.lora_linear_mixed.plan import MixedPlan, plan
from lora_kernels.lora_linear_mixed.rows import MixedRows


def lora_linear_mixed(
    x: Tensor,
    weight: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scalings: Sequence[float] | Tensor,
    row_adapters: Tensor | MixedRows,
    bias: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    impl: str = "auto",
) -> Tensor:
    """A linear layer whose rows belong to different LoRA adapters, or to none.

    Args:
        x: [..., K], float16, bfloat16, float32 or (outside the GPU kernels) float64.
        weight: [N, K], frozen, in x's dtype; under autocast any floating dtype.
        lora_as: [R_a, K] for each of the A adapters, any floating dtype; ranks may differ.
        lora_bs: [N, R_a] for each, any floating dtype.
        scalings: A floats, or a tensor [A] (no gradient).
        row_adapters: integers, one for each row of x (its leading shape, or flat [M]): which
            adapter, or -1 for the base alone. Sorting them once for all layers is
            `MixedRows.of(row_adapters, A)`, which is taken as well.
        bias: [N], in weight's dtype.
        dropout_p: probability, in [0, 1), of dropping an element of x in the low-rank branch; one
            for all adapters, or one each. The layer has one mask, drawn from torch's generator on
            x's device, by the place of an element in x.
        impl: "auto" (the plan decides), "triton", "eager" or "reference".

    Returns:
        y[..., N] in x's dtype; under autocast in autocast's. Gradients reach x, every lora_a and
        lora_b and bias, those of the adapters in their own dtypes; an adapter without rows gets
        zeros. Only "reference" can be differentiated twice.

    Raises:
        ValueError: a shape, a length, a device, dropout_p or impl does not fit; on a CPU also, an
            entry of row_adapters names no adapter (on other devices the check would wait for the
            device: such a row runs the base alone); weight or scalings requires a gradient; or the
            implementation asked for cannot run here.
        TypeError: an argument is not a tensor, not floating point, row_adapters not of integers,
            or weight's dtype is not x's.

    Source: PEFT's mixed batches (peft/tuners/lora/layer.py, `_mixed_batch_forward`), which run for
    inference only.
    """
    lora_as, lora_bs = list(lora_as), list(lora_bs)
    dropouts = check_arguments(x, weight, lora_as, lora_bs, scalings, bias, dropout_p)
    rows = rows_of(row_adapters, x, len(lora_as))
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    else:
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != x.dtype:
                raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
    seed = draw_seeds(1, x.device) if any(dropouts) else None
    impl = requested(impl)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if impl == "reference":
        keep = None
        if seed is not None:
            keep = mixed_keep(MixedDropout(seed, tuple(dropouts)), rows.row_adapters, flat)
        y = reference.lora_linear_mixed(
            flat, weight.to(x.dtype), lora_as, lora_bs, scalings, rows.row_adapters,
            None if bias is None else bias.to(x.dtype), keep,
        )  # fmt: skip
    else:
        tensor = scalings if isinstance(scalings, Tensor) else None
        values = [1.0] * len(lora_as) if tensor is not None else [float(s) for s in scalings]
        save_s = torch.is_grad_enabled() and any(lora_b.requires_grad for lora_b in lora_bs)
        settings = (
            values, tensor, rows.row_adapters, rows.order, rows.sorted_adapters, rows.starts, seed,
            dropouts, impl, save_s,
        )  # fmt: skip
        if calls_directly(flat, weight, bias, tensor, rows.order, *lora_as, *lora_bs):
            y = _Direct.apply(flat, weight, bias, settings, *lora_as, *lora_bs)
        else:
            y, _ = _forward_op(flat, weight, lora_as, lora_bs, bias, *settings)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _plan(
    x: Tensor, weight: Tensor, lora_as: Sequence[Tensor], dropout: bool, impl: str
) -> MixedPlan | None:
    """The Triton plan, or None for library GEMMs. Forward and backward come to the same.

    On a GPU float64 has no kernels; `resolve` sends it to the library.
    """
    if resolve(impl, x.device, x.dtype) != "triton":
        return None
    arch = architecture(x.device)
    ranks = tuple(lora_a.shape[0] for lora_a in lora_as)
    n, k = weight.shape
    return plan(x.shape[0], n, k, ranks, x.dtype, "interpreter" if arch == "cpu" else arch, dropout)


def _dropout(seed: Tensor | None, dropouts: Sequence[float]) -> MixedDropout | None:
    return None if seed is None else MixedDropout(seed, tuple(dropouts))


def _forward(
    x: Tensor,
    weight: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    bias: Tensor | None,
    scalings: Sequence[float],
    scaling_tensor: Tensor | None,
    row_adapters: Tensor,
    order: Tensor,
    sorted_adapters: Tensor,
    starts: Tensor,
    seed: Tensor | None,
    dropouts: Sequence[float],
    impl: str,
    save_s: bool,
) -> tuple[Tensor, Tensor]:
    """y[M, N] and the scaled S[M, R_max], which has no rows where backward does not need it.

    S is the implementation's own: its rows are in the order that its backward expects.
    """
    dtype = x.dtype
    rows = MixedRows(row_adapters, order, sorted_adapters, starts)
    dropout = _dropout(seed, dropouts)
    frozen, offset = weight.to(dtype), None if bias is None else bias.to(dtype).contiguous()
    chosen = _plan(x, weight, lora_as, dropout is not None, impl)
    if chosen is None:
        y, s = eager.forward(
            x, frozen, [t.to(dtype) for t in lora_as], [t.to(dtype) for t in lora_bs], offset,
            scalings if scaling_tensor is None else scaling_tensor.tolist(), rows, dropout,
        )  # fmt: skip
    else:
        from lora_kernels.lora_linear_mixed import triton_forward

        packed = pack(lora_as, lora_bs, scalings, scaling_tensor, dropout, dtype)
        with torch.cuda.device_of(x):
            y, s = triton_forward.forward(x, frozen, offset, packed, rows, chosen)
    return y, s if save_s else s.new_empty(0, s.shape[1])


_forward_op = torch.library.custom_op("lora_kernels::lora_linear_mixed", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    x, weight, lora_as, lora_bs, bias, scalings, scaling_tensor, row_adapters, order,
    sorted_adapters, starts, seed, dropouts, impl, save_s,
):  # fmt: skip
    rank = max(lora_a.shape[0] for lora_a in lora_as)
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, x.new_empty(x.shape[0] if save_s else 0, rank)


def _gradients(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    s: Tensor | None,
    scalings: Sequence[float],
    scaling_tensor: Tensor | None,
    row_adapters: Tensor,
    order: Tensor,
    sorted_adapters: Tensor,
    starts: Tensor,
    seed: Tensor | None,
    dropouts: Sequence[float],
    impl: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, all d_lora_a end to end, all d_lora_b end to end, and d_bias.

    `needs` says which of the four are made; the others are empty tensors.
    """
    need_dx, need_da, need_db, need_dbias = needs
    flags = (need_dx, need_da, need_db, need_dbias)
    dtype, dtypes = dy.dtype, (widest_dtype(lora_as), widest_dtype(lora_bs))
    rows = MixedRows(row_adapters, order, sorted_adapters, starts)
    dropout = _dropout(seed, dropouts)
    chosen = _plan(dy, weight, lora_as, dropout is not None, impl)
    if chosen is None:
        gradients = eager.backward(
            dy, x, weight.to(dtype), [t.to(dtype) for t in lora_as],
            [t.to(dtype) for t in lora_bs], s,
            scalings if scaling_tensor is None else scaling_tensor.tolist(), rows, dropout, flags,
        )  # fmt: skip
    else:
        from lora_kernels.lora_linear_mixed import triton_backward

        packed = pack(lora_as, lora_bs, scalings, scaling_tensor, dropout, dtype)
        with torch.cuda.device_of(dy):
            gradients = triton_backward.backward(
                dy, x, weight.to(dtype), s, packed, rows, flags, dtypes, chosen
            )
    dx, d_lora_a, d_lora_b, d_bias = gradients
    return (
        dy.new_empty(0) if dx is None else dx,
        dy.new_empty(0) if d_lora_a is None else d_lora_a.to(dtypes[0]),
        dy.new_empty(0) if d_lora_b is None else d_lora_b.to(dtypes[1]),
        dy.new_empty(0) if d_bias is None else d_bias,
    )


_gradients_op = torch.library.custom_op(
    "lora_kernels::lora_linear_mixed_backward", _gradients, mutates_args=()
)


@_gradients_op.register_fake
def _(
    dy, x, weight, lora_as, lora_bs, s, scalings, scaling_tensor, row_adapters, order,
    sorted_adapters, starts, seed, dropouts, impl, needs,
):  # fmt: skip
    need_dx, need_da, need_db, need_dbias = needs
    (n, k), rank = weight.shape, sum(lora_a.shape[0] for lora_a in lora_as)
    return (
        dy.new_empty(dy.shape[0], k) if need_dx else dy.new_empty(0),
        dy.new_empty(
            rank * k if need_da else 0, dtype=widest_dtype(lora_as) if need_da else dy.dtype
        ),
        dy.new_empty(
            rank * n if need_db else 0, dtype=widest_dtype(lora_bs) if need_db else dy.dtype
        ),
        dy.new_empty(n if need_dbias else 0),
    )


def _save(ctx: Any, inputs: Sequence[Any], s: Tensor) -> None:
    (
        x, weight, lora_as, lora_bs, _, scalings, scaling_tensor, row_adapters, order,
        sorted_adapters, starts, seed, dropouts, impl, _,
    ) = inputs  # fmt: skip
    ctx.set_materialize_grads(False)
    # x is saved for d_lora_a alone and S for d_lora_b alone; the rest are references.
    need_da, need_db = (any(t.requires_grad for t in factors) for factors in (lora_as, lora_bs))
    ctx.save_for_backward(
        x if need_da else None, weight, s if need_db else None, scaling_tensor, row_adapters,
        order, sorted_adapters, starts, seed, *lora_as, *lora_bs,
    )  # fmt: skip
    ctx.scalings, ctx.dropouts, ctx.impl = scalings, dropouts, impl


def _needed_gradients(
    ctx: Any,
    dy: Tensor | None,
    need_x: bool,
    need_as: Sequence[bool],
    need_bs: Sequence[bool],
    need_bias: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None]:
    """d_x, every d_lora_a and d_lora_b, d_bias; None where there is no need."""
    x, weight, s, scaling_tensor, row_adapters, order, sorted_adapters, starts, seed, *factors = (
        ctx.saved_tensors
    )
    lora_as, lora_bs = factors[: len(factors) // 2], factors[len(factors) // 2 :]
    needs = [need_x, any(need_as), any(need_bs), need_bias]
    none: list[Tensor | None] = [None] * len(lora_as)
    if dy is None or not any(needs):
        return None, none, none, None
    # A graph of the gradients is made (create_graph) by the custom op alone, which refuses it.
    direct = calls_directly(dy, x, weight, *factors) and not torch.is_grad_enabled()
    dx, d_a, d_b, d_bias = (_gradients if direct else _gradients_op)(
        dy, x, weight, lora_as, lora_bs, s, ctx.scalings, scaling_tensor, row_adapters, order,
        sorted_adapters, starts, seed, ctx.dropouts, ctx.impl, needs,
    )  # fmt: skip
    return (
        dx if need_x else None,
        _parts(d_a, lora_as, need_as) if needs[1] else none,
        _parts(d_b, lora_bs, need_bs) if needs[2] else none,
        d_bias if need_bias else None,
    )


def _parts(flat: Tensor, factors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Each adapter's part of what lies end to end, in its own dtype."""
    parts = flat.split([factor.numel() for factor in factors])
    return [
        part.view(factor.shape).to(factor.dtype) if need else None
        for part, factor, need in zip(parts, factors, needed, strict=True)
    ]


def _setup_context(ctx, inputs, output):
    _, s = output
    ctx.mark_non_differentiable(s)
    _save(ctx, inputs, s)


def _backward(ctx, dy, _):
    # ctx.needs_input_grad is nested like the arguments.
    need_x, _, need_as, need_bs, need_bias, *_ = ctx.needs_input_grad
    d_x, d_as, d_bs, d_bias = _needed_gradients(ctx, dy, need_x, need_as, need_bs, need_bias)
    return d_x, None, d_as, d_bs, d_bias, *[None] * 10


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The custom op with its autograd, without torch.library, whose lists of tensors cost time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: tuple[Any, ...],
        *factors: Tensor,
    ) -> Tensor:
        lora_as, lora_bs = factors[: len(factors) // 2], factors[len(factors) // 2 :]
        inputs = (x, weight, lora_as, lora_bs, bias, *settings)
        y, s = _forward(*inputs)
        _save(ctx, inputs, s)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        need_x, _, need_bias, _, *needed = ctx.needs_input_grad
        half = len(needed) // 2
        d_x, d_as, d_bs, d_bias = _needed_gradients(
            ctx, dy, need_x, needed[:half], needed[half:], need_bias
        )
        return d_x, None, d_bias, None, *d_as, *d_bs
