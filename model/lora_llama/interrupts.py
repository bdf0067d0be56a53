"""Ctrl-C and SIGTERM: the first lets the optimizer step end and a checkpoint be saved.

The second stops at once. (torchrun follows a Ctrl-C, which its processes have received themselves,
with a SIGTERM to each of them, and waits: there a signal of another kind is no second one.)
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """A training was stopped by a signal.

    Attributes:
        checkpoint: the last checkpoint that was saved, or None.
        signal: the signal's number.
    """

    def __init__(self, checkpoint: str | None, number: int = signal.SIGINT) -> None:
        super().__init__(f"saved in {checkpoint}" if checkpoint else "no checkpoint was saved")
        self.checkpoint = checkpoint
        self.signal = number


class StopRequest:
    """Whether a signal has asked a training to stop.

    Attributes:
        signal: the first signal's number, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def _receive(self, number: int, frame: Any) -> None:
        if self.signal is None:
            self.signal = number
            if os.environ.get("RANK", "0") == "0":
                # Not print: the signal may have come inside another print.
                os.write(2, b"\nstopping after this step, with a checkpoint; again stops at once\n")
        elif number == self.signal or "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it is open, the signals come here; the handlers before are then back in place."""
        # Python lets the main thread alone set handlers, and runs them there.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.signal = None
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                # None: a handler that was not set from Python, and cannot be.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


class StopAfterStep(TrainerCallback):
    """Ends the training with a checkpoint, once a step has ended after the request."""

    def __init__(self, request: StopRequest, accelerator: Any) -> None:
        self.request = request
        self.accelerator = accelerator

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        requested = self.request.signal or 0
        if self.accelerator.num_processes > 1:
            # A signal may have come to one process, or to some a step later; all stop together.
            flag = torch.tensor(requested, device=self.accelerator.device)
            requested = int(self.accelerator.gather(flag[None]).max())
            self.request.signal = requested or None
        if requested and state.global_step < state.max_steps:
            # An evaluation that is due now is made up for when the training goes on.
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True
