"""transformers' Trainer with checkpoints of our own: whole or absent, resumed to the last bit.

    checkpoint-N/       see `checkpoint_store.py` for how it comes to be
        adapter_config.json, adapter_model.safetensors, the tokenizer's files
        optimizer, scheduler, scaler, rng_state_RANK, training      see `training_state.py`
        trainer_state.json                                          transformers' own, written last

One process writes for all. What is resumed gives the next steps of a training that was never
interrupted, to the last bit, if there are as many processes as before.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from lora_llama import checkpoint_store, disk, state_files, training_state
from lora_llama.batching import SupervisedDataset
from lora_llama.checkpoint_files import one_line
from lora_llama.divergence import LossWatch
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.resuming import check_training, load_checkpoint, training_record


class CheckpointingTrainer(Trainer):
    """A Trainer that saves and resumes a LoraLlama without pickles.

    Attributes:
        last_checkpoint: the last that was saved, or resumed from.
        loss_watch: judges the loss by that of the last steps, which a checkpoint keeps.

    Raises:
        ValueError: an option asks for what would be saved as a pickle.
    """

    model: LoraLlamaForCausalLM
    train_dataset: SupervisedDataset

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.push_to_hub:
            raise ValueError("push_to_hub: expected False; transformers would add a pickle")
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_deepspeed_enabled or getattr(plugin, "fsdp_version", 2) == 1:
            raise ValueError("expected DDP or FSDP 2: DeepSpeed and FSDP 1 save pickles")
        self.last_checkpoint: str | None = None
        self.loss_watch = LossWatch(self.model.config.vocab_size)

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Trains, from where a checkpoint ended if there is one.

        Raises:
            OSError, ValueError: the checkpoint is faulty, or of another training.
        """
        if resume_from_checkpoint is not None:
            record = training_record(self.args, self.train_dataset)
            check_training(resume_from_checkpoint, self.model.lora_configs, record)
            self.last_checkpoint = resume_from_checkpoint
        super().train(resume_from_checkpoint=resume_from_checkpoint)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, int]:
        """The epoch, and the batch in it, to begin with."""
        start = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs
        )
        # Inside an epoch, Trainer would train one step more than there are.
        return start if self.state.global_step < max_steps else (num_train_epochs, 0)

    def prove_weights(self) -> None:
        """Raises an error where the weights are no good to save."""

    def _any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process; each waits for the others."""
        if self.accelerator.num_processes == 1:
            return flag
        flags = self.accelerator.gather(torch.tensor([flag], device=self.args.device))
        return bool(flags.any())

    # Saving.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter and the tokenizer; every process calls this.

        Of a sharded model transformers would gather all, or by its default save nothing.

        Raises:
            OSError: the disk is full, or the directory cannot be written; what was there before is
                intact.
        """
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """`save_model`; transformers would add its arguments as a pickle."""
        directory = Path(self.args.output_dir if output_dir is None else output_dir)
        try:
            if self.args.should_save and not directory.exists():
                disk.make_directory(directory)
            self._save_adapter(directory)
            for name, content in self._tokenizer_files.items() if self.args.should_save else ():
                file = directory / name
                if not file.is_file() or file.read_bytes() != content:
                    disk.replace_file(file, content)
        except OSError as error:
            raise OSError(
                f"{directory}: adapter and tokenizer could not be saved: {one_line(error)}; the "
                f"last checkpoint: {self.last_checkpoint or 'none'}"
            ) from error

    def _save_adapter(self, directory: Path) -> None:
        # In every process: what is sharded is gathered by all.
        self.model.save_pretrained(directory, is_main_process=self.args.should_save)

    @cached_property
    def _tokenizer_files(self) -> dict[str, bytes]:
        return {} if self.processing_class is None else tokenizer_files(self.processing_class)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes checkpoint-N, all of it or nothing, and then deletes what is beyond the limit.

        Raises:
            ValueError: the weights are no good; nothing is written.
            OSError: the disk is full, or the directory cannot be written; the message says which
                checkpoint there still is.
        """
        self.prove_weights()
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        output_dir = Path(self._get_output_dir(trial=trial))
        checkpoint = output_dir / f"checkpoint-{self.state.global_step}"
        best = self.state.best_global_step
        if best and (
            best == self.state.global_step or (output_dir / f"checkpoint-{best}").exists()
        ):
            self.state.best_model_checkpoint = str(output_dir / f"checkpoint-{best}")
        files = self._state_files(output_dir)
        failure: OSError | None = None
        try:
            self._write_checkpoint(checkpoint, files)
        except OSError as error:
            failure = error
        if self._any_process(failure is not None):
            reason = one_line(failure) if failure else "another process says why"
            saved = self.last_checkpoint or "none"
            raise OSError(
                f"{checkpoint} could not be saved: {reason}; the last checkpoint: {saved}"
            ) from failure
        self.last_checkpoint = str(checkpoint)
        if self.args.should_save:
            kept = {checkpoint, Path(self.state.best_model_checkpoint or checkpoint)}
            checkpoint_store.rotate(output_dir, self.args.save_total_limit, kept)

    def _write_checkpoint(self, checkpoint: Path, files: dict[str, bytes]) -> None:
        if not self.args.should_save:
            self._save_adapter(checkpoint)
            return
        staging = checkpoint_store.staging_of(checkpoint)
        try:
            checkpoint_store.begin(checkpoint)
            self._save_adapter(staging)
            for name, content in (self._tokenizer_files | files).items():
                disk.write_file(staging / name, content)
            checkpoint_store.commit(staging, checkpoint)
        except Exception:
            # A full disk gets its room back at once; after a crash the next save does this.
            with contextlib.suppress(OSError):
                if staging.exists():
                    disk.remove_tree(staging)
            raise

    def _state_files(self, output_dir: Path) -> dict[str, bytes]:
        """All that a checkpoint holds beside adapter and tokenizer, by name; trainer_state last."""
        states = {
            training_state.OPTIMIZER: self.optimizer.state_dict(),
            training_state.SCHEDULER: self.lr_scheduler.state_dict(),
        }
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            states[training_state.SCALER] = scaler.state_dict()
        states[training_state.TRAINING] = training_record(self.args, self.train_dataset) | {
            "save_number": checkpoint_store.next_save_number(output_dir)
        }
        files = {
            f"{name}{suffix}": content
            for name, state in states.items()
            for suffix, content in state_files.to_files(state).items()
        }
        rng = training_state.rng_state() | {
            "unlogged_loss": self._tr_loss.item(),
            "recent_losses": list(self.loss_watch.steps),
        }
        files |= training_state.gather_files(state_files.to_files(rng), self.accelerator)
        exported: dict[str, list[Any]] = {}
        for source in (*self.callback_handler.callbacks, self.control):
            if isinstance(source, ExportableState):
                exported.setdefault(type(source).__name__, []).append(source.state())
        self.state.stateful_callbacks = {
            name: found[0] if len(found) == 1 else found for name, found in exported.items()
        }
        content = json.dumps(asdict(self.state), indent=2, sort_keys=True)
        return files | {TRAINER_STATE_NAME: f"{content}\n".encode()}

    # Resuming.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Reads the adapters that `save_pretrained` wrote; transformers reads only PEFT's own."""
        load_checkpoint(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            # The state that was read has the intervals of logging and saving of its own training.
            self.state.compute_steps(self.args, self.state.max_steps)
            self._read(training_state.load_optimizer, self.optimizer, Path(checkpoint))
            self._read(
                training_state.load_scheduler, self.lr_scheduler, self.optimizer, Path(checkpoint)
            )

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None:
            scaler.load_state_dict(
                self._read(state_files.read, Path(checkpoint), training_state.SCALER)
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called once, when the data are where they were, and before the first step."""
        if checkpoint is not None:
            unlogged, recent = self._read(
                training_state.load_rng, Path(checkpoint), self.args.process_index,
                self.args.world_size, self.args.seed, self.state.global_step,
            )  # fmt: skip
            logged = [line["step"] for line in self.state.log_history if "loss" in line]
            self._tr_loss += unlogged
            self.loss_watch.steps.clear()
            self.loss_watch.steps.extend(recent)
            self._globalstep_last_logged = logged[-1] if logged else 0

    @staticmethod
    def _read(reader: Callable[..., Any], *args: Any) -> Any:
        try:
            return reader(*args)
        except ValueError as error:
            raise ValueError(f"resume_from_checkpoint: {error}") from error
        except FileNotFoundError as error:
            raise FileNotFoundError(f"resume_from_checkpoint: {error}") from error


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """What a tokenizer's `save_pretrained` writes: the files' contents by their relative paths.

    Its writers neither bring a file onto the disk nor keep an older one whole.

    Raises:
        OSError: the directory for temporary files is full, or cannot be written.
    """
    with tempfile.TemporaryDirectory() as directory:
        try:
            tokenizer.save_pretrained(directory)
        except Exception as error:
            # The tokenizers library has no type for it.
            if isinstance(error, OSError) or "os error" not in str(error):
                raise
            raise OSError(f"{directory}: {one_line(error)}") from error
        files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
        return {str(path.relative_to(directory)): path.read_bytes() for path in files}
