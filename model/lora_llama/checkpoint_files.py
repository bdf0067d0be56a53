"""A base checkpoint's files, checked before a weight is read: fields, index, headers, shapes.

    config.json                       a Llama's fields
    model.safetensors                 all weights, or
    model.safetensors.index.json      {"weight_map": {weight: file}}, and those files

The header of a safetensors file gives each weight's shape and the file's length: a file that is cut
short, or is another configuration's, is found without reading a weight, and named with every weight
that does not fit. A name from an index is opened only if it is a plain file name, so that no index
leads out of its directory. Nor does a link, but for those that a hub's cache is made of:

    models--OWNER--NAME/snapshots/COMMIT/model.safetensors -> ../../blobs/SHA
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file
from transformers.utils.hub import cached_files

from lora_kernels.field_checks import listed, shown
from lora_kernels.safetensors_header import read_header
from lora_kernels.strict_json import MAX_VALUES, parse_object

WEIGHTS_NAME = "model.safetensors"
PICKLE_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# The options of `from_pretrained` that say where a hub's files are.
HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "proxies")

_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
# 405B parameters are in 126 layers. Each is built, without its weights, for the shapes.
_MAX_LAYERS = 500
_MAX_JSON_BYTES = 4 << 20
_MAY_BE_NULL = ("num_key_value_heads", "head_dim")
# Names of classes, which a causal model does not use, but transformers makes or reads one by one.
_MAX_LABELS = 10_000
# A vocabulary of a quarter of a million tokens takes 32 MiB.
MAX_TEXT_BYTES = 1 << 26
# Files that a tokenizer's readers take as a whole; the patterns are those of transformers.
_TEXT_FILES = re.compile(
    r"config\.json|generation_config\.json|tokenizer_config\.json|tokenizer\.json|"
    r"special_tokens_map\.json|added_tokens\.json|chat_template\.json|vocab\.json|vocab\.txt|"
    r"merges\.txt|tekken\.json|.*\.jinja|.*\.model"
)
_TEMPLATES = "additional_chat_templates"


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


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its type's name if it says nothing, or only a key."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) or not text:
        return f"{type(error).__name__} {text}".strip()
    return text


def find_file(path: str, name: str, options: Mapping[str, Any]) -> str | None:
    """A file of a directory, or of a hub's model (downloaded if need be); None if there is none.

    Raises:
        ValueError: it is a link that leads out of the directory.
    """
    if os.path.isdir(path):
        file = os.path.join(path, options.get("subfolder") or "", name)
        check_inside(path, file)
        return file if os.path.isfile(file) else None
    try:
        return cached_file(path, name, **options)
    except OSError:
        return None


def check_directory(path: str, subfolder: str = "") -> None:
    """Checks every file of a local checkpoint, and of its templates, before transformers opens one.

    Which files it opens depends on what is in others, as the tokenizer's class.

    Raises:
        ValueError: a file is a link that leads out of the directory, a pipe or a device, or is a
            tokenizer's and too large; the message begins with the file.
    """
    directory = os.path.join(path, subfolder)
    if not os.path.isdir(directory):
        return
    # A link that leads out is refused before what it leads to is listed.
    templates = os.path.join(directory, _TEMPLATES)
    check_inside(path, templates)
    for place in (directory, templates):
        for entry in os.scandir(place) if os.path.isdir(place) else ():
            if entry.is_dir():
                continue
            check_inside(path, entry.path)
            if not entry.is_file():
                raise ValueError(f"{entry.path}: expected a regular file")
            if _TEXT_FILES.fullmatch(entry.name) and entry.stat().st_size > MAX_TEXT_BYTES:
                raise ValueError(
                    f"{entry.path}: expected at most {MAX_TEXT_BYTES} bytes, got "
                    f"{entry.stat().st_size}"
                )


def check_inside(directory: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """Checks that a file is in a checkpoint's directory, and no link to a place elsewhere.

    Raises:
        ValueError: it is not; the message begins with the file.
    """
    target = Path(os.path.realpath(file))
    allowed = [Path(os.path.realpath(directory))]
    # What a hub's client downloads is kept beside the snapshots that link to it.
    allowed += [p.parent / "blobs" for p in allowed[0].parents if p.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in allowed):
        if not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(directory)):
            raise ValueError(f"{file}: expected a file in the checkpoint's directory {directory}")
        raise ValueError(
            f"{file}: is a link to {str(target)!r}, outside the checkpoint's directory; copy the "
            "file there"
        )


def read_json_object(
    file: str | os.PathLike[str], max_bytes: int = _MAX_JSON_BYTES, max_values: int = MAX_VALUES
) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, too large, not UTF-8, not JSON, not an object, nested
            too deeply or has a key twice in one object; the message begins with the file.
    """
    # A pipe would be waited for, and a device has no end.
    if os.path.exists(file) and not os.path.isfile(file):
        raise ValueError(f"{file}: expected a regular file")
    with open(file, "rb") as opened:
        content = opened.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{file}: expected at most {max_bytes} bytes, got more")
    try:
        # NaN is let through for the checks of fields, which name the field.
        return parse_object(content, max_values, constants=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON, or cut short: {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


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


def shapes_of(file: str, content: Mapping[str, Any]) -> dict[str, list[int]]:
    """The name and shape of every weight of the Llama that a configuration describes.

    Raises:
        ValueError: no Llama can be built from it; the message begins with `file`.
    """
    # Which attention runs is no matter here, and its package may be missing.
    fields = {key: content[key] for key in content if "attn_implementation" not in key}
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**fields))
    except Exception as error:
        # The fields are all that goes in, so whatever was raised is theirs.
        raise ValueError(f"{file}: describes no Llama: {one_line(error)}") from error
    return {name: list(weight.shape) for name, weight in model.state_dict().items()}


