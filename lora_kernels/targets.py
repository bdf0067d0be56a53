"""Which modules of a model an adapter is for: PEFT's rules (`tuners/tuners_utils.py`).

    target_modules   list    a module whose name equals an entry or ends with "." + entry
                     str     a regular expression that matches the whole module name
                     "all-linear"    every linear layer except the output head
                     None    what PEFT defaults to for the model's architecture
    exclude_modules  never adapted: names and suffixes, or one regular expression
    modules_to_save  every module whose name ends with an entry; nothing in it is adapted

PEFT leaves a target or a pattern that matches nothing unmentioned or warns; here it is an error,
because the usual cause is a misspelling and the result a model that trains less than was asked.
Expressions are matched in a bounded number of steps (`name_patterns.py`); one that needs more is an
error too.
A linear layer is an nn.Linear, weight [out, in], or transformers' Conv1D (GPT-2), weight [in, out].
"""

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from lora_kernels.config import LoraConfig
from lora_kernels.field_checks import as_list, listed, shown
from lora_kernels.name_patterns import Budget, name_pattern, part_pattern
from lora_kernels.saved_modules import ModulesToSave

# PEFT's defaults (`utils/constants.py`) for architectures whose attention is made of linear layers.
_DEFAULT_TARGETS = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
        ("q_proj", "v_proj"),
    ),
    "gpt2": ("c_attn",),
}

# The heads that PEFT trains and saves with an adapter (`peft_model.py`); a model has one of them.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def match_target_modules(model: torch.nn.Module, config: LoraConfig) -> list[str]:
    """The full names of the modules that `config` adapts, in the model's order.

    Submodules of a linear layer (the adapters of an adapted one) and of a module that is saved as a
    whole are not looked at, so that a config can be applied again under another adapter name. Every
    entry of a target list, every rank or alpha pattern and every layer index must select something.

    Raises:
        ValueError: nothing matches; one entry, pattern or index selects nothing; or
            `target_modules` is None and the architecture has no default.
        TypeError: a matched module is not a linear layer.
    """
    modules = dict(modules_outside_adapters(model))
    budget = Budget()
    targets = config.target_modules
    if targets is None:
        targets = _default_targets(model)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        matched = _all_linear(model, modules, config)
    elif isinstance(targets, str):
        matched = list(filter(_selector(targets, budget), modules))
    else:
        matched = _match_suffixes(targets, modules, config, budget)

    if config.exclude_modules:
        excluded = set(filter(_selector(config.exclude_modules, budget), modules))
        matched = [name for name in matched if name not in excluded]
        if not excluded:
            warnings.warn(
                f"exclude_modules={config.exclude_modules!r} matches no module", stacklevel=2
            )

    if config.modules_to_save:
        saved = _inside(config.modules_to_save)
        matched = [name for name in matched if not saved(name)]

    with_target = {_layer_index(name, config.layers_pattern, budget) for name in matched}
    empty = [layer for layer in _layers(config) if layer not in with_target]
    if empty:
        raise ValueError(
            f"layers_to_transform: expected layers with a target module, got {listed(empty)}"
        )
    if not matched:
        hint = ""
        if isinstance(targets, str):
            hint = "a str is a regular expression for the whole name, a list holds suffixes; "
        raise ValueError(
            f"target_modules={shown(targets)} with exclude_modules="
            f"{shown(config.exclude_modules)} and modules_to_save={shown(config.modules_to_save)} "
            f"matches no module; {hint}{_some_linears(modules)}"
        )
    for name in matched:
        if not is_linear(modules[name]):
            raise TypeError(
                f"target_modules: expected names of nn.Linear modules, got {name!r}, "
                f"which is a {type(modules[name]).__name__}"
            )
    for field_name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field_name)
        unused = [
            pattern
            for pattern in patterns
            if not any(part_pattern(pattern).match_end(name, budget) for name in matched)
        ]
        if unused:
            raise ValueError(
                f"{field_name}: expected patterns that match a target module such as "
                f"{matched[0]!r}, got {listed(unused)}"
            )
    return matched


