"""transformers' Trainer for a LoraLlama: what it checks and logs.

    a step      forward and backward of each batch -> loss and gradients are finite, and sane
                -> the optimizer -> the log
    a save      the new weights are tried on the last batch -> `checkpointing.py`

An evaluation draws nothing from the generators that the training draws from.
"""

import math
import time
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lora_kernels.sharding import is_sharded, reshard
from lora_llama import training_state
from lora_llama.checkpointing import CheckpointingTrainer
from lora_llama.data import IGNORE_INDEX
from lora_llama.divergence import (
    DivergenceError,
    first_nonfinite,
    gradient_fault,
    nonfinite_parameter,
)
from lora_llama.gradients import GradientNorms, verify_gradients
from lora_llama.interrupts import StopAfterStep, StopRequest
from lora_llama.throughput import FlopCount, peak_flops, peak_memory_bytes
from lora_llama.watching import TrainingBar


class LoraTrainer(CheckpointingTrainer):
    """transformers' Trainer for a LoraLlama.

    Attributes:
        first_gradients: the norms of the first optimizer step's gradients, before clipping.
        moving_steps: optimizer steps with a learning rate above zero; a warm-up begins with zero.
        tokens_trained: tokens that went forward and backward in this process (padding only of
            packed sequences).
        seconds_trained: time spent in forward and backward.
        flops_trained: what these took; see `throughput.py`.
        stop_request: a signal's request to stop.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_metrics=mean_loss, **kwargs)
        self.first_gradients: list[GradientNorms] | None = None
        self.moving_steps = 0
        self.tokens_trained = 0
        self.seconds_trained = 0.0
        self.flops_trained = 0
        self.stop_request = StopRequest()
        self._flop_count = FlopCount.of(self.model)
        self._peak_flops = peak_flops(self.args.device, self.model.dtype)
        self._logged = (0, 0.0, 0)
        self._last_batch: dict[str, Any] = {}
        self._fault: str | None = None
        self._bar: TrainingBar | None = None
        shows_bar = self.pop_callback(ProgressCallback) is not None
        self.pop_callback(PrinterCallback)
        if shows_bar:
            self._bar = TrainingBar()
            self.add_callback(self._bar)
        self.add_callback(StopAfterStep(self.stop_request, self.accelerator))

    def tokens_per_second(self) -> float:
        """Over the whole training, of all processes (all of them call this)."""
        tokens = self._sum_over_processes([self.tokens_trained])[0]
        return tokens / self.seconds_trained if self.seconds_trained else 0.0

    def _sum_over_processes(self, numbers: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return numbers
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(mine, "sum").tolist()

    def utilisation(self) -> float | None:
        """Model FLOP/s utilisation over the whole training; None where the peak is not known."""
        if self._peak_flops is None or not self.seconds_trained:
            return None
        return self.flops_trained / self.seconds_trained / self._peak_flops

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        try:
            super().train(resume_from_checkpoint)
        finally:
            self.close_bar()

    def close_bar(self) -> None:
        """Leaves the progress bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    # One forward and backward pass.

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        tokens, flops = self._flop_count.of_batch(inputs)
        self._last_batch = inputs
        start = time.perf_counter()
        loss = super().training_step(model, inputs, *args, **kwargs)
        if loss.is_cuda:
            torch.cuda.synchronize(loss.device)
        self.seconds_trained += time.perf_counter() - start
        self.tokens_trained += tokens
        self.flops_trained += flops
        # The last forward pass before an optimizer step: the gradients are complete.
        complete = self.accelerator.sync_gradients
        fault = self.loss_watch.fault(loss.item(), complete)
        if fault is not None:
            fault += self._origin(loss.item())
        # A gradient scaler takes care of its overflows itself.
        elif getattr(self.accelerator, "scaler", None) is None:
            fault = gradient_fault(self.model)
        self._stop_if(fault, 1, agrees=complete)
        if complete:
            if self.first_gradients is None:
                self.first_gradients = verify_gradients(self.model)
            self.moving_steps += self._get_learning_rate() > 0
        return loss

    def _forward(self) -> torch.Tensor:
        """The mean loss of the last batch, by the weights as they are now."""
        self.model.train()
        with torch.no_grad(), self.compute_loss_context_manager():
            batch = self._prepare_inputs(dict(self._last_batch))
            loss = self.compute_loss(self.model, batch)
        reshard(self.model)
        return loss

    def prove_weights(self) -> None:
        """Checks the weights by their loss on the last batch, before they are saved.

        Raises:
            DivergenceError: it is not finite, or has exploded.
        """
        if self._last_batch:
            with training_state.preserved_rng():
                loss = self._forward().item()
                fault = self.loss_watch.judge(loss)
                self._stop_if(fault and fault + self._origin(loss), 0)

    def save_adapter(self) -> None:
        """Writes the adapter and tokenizer into output_dir; every process calls this.

        Raises:
            DivergenceError: the weights are no good; nothing is written.
            OSError: they cannot be written; in every process.
        """
        self.prove_weights()
        failure = None
        try:
            self.save_model()
        except OSError as error:
            failure = error
        if self._any_process(failure is not None):
            raise failure or OSError(
                f"{self.args.output_dir}: the adapter could not be saved: another process says why"
            )

    def _origin(self, loss: float) -> str:
        # Of a sharded model all processes look together, in `_stop_if`.
        if math.isfinite(loss) or is_sharded(self.model):
            return ""
        return f"; NaN or Inf begins in {first_nonfinite(self.model, self._forward)}"

    def _stop_if(self, fault: str | None, steps: int, agrees: bool = True) -> None:
        """Raises DivergenceError for a fault: in all processes, where one of several has it.

        Args:
            steps: how many steps after the last one that is complete.
            agrees: whether all processes are here; where they are not, the fault is kept.
        """
        self._fault = self._fault or fault
        if not agrees and self.accelerator.num_processes > 1:
            return
        fault, self._fault = self._fault, None
        if not self._any_process(fault is not None):
            return
        fault = fault or "another process says where"
        if is_sharded(self.model):
            reshard(self.model)
            name = nonfinite_parameter(self.model)
            if name is not None:
                fault += f"; NaN or Inf begins in the parameter {name}"
        saved = "no checkpoint was saved"
        if self.last_checkpoint is not None:
            saved = f"the last good checkpoint is {self.last_checkpoint}"
        advice = f"lower learning_rate (now {self.args.learning_rate:g})"
        if not self.state.global_step:
            advice = (
                "no optimizer step was made: it is not learning_rate, but the model or the data"
            )
        raise DivergenceError(
            f"the training diverged at step {self.state.global_step + steps}: "
            f"{fault}; {saved}; {advice}"
        )

    # The log, and evaluation.

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._speed())
        super().log(logs, *args, **kwargs)
        if not math.isfinite(logs.get("eval_loss", 0.0)):
            # All processes have the same one.
            self._stop_if(f"the held-out loss is {logs['eval_loss']}", 0)

    def _speed(self) -> dict[str, float]:
        """Since the last line of the log."""
        now = (self.tokens_trained, self.seconds_trained, self.flops_trained)
        tokens, seconds, flops = (a - b for a, b in zip(now, self._logged, strict=True))
        self._logged = now
        count = self.accelerator.num_processes
        tokens, flops = self._sum_over_processes([tokens, flops])
        speed = {
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "peak_memory_gib": peak_memory_bytes(self.args.device) / 2**30,
        }
        if self._peak_flops is not None and seconds:
            speed["mfu"] = flops / seconds / count / self._peak_flops
        return speed

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with training_state.preserved_rng():
            metrics = super().evaluate(*args, **kwargs)
        reshard(self.model)
        return metrics

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        """Each row's summed loss and number of trained tokens, for `mean_loss`.

        Trainer's own evaluation averages the means of batches, whose tokens differ in number.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            losses = model(**inputs, loss_per_row=True).loss
        return None, losses, (inputs["labels"][:, 1:] != IGNORE_INDEX).sum(1)


def mean_loss(prediction: Any) -> dict[str, float]:
    """The loss over all held-out tokens, from what `LoraTrainer.prediction_step` returns."""
    return {"loss": float(prediction.predictions.sum() / prediction.label_ids.sum())}
