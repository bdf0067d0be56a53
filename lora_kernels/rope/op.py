"""Rotary position embedding of q and k in one operation, out of place.

    out1 = x1 cos1 - x2 sin1            x1, x2 = the two halves of x[..., :rotary_dim]
    out2 = x2 cos2 + x1 sin2            x[..., rotary_dim:] is passed through

This is `q * cos + rotate_half(q) * sin` of transformers (models/llama/modeling_llama.py), the
layout that pairs feature i with feature i + rotary_dim / 2; the rotation itself is RoFormer's
(arXiv:2104.09864). It is linear in x, so its backward pass is the transposed rotation of the
incoming gradient: the same operation with `transpose` set.

Shapes: q [B, Hq, T, D], k [B, Hk, T, D], cos and sin [B or 1, T, rotary_dim].
"""

from typing import Any

import torch
from torch import Tensor

from lora_kernels.dispatch import calls_directly, requested, resolve
from lora_kernels.rope import eager, reference

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _empty_like(x: Tensor) -> Tensor:
    """Uninitialised [B, H, T, D], dense, with heads or tokens outermost as in x.

    q and k usually are transposed views of a projection's [B, T, H, D]; keeping that order spares
    the following reshape a copy. torch.empty_like would not do: it keeps the order of all the
    dimensions, and the kernel writes rows whose last dimension is contiguous.
    """
    order = (0, 2, 1, 3) if x.stride(1) < x.stride(2) else (0, 1, 2, 3)
    return torch.empty_permuted(x.shape, order, dtype=x.dtype, device=x.device)


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transpose: bool, impl: str
) -> tuple[Tensor, Tensor]:
    # "auto" can choose differently for each dtype; eager takes them all.
    dtypes = {q.dtype, k.dtype, cos.dtype, sin.dtype}
    fused = all(resolve(impl, q.device, dtype) == "triton" for dtype in dtypes)
    q_out, k_out = _empty_like(q), _empty_like(k)
    if q.numel() == 0 and k.numel() == 0:
        return q_out, k_out
    if fused:
        from lora_kernels.rope import triton_kernel

        triton_kernel.rotate(q, k, cos, sin, q_out, k_out, transpose)
    else:
        eager.rotate(q, cos, sin, q_out, transpose)
        eager.rotate(k, cos, sin, k_out, transpose)
    return q_out, k_out


_rope = torch.library.custom_op("lora_kernels::rope", _rotate, mutates_args=())


@_rope.register_fake
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transpose: bool, impl: str
) -> tuple[Tensor, Tensor]:
    return _empty_like(q), _empty_like(k)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.transpose, ctx.impl = inputs
    ctx.save_for_backward(cos, sin)
    ctx.set_materialize_grads(False)


def _rotate_back(dq: Tensor, dk: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    # A graph of the gradients (create_graph) is the custom op's alone.
    direct = calls_directly(dq, dk, *arguments[:2]) and not torch.is_grad_enabled()
    return (_rotate if direct else _rope)(dq, dk, *arguments)


def _backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    dq = dq if ctx.needs_input_grad[0] else None
    dk = dk if ctx.needs_input_grad[1] else None
    # A gradient that is absent or not wanted goes in as a tensor without heads.
    if dq is not None:
        dq, dk_out = _rotate_back(
            dq, dq[:, :0] if dk is None else dk, cos, sin, not ctx.transpose, ctx.impl
        )
        dk = None if dk is None else dk_out
    elif dk is not None:
        _, dk = _rotate_back(dk[:, :0], dk, cos, sin, not ctx.transpose, ctx.impl)
    return dq, dk, None, None, None, None


_rope.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The custom op with its autograd, without torch.library."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        outputs = _rotate(*inputs)
        _setup_context(ctx, inputs, outputs)
        return outputs

    backward = staticmethod(_backward)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> None:
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"unsqueeze_dim: expected 1 or 2, got {unsqueeze_dim!r}")
    for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected a dtype of {_DTYPES}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
    layout = "[B, heads, T, D]" if unsqueeze_dim == 1 else "[B, T, heads, D]"
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected {layout}, got shape {tuple(x.shape)}")
    heads_dim, token_dim = unsqueeze_dim, 3 - unsqueeze_dim
    batch, seq_len, head_dim = q.shape[0], q.shape[token_dim], q.shape[3]
    if (k.shape[0], k.shape[token_dim], k.shape[3]) != (batch, seq_len, head_dim):
        raise ValueError(
            f"k: expected q's shape {tuple(q.shape)} but for dimension {heads_dim} (heads), "
            f"got shape {tuple(k.shape)}"
        )
    for name, x in (("cos", cos), ("sin", sin)):
        if x.requires_grad:
            raise ValueError(f"{name}: expected a table without gradient, got requires_grad=True")
        if x.dim() != 3 or x.shape[0] not in (1, batch) or x.shape[1] != seq_len:
            raise ValueError(
                f"{name}: expected shape [{batch} or 1, {seq_len}, rotary_dim], "
                f"got {tuple(x.shape)}"
            )
    rotary_dim = cos.shape[2]
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(
            f"cos: expected an even rotary_dim (last dimension) from 2 to head_dim {head_dim}, "
            f"got {rotary_dim}"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"sin: expected cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions, like transformers' function of the same name.

    Inputs may have any strides and are not written. The outputs are dense and keep the memory
    order of heads and tokens of their inputs. Arithmetic is in float32 (float64 for float64 q or
    k); the "eager" implementation instead rounds its intermediate results to the result's dtype.

    Unlike transformers' function, which promotes to the wider dtype of x and cos, each result has
    its input's dtype: bfloat16 q with a float32 table gives bfloat16.

    Args:
        q: queries [B, Hq, T, D], or [B, T, Hq, D] with unsqueeze_dim=2. Floating-point, 16 bits or
            more.
        k: keys, shaped like q but for the number of heads, which is free.
        cos: [B or 1, T, rotary_dim] with an even rotary_dim <= D. The features of q and k beyond
            rotary_dim are passed through. Its two halves may differ. No gradient flows into it.
        sin: as cos.
        unsqueeze_dim: the dimension of the heads in q and k, 1 or 2.
        impl: "auto", "triton", "eager" or "reference".

    Returns:
        The rotated q and k.

    Raises:
        ValueError: shapes or devices do not fit, cos or sin requires a gradient, or `impl` is
            unknown or cannot run here.
        TypeError: a dtype is not float16, bfloat16, float32 or float64.
    """
    _check(q, k, cos, sin, unsqueeze_dim)
    impl = requested(impl)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    if impl == "reference":
        q, k = reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
    else:
        run = _Direct.apply if calls_directly(q, k, cos, sin) else _rope
        q, k = run(q, k, cos, sin, False, impl)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    return q, k
