"""What accelerates the modules around PEFT's layers: RMSNorm, SwiGLU, RoPE, and shared inputs.

    RMSNorm   weight * x / rms(x)               a module with one weight [H] and an eps
    SwiGLU    down(silu(gate(x)) * up(x))       a module with gate_proj, up_proj and down_proj
    RoPE      q cos + rotate_half(q) sin        an attention that calls apply_rotary_pos_emb

A module is recognised by what it computes, not by its class's name: its own forward runs on the
CPU, on a small random input and stand-ins for its weights, and must give what the operation gives.
Anything else (a norm of another kind, a forward that another library has put there) stays.
"""

import inspect
from collections.abc import Callable
from functools import update_wrapper, wraps
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.class_swap import original_class, recipe
from lora_kernels.layers import has_hooks
from lora_kernels.peft_linear import is_layer, is_plain, share_inputs
from lora_kernels.rms_norm import reference as rms_norm_reference
from lora_kernels.rms_norm.op import rms_norm
from lora_kernels.rope import reference as rope_reference
from lora_kernels.rope.op import apply_rotary_pos_emb
from lora_kernels.shared_calls import shared_calls
from lora_kernels.swiglu import reference as swiglu_reference
from lora_kernels.swiglu.op import swiglu

_MLP_CHILDREN = ("gate_proj", "up_proj", "down_proj")
_ROPE = "apply_rotary_pos_emb"
_UNSQUEEZE = ["unsqueeze_dim"]


def rms_norm_module(original: type[nn.Module], eps_name: str) -> dict[str, Any]:
    """The subclass of an RMSNorm whose epsilon is the attribute `eps_name`."""

    @wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        weight = self.weight
        # Of float64 such norms keep float32 statistics, which rms_norm does not.
        if not (is_plain(x) and is_plain(weight)) or torch.float64 in (x.dtype, weight.dtype):
            return original.forward(self, *args, **kwargs)
        return rms_norm(x, weight, getattr(self, eps_name))

    return {"forward": forward}


def parent_module(
    original: type[nn.Module], groups: tuple[tuple[str, ...], ...], with_swiglu: bool, rope: bool
) -> dict[str, Any]:
    """The subclass of a parent: its groups of children share inputs, its activation is fused."""
    forward: Any = original.forward
    if with_swiglu:
        forward = _swiglu_forward(forward)
    if rope:
        forward = _with_global(forward, _ROPE, _rope_like(forward.__globals__[_ROPE]))
    return {"forward": share_inputs(forward, groups) if groups else forward}


def parent_options(
    module: nn.Module, grouped: bool, with_swiglu: bool, rope: bool
) -> tuple[tuple[tuple[str, ...], ...], bool, bool] | None:
    """The options of `parent_module` for a module; None where there is nothing to accelerate."""
    if has_own_forward(module):
        return None
    options = (
        _groups(module) if grouped else (),
        with_swiglu and is_swiglu(module),
        rope and rotates_halves(module),
    )
    return options if any(options) else None


