"""LoraConfig: PEFT's field names, defaults and meaning, and the rules that pick modules from them.

    scaling = lora_alpha / r             or, with use_rslora, lora_alpha / sqrt(r)
    target_modules   list    a module whose name equals an entry or ends with "." + entry
                     str     a regular expression that matches the whole module name
                     "all-linear"    every nn.Linear except the output head
                     None    what PEFT defaults to for the model's architecture
    rank_pattern, alpha_pattern    regular expressions for the end of a module name; the first that
                     matches replaces r or lora_alpha

Semantics follow PEFT 0.21 (`tuners/lora/config.py`, `tuners/tuners_utils.py`, `utils/other.py`).
PEFT leaves a target or a pattern that matches nothing unmentioned or warns; here it is an error,
because the usual cause is a misspelling and the result a model that trains less than was asked.
"""

import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# PEFT's fields that change what an adapter is and are not supported here, with the default under
# which they change nothing. Supporting one means deleting its row.
_UNSUPPORTED: dict[str, Any] = {
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "use_dora": False,
    "lora_bias": False,
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

# PEFT's defaults (`utils/constants.py`) for the architectures whose attention is nn.Linear and
# named as Llama's is.
_DEFAULT_TARGETS = dict.fromkeys(
    ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
    ("q_proj", "v_proj"),
)

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


@dataclass(kw_only=True)
class LoraConfig:
    """What a LoRA adapter is: which modules, which rank, which scale.

    Fields have PEFT's names, defaults and meaning. Sets, tuples and lists of names become lists
    without duplicates, in the order given (sets: sorted).

    Args:
        r: rank of the update, at least 1.
        target_modules: the modules to adapt; see the module's docstring.
        exclude_modules: modules never adapted, by name suffixes or one regular expression.
        lora_alpha: numerator of the scaling; any finite number.
        lora_dropout: probability in [0, 1) of zeroing an input of the LoRA branch in training.
        use_rslora: scale by 1/sqrt(r) instead of 1/r (https://arxiv.org/abs/2312.03732).
        init_lora_weights: True: A Kaiming-uniform, B zero. "gaussian": A normal with standard
            deviation 1/r, B zero. False: both random, so that an untrained adapter has an effect.
        layers_to_transform: layer indices to adapt, for suffix targets only; an entry of
            `target_modules` that is a module's whole name is adapted whatever its layer.
        layers_pattern: name of the list of layers ("layers", "h"), where the first numbered
            segment of a module name is not the layer.
        rank_pattern: regular expression -> rank. Order matters: the first match counts.
        alpha_pattern: regular expression -> lora_alpha, likewise.
        task_type, base_model_name_or_path, revision, inference_mode: kept for PEFT.
        fan_in_fan_out, bias, modules_to_save, use_dora, lora_bias: only PEFT's default.
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
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Collection[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._check_supported()
        _check_rank("r", self.r)
        _check_number("lora_alpha", self.lora_alpha)
        _check_number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise _wrong(ValueError, "lora_dropout", "a number in [0, 1)", self.lora_dropout)
        for name in ("use_rslora", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(TypeError, name, "a bool", getattr(self, name))
        for name in ("task_type", "base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise _wrong(TypeError, name, "a str or None", getattr(self, name))
        if self.task_type is not None and self.task_type not in _TASK_TYPES:
            raise _wrong(ValueError, "task_type", f"one of {_TASK_TYPES} or None", self.task_type)

        self.target_modules = _checked_names("target_modules", self.target_modules)
        if self.target_modules is not None and not self.target_modules:
            raise _wrong(ValueError, "target_modules", "at least one name", self.target_modules)
        self.exclude_modules = _checked_names("exclude_modules", self.exclude_modules)
        self.layers_pattern = _checked_names("layers_pattern", self.layers_pattern)
        self._check_layers()
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_number)):
            patterns = getattr(self, name)
            if not isinstance(patterns, dict):
                raise _wrong(TypeError, name, "a dict", patterns)
            for pattern, value in patterns.items():
                _check_regex(name, pattern, _name_pattern)
                check(f"{name}[{pattern!r}]", value)
            setattr(self, name, dict(patterns))

    def _check_supported(self) -> None:
        if not isinstance(self.extra, dict):
            raise _wrong(TypeError, "extra", "a dict", self.extra)
        for name, default in _UNSUPPORTED.items():
            value = getattr(self, name, self.extra.get(name, default))
            # PEFT takes any empty value for "off".
            if value != default and (value or default):
                expected = f"{default!r}, all that this version supports"
                raise _wrong(ValueError, name, expected, value)
        init = self.init_lora_weights
        if not isinstance(init, bool) and init != "gaussian":
            raise _wrong(ValueError, "init_lora_weights", "True, False or 'gaussian'", init)

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            if self.layers_pattern:
                expected = "None where layers_to_transform is None"
                raise _wrong(ValueError, "layers_pattern", expected, self.layers_pattern)
            return
        for pattern in _as_list(self.layers_pattern or []):
            _check_regex("layers_pattern", pattern, _layer_pattern)
        if not isinstance(layers, int | list | tuple | set | frozenset):
            raise _wrong(TypeError, "layers_to_transform", "an int or a list of int", layers)
        for layer in _as_list(layers):
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise _wrong(TypeError, "layers_to_transform", "an int or a list of int", layer)
            if layer < 0:
                raise _wrong(ValueError, "layers_to_transform", "indices >= 0", layer)
        if isinstance(self.target_modules, str):
            expected = "None where target_modules is a str"
            raise _wrong(ValueError, "layers_to_transform", expected, layers)
        if not isinstance(layers, int):
            self.layers_to_transform = _as_list(layers)

    def rank_for(self, module_name: str) -> int:
        """The rank for the module of this full name: `r`, unless a rank_pattern matches."""
        return _first_match(self.rank_pattern, module_name, self.r)

    def alpha_for(self, module_name: str) -> float:
        """The lora_alpha for the module of this full name, likewise by alpha_pattern."""
        return _first_match(self.alpha_pattern, module_name, self.lora_alpha)

    def scaling_for(self, module_name: str) -> float:
        """The factor on this module's update: alpha/r, or alpha/sqrt(r) with use_rslora."""
        rank = self.rank_for(module_name)
        return self.alpha_for(module_name) / (math.sqrt(rank) if self.use_rslora else rank)

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
            raise _wrong(TypeError, "adapter config", "a dict with str keys", content)
        extra = copy.deepcopy(dict(content))
        peft_type = extra.pop("peft_type", "LORA")
        if peft_type != "LORA":
            raise _wrong(ValueError, "peft_type", "'LORA'", peft_type)
        fields = {name: extra.pop(name) for name in _FIELDS if name in extra}
        for name in ("rank_pattern", "alpha_pattern"):
            if fields.get(name, {}) is None:
                del fields[name]
        return cls(**fields, extra=extra)


_FIELDS = [f.name for f in dataclasses.fields(LoraConfig) if f.name != "extra"]


def match_target_modules(model: torch.nn.Module, config: LoraConfig) -> list[str]:
    """The full names of the modules that `config` adapts, in the model's order.

    Submodules of an nn.Linear (the adapters of an adapted layer) are not looked at, so that a
    config can be applied again under another adapter name. Every entry of a target list, every
    rank or alpha pattern and every layer index must select something.

    Raises:
        ValueError: nothing matches; one entry, pattern or index selects nothing; or
            `target_modules` is None and the architecture has no default.
        TypeError: a matched module is not an nn.Linear.
    """
    modules = dict(_modules_outside_linears(model))
    targets = config.target_modules
    if targets is None:
        targets = _default_targets(model)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        matched = _all_linear(model, modules, config)
    elif isinstance(targets, str):
        matched = list(filter(_selector(targets), modules))
    else:
        matched = _match_suffixes(targets, modules, config)

    if config.exclude_modules:
        excluded = set(filter(_selector(config.exclude_modules), modules))
        matched = [name for name in matched if name not in excluded]
        if not excluded:
            warnings.warn(
                f"exclude_modules={config.exclude_modules!r} matches no module", stacklevel=2
            )

    with_target = {_layer_index(name, config.layers_pattern) for name in matched}
    empty = [layer for layer in _layers(config) if layer not in with_target]
    if empty:
        raise ValueError(f"layers_to_transform: expected layers with a target module, got {empty}")
    if not matched:
        hint = ""
        if isinstance(targets, str):
            hint = "a str is a regular expression for the whole name, a list holds suffixes; "
        raise ValueError(
            f"target_modules={_shown(targets)} with exclude_modules="
            f"{_shown(config.exclude_modules)} matches no module; {hint}{_some_linears(modules)}"
        )
    for name in matched:
        if not isinstance(modules[name], torch.nn.Linear):
            raise TypeError(
                f"target_modules: expected names of nn.Linear modules, got {name!r}, "
                f"which is a {type(modules[name]).__name__}"
            )
    for field_name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field_name)
        unused = [p for p in patterns if not any(_name_pattern(p).match(name) for name in matched)]
        if unused:
            raise ValueError(
                f"{field_name}: expected patterns that match a target module such as "
                f"{matched[0]!r}, got {unused}"
            )
    return matched


