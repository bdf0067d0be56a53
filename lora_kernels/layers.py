"""LoRA layers: a linear layer with named adapters, projections of one input, and their injection.

    y = x weightᵀ + bias + Σ_active s_i (dropout_i(x) lora_A_iᵀ) lora_B_iᵀ

`LoraLinear` is an `nn.Linear` whose `weight` and `bias` keep their names, so checkpoints load
unchanged; an adapter adds `lora_A.<name>` [R, in] and `lora_B.<name>` [out, R]. Semantics are
PEFT's (peft/tuners/lora/layer.py): scaling, initialisation, dropout on the low-rank branch alone,
float32 adapters over a 16-bit base, active adapters summed, disabled or merged = base.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.config import LoraConfig, match_target_modules, validate_adapter_name
from lora_kernels.lora_linear.op import Projection, lora_linear, lora_linear_grouped

Model = TypeVar("Model", bound=nn.Module)


class LoraLinear(nn.Linear):
    """`nn.Linear` with any number of LoRA adapters, of which some are active.

    Shapes: x[..., in_features] -> y[..., out_features]; weight [out, in]; bias [out];
    lora_A[name] [R, in]; lora_B[name] [out, R].

    Attributes:
        active_adapters: the names summed onto the base, in order.
        scaling: alpha/R, or alpha/sqrt(R) with rsLoRA, by adapter name.
        merged_adapters: the names that are merged into `weight` now.
        disabled: True while the layer is to compute the base alone.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disabled = False
        self._init_modes: dict[str, bool | str] = {}
        self._unmerged_weight: Tensor | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: LoraConfig | None = None, adapter_name: str = "default"
    ) -> "LoraLinear":
        """A LoraLinear that takes over `linear`'s own weight and bias; nothing is copied.

        Args:
            linear: exactly an `nn.Linear`: quantised subclasses store another kind of weight.
            config: the first adapter's; without one the layer has no adapter yet.

        Raises:
            TypeError: linear is not exactly an nn.Linear.
            ValueError: linear has hooks or a forward of its own, which the new layer would lose.
        """
        _check_replaceable("linear", linear)
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, has_bias, device="meta")
        layer.weight = linear.weight
        layer.bias = linear.bias
        layer.train(linear.training)
        if config is not None:
            layer.add_adapter(adapter_name, config)
        return layer

    def add_adapter(
        self,
        name: str,
        config: LoraConfig,
        module_name: str = "",
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds an adapter and freezes the base; the first adapter becomes active.

        Args:
            module_name: this layer's path in its model, for rank_pattern and alpha_pattern.
            autocast_adapter_dtype: keep the adapter in float32 over a float16 or bfloat16 base.

        Raises:
            ValueError: the name is taken or unusable.
        """
        validate_adapter_name(name)
        if name in self.lora_A:
            raise ValueError(f"adapter_name: {name!r} exists already in this layer")
        r = config.rank_for(module_name)
        dtype = self.weight.dtype
        if autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        device = self.weight.device
        lora_a = torch.empty(r, self.in_features, dtype=dtype, device=device)
        lora_b = torch.empty(self.out_features, r, dtype=dtype, device=device)
        self.lora_A[name], self.lora_B[name] = nn.Parameter(lora_a), nn.Parameter(lora_b)
        self.scaling[name] = config.scaling_for(module_name)
        self.lora_dropout[name] = config.lora_dropout
        self._init_modes[name] = config.init_lora_weights
        self.reset_adapter_parameters(name)
        if len(self.lora_A) == 1:
            self.active_adapters = [name]
        elif name not in self.active_adapters:
            self._require_grad(name, False)

    def reset_adapter_parameters(self, name: str) -> None:
        """Initialises an adapter as its config's `init_lora_weights` says (PEFT's three modes)."""
        lora_a, lora_b, mode = self.lora_A[name], self.lora_B[name], self._init_modes[name]
        with torch.no_grad():
            if mode == "gaussian":
                nn.init.normal_(lora_a, std=1 / lora_a.shape[0])
            else:
                nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
            if mode is False:
                nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
            else:
                nn.init.zeros_(lora_b)

    def set_adapter(self, names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters, and no others, active and (unless inference_mode) trainable.

        A merged layer is unmerged first.

        Raises:
            ValueError: a name is unknown or repeated.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        self._check_names(wanted)
        if self.merged_adapters:
            warnings.warn("set_adapter on a merged layer: it is unmerged first", stacklevel=2)
            self.unmerge()
        self.active_adapters = wanted
        for name in self.lora_A:
            self._require_grad(name, name in wanted and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches all adapters on or off; a merged layer is unmerged before it is switched off."""
        if not enabled and self.merged_adapters:
            warnings.warn("disabling a merged layer: it is unmerged first", stacklevel=2)
            self.unmerge()
        self.disabled = not enabled

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter; where it was the only active one, the oldest left becomes active.

        Raises:
            ValueError: the name is unknown, or the adapter is merged.
        """
        self._check_names([name])
        if name in self.merged_adapters:
            raise ValueError(f"adapter_name: {name!r} is merged; unmerge before deleting it")
        del self.lora_A[name], self.lora_B[name]
        del self.scaling[name], self.lora_dropout[name], self._init_modes[name]
        if name in self.active_adapters:
            self.active_adapters.remove(name)
            if not self.active_adapters and self.lora_A:
                self.set_adapter(next(iter(self.lora_A)))

    def merge(self, names: str | Sequence[str] | None = None) -> None:
        """Adds the adapters (the active ones by default) to `weight`, in float32 and rounded once.

        The unmerged weight is kept beside it, so that `unmerge` restores every bit.

        Raises:
            ValueError: a name is unknown, the layer is merged already or disabled, or the merged
                weight has NaN or Inf; the layer is then unchanged.
        """
        if names is None:
            names = self.active_adapters
        wanted = [names] if isinstance(names, str) else list(names)
        self._check_names(wanted)
        if self.merged_adapters:
            raise ValueError(f"merge: {self.merged_adapters} are merged already; unmerge first")
        if not wanted:
            return
        if self.disabled:
            raise ValueError("merge: the adapters are disabled; enable them first")
        merged = self.merged_weight(wanted)
        self._unmerged_weight = self.weight.detach().clone()
        with torch.no_grad():
            self.weight.copy_(merged)
        self.merged_adapters = wanted

    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """weight + Σ s lora_B lora_A [out, in], in weight's dtype.

        Raises:
            ValueError: the result has NaN or Inf.
        """
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.no_grad():
            total = self.weight.to(exact, copy=True)
            for name in names:
                delta = self.lora_B[name].to(exact) @ self.lora_A[name].to(exact)
                total.add_(delta, alpha=self.scaling[name])
            merged = total.to(self.weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(f"merge: the weight merged with {list(names)} has NaN or Inf")
        return merged

    def unmerge(self) -> None:
        """Restores the weight as it was before `merge`, bit by bit."""
        if self._unmerged_weight is None:
            return
        with torch.no_grad():
            self.weight.copy_(self._unmerged_weight)
        self._unmerged_weight = None
        self.merged_adapters = []

    def projection(self) -> tuple[Projection, float] | None:
        """The arguments and the dropout of one kernel call, if one does it.

        Several active adapters are one adapter of the summed rank. Their dropout masks differ, so
        with dropout they are not: None.
        """
        active = [] if self.disabled or self.merged_adapters else self.active_adapters
        if not active:
            return (self.weight, None, None, 1.0, self.bias, None), 0.0
        dropouts = [self.lora_dropout[name] if self.training else 0.0 for name in active]
        if len(active) == 1:
            name = active[0]
            return (
                (
                    self.weight, self.lora_A[name], self.lora_B[name], self.scaling[name],
                    self.bias, None,
                ),
                dropouts[0],
            )  # fmt: skip
        if any(dropouts):
            return None
        lora_a = torch.cat([self.lora_A[name] for name in active])
        lora_b = torch.cat([self.lora_B[name] * self.scaling[name] for name in active], dim=1)
        return (self.weight, lora_a, lora_b, 1.0, self.bias, None), 0.0

    def forward(self, x: Tensor) -> Tensor:
        single = self.projection()
        if single is None:
            return self._forward_several(x)
        (weight, lora_a, lora_b, scaling, bias, magnitude), dropout_p = single
        if lora_a is None or lora_b is None:
            return F.linear(x, weight, bias)
        return lora_linear(
            x, weight, lora_a, lora_b, scaling, bias, dropout_p, magnitude=magnitude
        )

    def _forward_several(self, x: Tensor) -> Tensor:
        """Several active adapters with dropout: one fused, the others by library GEMMs."""
        first, *others = self.active_adapters
        y = lora_linear(
            x, self.weight, self.lora_A[first], self.lora_B[first], self.scaling[first],
            self.bias, self.lora_dropout[first],
        )  # fmt: skip
        for name in others:
            lora_a, lora_b = self.lora_A[name], self.lora_B[name]
            branch = F.dropout(x, self.lora_dropout[name]).to(lora_a.dtype)
            delta = F.linear(F.linear(branch, lora_a), lora_b) * self.scaling[name]
            y = (y + delta).to(y.dtype)
        return y

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={self.lora_A[name].shape[0]}" for name in self.lora_A)
        return f"{super().extra_repr()}, adapters={{{adapters}}}, active={self.active_adapters}"

    def _check_names(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.lora_A]
        if unknown:
            raise ValueError(f"adapter_name: {unknown} not found; there are {list(self.lora_A)}")
        if len(set(names)) != len(names):
            raise ValueError(f"adapter_name: expected each name once, got {list(names)}")

    def _require_grad(self, name: str, required: bool) -> None:
        self.lora_A[name].requires_grad_(required)
        self.lora_B[name].requires_grad_(required)


def grouped_projection(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """The outputs of several layers of the same input (q, k, v; gate, up), by one operation.

    Layers that one call cannot serve (not a LoraLinear, hooks, several adapters with dropout,
    different dropout rates) are called one by one, with the same result.
    """
    together = projections_of(layers)
    if together is None:
        return tuple(layer(x) for layer in layers)
    return lora_linear_grouped(x, together[0], dropout_p=together[1])


def projections_of(layers: Sequence[nn.Module]) -> tuple[list[Projection], float] | None:
    """The projections and the dropout of one call that serves all the layers, or None."""
    projections: list[Projection] = []
    rates = set()
    for layer in layers:
        if type(layer) is not LoraLinear or has_hooks(layer):
            return None
        single = layer.projection()
        if single is None:
            return None
        projections.append(single[0])
        if single[0][1] is not None:
            rates.add(single[1])
    if len(rates) > 1:
        return None
    return projections, rates.pop() if rates else 0.0


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward.

    A forward of the instance's own counts: accelerate moves offloaded weights in it.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _check_replaceable(name: str, linear: nn.Module) -> None:
    if type(linear) is not nn.Linear:
        raise TypeError(f"{name}: expected torch.nn.Linear, got {type(linear).__name__}")
    if has_hooks(linear):
        raise ValueError(f"{name}: expected a torch.nn.Linear without hooks, which would be lost")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The (path, layer) pairs of every LoraLinear of a model, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Puts new modules in the places of old ones, everywhere a shared one is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def inject_lora(
    model: Model,
    config: LoraConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
) -> Model:
    """Adds an adapter to the layers of any torch model that `config` targets, in place.

    Targeted `nn.Linear`s become `LoraLinear`s over the same weights and under the same names; every
    parameter that is not an adapter's is frozen. The first adapter of a model becomes active.

    Args:
        config: its target_modules choose the layers as PEFT does.
        adapter_name: letters, digits, "_" and "-".
        autocast_adapter_dtype: as in `LoraLinear.add_adapter`.

    Returns:
        The same model, whose `lora_configs` maps adapter names to configs.

    Raises:
        ValueError, TypeError: nothing matches a target, a target is no plain linear layer or has
            hooks, or the adapter exists already. The model is then unchanged.
    """
    validate_adapter_name(adapter_name)
    configs: dict[str, LoraConfig] = getattr(model, "lora_configs", {})
    if adapter_name in configs:
        raise ValueError(f"adapter_name: {adapter_name!r} exists already in this model")
    paths = match_target_modules(model, config)
    modules = dict(model.named_modules())
    for path in paths:
        module = modules[path]
        if not isinstance(module, LoraLinear):
            _check_replaceable(f"target_modules: {path}", module)
        elif adapter_name in module.lora_A:
            raise ValueError(f"adapter_name: {adapter_name!r} exists already in {path}")
    for parameter_name, parameter in model.named_parameters():
        if not _is_adapter_parameter(parameter_name):
            parameter.requires_grad_(False)
    layers: dict[str, LoraLinear] = {}
    for path in paths:
        linear = modules[path]
        assert isinstance(linear, nn.Linear)
        layers[path] = linear if isinstance(linear, LoraLinear) else LoraLinear.from_linear(linear)
    replace_modules(model, {modules[path]: layer for path, layer in layers.items()})
    for path, layer in layers.items():
        layer.add_adapter(adapter_name, config, path, autocast_adapter_dtype)
        # What is active is a choice for the whole model, also for layers new to adapters.
        if configs and layer.active_adapters == [adapter_name]:
            layer.set_adapter([])
    model.lora_configs = {**configs, adapter_name: config}  # type: ignore[assignment]
    return model


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that are active somewhere in the model, in order of appearance."""
    layers = (layer for _, layer in lora_layers(model))
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def _is_adapter_parameter(name: str) -> bool:
    return ".lora_A." in f".{name}" or ".lora_B." in f".{name}"
