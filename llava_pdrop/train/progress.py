"""The one line a run shows while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

SECONDS_BETWEEN_LINES = 30.0
"""Of a run whose output goes to a file, where a line cannot be overwritten."""

LINE_FORMAT = "step {n_fmt}/{total_fmt}, {remaining} left{postfix}"
"""On a terminal, for tqdm, as in a file: without a bar, which would take the room of the numbers."""


class Line(tqdm):
    """Tqdm's line, which it would let run on into a second one: from the right, numbers fall away until it fits."""

    def __str__(self) -> str:
        return shortened(str(super().__str__()), self.ncols)


class Progress(TrainerCallback):
    """On a terminal one changing line, elsewhere a line every half minute and at the last step; on the first rank."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.text = ""
        self._first_step, self._began, self._printed = 0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first_step, self._began, self._printed = state.global_step, time.perf_counter(), -SECONDS_BETWEEN_LINES
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = Line(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, bar_format=LINE_FORMAT
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        self.text = describe(logs)
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.set_postfix_str(self.text)
        elif now - self._printed >= SECONDS_BETWEEN_LINES or state.global_step >= state.max_steps:
            self._printed = now
            done, left = state.global_step - self._first_step, state.max_steps - state.global_step
            eta = tqdm.format_interval((now - self._began) / max(1, done) * left)
            print(f"step {state.global_step}/{state.max_steps}, {eta} left, {self.text}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def describe(logs: Mapping[str, Any]) -> str:
    """The numbers of a log line as text, as far as they are there, the most important ones first."""
    shown = (("loss", "loss {:.4f}"), ("learning_rate", "lr {:.1e}"), ("tokens_per_second", "{:,.0f} tokens/s"))
    pieces = [text.format(logs[name]) for name, text in shown if name in logs]
    for name, title in (("mfu", "MFU"), ("data_wait_share", "data wait")):
        if name in logs:
            pieces.append(f"{title} {logs[name]:.1%}")
    for name, title in (("peak_cuda_mib", "GPU memory"), ("peak_rss_mib", "memory")):
        if name in logs:
            pieces.append(f"{title} {logs[name] / 1024:.1f} GiB")
            break
    images = stages(logs, "image_tokens")
    if images:
        pieces.append(f"image tokens {'>'.join(f'{count:.0f}' for count in images)}")
    return ", ".join(pieces)


def shortened(line: str, columns: int | None) -> str:
    """``line`` in less than ``columns`` (None: not known, as it is), so that no terminal breaks it: of its pieces, with
    commas between them, as many as fit."""
    if not columns:
        return line
    pieces = line.split(", ")
    while len(pieces) > 1 and len(", ".join(pieces)) >= columns:
        pieces.pop()
    return ", ".join(pieces)[: columns - 1]


def stages(row: Mapping[str, Any], name: str) -> list[float]:
    """``NAME_0``, ``NAME_1``, ... of a log line: before any drop, after the first one, ..."""
    values: list[float] = []
    while f"{name}_{len(values)}" in row:
        values.append(row[f"{name}_{len(values)}"])
    return values
