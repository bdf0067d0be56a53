"""LoraConfig: PEFT's field names, defaults and meaning.

    scaling = lora_alpha / r             or, with use_rslora, lora_alpha / sqrt(r)
    rank_pattern, alpha_pattern    regular expressions for the end of a module name; the first that
                     matches replaces r or lora_alpha

Which modules a config is for is in `targets.py`. Semantics follow PEFT 0.21
(`tuners/lora/config.py`, `utils/other.py`).
"""

import copy
import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from lora_kernels.field_checks import (
    as_list,
    check_number,
    check_rank,
    check_regex,
    checked_names,
    wrong,
)
from lora_kernels.name_patterns import Budget, part_pattern

T = TypeVar("T")

# PEFT's fields that change what an adapter is and are not supported here, with the default under
# which they change nothing. Supporting one means deleting its row.
_UNSUPPORTED: dict[str, Any] = {
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "ensure_weight_tying": False,
    "megatron_config": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "velora_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "arrow_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
}

_TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)

_BIASES = ("none", "all", "lora_only")

_PISSA_ITERATIONS = re.compile(r"pissa_niter_(\d{1,4})")
# Four are near the exact decomposition; each is two products with the whole weight.
_MAX_PISSA_ITERATIONS = 64
# What a number must not exceed to be one in float32, the widest dtype that kernels scale in.
_MAX_ALPHA = torch.finfo(torch.float32).max

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


