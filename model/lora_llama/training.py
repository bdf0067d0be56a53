"""Fine-tuning through transformers' Trainer: options, checkpoints of adapters, checks, records.

    options -> model + data -> LoraTrainer.train() -> output_dir:
        adapter_config.json, adapter_model.safetensors   the adapter, in PEFT's format
        checkpoint-N/                                    to resume from
        loss.png, metrics.json                           what happened

The loss is the cross-entropy over every unmasked position of every sequence, averaged over all of
an optimizer step's tokens: gradient accumulation over unequal lengths is exact.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from lora_kernels.adapter_files import adapter_directory, load_adapter
from lora_kernels.adapters import check_fit, copy_adapter
from lora_kernels.config import LoraConfig
from lora_llama.data import (
    IGNORE_INDEX,
    Collator,
    SupervisedDataset,
    load_dataset,
    padding_id,
    read_jsonl,
    split_dataset,
)
from lora_llama.gradients import (
    GradientNorms,
    capture_lora_weights,
    unchanged_weights,
    verify_gradients,
)
from lora_llama.loading import (
    is_adapter_directory,
    load_tokenizer,
    read_llama_config,
    write_json,
)
from lora_llama.model import LoraLlamaForCausalLM

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
TrainingDtypeName = Literal["auto", "bfloat16", "float32"]
# Those of transformers' schedules that need no options of their own.
Schedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial",
    "inverse_sqrt",
]  # fmt: skip


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
        use_rslora: scale by lora_alpha / sqrt(lora_r) instead.
        learning_rate: peak learning rate of AdamW.
        lr_scheduler_type: how the learning rate goes on after the warm-up.
        warmup_steps: optimizer steps of linear warm-up.
        weight_decay: AdamW's weight decay.
        max_grad_norm: gradients are clipped to this norm.
        num_train_epochs: passes over the data, unless max_steps is given.
        max_steps: optimizer steps; -1 counts epochs instead.
        per_device_train_batch_size: sequences per forward pass.
        per_device_eval_batch_size: sequences per forward pass in evaluation.
        gradient_accumulation_steps: forward passes per optimizer step.
        gradient_checkpointing: recompute activations in backward, to save memory.
        logging_steps: optimizer steps between logged losses.
        eval_steps: optimizer steps between evaluations; 0 evaluates at the end alone.
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
    use_rslora: bool = False
    learning_rate: float = 2e-4
    lr_scheduler_type: Schedule = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    logging_steps: int = 1
    eval_steps: int = 0
    save_steps: int = 0
    save_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    report_to: str = "none"
    seed: int = 42

    def __post_init__(self) -> None:
        at_least = {
            "max_length": 2, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1, "logging_steps": 1, "eval_steps": 0,
            "save_steps": 0, "warmup_steps": 0, "lora_r": 1, "seed": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm", "num_train_epochs", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("val_set_size", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps: expected a positive number or -1, got {self.max_steps}")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(f"save_total_limit: expected at least 1, got {self.save_total_limit}")
        if self.seed >= 2**32:
            raise ValueError(f"seed: expected less than 2**32, got {self.seed}")
        for name, choices in (("dtype", TrainingDtypeName), ("lr_scheduler_type", Schedule)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name}: expected one of {get_args(choices)}, got {getattr(self, name)!r}"
                )
        if not self.output_dir or (
            os.path.exists(self.output_dir) and not os.path.isdir(self.output_dir)
        ):
            raise ValueError(f"output_dir: expected a directory, got {self.output_dir!r}")

    def lora_config(self) -> LoraConfig:
        """The adapter that these options describe."""
        targets = self.lora_target_modules
        if isinstance(targets, str) and targets != "all-linear":
            targets = [name.strip() for name in targets.split(",")]
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            use_rslora=self.use_rslora,
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
        arguments = TrainingArguments(
            output_dir=self.output_dir,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.lr_scheduler_type,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            num_train_epochs=self.num_train_epochs,
            max_steps=self.max_steps,
            per_device_train_batch_size=self.per_device_train_batch_size,
            per_device_eval_batch_size=self.per_device_eval_batch_size,
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


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory allocated so far: on a GPU by torch, on a CPU resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class TrainingBar(ProgressCallback):
    """transformers' progress bar, with the loss, the speed and the peak memory beside it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.trainer: LoraTrainer | None = None

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if self.training_bar is None or not logs or "loss" not in logs or self.trainer is None:
            return
        self.training_bar.set_postfix(
            {
                "loss": f"{float(logs['loss']):.3f}",
                "tokens/s": f"{self.trainer.tokens_per_second():.0f}",
                "peak": f"{peak_memory_bytes(self.device) / 2**30:.2f} GiB",
            }
        )


