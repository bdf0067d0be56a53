"""Checkpoints of a training: which one to resume from, and whether all of it is there.

checkpoint-N/
    adapter_config.json, adapter_model.safetensors   the adapter, in PEFT's format
    optimizer, scheduler, scaler, rng_state_RANK     JSON and safetensors (`training_state.py`)
    trainer_state.json                               written after all others
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from lora_kernels.adapter_files import adapter_directory, load_adapter
from lora_kernels.adapter_state import check_fit, copy_adapter
from lora_kernels.config import LoraConfig
from lora_llama import state_files, training_state
from lora_llama.checkpoint_files import one_line
from lora_llama.checkpoint_store import finished_checkpoints, read_trainer_state
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import FinetuneOptions


def find_checkpoint(options: FinetuneOptions) -> str | None:
    """The checkpoint directory to resume from, or None. "latest" is the last finished one.

    Raises:
        FileNotFoundError: there is none where the option says.
    """
    wanted = options.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted != "latest":
        try:
            read_trainer_state(Path(wanted))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"resume_from_checkpoint: {wanted} is no checkpoint, or its saving was interrupted "
                f"(it has no valid {TRAINER_STATE_NAME}: {one_line(error)})"
            ) from error
        return wanted
    finished = finished_checkpoints(Path(options.output_dir))
    if not finished:
        raise FileNotFoundError(
            f"resume_from_checkpoint: no finished checkpoint-N directory in {options.output_dir}"
        )
    return str(finished[max(finished)])


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
    names = [training_state.OPTIMIZER, training_state.SCHEDULER]
    pickles = sorted(path.name for kind in training_state.PICKLES for path in directory.glob(kind))
    if pickles and not all((directory / f"{name}.json").exists() for name in names):
        raise ValueError(
            f"resume_from_checkpoint: {directory} was saved by an older version or transformers: "
            f"{', '.join(pickles)}: pickles can run code and are never loaded; its adapter can be "
            "used, but the training cannot go on from it"
        )
    ranks = training_state.saved_ranks(directory)
    if not ranks:
        file = directory / f"{training_state.rng_name(0)}.json"
        raise FileNotFoundError(f"resume_from_checkpoint: {file} is missing")
    for name in names + [training_state.rng_name(rank) for rank in ranks]:
        try:
            state_files.read(directory, name)
        except (OSError, ValueError) as error:
            raise type(error)(f"resume_from_checkpoint: {error}") from error


def read_state(checkpoint: str) -> TrainerState:
    """How far a checkpoint's training had come.

    Raises:
        ValueError: trainer_state.json is not what transformers wrote.
    """
    file = Path(checkpoint) / TRAINER_STATE_NAME
    try:
        state = TrainerState(**read_trainer_state(Path(checkpoint)))
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
