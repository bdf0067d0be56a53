"""Checkpoints of a training: which one to resume from, and whether it is all there and fits.

checkpoint-N/
    adapter_config.json, adapter_model.safetensors   the adapter, in PEFT's format
    optimizer, scheduler, scaler, rng_state_RANK     JSON and safetensors (`training_state.py`)
    training.json                                    which training it is of
    trainer_state.json                               written after all others
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from lora_kernels.adapter_files import adapter_directory, load_adapter, read_adapter_outline
from lora_kernels.adapter_state import check_fit, check_values, copy_adapter
from lora_kernels.config import LoraConfig
from lora_llama import state_files, training_state
from lora_llama.batching import SupervisedDataset
from lora_llama.checkpoint_files import one_line
from lora_llama.checkpoint_store import finished_checkpoints, read_trainer_state
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import FinetuneOptions
from lora_llama.state_checks import check_trainer_state

# A checkpoint's own name, also while a new one is taking its place.
_NAMED = re.compile(r"checkpoint-(\d{1,18})|\.checkpoint-(\d{1,18})\.old")

# What a checkpoint's record says, in the words of an error.
_MEANINGS = {
    "rows": "training rows",
    "rows_sha256": "SHA-256 of the encoded rows, in their order",
    "seed": "seed",
    "global_batch_size": (
        "per_device_train_batch_size x gradient_accumulation_steps x number of processes"
    ),
}
# What an adapter computes by, beside its tensors; PiSSA and OLoRA begin with another base.
_ADAPTER_OPTIONS = (
    "r", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights"
)  # fmt: skip


def find_checkpoint(options: FinetuneOptions) -> str | None:
    """The checkpoint directory to resume from, or None. "latest" is the one that was saved last.

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
    return str(list(finished.values())[-1])


def check_checkpoint(checkpoint: str, adapters: Mapping[str, LoraConfig]) -> None:
    """Checks that all of what a resumed training will read is there, before it is begun.

    Args:
        adapters: the model's adapters, by name.

    Raises:
        OSError, ValueError: a file is missing, cut short or faulty; the message names the option
            and the file.
    """
    read_state(checkpoint)
    for name in adapters:
        with _naming_the_option():
            # Its data are read when there is a model to compare their shapes with.
            read_adapter_outline(adapter_directory(checkpoint, name))
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
        _read(directory, name)
    _read_record(directory)


def training_record(arguments: TrainingArguments, dataset: SupervisedDataset) -> dict[str, Any]:
    """What decides which rows the N-th optimizer step trains on, as a checkpoint keeps it.

    Fewer processes with a larger batch each have the same.
    """
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    return {
        "rows": len(dataset),
        "rows_sha256": dataset.sha256,
        "seed": seed,
        "global_batch_size": (
            arguments.train_batch_size
            * arguments.gradient_accumulation_steps
            * arguments.world_size
        ),
    }


def check_training(
    checkpoint: str, adapters: Mapping[str, LoraConfig], record: Mapping[str, Any]
) -> None:
    """Checks that a checkpoint is of this training, so that its steps go on where they ended.

    Args:
        adapters: the model's adapters, by name.
        record: of this training, from `training_record`.

    Raises:
        OSError, ValueError: a file is missing or faulty; or an adapter's options, the rows, the
            seed or the global batch size are others: the message names each that differs.
    """
    saved = _read_record(Path(checkpoint))
    faults = [
        _difference(_MEANINGS[name], saved.get(name), value)
        for name, value in record.items()
        if saved.get(name) != value
    ]
    for name, config in adapters.items():
        with _naming_the_option():
            saved_config, _ = read_adapter_outline(adapter_directory(checkpoint, name))
        faults += _adapter_differences(saved_config, config, name)
    if faults:
        raise ValueError(f"resume_from_checkpoint: {_of_another(checkpoint, faults)}")


def _read_record(directory: Path) -> dict[str, Any]:
    record = _read(directory, training_state.TRAINING)
    if not isinstance(record, dict):
        file = directory / f"{training_state.TRAINING}.json"
        raise ValueError(
            f"resume_from_checkpoint: {file}: expected an object, got {type(record).__name__}"
        )
    return record


def _read(directory: Path, name: str) -> Any:
    try:
        return state_files.read(directory, name)
    except (OSError, ValueError) as error:
        raise type(error)(f"resume_from_checkpoint: {error}") from error


def _difference(name: str, expected: Any, got: Any) -> str:
    return f"{name}: expected {expected}, got {got}"


def _adapter_differences(saved: LoraConfig, config: LoraConfig, name: str) -> list[str]:
    whose = "" if name == "default" else f"adapter {name}: "
    return [
        _difference(f"{whose}{option}", getattr(saved, option), getattr(config, option))
        for option in _ADAPTER_OPTIONS
        if getattr(saved, option) != getattr(config, option)
    ]


def _of_another(checkpoint: str | Path, faults: Sequence[str]) -> str:
    return f"{checkpoint} is of another training: {'; '.join(faults)}"


def read_state(checkpoint: str) -> TrainerState:
    """How far a checkpoint's training had come.

    Raises:
        ValueError: trainer_state.json is not what transformers wrote.
    """
    file = Path(checkpoint) / TRAINER_STATE_NAME
    try:
        state = TrainerState(**read_trainer_state(Path(checkpoint)))
        named = _NAMED.fullmatch(Path(checkpoint).resolve().name)
        check_trainer_state(state, int(named[1] or named[2]) if named else None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"resume_from_checkpoint: {file}: {one_line(error)}") from error
    return state


@contextmanager
def _naming_the_option() -> Iterator[None]:
    """Names the option in an error of an adapter's files."""
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"resume_from_checkpoint: {error}") from error


def load_checkpoint(model: LoraLlamaForCausalLM, checkpoint: str) -> None:
    """Reads a checkpoint's adapters into a model that has the same.

    Raises:
        ValueError: an adapter's files are missing or faulty, or it is another one; the message
            names what differs, and every key.
    """
    for name, config in model.lora_configs.items():
        directory = adapter_directory(checkpoint, name)

        def check(
            saved: LoraConfig,
            outlines: Mapping[str, Tensor],
            directory: Path = directory,
            config: LoraConfig = config,
            name: str = name,
        ) -> None:
            faults = _adapter_differences(saved, config, name)
            if faults:
                raise ValueError(_of_another(directory, faults))
            check_fit(model, config, outlines, str(directory))

        with _naming_the_option():
            _, tensors = load_adapter(directory, check)
            check_values(model, tensors, True, str(directory))
        copy_adapter(model, name, tensors)