class LoraTrainer(Trainer):
    """transformers' Trainer for a LoraLlama: checks its gradients, resumes its adapters.

    Attributes:
        first_gradients: the norms of the first optimizer step's gradients, before clipping.
        moving_steps: optimizer steps with a learning rate above zero; a warm-up begins with zero.
        tokens_trained: tokens that went forward and backward (padding only of packed sequences).
        seconds_trained: time spent in forward and backward.
    """

    model: LoraLlamaForCausalLM

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_metrics=mean_loss, **kwargs)
        self.first_gradients: list[GradientNorms] | None = None
        self.moving_steps = 0
        self.tokens_trained = 0
        self.seconds_trained = 0.0
        bar = self.pop_callback(ProgressCallback)
        self.pop_callback(PrinterCallback)
        if bar is not None:
            training_bar = TrainingBar(self.args.device)
            training_bar.trainer = self
            self.add_callback(training_bar)

    def tokens_per_second(self) -> float:
        return self.tokens_trained / self.seconds_trained if self.seconds_trained else 0.0

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        if resume_from_checkpoint is not None:
            file = os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME)
            state = TrainerState.load_from_json(file)
            if 0 < self.args.max_steps <= state.global_step:
                # Nothing is left to train; Trainer would train one step more.
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return
        super().train(resume_from_checkpoint=resume_from_checkpoint)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        start = time.perf_counter()
        loss = super().training_step(model, inputs, *args, **kwargs)
        if loss.is_cuda:
            torch.cuda.synchronize(loss.device)
        self.seconds_trained += time.perf_counter() - start
        self.tokens_trained += tokens
        # The last forward pass before an optimizer step: the gradients are complete.
        if self.accelerator.sync_gradients:
            if self.first_gradients is None:
                self.first_gradients = verify_gradients(self.model)
            self.moving_steps += self._get_learning_rate() > 0
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise ValueError(
                f"the training diverged: its loss is {logs['loss']} at step "
                f"{self.state.global_step}; lower learning_rate (now {self.args.learning_rate:g})"
            )

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        """Each row's summed loss and number of trained tokens, for `mean_loss`.

        Trainer's own evaluation averages the means of batches, whose tokens differ in number.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**inputs).logits[:, :-1]
            losses = [
                F.cross_entropy(row.float(), target, ignore_index=IGNORE_INDEX, reduction="sum")
                for row, target in zip(logits, labels, strict=True)
            ]
        return None, torch.stack(losses), (labels != IGNORE_INDEX).sum(1)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Reads the adapters that `save_pretrained` wrote; transformers reads only PEFT's own."""
        target = self.model if model is None else model
        for name, config in target.lora_configs.items():
            directory = adapter_directory(resume_from_checkpoint, name)
            saved, tensors = load_adapter(directory)
            for key in ("r", "lora_alpha", "use_rslora"):
                expected, got = getattr(config, key), getattr(saved, key)
                if expected != got:
                    raise ValueError(
                        f"resume_from_checkpoint: {directory} has an adapter with {key}={got}; "
                        f"this one has {key}={expected}"
                    )
            check_fit(target, config, tensors, str(directory))
            copy_adapter(target, name, tensors)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def mean_loss(prediction: Any) -> dict[str, float]:
    """The loss over all held-out tokens, from what `LoraTrainer.prediction_step` returns."""
    return {"loss": float(prediction.predictions.sum() / prediction.label_ids.sum())}


def encode_rows(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, options: FinetuneOptions
) -> SupervisedDataset:
    """The dataset of rows in the formats of `lora_llama.data`.

    Raises:
        ValueError: a row is faulty, or no row has a token to train on.
    """
    return load_dataset(
        rows, tokenizer, options.max_length, options.train_on_inputs, options.packing
    )


def build_trainer(
    model: LoraLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    train_dataset: SupervisedDataset,
    eval_dataset: SupervisedDataset | None = None,
) -> LoraTrainer:
    """A trainer over encoded rows, which pads or packs them as the model's attention needs."""
    return LoraTrainer(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=Collator(
            padding_id(tokenizer),
            return_flash_attn_kwargs=str(model.config._attn_implementation).startswith("flash"),
        ),
        processing_class=tokenizer,
    )


@dataclass
class TrainingResult:
    """What `train_and_save` measured; `metrics.json` holds the same.

    Attributes:
        steps: optimizer steps.
        train_losses: (step, loss) as logged.
        eval_losses: (step, loss), the first before the first step, the last after the last.
        tokens_per_second: in forward and backward.
        peak_memory_gib: see `peak_memory_bytes`.
        seconds: of training, evaluations included.
        gradients: the norms of the first step.
    """

    steps: int
    train_losses: list[tuple[int, float]]
    eval_losses: list[tuple[int, float]]
    tokens_per_second: float
    peak_memory_gib: float
    seconds: float
    gradients: list[GradientNorms]