def validate_adapter_name(name: str) -> None:
    """Refuses an adapter name that cannot be a dictionary key, a folder and a parameter's name.

    Raises:
        TypeError: `name` is not a str.
        ValueError: it is not 1 to 100 letters, digits, "_" or "-" (not first), or is taken: an
            attribute of torch.nn.ParameterDict, which holds the adapters of a layer, or
            "__base__", which in PEFT means the model without adapters.
    """
    if not isinstance(name, str):
        raise _wrong(TypeError, "adapter_name", "a str", name)
    if not _ADAPTER_NAME.fullmatch(name):
        expected = "1 to 100 letters, digits, '_' or '-', the first not '-'"
        raise _wrong(ValueError, "adapter_name", expected, name)
    if name == "__base__" or hasattr(torch.nn.ParameterDict(), name):
        raise _wrong(ValueError, "adapter_name", "a name that is not reserved", name)


def _modules_outside_linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    inside = None
    for name, module in model.named_modules():
        if name and (inside is None or not name.startswith(inside)):
            inside = f"{name}." if isinstance(module, torch.nn.Linear) else None
            yield name, module


def _default_targets(model: torch.nn.Module) -> list[str]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _DEFAULT_TARGETS:
        raise ValueError(
            "target_modules: expected names, a regular expression or 'all-linear', got None, and "
            f"model type {model_type!r} is none of those with a default: {list(_DEFAULT_TARGETS)}"
        )
    return list(_DEFAULT_TARGETS[model_type])


