"""What a training shows of its losses while it runs: a bar, and a plot."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from lora_llama import disk

logger = logging.get_logger(__name__)

Losses = list[tuple[int, float]]


class TrainingBar(ProgressCallback):
    """transformers' progress bar, with the loss, the speed and the peak memory beside it."""

    training_bar: Any
    prediction_bar: Any

    def close(self) -> None:
        """Leaves the bar as it stands, so that nothing of it comes after an error's message."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = None

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        self.training_bar.set_postfix(
            {
                "loss": f"{float(logs['loss']):.3f}",
                "tokens/s": f"{logs['tokens_per_second']:.0f}",
                "peak": f"{logs['peak_memory_gib']:.2f} GiB",
            }
        )


def losses_of(history: Sequence[dict[str, Any]], name: str) -> Losses:
    """The (step, value) pairs that a log has under a name."""
    return [(line["step"], line[name]) for line in history if name in line]


def plot_losses(train_losses: Losses, eval_losses: Losses, path: Path) -> None:
    """Draws training and held-out loss over optimizer steps into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if train_losses:
        axes.plot(*zip(*train_losses, strict=True), label="training", color="tab:blue")
    if eval_losses:
        axes.plot(*zip(*eval_losses, strict=True), "o--", label="held out", color="tab:orange")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    plt.close(figure)
    disk.replace_file(path, image.getvalue())


class LossPlot(TrainerCallback):
    """Draws output_dir/loss.png anew with each checkpoint."""

    def on_save(self, args, state, control, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            history = state.log_history
            path = Path(args.output_dir) / "loss.png"
            try:
                plot_losses(losses_of(history, "loss"), losses_of(history, "eval_loss"), path)
            except OSError as error:
                # The checkpoint is saved; a picture is no reason to stop.
                logger.warning(f"{path} could not be drawn: {error}")