def train_and_save(
    trainer: LoraTrainer, resume_from_checkpoint: str | None = None
) -> TrainingResult:
    """Trains, saves the adapter and tokenizer, and writes metrics.json and loss.png.

    Raises:
        GradientError: the first step's gradients are wrong.
        ValueError: the checkpoint does not fit, the training diverged, or an adapter weight has not
            moved (all is saved by then).
    """
    start = time.perf_counter()
    before = capture_lora_weights(trainer.model)
    # Not trainer.evaluate(): a model that Trainer has evaluated is not made distributed any more.
    trainer.args.eval_on_start = trainer.eval_dataset is not None and not resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    history = trainer.state.log_history
    eval_losses = [(h["step"], h["eval_loss"]) for h in history if "eval_loss" in h]
    steps = trainer.state.global_step
    if trainer.eval_dataset is not None and steps not in dict(eval_losses):
        eval_losses.append((steps, trainer.evaluate()["eval_loss"]))
    result = TrainingResult(
        steps=steps,
        train_losses=[(h["step"], h["loss"]) for h in history if "loss" in h],
        eval_losses=eval_losses,
        tokens_per_second=trainer.tokens_per_second(),
        peak_memory_gib=peak_memory_bytes(trainer.args.device) / 2**30,
        seconds=time.perf_counter() - start,
        gradients=trainer.first_gradients or [],
    )
    if trainer.is_world_process_zero():
        directory = Path(trainer.args.output_dir)
        # Not trainer.save_model, which adds its arguments as a pickle.
        trainer.model.save_pretrained(directory)
        trainer.processing_class.save_pretrained(directory)
        write_json(directory / "metrics.json", asdict(result))
        plot_losses(result, directory / "loss.png")
    _check_moved(trainer, before)
    return result


def _check_moved(trainer: LoraTrainer, before: dict[str, torch.Tensor]) -> None:
    """Raises ValueError naming the trained weights that are what they were."""
    steps, active = trainer.moving_steps, trainer.model.active_adapters()
    still = [
        name
        for name in unchanged_weights(before, capture_lora_weights(trainer.model))
        # The first step moves B alone: while B is 0, A's gradient is.
        if name.rpartition(".")[2] in active and steps >= (1 if ".lora_B." in name else 2)
    ]
    if still:
        raise ValueError("adapter weights have not moved: " + ", ".join(still))


def plot_losses(result: TrainingResult, path: Path) -> None:
    """Draws training and held-out loss over optimizer steps into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if result.train_losses:
        axes.plot(*zip(*result.train_losses, strict=True), label="training", color="tab:blue")
    if result.eval_losses:
        axes.plot(
            *zip(*result.eval_losses, strict=True), "o--", label="held out", color="tab:orange"
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    staged = path.with_name(f".{path.name}.new")
    figure.savefig(staged, dpi=150, format="png")
    plt.close(figure)
    os.replace(staged, path)


def finetune(options: FinetuneOptions) -> tuple[LoraTrainer, TrainingResult]:
    """Fine-tunes a Llama on a JSONL file as the options say.

    Raises:
        ValueError, OSError, ImportError: an option, the data, the model or a checkpoint is faulty.
            What can be checked without the model's weights is checked before they are read, and
            nothing is written before the training begins.
    """
    rows = read_jsonl(options.data)
    eval_rows: list[dict[str, Any]] = []
    if options.val_set_size:
        rows, eval_rows = split_dataset(rows, options.val_set_size, options.seed)
    arguments = options.training_arguments(bool(eval_rows))
    config = options.lora_config()
    checkpoint = find_checkpoint(options)
    if is_adapter_directory(options.model):
        raise ValueError(
            f"model: expected a base model, got the adapter {options.model}; "
            "resume_from_checkpoint goes on with an interrupted training"
        )
    read_llama_config(options.model, options.gguf_file)
    tokenizer = load_tokenizer(options.model, options.gguf_file)
    train_dataset = encode_rows(rows, tokenizer, options)
    eval_dataset = encode_rows(eval_rows, tokenizer, options) if eval_rows else None
    set_seed(options.seed)
    model = LoraLlamaForCausalLM.from_pretrained(
        options.model,
        lora=config,
        gguf_file=options.gguf_file,
        dtype=resolve_dtype(options.dtype, arguments.device),
    ).to(arguments.device)
    if arguments.process_index == 0:
        model.print_trainable_parameters()
        print(f"training on {train_dataset}, held out: {eval_dataset or 'nothing'}")
    trainer = build_trainer(model, tokenizer, arguments, train_dataset, eval_dataset)
    return trainer, train_and_save(trainer, checkpoint)


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
