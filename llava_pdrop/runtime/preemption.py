"""Being told to stop: SIGTERM or SIGUSR1 let the step end, save, and leave with an exit code of their own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from llava_pdrop.files import write_json

PREEMPTED_EXIT = 85
"""Of a run that was told to stop and saved: start the same command again and it goes on. (torchrun ends with 1 whatever
its workers end with, so the same is written to `NOTE_FILE`.)"""

NOTE_FILE = "preempted.json"
"""In ``output_dir`` from such an end to the next start: ``step`` and ``signal``."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def outlive_signals(worker: int) -> None:
    """For data workers: what is sent to all processes of a job must not end those that the last step still needs. (A
    second SIGTERM does: so the main process ends a worker that does not answer.)"""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL) and None)


class Preempted(SystemExit):
    """The run was told to stop and has saved. Ends the program with `PREEMPTED_EXIT`."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED_EXIT)


class Preemption(TrainerCallback):
    """Listens for `SIGNALS` and stops the Trainer behind a step, once all ranks know.

    Attributes:
        received: name of the signal that this process got.
        agreed: whether any rank got one, as of this step; set by `trainer.StepGuard`, equal on all ranks.
    """

    def __init__(self, directory: Path) -> None:
        self.note = directory / NOTE_FILE
        self.received: str | None = None
        self.agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over as long as it lasts; outside the main thread, where Python allows no handlers, not."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.note.unlink(missing_ok=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed and state.is_world_process_zero and state.global_step < state.max_steps:
            note = {"step": state.global_step, "signal": self.received or "another rank's"}
            write_json(self.note, note, indent=None)
