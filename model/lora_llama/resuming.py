"""Checkpoints of a training: which one to resume from, and whether all of it is there.

checkpoint-N/
    adapter_config.json, adapter_model.safetensors   the adapter, in PEFT's format
    optimizer.pt, scheduler.pt, rng_state*.pth       transformers' own, zip archives
    trainer_state.json                               written after all others
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from lora_kernels.adapter_files import adapter_directory, load_adapter
from lora_kernels.adapter_state import check_fit, copy_adapter
from lora_kernels.config import LoraConfig
from lora_llama.checkpoint_files import one_line
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import FinetuneOptions

_ARCHIVES = ("optimizer*.pt", "scheduler*.pt", "rng_state*.pth")


def find_checkpoint(options: FinetuneOptions) -> str | None:
    """The checkpoint directory to resume from, or None. "latest" is the last finished one.

    Raises:
        FileNotFoundError: there is none where the option says.
    """
    wanted = options.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted != "latest":
        if not _is_finished(Path(wanted)):
            raise FileNotFoundError(
                f"resume_from_checkpoint: {wanted} is no checkpoint, or its saving was interrupted "
                f"(it has no valid {TRAINER_STATE_NAME})"
            )
        return wanted
    numbered = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in Path(options.output_dir).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal() and _is_finished(path)
    }
    if not numbered:
        raise FileNotFoundError(
            f"resume_from_checkpoint: no finished checkpoint-N directory in {options.output_dir}"
        )
    return str(numbered[max(numbered)])


def _is_finished(checkpoint: Path) -> bool:
    # Trainer writes this file after all others of a checkpoint.
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def check_checkpoint(checkpoint: str, adapters: Mapping[str, LoraConfig]) -> None:
    """Checks what a resumed training will read, before it is begun.

    Args:
        adapters: the model's adapters, by name.

    Raises:
        OSError, ValueError: a file is missing, cut short or of another training; the message names
            the option and the file.
    """
    read_state(checkpoint)
    for name, config in adapters.items():
        _read_adapter(adapter_directory(checkpoint, name), config)
    directory = Path(checkpoint)
    # Without either transformers begins anew with both. (DeepSpeed has a directory for them.)
    if not any(directory.glob("global_step*")):
        for kind in ("optimizer", "scheduler"):
            if not any(directory.glob(f"{kind}*")):
                raise FileNotFoundError(f"resume_from_checkpoint: {directory / kind}.pt is missing")
    for file in sorted(file for pattern in _ARCHIVES for file in directory.glob(pattern)):
        # The archive's directory is at its end, so that a file that is cut short has none.
        if not zipfile.is_zipfile(file):
            raise ValueError(f"resume_from_checkpoint: {file} is broken or cut short")


def read_state(checkpoint: str) -> TrainerState:
    """How far a checkpoint's training had come.

    Raises:
        ValueError: trainer_state.json is not what transformers wrote.
    """
    file = Path(checkpoint) / TRAINER_STATE_NAME
    try:
        state = TrainerState.load_from_json(str(file))
        if not isinstance(state.global_step, int) or state.global_step < 1:
            raise ValueError(f"global_step: expected at least 1, got {state.global_step!r}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"resume_from_checkpoint: {file}: {one_line(error)}") from error
    return state


def _read_adapter(directory: Path, config: LoraConfig) -> dict[str, Tensor]:
    try:
        saved, tensors = load_adapter(directory)
    except (OSError, ValueError) as error:
        raise ValueError(f"resume_from_checkpoint: {error}") from error
    for key in ("r", "lora_alpha", "use_rslora"):
        expected, got = getattr(config, key), getattr(saved, key)
        if expected != got:
            raise ValueError(
                f"resume_from_checkpoint: {directory} has an adapter with {key}={got}; "
                f"this one has {key}={expected}"
            )
    return tensors


def load_checkpoint(model: LoraLlamaForCausalLM, checkpoint: str) -> None:
    """Reads a checkpoint's adapters into a model that has the same.

    Raises:
        ValueError: an adapter's files are missing or faulty, or it is another one; the message
            names what differs, and every key.
    """
    for name, config in model.lora_configs.items():
        directory = adapter_directory(checkpoint, name)
        tensors = _read_adapter(directory, config)
        check_fit(model, config, tensors, f"resume_from_checkpoint: {directory}")
        copy_adapter(model, name, tensors)
