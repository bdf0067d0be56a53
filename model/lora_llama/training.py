"""Fine-tuning through transformers' Trainer: checks, adapters in its checkpoints, records.

    options -> model + data -> LoraTrainer.train() -> output_dir:
        adapter_config.json, adapter_model.safetensors   the adapter, in PEFT's format
        checkpoint-N/                                    to resume from
        loss.png, metrics.json                           what happened

The loss is the cross-entropy over every unmasked position of every sequence, averaged over all of
an optimizer step's tokens: gradient accumulation over unequal lengths is exact.
"""

import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, Trainer, TrainingArguments, set_seed
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lora_llama.batching import (
    Collator,
    SupervisedDataset,
    encode_located,
    load_dataset,
    padding_id,
)
from lora_llama.data import (
    IGNORE_INDEX,
    Row,
    check_token_ids,
    read_located,
    split_dataset,
)
from lora_llama.gradients import (
    GradientNorms,
    capture_lora_weights,
    unchanged_weights,
    verify_gradients,
)
from lora_llama.loading import (
    check_writable,
    is_adapter_directory,
    load_tokenizer,
    read_llama_config,
    write_json,
)
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import FinetuneOptions, resolve_dtype
from lora_llama.resuming import check_checkpoint, find_checkpoint, load_checkpoint, read_state


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
            state = read_state(resume_from_checkpoint)
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
        load_checkpoint(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def mean_loss(prediction: Any) -> dict[str, float]:
    """The loss over all held-out tokens, from what `LoraTrainer.prediction_step` returns."""
    return {"loss": float(prediction.predictions.sum() / prediction.label_ids.sum())}


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: FinetuneOptions
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
    located = list(read_located(options.data))
    held_out: list[tuple[str, Row]] = []
    if options.val_set_size:
        located, held_out = split_dataset(located, options.val_set_size, options.seed)
    arguments = options.training_arguments(bool(held_out))
    config = options.lora_config()
    checkpoint = find_checkpoint(options)
    if checkpoint is not None:
        check_checkpoint(checkpoint, {"default": config})
    check_writable("output_dir", options.output_dir)
    if is_adapter_directory(options.model):
        raise ValueError(
            f"model: expected a base model, got the adapter {options.model}; "
            "resume_from_checkpoint goes on with an interrupted training"
        )
    # A hub's weights are downloaded after the data has been read.
    content = read_llama_config(
        options.model, options.gguf_file, check_weights=os.path.isdir(options.model)
    )
    tokenizer = load_tokenizer(options.model, options.gguf_file)

    def encode(part: Iterable[tuple[str, Row]]) -> SupervisedDataset:
        dataset = encode_located(
            options.data, part, tokenizer, options.max_length, options.train_on_inputs,
            options.packing,
        )  # fmt: skip
        tokens = [item["input_ids"] for item in dataset.items]
        tokens.append(torch.tensor([padding_id(tokenizer)]))
        check_token_ids(tokens, content.get("vocab_size", LlamaConfig.vocab_size))
        return dataset

    train_dataset = encode(located)
    eval_dataset = encode(held_out) if held_out else None
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
    if checkpoint is not None:
        # Trainer reads it again, but makes the output directory first.
        load_checkpoint(model, checkpoint)
    trainer = build_trainer(model, tokenizer, arguments, train_dataset, eval_dataset)
    return trainer, train_and_save(trainer, checkpoint)
