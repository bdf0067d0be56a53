"""The forward of an accelerated PEFT layer, and what layers of one input do together.

    y = x weightᵀ + bias + s (dropout(x) lora_Aᵀ) lora_Bᵀ        by `lora_linear`

Everything is fetched from PEFT's layer at the call, so its state (active, disabled, merged,
hot-swapped, rescaled, cast) is always the truth; what the operation does not do, PEFT's forward
does. Layers that their parent calls with one variable are computed with the first of them, by
`lora_linear_grouped`; the parent's forward itself stays as it is.

Shapes: x [..., in], weight [out, in], lora_A.weight [R, in], lora_B.weight [out, R].
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.class_swap import recipe
from lora_kernels.layers import has_hooks
from lora_kernels.lora_linear.op import Projection, lora_linear, lora_linear_grouped

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def lora_linear_layer(original: type[nn.Module], dora_variant: type) -> dict[str, Any]:
    """The subclass of `peft.tuners.lora.Linear`; `dora_variant` is PEFT's mark of DoRA.

    Its instances have the attribute `_shared_input`, None outside their parent's forward.
    """

    @wraps(original.forward)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Arguments are those of a mixed batch (adapter_names) or of a variant of LoRA.
        y = None if args or kwargs else _forward(self, x)
        return original.forward(self, x, *args, **kwargs) if y is None else y

    return {"forward": forward, "_dora_variant": dora_variant}


def is_layer(module: nn.Module) -> bool:
    """Whether it is an accelerated PEFT layer."""
    return lora_linear_layer in recipe(module)


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    """The output, or None where PEFT's forward is to make it."""
    if layer._shared_input is not None:
        y = layer._shared_input.take(layer, x)
        if y is not None:
            return y
    single = projection(layer)
    if isinstance(single, str) or not accepts(single[0], x):
        return None
    (weight, lora_a, lora_b, scaling, bias, magnitude), dropout_p = single
    assert lora_a is not None and lora_b is not None
    return lora_linear(x, weight, lora_a, lora_b, scaling, bias, dropout_p, magnitude=magnitude)


def projection(layer: Any) -> tuple[Projection, float] | str:
    """The arguments and the dropout of one kernel call, or why PEFT's forward runs instead."""
    lora_as = layer.lora_A
    names = [name for name in layer.active_adapters if name in lora_as]
    if not names or layer.disable_adapters or layer.merged:
        return "no adapter is active"
    base = layer.base_layer
    if type(base) is not nn.Linear:
        return f"the base layer is a {type(base).__name__}"
    if not layer.cast_input_dtype_enabled:
        return "the cast of the input's dtype is disabled"
    if has_hooks(base):
        return "a module inside it has hooks"
    weight: Tensor = base.weight
    # In any grad mode: reentrant checkpoints run forward in both, with one dropout mask.
    if weight.requires_grad:
        return "the base weight is trained"
    adapters: list[_Adapter] = []
    for name in names:
        adapter = _adapter(layer, name, weight)
        if isinstance(adapter, str):
            return adapter
        adapters.append(adapter)
    bias: Tensor | None = base.bias
    for _, _, scaling, lora_bias, _, _ in adapters:
        if lora_bias is not None:
            offset = lora_bias * scaling
            bias = (offset if bias is None else bias + offset).to(weight.dtype)
    if len(adapters) == 1:
        lora_a, lora_b, scaling, _, magnitude, rate = adapters[0]
        return (weight, lora_a, lora_b, scaling, bias, magnitude), rate
    if any(rate for *_, rate in adapters):
        return "several adapters with dropout: their masks differ"
    if any(magnitude is not None for *_, magnitude, _ in adapters):
        return "several adapters, of which DoRA scales what is before it"
    lora_a = torch.cat([lora_a for lora_a, *_ in adapters])
    lora_b = torch.cat([lora_b * scaling for _, lora_b, scaling, *_ in adapters], dim=1)
    return (weight, lora_a, lora_b, 1.0, bias, None), 0.0


# lora_A's weight [R, in], lora_B's weight [out, R], scaling, lora_B's bias, magnitude, dropout.
_Adapter = tuple[Tensor, Tensor, float | Tensor, Tensor | None, Tensor | None, float]


