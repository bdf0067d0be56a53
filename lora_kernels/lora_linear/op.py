"""`lora_linear`: validates, plans, and runs one implementation behind a custom op with autograd.

    x[M, K]  weight[N, K] (frozen)  lora_a[R, K]  lora_b[N, R]  bias[N]  s = scaling
    y[M, N] = x weightᵀ + bias + s (dropout(x) lora_aᵀ) lora_bᵀ

The op takes a group of projections of one x; `lora_linear` is a group of one. The dtypes are
settled here and nowhere else: below the custom ops every tensor has x's dtype (autocast's, where it
is on), and the gradients of the adapter come back in the adapter's dtype.

With a magnitude (DoRA) the products are scaled by columns, c = magnitude / ‖weight + s lora_b
lora_a‖, in the kernel's epilogue; its gradient needs y, the only [M, N] tensor that is ever kept.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.dispatch import calls_directly, requested, resolve
from lora_kernels.lora_linear import eager, reference
from lora_kernels.lora_linear.checks import check_projection, widest_dtype
from lora_kernels.lora_linear.dora import column_scale, scale_gradient
from lora_kernels.lora_linear.dropout import Dropout, draw_seeds, generator_keep
from lora_kernels.lora_linear.plan import Plan, plan

# weight, lora_a, lora_b, scaling, bias and, for DoRA, magnitude. Without an adapter lora_a and
# lora_b are None.
PlainProjection = tuple[Tensor, Tensor | None, Tensor | None, float | Tensor, Tensor | None]
Projection = tuple[
    Tensor, Tensor | None, Tensor | None, float | Tensor, Tensor | None, Tensor | None
]
_Complete = tuple[Tensor, Tensor, Tensor, float | Tensor, Tensor | None, Tensor | None]


@cache
def architecture(device: torch.device) -> str:
    """The plan's name of a device's architecture: "sm_90", "gfx942", or "cpu"."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def plan_for(
    m: int,
    n: int | tuple[int, ...],
    k: int,
    r: int | tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    dropout: bool = False,
) -> Plan:
    """The plan of the Triton kernels on `device`; on a CPU, the interpreter's."""
    arch = architecture(device)
    return plan(m, n, k, r, dtype, "interpreter" if arch == "cpu" else arch, dropout)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
    magnitude: Tensor | None = None,
) -> Tensor:
    """A linear layer with a LoRA adapter: base product plus scaled low-rank product.

    Args:
        x: [..., K], float16, bfloat16, float32 or (outside the GPU kernels) float64.
        weight: [N, K], frozen, in x's dtype; under autocast any floating dtype.
        lora_a: [R, K], any floating dtype. The products run in x's dtype.
        lora_b: [N, R], any floating dtype.
        scaling: a float, or a tensor with one element (no gradient). A new value compiles nothing.
        bias: [N], in weight's dtype.
        dropout_p: probability, in [0, 1), of dropping an element of x in the low-rank branch alone.
            The mask comes from torch's generator on x's device.
        impl: "auto" (the plan decides), "triton", "eager" or "reference".
        magnitude: [N], DoRA's trained length of each row of the weight with its update: the
            products are scaled by magnitude / ‖weight + scaling lora_b lora_a‖, whose norm gets no
            gradient. With dropout the base product is made twice, as DoRA in PEFT defines it.

    Returns:
        y[..., N] in x's dtype; under autocast in autocast's. Gradients reach x, lora_a, lora_b,
        bias and magnitude, those of lora_a, lora_b and magnitude in their own dtypes. Only
        "reference" can be differentiated twice.

    Raises:
        ValueError: a shape, a device, dropout_p or impl does not fit; weight or scaling requires a
            gradient; or the implementation asked for cannot run here (the message says why).
        TypeError: an argument is not a tensor, not floating point, or weight's dtype is not x's.

    Source: Hu et al., "LoRA" (arXiv:2106.09685); Liu et al., "DoRA" (arXiv:2402.09353); PEFT's
    semantics (peft/tuners/lora/layer.py and dora.py).
    """
    projection = (weight, lora_a, lora_b, scaling, bias, magnitude)
    return _run(x, [projection], dropout_p, impl, ("",))[0]