def find_weights(path: str, content: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """The safetensors files of a checkpoint, in a directory or (downloaded if need be) a hub's.

    The list is empty for a hub's model without any: transformers may have it converted.

    Args:
        content: config.json, which may name another file as `transformers_weights`.
        options: `HUB_OPTIONS`, and `variant` for the files model.VARIANT.safetensors.

    Raises:
        FileNotFoundError: the directory has none, or a shard is missing.
        ValueError: the index is malformed, or names a file that is no plain name.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    variant = f".{options['variant']}" if options.get("variant") else ""
    named = content.get("transformers_weights")
    if named is not None:
        _check_plain(f"{path}: config.json: transformers_weights", [named])
    single = named or f"model{variant}.safetensors"
    index = named or f"{WEIGHTS_NAME}.index{variant}.json"
    if single.endswith(".safetensors") and (file := find_file(path, single, hub)):
        return [file]
    if index.endswith(".json") and (file := find_file(path, index, hub)):
        return _shards(path, file, hub)
    if not os.path.isdir(path):
        return []
    directory = os.path.join(path, hub["subfolder"]) if hub.get("subfolder") else path
    wanted = named or f"{single} and no {index}"
    message = f"{directory}: no {wanted} there"
    if any(os.path.exists(os.path.join(directory, name)) for name in PICKLE_NAMES):
        message += (
            "; pytorch_model.bin is a pickle, and pickles can run code and are never loaded: load "
            "it with transformers where you trust it, and save_pretrained"
        )
    raise FileNotFoundError(message)


def _shards(path: str, index: str, options: Mapping[str, Any]) -> list[str]:
    content = read_json_object(index)
    where = content.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index}: weight_map: expected {{weight: file}}, got {shown(where)}")
    # transformers' own reader needs it.
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(
            f"{index}: metadata: expected an object, got {shown(content.get('metadata'))}"
        )
    _check_plain(f"{index}: weight_map", where.values())
    names = sorted(set(where.values()))
    if not os.path.isdir(path):
        return cached_files(path, names, **options)
    directory = os.path.dirname(index)
    missing = [name for name in names if not os.path.isfile(os.path.join(directory, name))]
    if missing:
        raise FileNotFoundError(f"{index}: names files that are missing: {listed(missing)}")
    files = [os.path.join(directory, name) for name in names]
    for file in files:
        check_inside(path, file)
    return files


def _check_plain(source: str, names: Iterable[Any]) -> None:
    for name in names:
        plain = isinstance(name, str) and not set(name) & set("/\\:\0")
        if not plain or not name.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(
                f"{source}: expected the plain name of a safetensors file, in the same directory, "
                f"got {shown(name)}"
            )


def read_shapes(files: Iterable[str]) -> dict[str, list[int]]:
    """The shape of each weight in safetensors files, from their headers.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is no safetensors file, or cut short; the message begins with it.
    """
    shapes = {}
    for file in files:
        try:
            for name, entry in read_header(file).items():
                shapes[name] = list(entry.shape)
        except ValueError as error:
            raise ValueError(f"{file}: no safetensors file, or cut short: {error}") from None
    return shapes


def check_shapes(
    path: str, actual: Mapping[str, list[int]], expected: Mapping[str, list[int]], tied: bool
) -> None:
    """Compares a checkpoint's weights with those of the Llama that config.json describes.

    Args:
        path: the checkpoint, for the message.
        actual: shapes in the files, also without the leading "model." of a bare LlamaModel.
        expected: shapes of the Llama; weights that it does not have are transformers' to report.
        tied: whether the head is the embedding, so that one of the two suffices.

    Raises:
        ValueError: naming every weight that is missing, and every one of another shape.
    """
    found = {name if name in expected else f"model.{name}": actual[name] for name in actual}
    missing = {name for name in expected if name not in found}
    pair = {"lm_head.weight", "model.embed_tokens.weight"}
    if tied and not pair <= missing:
        missing -= pair
    if missing:
        raise ValueError(f"{path}: weights are missing: {listed(sorted(missing))}")
    faults = [
        f"{name}: expected {shape}, got {found[name]}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if faults:
        raise ValueError(f"{path}: weights do not fit config.json: " + "; ".join(faults))
