"""Options of a training, and what they become: an adapter, transformers' arguments, a dtype.

`lora-llama finetune --help` shows the docstring of `FinetuneOptions`, one entry for each option.
"""

import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from lora_kernels.config import LoraConfig
from lora_kernels.field_checks import check_types

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
TrainingDtypeName = Literal["auto", "bfloat16", "float32"]
# Those of transformers' schedules that need no options of their own.
Schedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial",
    "inverse_sqrt",
]  # fmt: skip
# Larger than every projection's smaller side, beyond which a rank adds nothing.
MAX_RANK = 2**16
# Of any other whole number: what torch and transformers count with.
MAX_INT = 2**31 - 1
WARMUP_STEPS = 10


@dataclass
class FinetuneOptions:
    """Options of `lora-llama finetune`; the names are transformers' and axolotl's.

    Args:
        model: directory or hub id of a Llama, in safetensors (or GGUF, with --gguf_file).
        data: JSON Lines file: messages, prompt + completion, Alpaca's keys, or text.
        output_dir: where the adapter, checkpoints, loss.png and metrics.json go.
        gguf_file: GGUF file inside the model directory.
        dtype: dtype of the base weights; auto is bfloat16 where the device computes it natively,
            else float32. (Gradients would underflow in float16.)
        val_set_size: held-out rows, as a number or (below 1) a fraction of the data; 0 for none.
        max_length: most tokens in a sequence; longer rows lose their end.
        packing: put several rows into one sequence.
        train_on_inputs: train on the prompts as well as on the completions.
        lora_r: rank of the adapter.
        lora_alpha: the adapter's delta is scaled by lora_alpha / lora_r.
        lora_dropout: dropout on the adapter's input.
        lora_target_modules: names of the projections that get an adapter, as q_proj,v_proj or
            [q_proj,v_proj]; all-linear takes every one.
        lora_modules_to_save: names of modules that are trained and saved whole beside the adapter,
            as lm_head,embed_tokens.
        lora_bias: train a bias on each B; only layers with a bias can merge it.
        init_lora_weights: how A and B begin: true (B zero), gaussian, orthogonal, pissa,
            pissa_niter_N or olora.
        use_rslora: scale by lora_alpha / sqrt(lora_r) instead.
        use_dora: train the norms of the updated weight's rows as well (DoRA).
        learning_rate: peak learning rate of AdamW.
        lr_scheduler_type: how the learning rate goes on after the warm-up.
        warmup_steps: optimizer steps of linear warm-up; by default 10, or half of max_steps if that
            is less.
        weight_decay: AdamW's weight decay.
        max_grad_norm: gradients are clipped to this norm.
        num_train_epochs: passes over the data, unless max_steps is given.
        max_steps: optimizer steps; -1 counts epochs instead.
        per_device_train_batch_size: sequences per forward pass.
        per_device_eval_batch_size: sequences per forward pass in evaluation; by default as many as
            in training, which needs more memory.
        gradient_accumulation_steps: forward passes per optimizer step.
        gradient_checkpointing: recompute activations in backward, to save memory.
        logging_steps: optimizer steps between logged losses.
        eval_steps: optimizer steps between evaluations; 0 evaluates at the end alone.
        eval_samples: with each evaluation, print greedy answers to this many held-out prompts, and
            add them to samples.jsonl.
        save_steps: optimizer steps between checkpoints; 0 saves at the end alone.
        save_total_limit: checkpoints to keep.
        resume_from_checkpoint: a checkpoint directory, or "latest" in output_dir.
        report_to: none, or one of transformers' integrations: tensorboard, wandb, ...
        seed: of the adapter's initialisation, the data's order and split, and dropout.
    """

    model: str
    data: str
    output_dir: str = "outputs"
    gguf_file: str | None = None
    dtype: TrainingDtypeName = "auto"
    val_set_size: float = 0.05
    max_length: int = 1024
    packing: bool = False
    train_on_inputs: bool = False
    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | str = field(default_factory=lambda: list(ALL_PROJECTIONS))
    lora_modules_to_save: list[str] | str | None = None
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    use_rslora: bool = False
    use_dora: bool = False
    learning_rate: float = 2e-4
    lr_scheduler_type: Schedule = "cosine"
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    logging_steps: int = 1
    eval_steps: int = 0
    eval_samples: int = 0
    save_steps: int = 0
    save_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    report_to: str = "none"
    seed: int = 42

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("model", "data", "gguf_file", "resume_from_checkpoint"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}: expected a name, got ''")
        at_least = {
            "max_length": 2, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1, "logging_steps": 1, "eval_steps": 0,
            "eval_samples": 0, "save_steps": 0, "warmup_steps": 0, "save_total_limit": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), least)
        check_range("lora_r", self.lora_r, 1, MAX_RANK)
        check_seed(self.seed)
        for name in ("learning_rate", "max_grad_norm", "num_train_epochs", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        # Beyond these a float32 is zero or infinite before anything is learned.
        check_range("lora_alpha", self.lora_alpha, 1e-6, 1e6)
        check_range("max_grad_norm", self.max_grad_norm, 1e-6, math.inf)
        check_range("learning_rate", self.learning_rate, 1e-12, math.inf)
        check_range("num_train_epochs", self.num_train_epochs, 0, 1e6)
        for name in ("val_set_size", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps: expected a positive number or -1, got {self.max_steps}")
        check_range("max_steps", self.max_steps, -1)
        for name, choices in (("dtype", TrainingDtypeName), ("lr_scheduler_type", Schedule)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name}: expected one of {get_args(choices)}, got {getattr(self, name)!r}"
                )
        if not self.output_dir or (
            os.path.exists(self.output_dir) and not os.path.isdir(self.output_dir)
        ):
            raise ValueError(f"output_dir: expected a directory, got {self.output_dir!r}")
        self._check_together()

    def _check_together(self) -> None:
        """Raises ValueError for an option that another one leaves without a meaning."""
        for name in ("eval_samples", "eval_steps"):
            if getattr(self, name) and not self.val_set_size:
                raise ValueError(
                    f"{name}: expected 0 without held-out rows (val_set_size), "
                    f"got {getattr(self, name)}"
                )
        if self.save_total_limit is not None and not self.save_steps:
            raise ValueError(
                "save_total_limit: expected save_steps with it, which saves checkpoints, "
                f"got {self.save_total_limit} and save_steps {self.save_steps}"
            )
        if self.warmup_steps:
            if 0 < self.max_steps <= self.warmup_steps:
                raise ValueError(
                    f"warmup_steps: expected fewer than max_steps ({self.max_steps}), "
                    f"got {self.warmup_steps}"
                )
            if self.lr_scheduler_type == "constant":
                raise ValueError(
                    "warmup_steps: expected 0 with lr_scheduler_type constant, which has no "
                    f"warm-up (constant_with_warmup has), got {self.warmup_steps}"
                )
        saved = names_of("lora_modules_to_save", self.lora_modules_to_save or [])
        both = set(names_of("lora_target_modules", self.lora_target_modules)) & set(saved)
        if both:
            raise ValueError(
                "lora_modules_to_save: expected other names than lora_target_modules has, "
                f"got {sorted(both)} in both"
            )

    def lora_config(self) -> LoraConfig:
        """The adapter that these options describe."""
        targets, saved = self.lora_target_modules, self.lora_modules_to_save
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=(
                targets if targets == "all-linear" else names_of("lora_target_modules", targets)
            ),
            modules_to_save=None if saved is None else names_of("lora_modules_to_save", saved),
            lora_bias=self.lora_bias,
            init_lora_weights=self.init_lora_weights,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            task_type="CAUSAL_LM",
        )

    def training_arguments(self, has_eval: bool) -> TrainingArguments:
        """The same, as transformers' TrainingArguments.

        Raises:
            ValueError: `report_to` is unknown or not installed.
        """
        installed = get_available_reporting_integrations()
        if self.report_to != "none" and self.report_to not in installed:
            raise ValueError(
                f"report_to: expected none, or an integration that is installed "
                f"({', '.join(installed) or 'here there is none'}), got {self.report_to}"
            )
        on_gpu = torch.cuda.is_available()
        warmup_steps = self.warmup_steps
        if warmup_steps is None:
            limited = self.max_steps > 0
            warmup_steps = min(WARMUP_STEPS, self.max_steps // 2) if limited else WARMUP_STEPS
        arguments = TrainingArguments(
            output_dir=self.output_dir,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.lr_scheduler_type,
            warmup_steps=warmup_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            num_train_epochs=self.num_train_epochs,
            max_steps=self.max_steps,
            per_device_train_batch_size=self.per_device_train_batch_size,
            per_device_eval_batch_size=(
                self.per_device_eval_batch_size or self.per_device_train_batch_size
            ),
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            **self._checkpointing(),
            logging_steps=self.logging_steps,
            eval_strategy="steps" if has_eval and self.eval_steps else "no",
            eval_steps=self.eval_steps or None,
            save_strategy="steps" if self.save_steps else "no",
            save_steps=self.save_steps or 500,
            save_total_limit=self.save_total_limit,
            report_to=self.report_to,
            seed=self.seed,
            data_seed=self.seed,
            use_cpu=not on_gpu,
            # Else there is no bar where transformers' warnings are off.
            disable_tqdm=False,
            dataloader_pin_memory=on_gpu,
            # Every adapter weight has a gradient in every pass.
            ddp_find_unused_parameters=False,
            # A loss that is NaN is to be seen, not replaced.
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        # One process trains on one GPU; `torchrun` starts one for each.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments

    def _checkpointing(self) -> dict[str, Any]:
        if not self.gradient_checkpointing:
            return {}
        # transformers 5.23 renamed the option; 5.17 has the old name alone.
        new_name = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
        option = "activation_checkpointing" if new_name else "gradient_checkpointing"
        return {option: True, f"{option}_kwargs": {"use_reentrant": False}}


def names_of(option: str, listed: list[str] | str) -> list[str]:
    """The names of a list, or of a text with commas between them.

    Raises:
        ValueError: a name is there twice; the message begins with the option.
    """
    names = [name.strip() for name in listed.split(",")] if isinstance(listed, str) else listed
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{option}: expected each name once, got {twice} more than once")
    return names


def check_range(name: str, value: float, least: float, most: float = MAX_INT) -> None:
    """Raises ValueError for an option that is below or above what it may be."""
    if not value >= least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not value <= most:
        raise ValueError(f"{name}: expected at most {most}, got {value}")


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that numpy's generators, which are seeded too, do not take."""
    check_range("seed", seed, 0, math.inf)
    if seed >= 2**32:
        raise ValueError(f"seed: expected less than 2**32, got {seed}")


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the device has instructions for it, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32