def lora_linear_grouped(
    x: Tensor,
    projections: Sequence[Projection | PlainProjection],
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Several LoRA linear layers of one input: q, k, v of an attention, gate and up of an MLP.

    Without dropout x is read once for all the low-rank products and once for all the gradients of
    lora_a; dx is one GEMM over the concatenated outputs. The weights stay where they are.

    Args:
        x: [..., K], as for `lora_linear`.
        projections: (weight[N, K], lora_a[R, K], lora_b[N, R], scaling, bias[N] or None) each, and
            a sixth, magnitude[N] or None, for DoRA; N, R and scaling may differ. lora_a = lora_b =
            None is a projection without an adapter.
        dropout_p: as for `lora_linear`; every projection draws its own mask.
        impl: as for `lora_linear`.

    Returns:
        One y[..., N] per projection.

    Raises:
        ValueError, TypeError: as `lora_linear`; projections is empty, or an entry has one of lora_a
            and lora_b without the other.
    """
    if not projections:
        raise ValueError("projections: expected at least one, got none")
    complete: dict[int, _Complete] = {}
    outputs: dict[int, Tensor] = {}
    for index, (weight, lora_a, lora_b, scaling, bias, *magnitude) in enumerate(projections):
        if lora_a is None and lora_b is None:
            outputs[index] = F.linear(x, weight, bias)
        elif lora_a is None or lora_b is None:
            missing = "lora_a" if lora_a is None else "lora_b"
            raise ValueError(f"projections[{index}]: {missing} is None and its counterpart is not")
        else:
            last = magnitude[0] if magnitude else None
            complete[index] = (weight, lora_a, lora_b, scaling, bias, last)
    if complete:
        names = tuple(f"projections[{index}]." for index in complete)
        ys = _run(x, list(complete.values()), dropout_p, impl, names)
        outputs.update(zip(complete, ys, strict=True))
    return tuple(outputs[index] for index in range(len(projections)))


def _run(
    x: Tensor,
    projections: Sequence[_Complete],
    dropout_p: float,
    impl: str,
    names: Sequence[str],
) -> tuple[Tensor, ...]:
    """`names` is what errors call each projection's arguments by: a prefix."""
    for name, projection in zip(names, projections, strict=True):
        check_projection(x, *projection, dropout_p, name)
    if dropout_p > 0.0 and any(projection[-1] is not None for projection in projections):
        return tuple(
            _with_dropout(x, projection, dropout_p, impl, name)
            for name, projection in zip(names, projections, strict=True)
        )
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    else:
        for name, (weight, _, _, _, bias, _) in zip(names, projections, strict=True):
            if weight.dtype != x.dtype:
                raise TypeError(f"{name}weight: expected x's dtype {x.dtype}, got {weight.dtype}")
            if bias is not None and bias.dtype != x.dtype:
                raise TypeError(f"{name}bias: expected x's dtype {x.dtype}, got {bias.dtype}")

    seeds = draw_seeds(len(projections), x.device) if dropout_p > 0.0 else None
    impl = requested(impl)
    if impl == "reference":
        return tuple(
            reference.lora_linear(
                x, weight.to(x.dtype), lora_a, lora_b, scaling,
                None if bias is None else bias.to(x.dtype),
                None if seeds is None else generator_keep(seeds[g], dropout_p, x), magnitude,
            )
            for g, (weight, lora_a, lora_b, scaling, bias, magnitude) in enumerate(projections)
        )  # fmt: skip

    weights, lora_as, lora_bs, scalings, biases, _ = zip(*projections, strict=True)
    scales = _column_scales(projections)
    # Beside a scale a bias is added afterwards: the gradient of the scale is had from y without it,
    # and both in one epilogue are more registers than the largest tiles have.
    values, scaling_tensor = _scalings(scalings, x)
    given = [] if scales or all(bias is None for bias in biases) else [
        x.new_zeros(weight.shape[0]) if bias is None else bias
        for weight, bias in zip(weights, biases, strict=True)
    ]  # fmt: skip
    save_s = torch.is_grad_enabled() and any(lora_b.requires_grad for lora_b in lora_bs)
    settings = (values, scaling_tensor, seeds, dropout_p, impl, save_s)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if calls_directly(x, scaling_tensor, *weights, *lora_as, *lora_bs, *given, *scales):
        groups = (weights, lora_as, lora_bs, given, scales)
        ys = _Direct.apply(rows, settings, tuple(map(len, groups)), *chain(*groups))
    else:
        ys, _ = _forward_op(rows, weights, lora_as, lora_bs, given, scales, *settings)
    if scales:
        ys = [
            y if bias is None else y + bias.to(y.dtype)
            for y, bias in zip(ys, biases, strict=True)
        ]  # fmt: skip
    leading = x.shape[:-1]
    return tuple(y.reshape(*leading, y.shape[-1]) for y in ys)


def _with_dropout(
    x: Tensor, projection: _Complete, dropout_p: float, impl: str, name: str
) -> Tensor:
    """One projection of a group of which some have a magnitude.

    DoRA's product is of the dropped x alone, and the rest of x goes through the base.
    """
    weight, lora_a, lora_b, scaling, bias, magnitude = projection
    if magnitude is None:
        return _run(x, [projection], dropout_p, impl, (name,))[0]
    dropped = F.dropout(x, dropout_p)
    whole = (weight, lora_a, lora_b, scaling, None, magnitude)
    return _run(dropped, [whole], 0.0, impl, (name,))[0] + F.linear(x - dropped, weight, bias)


def _column_scales(projections: Sequence[_Complete]) -> list[Tensor]:
    """c[N] of each projection, ones where it has no magnitude; empty where none has."""
    if all(projection[-1] is None for projection in projections):
        return []
    return [
        weight.new_ones(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))
        if magnitude is None
        else column_scale(magnitude, weight, lora_a, lora_b, scaling)
        for weight, lora_a, lora_b, scaling, _, magnitude in projections
    ]


