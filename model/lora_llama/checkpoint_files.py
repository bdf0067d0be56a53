"""A base checkpoint's files, checked before a weight is read: index, headers, shapes.

    config.json                       a Llama's fields (`config_checks.py`)
    model.safetensors                 all weights, or
    model.safetensors.index.json      {"weight_map": {weight: file}}, and those files

The header of a safetensors file gives each weight's shape and the file's length: a file that is cut
short, or is another configuration's, is found without reading a weight, and named with every weight
that does not fit. A name from an index is opened only if it is a plain file name, so that no index
leads out of its directory. Nor does a link, but for those that a hub's cache is made of:

    models--OWNER--NAME/snapshots/COMMIT/model.safetensors -> ../../blobs/SHA
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import cached_file
from transformers.utils.hub import cached_files

from lora_kernels.field_checks import listed, shown
from lora_kernels.safetensors_header import read_header
from lora_kernels.strict_json import MAX_VALUES, parse_object

WEIGHTS_NAME = "model.safetensors"
PICKLE_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# The options of `from_pretrained` that say where a hub's files are.
HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "proxies")

_MAX_JSON_BYTES = 4 << 20
# A vocabulary of a quarter of a million tokens takes 32 MiB.
MAX_TEXT_BYTES = 1 << 26
# Files that a tokenizer's readers take as a whole; the patterns are those of transformers.
_TEXT_FILES = re.compile(
    r"config\.json|generation_config\.json|tokenizer_config\.json|tokenizer\.json|"
    r"special_tokens_map\.json|added_tokens\.json|chat_template\.json|vocab\.json|vocab\.txt|"
    r"merges\.txt|tekken\.json|.*\.jinja|.*\.model"
)
_TEMPLATES = "additional_chat_templates"


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
