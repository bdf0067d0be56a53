"""What a config.json says, checked before transformers builds anything of it.

transformers takes nearly any value of a field, and fails, fills the memory or runs for ever where
it is used. Each check here names the field, what was expected and what came.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from lora_kernels.field_checks import shown

NO_CODE = "expected no code of the checkpoint's own, which is never run"
_ROPE_NUMBERS = (
    "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "attention_factor", "beta_fast", "beta_slow",
)  # fmt: skip
_POSITIVE: tuple[str, Callable[[float], bool]] = ("above 0", lambda x: 0 < x < math.inf)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "rms_norm_eps": ("of at least 0", lambda x: 0 <= x < math.inf),
    "attention_dropout": ("of at least 0 and below 1", lambda x: 0 <= x < 1),
    # A head turns all of its width at most.
    "partial_rotary_factor": ("above 0 and at most 1", lambda x: 0 < x <= 1),
}

_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
# 405B parameters are in 126 layers. Each is built, without its weights, for the shapes.
_MAX_LAYERS = 500
_MAY_BE_NULL = ("num_key_value_heads", "head_dim")
# Names of classes, which a causal model does not use, but transformers makes or reads one by one.
_MAX_LABELS = 10_000


def check_config(file: str, content: Mapping[str, Any]) -> None:
    """Checks the fields that a Llama is built from.

    Raises:
        ValueError: naming the file, and each faulty field with what was expected and what came.
    """
    faults = [
        f"{name}: expected a positive integer, got {shown(content[name])}"
        for name in _COUNTS
        if name in content
        and not (content[name] is None and name in _MAY_BE_NULL)
        and not (_is_integer(content[name]) and content[name] > 0)
    ]
    if not faults:
        faults = _faults_of_heads(content)
    layers = content.get("num_hidden_layers", 1)
    if _is_integer(layers) and layers > _MAX_LAYERS:
        faults.append(f"num_hidden_layers: expected at most {_MAX_LAYERS}, got {shown(layers)}")
    for name, value in content.items():
        # A name with a slash is a hub's, whose code transformers would fetch and run.
        if "_implementation" in name and not re.fullmatch(r"[\w|]*", str(value)):
            faults.append(f"{name}: expected a plain name, as 'sdpa', got {shown(value)}")
    faults += _faults_of_numbers(content)
    activation = content.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACT2FN:
        faults.append(
            f"hidden_act: expected an activation's name, as 'silu', got {shown(activation)}"
        )
    for name in ("dtype", "torch_dtype"):
        if content.get(name) is not None and not _is_dtype(content[name]):
            faults.append(
                f"{name}: expected a floating dtype, as 'bfloat16', got {shown(content[name])}"
            )
    faults += _faults_of_labels(content) + _faults_of_quantization(content)
    if content.get("auto_map") is not None:
        faults.append(f"auto_map: {NO_CODE}, got {shown(content['auto_map'])}")
    if faults:
        raise ValueError(f"{file}: " + "; ".join(faults))


def _faults_of_labels(content: Mapping[str, Any]) -> list[str]:
    faults = []
    for name in ("num_labels", "id2label", "label2id"):
        value = content.get(name, 0)
        count = len(value) if isinstance(value, dict) else value
        if value is not None and not (_is_integer(count) and 0 <= count <= _MAX_LABELS):
            faults.append(f"{name}: expected at most {_MAX_LABELS} labels, got {shown(value)}")
    return faults


def _faults_of_quantization(content: Mapping[str, Any]) -> list[str]:
    quantization = content.get("quantization_config")
    if quantization is None:
        return []
    if not isinstance(quantization, dict):
        return [f"quantization_config: expected an object, got {shown(quantization)}"]
    method = quantization.get("quant_method")
    known = sorted({*AUTO_QUANTIZATION_CONFIG_MAPPING, "bitsandbytes"} - {"gguf"})
    if method not in known:
        return [f"quantization_config.quant_method: expected one of {known}, got {shown(method)}"]
    return []


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_dtype(value: Any) -> bool:
    name = str(value).removeprefix("torch.")
    return name in ("float16", "bfloat16", "float32", "float64")


def _faults_of_heads(content: Mapping[str, Any]) -> list[str]:
    def count(name: str) -> int:
        return content.get(name, getattr(LlamaConfig, name))

    hidden, heads = count("hidden_size"), count("num_attention_heads")
    kv_heads, vocabulary = count("num_key_value_heads") or heads, count("vocab_size")
    faults = []
    if hidden % heads:
        faults.append(
            f"num_attention_heads: expected a divisor of hidden_size {hidden}, got {heads}"
        )
    if heads % kv_heads:
        faults.append(
            f"num_key_value_heads: expected a divisor of num_attention_heads {heads}, "
            f"got {kv_heads}"
        )
    width = content.get("head_dim") or hidden // heads
    # RoPE turns pairs of a head's elements.
    if not faults and width % 2:
        faults.append(f"head_dim: expected an even number, got {width}")
    padding = content.get("pad_token_id")
    # torch counts a negative one from the end.
    if padding is not None and not (_is_integer(padding) and -vocabulary <= padding < vocabulary):
        faults.append(
            f"pad_token_id: expected a token of vocab_size {vocabulary}, or null, got "
            f"{shown(padding)}"
        )
    return faults


def _faults_of_numbers(content: Mapping[str, Any]) -> list[str]:
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return [f"rope_parameters: expected an object, got {shown(rope)}"]
    share = "partial_rotary_factor"
    values = [(name, content.get(name)) for name in ("rms_norm_eps", "rope_theta", share)]
    values += [(f"rope_parameters.{name}", rope.get(name)) for name in (*_ROPE_NUMBERS, share)]
    values.append(("attention_dropout", content.get("attention_dropout")))
    faults = []
    for name, value in values:
        expected, holds = _RANGES.get(name.rpartition(".")[2], _POSITIVE)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and holds(value)):
            faults.append(f"{name}: expected a finite number {expected}, got {shown(value)}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in (known := ["default", *ROPE_INIT_FUNCTIONS]):
        faults.append(f"rope_parameters.rope_type: expected one of {known}, got {shown(kind)}")
    return faults
