"""Ctrl-C and SIGTERM: the first lets the optimizer step end and a checkpoint be saved.

The second stops at once. After the last step the adapter is saved whatever comes; of what follows,
the last evaluation and metrics.json, the second signal alone takes something away.

Of several processes one may learn of a signal from the others before it comes to itself, and a
launcher may forward what its processes have had already: there a signal that comes within a second
of the first is the first once more.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 1.0

STOPS = "stopping after this step, with a checkpoint"
LAST_STEP = "this is the last step, and the adapter is saved after it"
FINISHED = "the training is finished and its adapter saved; metrics.json follows"
TORCHRUN = (
    "torchrun kills what still runs 30 s after Ctrl-C, where its --shutdown-timeout or "
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT say nothing else"
)


class TrainingInterrupted(KeyboardInterrupt):
    """A training was stopped by a signal.

    Attributes:
        checkpoint: the last checkpoint that was saved, or None.
        signal: the signal's number.
        adapter: where the adapter is, of a training that had made its last step; else None.
    """

    def __init__(
        self, checkpoint: str | None, number: int = signal.SIGINT, adapter: str | None = None
    ) -> None:
        message = f"saved in {checkpoint}" if checkpoint else "no checkpoint was saved"
        if adapter is not None:
            message = f"the training was finished, and its adapter is saved in {adapter}"
        super().__init__(message)
        self.checkpoint = checkpoint
        self.signal = number
        self.adapter = adapter


class StopRequest:
    """Whether a signal has asked a training to stop.

    Attributes:
        signal: the first signal's number, or None.
        outcome: what the first signal leads to, as it is told to the user.
        stopped: whether the training was ended because of it, before its last step.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.signal: int | None = None
        self.outcome = STOPS
        self.stopped = False
        self._accepted = 0.0
        self._holds = self._held = False

    def accept(self, number: int) -> None:
        """Takes a signal, of this or of another process, for the first."""
        self.signal, self._accepted = number, time.monotonic()

    def _receive(self, number: int, frame: Any) -> None:
        if self.signal is None:
            self.accept(number)
            if os.environ.get("RANK", "0") == "0":
                text = f"\n{self.outcome}; again stops at once\n"
                if "TORCHELASTIC_RUN_ID" in os.environ:
                    text += f"{TORCHRUN}\n"
                # Not print: the signal may have come inside another print.
                os.write(2, text.encode())
        elif "RANK" in os.environ and time.monotonic() < self._accepted + ECHO_SECONDS:
            pass
        elif self._holds:
            self._held = True
        else:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """While it is open nothing stops; a second signal does at its end."""
        self._holds = True
        try:
            yield
        finally:
            self._holds = False
        if self._held:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it is open, the signals come here; the handlers before are then back in place."""
        # Python lets the main thread alone set handlers, and runs them there.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._reset()
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

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        if state.global_step + 1 >= state.max_steps:
            self.request.outcome = LAST_STEP

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        requested = self.request.signal or 0
        if self.accelerator.num_processes > 1:
            # A signal may have come to one process, or to some a step later; all stop together.
            flag = torch.tensor(requested, device=self.accelerator.device)
            requested = int(self.accelerator.gather(flag[None]).max())
            if requested and self.request.signal is None:
                self.request.accept(requested)
        if requested and state.global_step < state.max_steps:
            # An evaluation that is due now is made up for when the training goes on.
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True
            self.request.stopped = True
        elif state.global_step + 1 >= state.max_steps:
            self.request.outcome = LAST_STEP