def _all_linear(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], config: LoraConfig
) -> list[str]:
    """Every nn.Linear but the language model's head or, where there is none, the classifier."""
    head = None
    get_output_embeddings: Any = getattr(model, "get_output_embeddings", None)
    if get_output_embeddings is not None:
        head = get_output_embeddings()
        if head is None and config.task_type == "SEQ_CLS":
            head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return [
        name
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def _match_suffixes(
    targets: Collection[str], modules: Mapping[str, torch.nn.Module], config: LoraConfig
) -> list[str]:
    matched = list(filter(_selector(targets), modules))
    unused = [target for target in targets if not any(map(_selector([target]), matched))]
    if unused:
        raise ValueError(
            f"target_modules: expected names of modules, got {unused}, which match none; "
            f"{_some_linears(modules)}"
        )
    layers = _layers(config)
    if not layers:
        return matched
    return [
        name
        for name in matched
        if name in targets or _layer_index(name, config.layers_pattern) in layers
    ]


def _selector(names: Collection[str] | str) -> Callable[[str], bool]:
    """Whether a module is meant: by a regular expression (str), or by its name or its suffix."""
    if isinstance(names, str):
        pattern = re.compile(names)
        return lambda module_name: pattern.fullmatch(module_name) is not None
    exact, suffixes = frozenset(names), tuple(f".{name}" for name in names)
    return lambda module_name: module_name in exact or module_name.endswith(suffixes)


def _layers(config: LoraConfig) -> list[int]:
    layers = config.layers_to_transform
    return [] if layers is None else _as_list(layers)


def _layer_index(module_name: str, layers_pattern: Collection[str] | str | None) -> int | None:
    """The layer of a module: the first numbered segment that follows a named one.

    With a pattern the named one must match it; without, it is any but the name's first segment.
    It is the first, not the last: the layer of "model.layers.1.experts.0.w1" is 1.
    """
    for pattern in _as_list(layers_pattern or []):
        if found := _layer_pattern(pattern).search(module_name):
            return int(found["index"])
    if layers_pattern:
        return None
    found = re.search(r"\.[^.]*\.(\d+)\.", module_name)
    return int(found[1]) if found else None


def _some_linears(modules: Mapping[str, torch.nn.Module]) -> str:
    linears = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    return f"the model has {len(linears)} nn.Linear, e.g. {linears[:5]}"


# `re` itself caches 512 patterns; a config with one pattern for every module has more.
@lru_cache(maxsize=8192)
def _name_pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _layer_pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|\.)(?:{pattern})\.(?P<index>\d+)\.")


def _first_match(patterns: Mapping[str, T], module_name: str, default: T) -> T:
    matches = (value for key, value in patterns.items() if _name_pattern(key).match(module_name))
    return next(matches, default)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _wrong(error: type[Exception], name: str, expected: str, value: object) -> Exception:
    return error(f"{name}: expected {expected}, got {_shown(value)}")


def _check_rank(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(TypeError, name, "an int", value)
    if value < 1:
        raise _wrong(ValueError, name, "an int >= 1", value)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(TypeError, name, "a number", value)
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise _wrong(ValueError, name, "a finite number", value)


def _check_regex(
    name: str, pattern: Any, compile_pattern: Callable[[str], re.Pattern[str]] = re.compile
) -> None:
    if not isinstance(pattern, str):
        raise _wrong(TypeError, name, "a regular expression (str)", pattern)
    try:
        compile_pattern(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise _wrong(ValueError, name, f"a regular expression ({error})", pattern) from error


def _checked_names(name: str, value: Any) -> list[str] | str | None:
    if isinstance(value, str):
        _check_regex(name, value)
        return value
    if value is None:
        return None
    if not isinstance(value, list | tuple | set | frozenset):
        raise _wrong(TypeError, name, "a str, a list of str or None", value)
    for item in value:
        if not isinstance(item, str):
            raise _wrong(TypeError, name, "a list of str", item)
        if not item:
            raise _wrong(ValueError, name, "non-empty names", item)
    return _as_list(value)


def _as_list(items: Any) -> list[Any]:
    """One item or several as a list without duplicates; a set, whose order varies, is sorted."""
    if isinstance(items, str | int):
        return [items]
    return list(dict.fromkeys(sorted(items) if isinstance(items, set | frozenset) else items))
