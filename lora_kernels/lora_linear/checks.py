"""What the arguments of LoRA linear layers must be, each with one error that names it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check_tensors(named: Mapping[str, Tensor]) -> None:
    """Raises TypeError or ValueError where one is no floating-point tensor on the device of x.

    Args:
        named: the tensors by the names that errors call them, "x" first.
    """
    device = None
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(f"{name}: expected x's device {device}, got {tensor.device}")


def widest_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Their common dtype; of different ones, the widest."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_projection(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    bias: Tensor | None,
    magnitude: Tensor | None,
    dropout_p: float,
    prefix: str,
) -> None:
    """Raises ValueError or TypeError for what does not fit; `prefix` comes before the names."""
    tensors = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    if bias is not None:
        tensors["bias"] = bias
    if magnitude is not None:
        tensors["magnitude"] = magnitude
    check_tensors(
        {name if name == "x" else prefix + name: tensor for name, tensor in tensors.items()}
    )
    for name in ("weight", "lora_a", "lora_b"):
        if tensors[name].dim() != 2:
            raise ValueError(
                f"{prefix}{name}: expected 2 dimensions, got {tuple(tensors[name].shape)}"
            )
    if x.dim() < 1:
        raise ValueError("x: expected at least 1 dimension, got a scalar")
    n, k = weight.shape
    r = lora_a.shape[0]
    if r < 1:
        raise ValueError(
            f"{prefix}lora_a: expected a rank of at least 1, got shape {tuple(lora_a.shape)}"
        )
    expected = {
        "x": (*x.shape[:-1], k), "lora_a": (r, k), "lora_b": (n, r), "bias": (n,), "magnitude": (n,)
    }  # fmt: skip
    for name, tensor in tensors.items():
        if name != "weight" and tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name if name == 'x' else prefix + name}: expected shape "
                f"{tuple(expected[name])} for weight {(n, k)} and rank {r}, "
                f"got {tuple(tensor.shape)}"
            )
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError(
            f"{prefix}weight: expected requires_grad=False (the base weight is frozen and gets no "
            "gradient), got requires_grad=True"
        )
    if isinstance(scaling, Tensor):
        if scaling.numel() != 1 or not scaling.is_floating_point():
            raise ValueError(
                f"{prefix}scaling: expected a float or a floating-point tensor with one element, "
                f"got {scaling.dtype} of shape {tuple(scaling.shape)}"
            )
        if scaling.device != x.device:
            raise ValueError(
                f"{prefix}scaling: expected x's device {x.device}, got {scaling.device}"
            )
        if torch.is_grad_enabled() and scaling.requires_grad:
            raise ValueError(
                f"{prefix}scaling: expected requires_grad=False, got requires_grad=True"
            )
    elif not isinstance(scaling, int | float):
        raise TypeError(
            f"{prefix}scaling: expected a float or a tensor, got {type(scaling).__name__}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
