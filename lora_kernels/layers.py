"""LoRA layers: a linear layer with named adapters, and the projections of one input.

    y = x weightᵀ + bias + Σ_active s_i ((dropout_i(x) lora_A_iᵀ) lora_B_iᵀ + lora_bias_i)

`LoraLinear` is an `nn.Linear` whose `weight` and `bias` keep their names, so checkpoints load
unchanged; an adapter adds `lora_A.<name>` [R, in] and `lora_B.<name>` [out, R], with lora_bias
`lora_bias.<name>` [out] and with DoRA `lora_magnitude_vector.<name>` [out]. Semantics are PEFT's
(peft/tuners/lora/layer.py): scaling, initialisation, dropout on the low-rank branch alone, float32
adapters over a 16-bit base, active adapters summed, disabled or merged = base.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.config import LoraConfig, validate_adapter_name
from lora_kernels.init_weights import check_initialisation, initialise, initialise_bias
from lora_kernels.lora_linear.dora import weight_norm
from lora_kernels.lora_linear.op import Projection, lora_linear, lora_linear_grouped
from lora_kernels.merging import merged_weight_and_bias
from lora_kernels.name_patterns import Budget
from lora_kernels.sharding import sharded_like, whole
from lora_kernels.successive import add_successive
from lora_kernels.targets import is_conv1d, linear_shape

if TYPE_CHECKING:
    from lora_kernels.mixed_batch import MixedBatch


class LoraLinear(nn.Linear):
    """`nn.Linear` with any number of LoRA adapters, of which some are active.

    Shapes: x[..., in_features] -> y[..., out_features]; weight [out, in], or [in, out] in place of
    transformers' Conv1D; bias [out]; lora_A[name] [R, in]; lora_B[name] [out, R]; lora_bias[name]
    and lora_magnitude_vector[name] [out].

    Attributes:
        active_adapters: the names summed onto the base, in order.
        scaling: alpha/R, or alpha/sqrt(R) with rsLoRA, by adapter name.
        merged_adapters: the names that are merged into `weight` now.
        disabled: True while the layer is to compute the base alone.
        fan_in_fan_out: whether weight is [in, out].
        mixed: while a batch is computed whose rows use different adapters, that batch.
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
        self.lora_bias = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disabled = False
        self.fan_in_fan_out = False
        self.mixed: MixedBatch | None = None
        self._replaced: type[nn.Module] = nn.Linear
        self._init_modes: dict[str, bool | str] = {}
        self._unmerged_weight: Tensor | None = None
        self._unmerged_bias: Tensor | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Module, config: LoraConfig | None = None, adapter_name: str = "default"
    ) -> "LoraLinear":
        """A LoraLinear that takes over `linear`'s own weight and bias; nothing is copied.

        Args:
            linear: exactly an `nn.Linear` (quantised subclasses store another kind of weight) or
                transformers' Conv1D.
            config: the first adapter's; without one the layer has no adapter yet.

        Raises:
            TypeError: linear is neither.
            ValueError: linear has hooks or a forward of its own, which the new layer would lose.
        """
        check_replaceable("linear", linear)
        out_features, in_features = linear_shape(linear)
        layer = cls(in_features, out_features, linear.bias is not None, device="meta")
        layer.weight = linear.weight  # type: ignore[assignment]
        layer.bias = linear.bias  # type: ignore[assignment]
        layer.fan_in_fan_out = is_conv1d(linear)
        layer._replaced = type(linear)
        layer.train(linear.training)
        if config is not None:
            layer.add_adapter(adapter_name, config)
        return layer

    def to_linear(self) -> nn.Module:
        """A layer of the replaced class, without adapters, over weight and bias as they are now."""
        with torch.device("meta"):
            if self.fan_in_fan_out:
                linear = self._replaced(self.out_features, self.in_features)
            else:
                linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    @property
    def weight_by_rows(self) -> Tensor:
        """The weight [out, in], whichever way it is stored."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by PEFT's key behind the layer's path; empty: no such adapter."""
        kinds = {
            "lora_A.weight": self.lora_A,
            "lora_B.weight": self.lora_B,
            "lora_B.bias": self.lora_bias,
            "lora_magnitude_vector": self.lora_magnitude_vector,
        }
        return {key: parameters[name] for key, parameters in kinds.items() if name in parameters}

    def add_adapter(
        self,
        name: str,
        config: LoraConfig,
        module_name: str = "",
        autocast_adapter_dtype: bool = True,
        budget: Budget | None = None,
    ) -> None:
        """Adds an adapter and freezes the base; the first adapter becomes active.

        With "pissa" or "olora" the weight changes by what the adapter takes over.

        Args:
            module_name: this layer's path in its model, for rank_pattern and alpha_pattern.
            autocast_adapter_dtype: keep the adapter in float32 over a float16 or bfloat16 base.
            budget: of steps, for the patterns with all layers together; see `name_patterns.py`.

        Raises:
            ValueError: the name is taken or unusable, or rank, scaling or weight do not suit the
                initialisation; the layer is unchanged.
            TypeError: the weight's dtype does not.
        """
        validate_adapter_name(name)
        if name in self.lora_A:
            raise ValueError(f"adapter_name: {name!r} exists already in this layer")
        budget = budget or Budget()
        r, scaling = config.rank_for(module_name, budget), config.scaling_for(module_name, budget)
        check_initialisation(
            config.init_lora_weights, self.weight_by_rows.detach(), r, scaling,
            module_name or "this layer",
        )  # fmt: skip
        dtype = adapter_dtype(self.weight.dtype, autocast_adapter_dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        device = self.weight.device
        lora_a = torch.empty(r, self.in_features, dtype=dtype, device=device)
        lora_b = torch.empty(self.out_features, r, dtype=dtype, device=device)
        self.lora_A[name], self.lora_B[name] = nn.Parameter(lora_a), nn.Parameter(lora_b)
        for wanted, parameters in (
            (config.lora_bias, self.lora_bias),
            (config.use_dora, self.lora_magnitude_vector),
        ):
            if wanted:
                vector = torch.empty(self.out_features, dtype=dtype, device=device)
                parameters[name] = nn.Parameter(vector)
        self.scaling[name] = scaling
        self.lora_dropout[name] = config.lora_dropout
        self._init_modes[name] = config.init_lora_weights
        self.reset_adapter_parameters(name)
        if len(self.lora_A) == 1:
            self.active_adapters = [name]
        elif name not in self.active_adapters:
            self._require_grad(name, False)

    def reset_adapter_parameters(self, name: str) -> None:
        """Initialises an adapter as its config's `init_lora_weights` says (`init_weights.py`).

        "pissa" and "olora" take their part out of `weight` as it is now.
        """
        mode, lora_a, lora_b = self._init_modes[name], self.lora_A[name], self.lora_B[name]
        residual = initialise(mode, self.weight_by_rows, lora_a, lora_b, self.scaling[name])
        with torch.no_grad():
            if residual is not None:
                self.weight_by_rows.copy_(residual)
            if name in self.lora_bias:
                initialise_bias(mode, self.lora_bias[name], lora_a.shape[0])
            if name in self.lora_magnitude_vector:
                norm = weight_norm(self.weight_by_rows, lora_a, lora_b, self.scaling[name])
                self.lora_magnitude_vector[name].copy_(norm)

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
        for parameters in (self.lora_A, self.lora_B, self.lora_bias, self.lora_magnitude_vector):
            if name in parameters:
                del parameters[name]
        del self.scaling[name], self.lora_dropout[name], self._init_modes[name]
        if name in self.active_adapters:
            self.active_adapters.remove(name)
            if not self.active_adapters and self.lora_A:
                self.set_adapter(next(iter(self.lora_A)))

    def merge(self, names: str | Sequence[str] | None = None) -> None:
        """Adds the adapters (the active ones by default) to `weight`, in float32 and rounded once.

        A bias on B goes into `bias`. The unmerged ones are kept, so that `unmerge` restores every
        bit.

        Raises:
            ValueError: a name is unknown, the layer is merged already or disabled, the merged
                weight or bias has NaN or Inf, or an adapter has a bias and the layer none; the
                layer is then unchanged.
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
        weight, bias = self.merged_tensors(wanted)
        self._unmerged_weight = self.weight.detach().clone()
        with torch.no_grad():
            self.weight.copy_(
                sharded_like(weight.t() if self.fan_in_fan_out else weight, self.weight)
            )
            if bias is not None and any(name in self.lora_bias for name in wanted):
                self._unmerged_bias = self.bias.detach().clone()
                self.bias.copy_(sharded_like(bias, self.bias))
        self.merged_adapters = wanted

    def merged_tensors(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """weight [out, in] and bias [out] with these adapters in it (see `merging.py`).

        A sharded layer's are whole, in every process.

        Raises:
            ValueError: one has NaN or Inf, or an adapter has a bias and the layer none.
        """
        adapters = [
            {key: whole(parameter) for key, parameter in self.adapter_parameters(name).items()}
            for name in names
        ]
        scalings = [self.scaling[name] for name in names]
        weight = whole(self.weight)
        bias = None if self.bias is None else whole(self.bias)
        try:
            return merged_weight_and_bias(
                weight.t() if self.fan_in_fan_out else weight, bias, adapters, scalings
            )
        except ValueError as error:
            raise ValueError(f"{error} (adapters {list(names)})") from error

    def unmerge(self) -> None:
        """Restores weight and bias as they were before `merge`, bit by bit."""
        if self._unmerged_weight is None:
            return
        with torch.no_grad():
            self.weight.copy_(self._unmerged_weight)
            if self._unmerged_bias is not None:
                self.bias.copy_(self._unmerged_bias)
        self._unmerged_weight = self._unmerged_bias = None
        self.merged_adapters = []

    def projection(self) -> tuple[Projection, float] | None:
        """The arguments and the dropout of one kernel call, if one does it.

        Several active adapters are one adapter of the summed rank. Their dropout masks differ, and
        DoRA scales what the adapters before it have made, so with either they are not: None.
        """
        active = [] if self.disabled or self.merged_adapters else self.active_adapters
        weight = self.weight_by_rows
        if not active:
            return (weight, None, None, 1.0, self.bias, None), 0.0
        dropouts = [self.lora_dropout[name] if self.training else 0.0 for name in active]
        bias = self._bias_with(active)
        if len(active) == 1:
            name = active[0]
            magnitude = self.lora_magnitude_vector[name] if self._has_magnitude(name) else None
            lora_a, lora_b = self.lora_A[name], self.lora_B[name]
            return (weight, lora_a, lora_b, self.scaling[name], bias, magnitude), dropouts[0]
        if any(dropouts) or any(map(self._has_magnitude, active)):
            return None
        lora_a = torch.cat([self.lora_A[name] for name in active])
        lora_b = torch.cat([self.lora_B[name] * self.scaling[name] for name in active], dim=1)
        return (weight, lora_a, lora_b, 1.0, bias, None), 0.0

    def _has_magnitude(self, name: str) -> bool:
        return name in self.lora_magnitude_vector

    def _bias_with(self, names: Sequence[str]) -> Tensor | None:
        """bias + Σ s lora_bias [out], in bias's dtype; None where there is neither."""
        added = [
            self.lora_bias[name] * self.scaling[name] for name in names if name in self.lora_bias
        ]
        if not added:
            return self.bias
        total = sum(added[1:], added[0])
        return (total if self.bias is None else self.bias + total).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.mixed is not None:
            return self.mixed.linear(self, x)
        single = self.projection()
        if single is None:
            return self._forward_several(x)
        (weight, lora_a, lora_b, scaling, bias, magnitude), dropout_p = single
        if lora_a is None or lora_b is None:
            return F.linear(x, weight, bias)
        return lora_linear(x, weight, lora_a, lora_b, scaling, bias, dropout_p, magnitude=magnitude)

    def _forward_several(self, x: Tensor) -> Tensor:
        """Several active adapters that one call cannot do: one fused, the others by library GEMMs.

        In their order: a DoRA adapter scales the sum of all before it.
        """
        first, *others = self.active_adapters
        y = lora_linear(
            x, self.weight_by_rows, self.lora_A[first], self.lora_B[first], self.scaling[first],
            self._bias_with([first]), self.lora_dropout[first] if self.training else 0.0,
            magnitude=self.lora_magnitude_vector[first] if self._has_magnitude(first) else None,
        )  # fmt: skip
        dtype = y.dtype
        for name in others:
            y = add_successive(
                y, x, self.weight_by_rows, self.bias, self.adapter_parameters(name),
                self.scaling[name], self.lora_dropout[name] if self.training else 0.0,
            )  # fmt: skip
        return y.to(dtype)

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
        for parameter in self.adapter_parameters(name).values():
            parameter.requires_grad_(required)


def grouped_projection(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """The outputs of several layers of the same input (q, k, v; gate, up), by one operation.

    Layers that one call cannot serve (not a LoraLinear, hooks, several adapters with dropout,
    different dropout rates, a mixed batch) are called one by one, with the same result.
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
        if type(layer) is not LoraLinear or has_hooks(layer) or layer.mixed is not None:
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


def adapter_dtype(weight_dtype: torch.dtype, autocast: bool = True) -> torch.dtype:
    """The dtype of an adapter over a weight: float32 over one of 16 bits, unless not autocast."""
    low = autocast and weight_dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if low else weight_dtype


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


def check_replaceable(name: str, linear: nn.Module) -> None:
    """Raises TypeError or ValueError where a LoraLinear cannot take a module's place."""
    if type(linear) is not nn.Linear and not is_conv1d(linear):
        raise TypeError(f"{name}: expected torch.nn.Linear, got {type(linear).__name__}")
    if has_hooks(linear):
        raise ValueError(f"{name}: expected a torch.nn.Linear without hooks, which would be lost")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The (path, layer) pairs of every LoraLinear of a model, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that are active somewhere in the model, in order of appearance."""
    layers = (layer for _, layer in lora_layers(model))
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