def _groups(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The groups of linear children with the same input of which two or more are accelerated."""
    children = dict(module.named_children())
    layers = {name for name, child in children.items() if is_layer(child)}
    if len(layers) < 2:
        return ()
    linears = layers | {name for name, child in children.items() if type(child) is nn.Linear}
    groups = shared_calls(original_class(module).forward, frozenset(linears))
    return tuple(group for group in groups if len(layers.intersection(group)) > 1)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a forward of the instance's own hides its class's."""
    return "forward" in module.__dict__


def shared_groups(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The groups of children that share their input in an accelerated parent."""
    _, make, *options = recipe(module) or (None, None)
    return options[0] if make is parent_module else ()


def counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Per kind: how many modules are accelerated, of how many that look like it."""
    found = {"RMSNorm": [0, 0], "SwiGLU": [0, 0], "RoPE": [0, 0]}
    for module in model.modules():
        _, make, *options = recipe(module) or (None, None)
        parent = make is parent_module
        for kind, looks, fused in (
            ("RMSNorm", eps_attribute(module) is not None, make is rms_norm_module),
            ("SwiGLU", has_swiglu_children(module), parent and options[1]),
            ("RoPE", _ROPE in _names(original_class(module).forward), parent and options[2]),
        ):
            found[kind][0] += fused
            found[kind][1] += looks
    return {kind: (fused, total) for kind, (fused, total) in found.items()}


def eps_attribute(module: nn.Module) -> str | None:
    """The name of the epsilon of what looks like an RMSNorm: one weight [H], nothing inside."""
    if list(module._parameters) != ["weight"] or module._modules or module._buffers:
        return None
    weight = module._parameters["weight"]
    if weight is None or weight.dim() != 1:
        return None
    values = {name: value for name, value in module.__dict__.items() if "eps" in name.lower()}
    names = [name for name, value in values.items() if type(value) is float and 0.0 <= value < 1.0]
    return names[0] if len(names) == 1 else None


def is_rms_norm(module: nn.Module, eps_name: str) -> bool:
    """Whether its forward has the very bits of rms_norm, in float32 and in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    weight: Any = module.weight
    size, eps = weight.shape[0], getattr(module, eps_name)
    for dtype, weight_dtype in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ):
        # Small enough that eps counts.
        x = (_random((3, size), generator) * max(eps, 1e-6) ** 0.5).to(dtype)
        weight = _random((size,), generator).to(weight_dtype)
        y = _probe(module, {"weight": weight}, {}, x)
        expected = rms_norm_reference.rms_norm(x, weight, eps)
        if not isinstance(y, Tensor) or y.dtype != expected.dtype or not torch.equal(y, expected):
            return False
    return True


def has_swiglu_children(module: nn.Module) -> bool:
    return all(name in module._modules for name in _MLP_CHILDREN) and hasattr(module, "act_fn")


def is_swiglu(module: nn.Module) -> bool:
    """Whether its forward is down(silu(gate(x)) * up(x))."""
    if not has_swiglu_children(module):
        return False
    generator = torch.Generator().manual_seed(0)
    x = _random((3, 6), generator).double()
    children = {}
    for name, (n, k) in zip(_MLP_CHILDREN, ((10, 6), (10, 6), (6, 10)), strict=True):
        linear = nn.Linear(k, n, bias=False, device="meta", dtype=torch.float64)
        linear.weight = nn.Parameter(_random((n, k), generator).double(), requires_grad=False)
        children[name] = linear
    y = _probe(module, {}, {"act_fn": module._modules.get("act_fn"), **children}, x)
    gate, up = children["gate_proj"](x), children["up_proj"](x)
    return _equals(y, children["down_proj"](swiglu_reference.swiglu(gate, up)))


def rotates_halves(module: nn.Module) -> bool:
    """Whether its class's forward rotates q and k by a global function that is ours in effect.

    The function must come from the package of the forward: another library's is there on purpose.
    """
    forward = original_class(module).forward
    if not isinstance(forward, FunctionType) or _ROPE not in forward.__code__.co_names:
        return False
    function: Any = forward.__globals__.get(_ROPE)
    if _package(function) != _package(forward):
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (_random((2, heads, 5, 8), generator).double() for heads in (3, 1))
    cos, sin = (_random((2, 5, 8), generator).double() for _ in range(2))
    expected = [rope_reference.rotate(x, cos, sin) for x in (q, k)]
    try:
        if list(inspect.signature(function).parameters) != ["q", "k", "cos", "sin", *_UNSQUEEZE]:
            return False
        outputs = function(q, k, cos, sin)
        transposed = function(q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2)
    except Exception:
        # As in _probe: a kernel for the GPU alone, say.
        return False
    return len(outputs) == len(transposed) == 2 and all(
        _equals(y, e) and _equals(t, e.transpose(1, 2))
        for y, t, e in zip(outputs, transposed, expected, strict=True)
    )


def _probe(
    module: nn.Module, parameters: dict[str, Tensor], children: dict[str, Any], x: Tensor
) -> Any:
    """What the module's class computes of x with other weights and children; None if it raises."""
    original = original_class(module)
    stand_in: Any = nn.Module.__new__(original)
    stand_in.__dict__.update(module.__dict__)
    stand_in.__dict__.update(_parameters=parameters, _modules=children, training=True)
    try:
        with torch.no_grad():
            return original.forward(stand_in, x)
    except Exception:
        # Any forward of any module comes here; one that cannot run is not the one looked for.
        return None


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """On the CPU, whatever the default device and dtype, and without touching torch's generator."""
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def _equals(y: Any, expected: Tensor) -> bool:
    return (
        isinstance(y, Tensor)
        and (y.shape, y.dtype) == (expected.shape, expected.dtype)
        and torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    )


def _names(forward: Any) -> tuple[str, ...]:
    """The global names and attributes that the source of a forward, decorated or not, uses."""
    function = inspect.unwrap(forward)
    return function.__code__.co_names if isinstance(function, FunctionType) else ()


def _package(function: Any) -> str:
    return str(getattr(function, "__module__", "")).split(".")[0]


def _swiglu_forward(original_forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        hooked = isinstance(self.act_fn, nn.Module) and has_hooks(self.act_fn)
        if hooked or kwargs or len(args) != 1:
            return original_forward(self, *args, **kwargs)
        gate, up = self.gate_proj(args[0]), self.up_proj(args[0])
        fits = is_plain(gate) and is_plain(up) and gate.dtype == up.dtype
        return self.down_proj(swiglu(gate, up) if fits else self.act_fn(gate) * up)

    return forward


def _with_global(
    function: FunctionType, name: str, value: Callable[..., Any]
) -> Callable[..., Any]:
    """The same function, for which one global name stands for something else."""
    new = FunctionType(
        function.__code__,
        {**function.__globals__, name: value},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    new.__kwdefaults__ = function.__kwdefaults__
    return update_wrapper(new, function)


def _rope_like(original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' function by ours, with its rule for dtypes: the wider one of x and cos."""

    @wraps(original)
    def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        tables = all(is_plain(t) and t.dim() == 3 and not t.requires_grad for t in (cos, sin))
        heads = all(is_plain(x) and x.dim() == 4 for x in (q, k)) and unsqueeze_dim in (1, 2)
        if not tables or not heads:
            return original(q, k, cos, sin, unsqueeze_dim)
        q, k = (x.to(torch.promote_types(x.dtype, cos.dtype)) for x in (q, k))
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)

    return rotate