def _adapter(layer: Any, name: str, weight: Tensor) -> _Adapter | str:
    """One adapter of a layer over this base weight, or what is unusual about it."""
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return "lora_A or lora_B is not a torch.nn.Linear"
    rate = 0.0
    if type(dropout) is nn.Dropout:
        rate = dropout.p if dropout.training else 0.0
    elif type(dropout) is not nn.Identity:
        return "its dropout is of another kind"
    if rate >= 1.0:
        return "its dropout drops everything"
    if has_hooks(a) or has_hooks(b) or has_hooks(dropout):
        return "a module inside it has hooks"
    lora_a, lora_b, lora_bias = a.weight, b.weight, b.bias
    if not (_beside(lora_a, weight) and _beside(lora_b, weight)):
        return _why_not_plain(weight)
    if lora_a.dtype != lora_b.dtype:
        return "lora_A and lora_B differ in dtype"
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor):
        if scaling.numel() != 1 or scaling.requires_grad:
            return "its scaling is more than a number"
        scaling = scaling.to(weight.device)
    magnitude = None
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name])
        usual = lora_bias is None and not layer.ephemeral_gpu_offload
        if variant is not layer._dora_variant or not usual:
            return f"adapter {name!r} is a {variant.__name__}"
        magnitude = layer.lora_magnitude_vector[name].weight
        if not _beside(magnitude, weight):
            return _why_not_plain(weight)
    return lora_a, lora_b, scaling, lora_bias, magnitude, rate


def is_plain(tensor: Any) -> bool:
    """Whether it is a floating-point tensor of no subclass (sharded, quantised)."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in DTYPES


def _beside(tensor: Any, weight: Tensor) -> bool:
    return is_plain(tensor) and tensor.device == weight.device


def _why_not_plain(weight: Any) -> str:
    if hasattr(weight, "full_tensor"):
        return "its weights are sharded: FSDP makes them whole, and it fused, in a forward pass"
    return "its weights are not plain tensors on one device"


def accepts(arguments: Projection, x: Tensor) -> bool:
    """Whether `lora_linear` has the meaning of F.linear's dtypes for this x."""
    weight = arguments[0]
    if not is_plain(weight) or not _beside(x, weight):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return torch.float64 not in (x.dtype, weight.dtype)
    return x.dtype == weight.dtype


class SharedInput:
    """Outputs of layers of one x: computed with the first layer, kept until each is asked for.

    It lives as long as one forward of the layers' parent, so nothing is kept beyond that, whether
    it returns or raises. An output is for the very x it was computed from, once.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.x: Tensor | None = None
        self.mode: tuple[Any, ...] = ()
        self.outputs: list[Tensor | None] = []

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """layer(x), or None where the layer is to run alone."""
        mode = _mode(x)
        if self.x is not x or self.mode != mode:
            self.x, self.mode, self.outputs = x, mode, together(self.layers, x)
        for index, candidate in enumerate(self.layers):
            if candidate is layer:
                y, self.outputs[index] = self.outputs[index], None
                return y
        return None


def _mode(x: Tensor) -> tuple[Any, ...]:
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return torch.is_grad_enabled(), autocast


def together(layers: Sequence[Any], x: Tensor) -> list[Tensor | None]:
    """The outputs that one operation makes; None for a layer that is to run alone."""
    projections = shared_projections(layers, x)
    if projections is None:
        return [None] * len(layers)
    members = [single for single in projections if single is not None]
    ys = iter(lora_linear_grouped(x, [m[0] for m in members], dropout_p=members[0][1]))
    return [None if single is None else next(ys) for single in projections]


def shared_projections(
    layers: Sequence[Any], x: Tensor | None = None
) -> list[tuple[Projection, float] | None] | None:
    """What each layer brings into one operation, None for one that cannot; None if no two can."""
    found: list[tuple[Projection, float] | None] = []
    for layer in layers:
        single = projection(layer)
        fits = not isinstance(single, str) and (x is None or accepts(single[0], x))
        found.append(single if fits and not isinstance(single, str) else None)
    rates = [single[1] for single in found if single is not None]
    return found if len(rates) > 1 and len(set(rates)) == 1 else None


def share_inputs(
    forward: Callable[..., Any], groups: Sequence[tuple[str, ...]]
) -> Callable[..., Any]:
    """A parent's forward, during which the children of each group share their input."""

    @wraps(forward)
    def sharing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        opened = []
        for names in groups:
            layers = shareable(self, names)
            if len(layers) > 1:
                shared = SharedInput(layers)
                for layer in layers:
                    layer._shared_input = shared
                    opened.append(layer)
        try:
            return forward(self, *args, **kwargs)
        finally:
            for layer in opened:
                layer._shared_input = None

    return sharing


def shareable(parent: nn.Module, names: Sequence[str]) -> list[Any]:
    """The children of these names that are accelerated layers now.

    None of them where any has hooks, which could write into the shared x.
    """
    children = [getattr(parent, name) for name in names if hasattr(parent, name)]
    if any(has_hooks(child) for child in children):
        return []
    return [child for child in children if hasattr(child, "_shared_input")]