@dataclass(kw_only=True)
class LoraConfig:
    """What a LoRA adapter is: which modules, which rank, which scale.

    Fields have PEFT's names, defaults and meaning. Sets, tuples and lists of names become lists
    without duplicates, in the order given (sets: sorted).

    Args:
        r: rank of the update, at least 1.
        target_modules: the modules to adapt, by names, suffixes, one regular expression or
            "all-linear"; see `targets.py`.
        exclude_modules: modules never adapted, by name suffixes or one regular expression.
        lora_alpha: numerator of the scaling; any number that is finite in float32.
        lora_dropout: probability in [0, 1) of zeroing an input of the LoRA branch in training.
        use_rslora: scale by 1/sqrt(r) instead of 1/r (https://arxiv.org/abs/2312.03732).
        fan_in_fan_out: True for layers that keep their weight [in, out]: transformers' Conv1D, as
            GPT-2 has it. The layer's class decides; a flag that contradicts it is corrected.
        bias: the base model's biases that train with the adapter and are saved with it: "none",
            "all", or those of the adapted layers ("lora_only"). One adapter of a model may have it.
        modules_to_save: modules trained as a whole: every adapter has its own copy of each module
            whose name ends with an entry, and saves it. No adapter is put into such a module.
        init_lora_weights: True: A Kaiming-uniform, B zero. "gaussian": A normal with standard
            deviation 1/r, B zero. False: both random, so that an untrained adapter has an effect.
            "pissa", "pissa_niter_N" (N at most 64), "olora": the leading part of the weight itself,
            which is taken out of the base (see `init_weights.py`); lora_alpha > 0. "orthogonal": A
            and B orthogonal.
        use_dora: decompose the weight into lengths, trained as well, and directions
            (https://arxiv.org/abs/2402.09353).
        lora_bias: a trained bias on B.
        layers_to_transform: layer indices to adapt, for suffix targets only; an entry of
            `target_modules` that is a module's whole name is adapted whatever its layer.
        layers_pattern: name of the list of layers ("layers", "h"), where the first numbered
            segment of a module name is not the layer.
        rank_pattern: regular expression -> rank. Order matters: the first match counts.
        alpha_pattern: regular expression -> lora_alpha, likewise.
        task_type, base_model_name_or_path, revision, inference_mode: kept for PEFT.
        extra: further keys of an adapter_config.json, which `to_dict` writes back.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, contradicts another, or asks for what is not
            supported. Either message names the field, what was expected and what came.
    """

    r: int = 8
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Collection[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Collection[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._check_supported()
        check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        check_number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise wrong(ValueError, "lora_dropout", "a number in [0, 1)", self.lora_dropout)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise wrong(TypeError, name, "a bool", getattr(self, name))
        for name in ("task_type", "base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise wrong(TypeError, name, "a str or None", getattr(self, name))
        if self.bias not in _BIASES:
            raise wrong(ValueError, "bias", f"one of {_BIASES}", self.bias)
        if self.task_type is not None and self.task_type not in _TASK_TYPES:
            raise wrong(ValueError, "task_type", f"one of {_TASK_TYPES} or None", self.task_type)

        self.target_modules = checked_names("target_modules", self.target_modules)
        if self.target_modules is not None and not self.target_modules:
            raise wrong(ValueError, "target_modules", "at least one name", self.target_modules)
        self.exclude_modules = checked_names("exclude_modules", self.exclude_modules)
        if isinstance(self.modules_to_save, str):
            raise wrong(TypeError, "modules_to_save", "a list of str", self.modules_to_save)
        self.modules_to_save = checked_names("modules_to_save", self.modules_to_save)
        self.layers_pattern = checked_names("layers_pattern", self.layers_pattern)
        self._check_layers()
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", _check_alpha)):
            patterns = getattr(self, name)
            if not isinstance(patterns, dict):
                raise wrong(TypeError, name, "a dict", patterns)
            for pattern, value in patterns.items():
                check_regex(name, pattern, part_pattern)
                check(f"{name}[{pattern!r}]", value)
            setattr(self, name, dict(patterns))

    def _check_supported(self) -> None:
        if not isinstance(self.extra, dict):
            raise wrong(TypeError, "extra", "a dict", self.extra)
        for name, default in _UNSUPPORTED.items():
            value = getattr(self, name, self.extra.get(name, default))
            # PEFT takes any empty value for "off".
            if value != default and (value or default):
                expected = f"{default!r}, all that this version supports"
                raise wrong(ValueError, name, expected, value)
        self._check_initialisation()

    def _check_initialisation(self) -> None:
        init = self.init_lora_weights
        if isinstance(init, str):
            known = init.lower() in ("gaussian", "olora") or init in ("pissa", "orthogonal")
            iterations = _PISSA_ITERATIONS.fullmatch(init)
            if not known and not (iterations and int(iterations[1]) <= _MAX_PISSA_ITERATIONS):
                expected = (
                    "True, False, 'gaussian', 'pissa', 'olora', 'orthogonal' or 'pissa_niter_N' "
                    f"with N at most {_MAX_PISSA_ITERATIONS}"
                )
                raise wrong(ValueError, "init_lora_weights", expected, init)
        elif not isinstance(init, bool):
            raise wrong(ValueError, "init_lora_weights", "a bool or a str", init)
        if self.lora_bias and not isinstance(init, bool):
            expected = "True or False where lora_bias is True"
            raise wrong(ValueError, "init_lora_weights", expected, init)
        if self.lora_bias and self.use_dora:
            raise wrong(ValueError, "lora_bias", "False where use_dora is True", self.lora_bias)

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            if self.layers_pattern:
                expected = "None where layers_to_transform is None"
                raise wrong(ValueError, "layers_pattern", expected, self.layers_pattern)
            return
        for pattern in as_list(self.layers_pattern or []):
            check_regex("layers_pattern", pattern, part_pattern)
        if not isinstance(layers, int | list | tuple | set | frozenset):
            raise wrong(TypeError, "layers_to_transform", "an int or a list of int", layers)
        for layer in as_list(layers):
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise wrong(TypeError, "layers_to_transform", "an int or a list of int", layer)
            if layer < 0:
                raise wrong(ValueError, "layers_to_transform", "indices >= 0", layer)
        if isinstance(self.target_modules, str):
            expected = "None where target_modules is a str"
            raise wrong(ValueError, "layers_to_transform", expected, layers)
        if not isinstance(layers, int):
            self.layers_to_transform = as_list(layers)

    def rank_for(self, module_name: str, budget: Budget | None = None) -> int:
        """The rank for the module of this full name: `r`, unless a rank_pattern matches.

        Args:
            budget: of steps, for all names of a config together; see `name_patterns.py`.
        """
        return _first_match(self.rank_pattern, module_name, self.r, budget)

    def alpha_for(self, module_name: str, budget: Budget | None = None) -> float:
        """The lora_alpha for the module of this full name, likewise by alpha_pattern."""
        return _first_match(self.alpha_pattern, module_name, self.lora_alpha, budget)

    def scaling_for(self, module_name: str, budget: Budget | None = None) -> float:
        """The factor on this module's update: alpha/r, or alpha/sqrt(r) with use_rslora."""
        budget = budget or Budget()
        rank = self.rank_for(module_name, budget)
        alpha = self.alpha_for(module_name, budget)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json: JSON types, sorted keys, no shared objects.

        Patterns keep their order, which decides between two that match the same module.
        """
        content = {name: getattr(self, name) for name in _FIELDS}
        content = copy.deepcopy({**self.extra, **content, "peft_type": "LORA"})
        return dict(sorted(content.items()))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "LoraConfig":
        """A config from an adapter_config.json's content, or from PEFT's `LoraConfig.to_dict()`.

        Keys that are no field here are kept in `extra`. `peft_type` may be absent.

        Raises:
            TypeError, ValueError: as the constructor does; `peft_type` is not "LORA".
        """
        if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
            raise wrong(TypeError, "adapter config", "a dict with str keys", content)
        extra = copy.deepcopy(dict(content))
        peft_type = extra.pop("peft_type", "LORA")
        if peft_type != "LORA":
            raise wrong(ValueError, "peft_type", "'LORA'", peft_type)
        fields = {name: extra.pop(name) for name in _FIELDS if name in extra}
        for name in ("rank_pattern", "alpha_pattern"):
            if fields.get(name, {}) is None:
                del fields[name]
        return cls(**fields, extra=extra)


_SWITCHES = ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "inference_mode")
_FIELDS = [f.name for f in dataclasses.fields(LoraConfig) if f.name != "extra"]


def _check_alpha(name: str, value: Any) -> None:
    check_number(name, value)
    if abs(value) > _MAX_ALPHA:
        raise wrong(ValueError, name, f"a number from -{_MAX_ALPHA} to {_MAX_ALPHA}", value)


def validate_adapter_name(name: str) -> None:
    """Refuses an adapter name that cannot be a dictionary key, a folder and a parameter's name.

    Raises:
        TypeError: `name` is not a str.
        ValueError: it is not 1 to 100 letters, digits, "_" or "-" (not first), or is taken: an
            attribute of torch.nn.ParameterDict, which holds the adapters of a layer, or
            "__base__", which in PEFT means the model without adapters.
    """
    if not isinstance(name, str):
        raise wrong(TypeError, "adapter_name", "a str", name)
    if not _ADAPTER_NAME.fullmatch(name):
        expected = "1 to 100 letters, digits, '_' or '-', the first not '-'"
        raise wrong(ValueError, "adapter_name", expected, name)
    if name == "__base__" or hasattr(torch.nn.ParameterDict(), name):
        raise wrong(ValueError, "adapter_name", "a name that is not reserved", name)


def _first_match(
    patterns: Mapping[str, T], module_name: str, default: T, budget: Budget | None = None
) -> T:
    budget = budget or Budget()
    matches = (
        value for key, value in patterns.items() if part_pattern(key).match_end(module_name, budget)
    )
    return next(matches, default)
