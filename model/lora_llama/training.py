"""Fine-tuning from options to files: data, model, trainer, adapter, records.

    options -> model + data -> LoraTrainer.train() -> output_dir:
        adapter_config.json, adapter_model.safetensors   the adapter, in PEFT's format
        checkpoint-N/                                    to resume from
        loss.png, metrics.json                           what happened
        samples.jsonl                                    answers to held-out prompts, if asked for

The loss is the cross-entropy over every unmasked position of every sequence, averaged over all of
an optimizer step's tokens: gradient accumulation over unequal lengths is exact.
"""

import json
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, TrainerCallback, TrainingArguments, set_seed
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_llama import disk
from lora_llama.batching import (
    Collator,
    SupervisedDataset,
    encode_located,
    load_dataset,
    padding_id,
)
from lora_llama.data import Row, check_token_ids, read_located, split_dataset
from lora_llama.gradients import GradientNorms, capture_lora_weights, unchanged_weights
from lora_llama.interrupts import FINISHED, TrainingInterrupted
from lora_llama.loading import (
    check_writable,
    is_adapter_directory,
    load_tokenizer,
    read_llama_config,
)
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import FinetuneOptions, resolve_dtype
from lora_llama.resuming import (
    check_checkpoint,
    check_training,
    find_checkpoint,
    load_checkpoint,
    read_state,
    training_record,
)
from lora_llama.samples import EvalSamples
from lora_llama.throughput import peak_memory_bytes
from lora_llama.trainer import LoraTrainer
from lora_llama.watching import LossPlot, losses_of, plot_losses


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
    trainer = LoraTrainer(
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
    trainer.add_callback(LossPlot())
    return trainer


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
        mfu: model FLOP/s utilisation (`throughput.py`); None on a CPU or an unknown GPU.
        log: every line of the log, with its step: loss, eval_loss, learning_rate, grad_norm,
            tokens_per_second, peak_memory_gib and mfu.
    """

    steps: int
    train_losses: list[tuple[int, float]]
    eval_losses: list[tuple[int, float]]
    tokens_per_second: float
    peak_memory_gib: float
    seconds: float
    gradients: list[GradientNorms]
    mfu: float | None = None
    log: list[dict[str, Any]] = field(default_factory=list)


def train_and_save(
    trainer: LoraTrainer, resume_from_checkpoint: str | None = None
) -> TrainingResult:
    """Trains, saves the adapter and tokenizer, evaluates, and writes metrics.json and loss.png.

    Raises:
        GradientError: the first step's gradients are wrong.
        DivergenceError: the loss or a gradient is not finite, or the loss has exploded.
        TrainingInterrupted: by Ctrl-C or SIGTERM; a checkpoint is saved, but at the second signal.
            After the last step the adapter is saved in any case, and the first signal stops
            nothing.
        ValueError: the checkpoint does not fit, or an adapter weight has not moved (all is saved by
            then).
        OSError: a checkpoint, or the adapter, cannot be written.
    """
    start = time.perf_counter()
    before = capture_lora_weights(trainer.model)
    # Not trainer.evaluate(): a model that Trainer has evaluated is not made distributed any more.
    trainer.args.eval_on_start = _evaluates_on_start(trainer, resume_from_checkpoint)
    last_step = SaveLastStep(trainer)
    trainer.add_callback(last_step)
    request = trainer.stop_request
    try:
        with request.listening():
            trainer.train(resume_from_checkpoint=resume_from_checkpoint)
            if request.stopped:
                raise KeyboardInterrupt
            if not last_step.saved or trainer.args.load_best_model_at_end:
                last_step.save()
            result = _write_records(trainer, start)
    except KeyboardInterrupt:
        raise TrainingInterrupted(
            trainer.last_checkpoint,
            request.signal or signal.SIGINT,
            trainer.args.output_dir if last_step.saved else None,
        ) from None
    finally:
        trainer.remove_callback(last_step)
        trainer.close_bar()
    _check_moved(trainer, before)
    return result


class SaveLastStep(TrainerCallback):
    """Saves the adapter right after the last step, before what takes long.

    Attributes:
        saved: whether it is saved.
    """

    def __init__(self, trainer: LoraTrainer) -> None:
        self.trainer = trainer
        self.saved = False

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            self.save()

    def save(self) -> None:
        request = self.trainer.stop_request
        with request.held():
            self.trainer.save_adapter()
            self.saved = True
            request.outcome = FINISHED


def _write_records(trainer: LoraTrainer, start: float) -> TrainingResult:
    """The last evaluation, metrics.json and loss.png."""
    history, steps = trainer.state.log_history, trainer.state.global_step
    eval_losses = losses_of(history, "eval_loss")
    if trainer.eval_dataset is not None and steps not in dict(eval_losses):
        eval_losses.append((steps, trainer.evaluate()["eval_loss"]))
    result = TrainingResult(
        steps=steps,
        train_losses=losses_of(history, "loss"),
        eval_losses=eval_losses,
        tokens_per_second=trainer.tokens_per_second(),
        peak_memory_gib=peak_memory_bytes(trainer.args.device) / 2**30,
        seconds=time.perf_counter() - start,
        gradients=trainer.first_gradients or [],
        mfu=trainer.utilisation(),
        log=history,
    )
    if trainer.is_world_process_zero():
        directory = Path(trainer.args.output_dir)
        content = json.dumps(asdict(result), indent=2)
        disk.replace_file(directory / "metrics.json", f"{content}\n".encode())
        plot_losses(result.train_losses, result.eval_losses, directory / "loss.png")
    return result


def _evaluates_on_start(trainer: LoraTrainer, checkpoint: str | None) -> bool:
    """A new training does; a resumed one does where an interrupt left an evaluation out."""
    if trainer.eval_dataset is None or checkpoint is None:
        return trainer.eval_dataset is not None
    state, interval = read_state(checkpoint), trainer.args.eval_steps
    return (
        trainer.args.eval_strategy == "steps"
        and state.global_step % interval == 0
        and state.global_step not in dict(losses_of(state.log_history, "eval_loss"))
    )


def _check_moved(trainer: LoraTrainer, before: dict[str, torch.Tensor]) -> None:
    """Raises ValueError naming the trained weights that are what they were."""
    steps = trainer.moving_steps
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    still = [
        name
        for name in unchanged_weights(before, capture_lora_weights(trainer.model))
        # The first step leaves A where it is: while B is 0, A's gradient is.
        if name in trained and steps >= (2 if ".lora_A." in name else 1)
    ]
    if still:
        raise ValueError("adapter weights have not moved: " + ", ".join(still))


def finetune(options: FinetuneOptions) -> tuple[LoraTrainer, TrainingResult]:
    """Fine-tunes a Llama on a JSONL file as the options say.

    Raises:
        ValueError, OSError, ImportError: an option, the data, the model or a checkpoint is faulty.
            What can be checked without the model's weights is checked before they are read, and
            nothing is written before the training begins.
    """
    config = options.lora_config()
    located = list(read_located(options.data))
    held_out: list[tuple[str, Row]] = []
    if options.val_set_size:
        located, held_out = split_dataset(located, options.val_set_size, options.seed)
    arguments = options.training_arguments(bool(held_out))
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

    samples = []
    if options.eval_samples:
        rows = [row for _, row in held_out]
        samples = [EvalSamples(rows, tokenizer, options.eval_samples, options.max_length)]
    train_dataset = encode(located)
    if checkpoint is not None:
        check_training(checkpoint, {"default": config}, training_record(arguments, train_dataset))
    eval_dataset = encode(held_out) if held_out else None
    set_seed(options.seed)
    model = LoraLlamaForCausalLM.from_pretrained(
        options.model,
        lora=config,
        gguf_file=options.gguf_file,
        dtype=resolve_dtype(options.dtype, arguments.device),
    )
    if arguments.process_index == 0:
        model.print_trainable_parameters()
        print(f"training on {train_dataset}, held out: {eval_dataset or 'nothing'}")
    # Trainer moves it to its device: a model to be sharded may be larger than one GPU.
    if checkpoint is not None:
        # Trainer reads it again, but makes the output directory first.
        load_checkpoint(model, checkpoint)
    trainer = build_trainer(model, tokenizer, arguments, train_dataset, eval_dataset)
    for callback in samples:
        trainer.add_callback(callback)
    return trainer, train_and_save(trainer, checkpoint)
