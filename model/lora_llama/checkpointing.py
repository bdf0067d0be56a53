"""transformers' Trainer with checkpoints of our own: whole or absent, resumed to the last bit.

    checkpoint-N/       see `checkpoint_store.py` for how it comes to be
        adapter_config.json, adapter_model.safetensors, the tokenizer's files
        optimizer, scheduler, scaler, rng_state_RANK      see `training_state.py`
        trainer_state.json                                transformers' own, written last

One process writes for all. What is resumed gives the next steps of a training that was never
interrupted, to the last bit, if there are as many processes as before.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from lora_llama import checkpoint_store, disk, state_files, training_state
from lora_llama.checkpoint_files import one_line
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.resuming import load_checkpoint, read_state


class CheckpointingTrainer(Trainer):
    """A Trainer that saves and resumes a LoraLlama without pickles.

    Attributes:
        last_checkpoint: the last that was saved, or resumed from.

    Raises:
        ValueError: an option asks for what would be saved as a pickle.
    """

    model: LoraLlamaForCausalLM

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.push_to_hub:
            raise ValueError("push_to_hub: expected False; transformers would add a pickle")
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_deepspeed_enabled or getattr(plugin, "fsdp_version", 2) == 1:
            raise ValueError("expected DDP or FSDP 2: DeepSpeed and FSDP 1 save pickles")
        self.last_checkpoint: str | None = None

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        if resume_from_checkpoint is not None:
            self.last_checkpoint = resume_from_checkpoint
            state = read_state(resume_from_checkpoint)
            if 0 < self.args.max_steps <= state.global_step:
                # Nothing is left to train; Trainer would train one step more.
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return
        super().train(resume_from_checkpoint=resume_from_checkpoint)

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
        """Writes the adapter; every process calls this.

        Of a sharded model transformers would gather all, or by its default save nothing.
        """
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter and the tokenizer; transformers would add its arguments as a pickle."""
        directory = self.args.output_dir if output_dir is None else output_dir
        # In every process: what is sharded is gathered by all.
        self.model.save_pretrained(
            directory, is_main_process=self.args.should_save, state_dict=state_dict
        )
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(directory)

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
        files = self._state_files()
        failure: Exception | None = None
        try:
            self._write_checkpoint(checkpoint, files)
        except Exception as error:
            # The tokenizer's own writer has no type for it.
            if not isinstance(error, OSError) and "os error" not in str(error):
                raise
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
            self._save(str(checkpoint))
            return
        staging = checkpoint_store.staging_of(checkpoint)
        try:
            checkpoint_store.begin(checkpoint)
            self._save(str(staging))
            for name, content in files.items():
                disk.write_file(staging / name, content)
            checkpoint_store.commit(staging, checkpoint)
        except Exception:
            # A full disk gets its room back at once; after a crash the next save does this.
            with contextlib.suppress(OSError):
                if staging.exists():
                    disk.remove_tree(staging)
            raise

    def _state_files(self) -> dict[str, bytes]:
        """All that a checkpoint holds beside adapter and tokenizer, by name; trainer_state last."""
        states = {
            training_state.OPTIMIZER: self.optimizer.state_dict(),
            training_state.SCHEDULER: self.lr_scheduler.state_dict(),
        }
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            states[training_state.SCALER] = scaler.state_dict()
        files = {
            f"{name}{suffix}": content
            for name, state in states.items()
            for suffix, content in state_files.to_files(state).items()
        }
        rng = training_state.rng_state() | {"unlogged_loss": self._tr_loss.item()}
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
            unlogged = self._read(
                training_state.load_rng, Path(checkpoint), self.args.process_index,
                self.args.world_size, self.args.seed, self.state.global_step,
            )  # fmt: skip
            logged = [line["step"] for line in self.state.log_history if "loss" in line]
            self._tr_loss += unlogged
            self._globalstep_last_logged = logged[-1] if logged else 0

    @staticmethod
    def _read(reader: Callable[..., Any], *args: Any) -> Any:
        try:
            return reader(*args)
        except ValueError as error:
            raise ValueError(f"resume_from_checkpoint: {error}") from error
        except FileNotFoundError as error:
            raise FileNotFoundError(f"resume_from_checkpoint: {error}") from error