def match_modules_to_save(model: torch.nn.Module, config: LoraConfig) -> list[str]:
    """The full names of the modules of which the adapter has a copy of its own.

    Raises:
        ValueError: an entry matches no module, or a matched module is inside another.
    """
    modules = dict(modules_outside_adapters(model))
    entries = config.modules_to_save or ()
    matched = [name for name in modules if name.endswith(tuple(entries))]
    optional = HEADS.get(config.task_type or "", ())
    unused = [
        entry
        for entry in entries
        if entry not in optional and not any(name.endswith(entry) for name in matched)
    ]
    if unused:
        raise ValueError(
            f"modules_to_save: expected names of modules, got {listed(unused)}, which match none"
        )
    for name in matched:
        outer = next((other for other in matched if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(f"modules_to_save: expected separate modules, got {name} in {outer}")
    return matched


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer: an nn.Linear or transformers' Conv1D."""
    return isinstance(module, torch.nn.Linear) or is_conv1d(module)


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, whose weight is [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def linear_shape(module: torch.nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if isinstance(module, torch.nn.Linear):
        return module.out_features, module.in_features
    weight = module.get_parameter("weight")
    return weight.shape[1], weight.shape[0]


def modules_outside_adapters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The (name, module) pairs without the insides of linear layers and of saved modules."""
    inside = None
    for name, module in model.named_modules():
        if name and (inside is None or not name.startswith(inside)):
            closed = isinstance(module, torch.nn.Linear | ModulesToSave)
            inside = f"{name}." if closed else None
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
    """Every linear layer but the language model's head or, if there is none, the classifier."""
    head = None
    get_output_embeddings: Any = getattr(model, "get_output_embeddings", None)
    if get_output_embeddings is not None:
        head = get_output_embeddings()
        if head is None and config.task_type == "SEQ_CLS":
            head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return [name for name, module in modules.items() if is_linear(module) and module is not head]


def _match_suffixes(
    targets: Collection[str],
    modules: Mapping[str, torch.nn.Module],
    config: LoraConfig,
    budget: Budget,
) -> list[str]:
    matched = list(filter(_selector(targets, budget), modules))
    used = {suffix for name in matched for suffix in _suffixes(name)}
    unused = [target for target in targets if target not in used]
    if unused:
        raise ValueError(
            f"target_modules: expected names of modules, got {listed(unused)}, which match none; "
            f"{_some_linears(modules)}"
        )
    layers, whole_names = set(_layers(config)), set(targets)
    if not layers:
        return matched
    return [
        name
        for name in matched
        if name in whole_names or _layer_index(name, config.layers_pattern, budget) in layers
    ]


def _selector(names: Collection[str] | str, budget: Budget) -> Callable[[str], bool]:
    """Whether a module is meant: by a regular expression (str), or by its name or its suffix."""
    if isinstance(names, str):
        pattern = name_pattern(names)
        return lambda module_name: pattern.fullmatch(module_name, budget)
    wanted = frozenset(names)
    return lambda module_name: not wanted.isdisjoint(_suffixes(module_name))


def _suffixes(module_name: str) -> Iterator[str]:
    """The name and what is behind each of its dots."""
    parts = module_name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def _inside(names: Collection[str]) -> Callable[[str], bool]:
    """Whether a module is one of these or in one of these, by any part of its name."""
    parts = tuple(f".{name}." for name in names)
    return lambda module_name: any(part in f".{module_name}." for part in parts)


def _layers(config: LoraConfig) -> list[int]:
    layers = config.layers_to_transform
    return [] if layers is None else as_list(layers)


def _layer_index(
    module_name: str, layers_pattern: Collection[str] | str | None, budget: Budget
) -> int | None:
    """The layer of a module: the first numbered segment that follows a named one.

    With a pattern the named one must match it; without, it is any but the name's first segment.
    It is the first, not the last: the layer of "model.layers.1.experts.0.w1" is 1.
    """
    for pattern in as_list(layers_pattern or []):
        index = part_pattern(pattern).index_after(module_name, budget)
        if index is not None:
            return index
    if layers_pattern:
        return None
    found = re.search(r"\.[^.]*\.(\d+)\.", module_name)
    return int(found[1]) if found else None


def _some_linears(modules: Mapping[str, torch.nn.Module]) -> str:
    linears = [name for name, module in modules.items() if is_linear(module)]
    return f"the model has {len(linears)} nn.Linear, e.g. {linears[:5]}"
