"""Existing PEFT models on this package's kernels, in place, and back.

    model = get_peft_model(model, LoraConfig(...))      # or PeftModel.from_pretrained, or
    accelerate(model)                                   # transformers' model.add_adapter
    restore(model)

PEFT stays in charge of adapters, configurations and files. Of every layer of exactly the class
`peft.tuners.lora.Linear` only the class is swapped, for a subclass with another forward; so it is
with the RMSNorms, MLPs and attentions around them (peft_parents.py). transformers and peft are
imported where they are needed, so that the package works without them.
"""

import sys
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from lora_kernels import class_swap
from lora_kernels.lora_linear.op import Projection
from lora_kernels.peft_linear import is_layer, lora_linear_layer, projection
from lora_kernels.peft_parents import (
    eps_attribute,
    has_own_forward,
    is_rms_norm,
    parent_module,
    parent_options,
    rms_norm_module,
)

Model = TypeVar("Model", bound=nn.Module)


def accelerate(
    model: Model,
    *,
    grouped: bool = True,
    rope: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
) -> Model:
    """Runs a model's PEFT LoRA layers, and what is around them, on this package's operations.

    Every feature of PEFT keeps working and every file stays the same. What the operations do not
    do (a merged or disabled layer, `adapter_names`, a quantised base, hooks inside a layer, ...)
    PEFT's own code does; `status` says which layers those are. With dropout the masks are other
    draws of the same distribution. The fused operations can be differentiated once.

    Call it again after adding adapters to layers that had none; the last call's options hold.

    Args:
        model: any module with PEFT LoRA layers in it: a PeftModel, or a transformers model after
            `add_adapter` or `load_adapter`.
        grouped: layers that their parent calls with the same input (q, k and v; gate and up) are
            one operation.
        rope: attentions apply the rotary embedding in one operation.
        rms_norm: modules that compute Llama's RMSNorm, of 16-bit or float32 inputs, use `rms_norm`.
        swiglu: MLPs that compute Llama's use `swiglu`.

    Returns:
        The same model.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: it has no PEFT LoRA layer. The model is unchanged.
        ImportError: peft is not installed.
    """
    _check(model)
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant

    restore(model)
    modules = list(model.modules())
    for module in modules:
        if type(module) is Linear and not has_own_forward(module):
            class_swap.swap(module, lora_linear_layer, DoraLinearVariant)
            module._shared_input = None  # type: ignore[assignment]
    for module in modules:
        if class_swap.recipe(module):
            continue
        eps_name = eps_attribute(module) if rms_norm and not has_own_forward(module) else None
        if eps_name is not None and is_rms_norm(module, eps_name):
            class_swap.swap(module, rms_norm_module, eps_name)
        options = parent_options(module, grouped, swiglu, rope)
        if options is not None:
            class_swap.swap(module, parent_module, *options)
    return model


def restore(model: Model) -> Model:
    """Gives every module that `accelerate` changed its own class back.

    Returns:
        The same model.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    _check_module(model)
    for module in model.modules():
        class_swap.swap_back(module)
        module.__dict__.pop("_shared_input", None)
    return model


def peft_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The (path, layer) pairs of every PEFT LoRA layer of a model, accelerated or not."""
    # Where peft is not imported there can be none.
    layer_module = sys.modules.get("peft.tuners.lora.layer")
    if layer_module is not None:
        for name, module in model.named_modules():
            if isinstance(module, layer_module.LoraLayer):
                yield name, module


def peft_projection(layer: Any) -> tuple[Projection, float] | str:
    """What a PEFT LoRA layer gives to `lora_linear` now, or why PEFT's own forward runs in it."""
    if is_layer(layer):
        return projection(layer)
    if type(layer) is not sys.modules["peft.tuners.lora.layer"].Linear:
        return f"PEFT's {type(layer).__name__} is not of the kind that is fused"
    return "it has a forward of its own" if has_own_forward(layer) else "not accelerated"


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _check(model: Any) -> None:
    _check_module(model)
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError("accelerate needs peft: pip install lora-kernels[peft]") from error
    if next(peft_layers(model), None) is None:
        others = {type(m).__name__ for m in model.modules() if isinstance(m, BaseTunerLayer)}
        found = f"with PEFT's {', '.join(sorted(others))} instead" if others else "without any"
        raise ValueError(
            "model: expected PEFT LoRA layers (get_peft_model, add_adapter, ...), got "
            f"{type(model).__name__} {found}"
        )