def _scalings(scalings: Sequence[float | Tensor], x: Tensor) -> tuple[list[float], Tensor | None]:
    """All by value, or, where one is a tensor, all in one tensor [G] on x's device."""
    if not any(isinstance(scaling, Tensor) for scaling in scalings):
        return [float(scaling) for scaling in scalings], None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = [
        scaling.reshape(()).to(dtype)
        if isinstance(scaling, Tensor)
        else torch.full((), float(scaling), dtype=dtype, device=x.device)
        for scaling in scalings
    ]
    return [1.0] * len(rows), torch.stack(rows)


def _plan(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    dropout: bool,
    impl: str,
) -> Plan | None:
    """The Triton plan, or None for library GEMMs. Forward and backward come to the same."""
    if resolve(impl, x.device, x.dtype) != "triton":
        return None
    n = tuple(weight.shape[0] for weight in weights)
    r = tuple(lora_a.shape[0] for lora_a in lora_as)
    chosen = plan_for(x.shape[0], n, weights[0].shape[1], r, x.dtype, x.device, dropout)
    return None if chosen.method == "library" else chosen


def _stacked(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All lora_a [R_g, K], one below the other, contiguous and in one dtype."""
    if len(tensors) == 1:
        return tensors[0].to(dtype).contiguous()
    return torch.cat([tensor.to(dtype) for tensor in tensors])


def _operands(
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    return (
        [weight.to(dtype) for weight in weights],
        _stacked(lora_as, dtype),
        [lora_b.to(dtype).contiguous() for lora_b in lora_bs],
    )


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor],
    column_scales: Sequence[Tensor],
    scalings: Sequence[float],
    scaling_tensor: Tensor | None,
    seeds: Tensor | None,
    dropout_p: float,
    impl: str,
    save_s: bool,
) -> tuple[list[Tensor], Tensor]:
    """y_g[M, N_g] and the scaled S[M, R], which has no rows where backward does not need it."""
    frozen, lora_a, expansions = _operands(weights, lora_as, lora_bs, x.dtype)
    offsets = [bias.to(x.dtype).contiguous() for bias in biases] or None
    columns = [scale.contiguous() for scale in column_scales] or None
    dropout = None if seeds is None else Dropout(seeds, dropout_p)
    chosen = _plan(x, weights, lora_as, seeds is not None, impl)
    arguments = (
        x, frozen, lora_a, expansions, offsets, columns, list(scalings), scaling_tensor, dropout
    )  # fmt: skip
    s: Tensor | None
    if chosen is None:
        ys, s = eager.forward(*arguments)
    else:
        from lora_kernels.lora_linear import triton_forward

        with torch.cuda.device_of(x):
            ys, s = triton_forward.forward(*arguments, save_s, chosen)
    return ys, s if save_s and s is not None else x.new_empty(0, lora_a.shape[0])


_forward_op = torch.library.custom_op("lora_kernels::lora_linear", _forward, mutates_args=())


@_forward_op.register_fake
def _(
    x, weights, lora_as, lora_bs, biases, column_scales, scalings, scaling_tensor, seeds, dropout_p,
    impl, save_s,
):  # fmt: skip
    rank = sum(lora_a.shape[0] for lora_a in lora_as)
    ys = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    return ys, x.new_empty(x.shape[0] if save_s else 0, rank)


def _gradients(
    dys: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    s: Tensor | None,
    scalings: Sequence[float],
    scaling_tensor: Tensor | None,
    seeds: Tensor | None,
    dropout_p: float,
    impl: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """dx, the stacked d_lora_a[R, K], d_lora_b and d_bias of each projection.

    `needs` says which of the four are made; the others are an empty tensor or no tensors.
    """
    need_dx, need_da, need_db, need_dbias = needs
    flags = (need_dx, need_da, need_db, need_dbias)
    like = dys[0]
    frozen, lora_a, expansions = _operands(weights, lora_as, lora_bs, like.dtype)
    dropout = None if seeds is None else Dropout(seeds, dropout_p)
    chosen = _plan(like, weights, lora_as, seeds is not None, impl)
    arguments = (
        list(dys), x, frozen, lora_a, expansions, s, list(scalings), scaling_tensor, dropout, flags
    )  # fmt: skip
    if chosen is None:
        gradients = eager.backward(*arguments)
    else:
        from lora_kernels.lora_linear import triton_backward

        with torch.cuda.device_of(like):
            gradients = triton_backward.backward(*arguments, chosen)
    dx, d_lora_a, d_lora_bs, d_biases = gradients
    return (
        like.new_empty(0) if dx is None else dx,
        like.new_empty(0) if d_lora_a is None else d_lora_a.to(widest_dtype(lora_as)),
        [d.to(b.dtype) for d, b in zip(d_lora_bs or [], lora_bs if need_db else [], strict=True)],
        [d.to(like.dtype) for d in d_biases or []],
    )


_gradients_op = torch.library.custom_op(
    "lora_kernels::lora_linear_backward", _gradients, mutates_args=()
)


@_gradients_op.register_fake
def _(
    dys, x, weights, lora_as, lora_bs, s, scalings, scaling_tensor, seeds, dropout_p, impl, needs
):
    need_dx, need_da, need_db, need_dbias = needs
    like, k = dys[0], weights[0].shape[1]
    rank = sum(lora_a.shape[0] for lora_a in lora_as)
    return (
        like.new_empty(like.shape[0], k) if need_dx else like.new_empty(0),
        like.new_empty(rank, k, dtype=widest_dtype(lora_as)) if need_da else like.new_empty(0),
        [lora_b.new_empty(lora_b.shape) for lora_b in lora_bs] if need_db else [],
        [like.new_empty(weight.shape[0]) for weight in weights] if need_dbias else [],
    )


def _save(
    ctx: Any,
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    column_scales: Sequence[Tensor],
    settings: tuple[Any, ...],
    ys: Sequence[Tensor],
    s: Tensor,
) -> None:
    ctx.scalings, scaling_tensor, seeds, ctx.dropout_p, ctx.impl, _ = settings
    ctx.set_materialize_grads(False)
    # x is saved for d_lora_a alone, S for d_lora_b and y for the scales; the rest are references.
    need_da, need_db, need_scale = (
        any(tensor.requires_grad for tensor in tensors)
        for tensors in (lora_as, lora_bs, column_scales)
    )
    ctx.rows, ctx.count = x.shape[0], len(weights)
    ctx.save_for_backward(
        x if need_da else None, s if need_db else None, scaling_tensor, seeds,
        *weights, *lora_as, *lora_bs, *column_scales, *(ys if need_scale else ()),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    x, weights, lora_as, lora_bs, _, column_scales, *settings = inputs
    ys, s = output
    ctx.mark_non_differentiable(s)
    _save(ctx, x, weights, lora_as, lora_bs, column_scales, tuple(settings), ys, s)


_Gradients = tuple[Tensor | None, list[Any], list[Any], list[Any], list[Any]]


def _needed_gradients(
    ctx: Any,
    dys: Sequence[Tensor | None],
    need_x: bool,
    need_a: Sequence[bool],
    need_b: Sequence[bool],
    need_bias: Sequence[bool],
    need_scale: Sequence[bool],
) -> _Gradients:
    """dx and, per projection, d_lora_a, d_lora_b, d_bias and d_scale: None where not needed."""
    x, s, scaling_tensor, seeds, *rest = ctx.saved_tensors
    count = ctx.count
    weights, lora_as, lora_bs = rest[:count], rest[count : 2 * count], rest[2 * count : 3 * count]
    scaled = len(need_scale)
    scales, ys = rest[3 * count : 3 * count + scaled], rest[3 * count + scaled :]
    none: list[Any] = [None] * count
    d_x, d_lora_as, d_lora_bs = None, none, none
    d_biases: list[Any] = [None] * len(need_bias)
    d_scales: list[Any] = [None] * scaled
    needs = [need_x, any(need_a), any(need_b), any(need_bias)]
    given = next((dy for dy in dys if dy is not None), None)
    if given is None or not (any(needs) or any(need_scale)):
        return d_x, d_lora_as, d_lora_bs, d_biases, d_scales
    # An output that nothing used has no gradient.
    complete = [
        given.new_zeros(ctx.rows, weight.shape[0]) if dy is None else dy
        for dy, weight in zip(dys, weights, strict=True)
    ]
    if ys:
        pairs = [
            scale_gradient(dy, y, scale, ctx.impl)
            for dy, y, scale in zip(complete, ys, scales, strict=True)
        ]
        complete = [dy for dy, _ in pairs]
        d_scales = [d if need else None for (_, d), need in zip(pairs, need_scale, strict=True)]
    elif scales:
        complete = [
            (dy * scale).to(dy.dtype) for dy, scale in zip(complete, scales, strict=True)
        ]  # fmt: skip
    if not any(needs):
        return d_x, d_lora_as, d_lora_bs, d_biases, d_scales
    # A graph of the gradients is made (create_graph) by the custom op alone, which refuses it.
    direct = calls_directly(*complete, x, *rest) and not torch.is_grad_enabled()
    dx, d_lora_a, d_b, d_bias = (_gradients if direct else _gradients_op)(
        complete, x, weights, lora_as, lora_bs, s, ctx.scalings, scaling_tensor, seeds,
        ctx.dropout_p, ctx.impl, needs,
    )  # fmt: skip
    d_x = dx if need_x else None
    if needs[1]:
        parts = d_lora_a.split([lora_a.shape[0] for lora_a in lora_as])
        d_lora_as = [
            part.to(lora_a.dtype) if need else None
            for part, lora_a, need in zip(parts, lora_as, need_a, strict=True)
        ]
    if needs[2]:
        d_lora_bs = [d if need else None for d, need in zip(d_b, need_b, strict=True)]
    if needs[3]:
        d_biases = [d if need else None for d, need in zip(d_bias, need_bias, strict=True)]
    return d_x, d_lora_as, d_lora_bs, d_biases, d_scales


def _backward(ctx: Any, dys: Sequence[Tensor | None], _: None) -> tuple[Any, ...]:
    need_x, _, need_a, need_b, need_bias, need_scale, *_ = ctx.needs_input_grad
    d_x, d_a, d_b, d_bias, d_scale = _needed_gradients(
        ctx, dys, need_x, need_a, need_b, need_bias, need_scale
    )
    return d_x, [None] * ctx.count, d_a, d_b, d_bias, d_scale, *[None] * 6


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The custom op with its autograd, without torch.library; its tensors are one flat list."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, settings: tuple[Any, ...], sizes: tuple[int, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, lora_as, lora_bs, biases, scales = _split(tensors, sizes)
        ys, s = _forward(x, weights, lora_as, lora_bs, biases, scales, *settings)
        ctx.sizes = sizes
        _save(ctx, x, weights, lora_as, lora_bs, scales, settings, ys, s)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        need_x, _, _, *needs = ctx.needs_input_grad
        _, *groups = _split(needs, ctx.sizes)
        d_x, *gradients = _needed_gradients(ctx, dys, need_x, *groups)
        nested = [None] * ctx.count, *gradients
        return d_x, None, None, *(gradient for group in nested for gradient in group)


def _split(items: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    """Consecutive parts of the given sizes."""
    ends = list(accumulate(sizes))
    return [items[end - size : end] for size, end in zip(sizes, ends, strict=True)]
