"""What a run writes down about itself: time, tokens and memory of every step, in ``metrics.jsonl``."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from llava_pdrop.errors import UserError
from llava_pdrop.files import write_lines
from llava_pdrop.model.vlm import Output
from llava_pdrop.runtime.clock import TIME_PARTS, Mark, StepClock
from llava_pdrop.runtime.device import peak_memory, reset_peak_memory

METRICS_FILE = "metrics.jsonl"


class StepMeter(TrainerCallback):
    """Sums what happens between two log lines; `drain` hands it over and starts again.

    A step's time is from its first forward to the end of the optimizer step; fetching data is timed apart. On CUDA
    the wall time is taken from events, so that timing makes no step wait for the device. Tokens count as they enter
    the first layer, before any drop, of text and images alike.

    Args:
        clock: measures the parts of a step.
        peak_flops: operations a second that one device can do; None: no MFU is reported.
    """

    def __init__(self, device: torch.device, clock: StepClock | None = None, peak_flops: float | None = None) -> None:
        self.device, self.clock, self.peak_flops = device, clock, peak_flops
        self._began = Mark.now(device)
        self._reset()

    def _reset(self) -> None:
        self.steps, self.samples, self.flops = 0, 0, 0.0
        self.cpu = self.data = 0.0
        self.tokens: list[int] = []  # of every stage, and then the image tokens among them
        self._marks: list[tuple[Mark, Mark]] = []
        self._drained = time.perf_counter()

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Times the fetching of a step's batches."""
        start = time.perf_counter()
        yield
        self.data += time.perf_counter() - start

    def count(self, samples: int, output: Output) -> None:
        """Adds one micro-batch."""
        tokens = [*output.tokens, *output.image_tokens]
        self.samples += samples
        self.tokens = [a + b for a, b in zip(self.tokens, tokens, strict=True)] if self.tokens else tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reset_peak_memory()
        self._reset()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = Mark.now(self.device)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.clock is not None and args.deepspeed_plugin is None:  # DeepSpeed has made its step already
            self.clock.start("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.clock is not None:
            self.clock.stop("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ended = Mark.now(self.device)
        self.cpu += ended.cpu - self._began.cpu
        self.steps += 1
        self._marks.append((self._began, ended))

    def drain(self, total: Callable[[list[float]], list[float]] = list, ranks: int = 1) -> dict[str, float]:
        """The metrics since the last call, per step, per sample or per second.

        Tokens, samples and operations are those of all ranks; seconds of the parts of a step and of fetching are means
        over the ranks, and ``rest_seconds`` is what is left of the time passed: waiting for other ranks, clipping,
        logging, saving.

        Args:
            total: sums a list of numbers over all ranks.
            ranks: how many there are.
        """
        steps = max(1, self.steps)
        if self._marks:
            self._marks[-1][1].reached()
        wall = sum(began.until(ended).seconds for began, ended in self._marks)
        parts = {} if self.clock is None else self.clock.drain()
        times = [self.data, *(parts.get(part, 0.0) for part in TIME_PARTS)]
        flops, all_samples, *sums = total([self.flops, self.samples, *times, *self.tokens])
        data, *seconds = (value / ranks for value in sums[: len(times)])
        tokens = sums[len(times) :]
        stages = len(tokens) // 2
        samples = max(1.0, all_samples)
        passed = max(1e-9, time.perf_counter() - self._drained)
        metrics = {
            "tokens_per_second": (tokens[0] if tokens else 0) / passed,
            "step_seconds": wall / steps,
            "step_cpu_seconds": self.cpu / steps,
            "data_seconds": data / steps,
            "data_wait_share": data / passed,
            "samples": all_samples / steps,
        }
        if self.peak_flops is not None:
            metrics["mfu"] = flops / (passed * self.peak_flops * ranks)
        if self.clock is not None:
            metrics |= {f"{part}_seconds": value / steps for part, value in zip(TIME_PARTS, seconds) if part in parts}
            metrics["rest_seconds"] = max(0.0, passed - data - sum(seconds)) / steps
        metrics |= {f"tokens_{k}": n / samples for k, n in enumerate(tokens[:stages])}
        metrics |= {f"image_tokens_{k}": n / samples for k, n in enumerate(tokens[stages:])}
        metrics |= peak_memory(self.device)
        self._reset()
        return metrics


class MetricsFile(TrainerCallback):
    """Writes every log line of the first rank to ``metrics.jsonl``, whatever else ``report_to`` names. The last step is
    logged whatever ``logging_steps`` is, so that no step is missing in what is summed up."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / METRICS_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        old = step_rows(self.file) if state.global_step else []
        kept = [row for row in old if row["step"] <= state.global_step]
        with writing(self.file):  # in one move: a run that is killed here must not lose what it had
            write_lines(self.file, kept)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            row = {"step": state.global_step, **logs, "time": time.time()}
            with writing(self.file), self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """What keeps a run from writing ``file`` becomes a `UserError` of one line, which ends the run: nothing that it
    should have left is missing without a word, and its checkpoints are as they were."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{file} could not be written: {error.strerror or error}; mend that (make room if the disk is full) and "
            "start the same command again: it goes on from the newest checkpoint"
        ) from error


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that was cut off by a crash is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def step_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` that are about steps; none where the file is gone."""
    return [row for row in read_metrics(file) if "loss" in row] if file.is_file() else []


def steps_of(rows: Sequence[dict[str, Any]]) -> list[int]:
    """How many steps each of all log lines of a run is the mean of: those since the line before
    (``train.logging_steps``, and at the end what is left)."""
    return [step - before for before, step in pairwise([0, *(row["step"] for row in rows)])]


@dataclass(frozen=True)
class Timing:
    """A training run's median step, its first steps left out (where a log line is of several steps, the median of the
    lines, which are means). ``device`` says which time counts: on a GPU the wall time between CUDA events, on a CPU the
    time all cores were busy with it, which other programs hardly touch."""

    wall: float
    cpu: float
    peak_mib: float
    device: str
    steps: int

    @property
    def seconds(self) -> float:
        return self.wall if self.device == "cuda" else self.cpu


def timing_of(file: Path) -> Timing | None:
    """Medians of a ``metrics.jsonl``; a fifth of the steps, at most 10, count as warm-up, and with them the steps that
    share a log line with one of them (``train.logging_steps``), if others are left. None where no step was logged or
    the file is gone."""
    rows = step_rows(file)
    if not rows:
        return None
    steps = rows[-1]["step"]
    warmup = min(10, steps // 5)
    steady = [row for row, count in zip(rows, steps_of(rows)) if row["step"] - count >= warmup] or rows
    cuda = any("peak_cuda_mib" in row for row in rows)
    return Timing(
        wall=statistics.median(row["step_seconds"] for row in steady),
        cpu=statistics.median(row["step_cpu_seconds"] for row in steady),
        peak_mib=max(row["peak_cuda_mib" if cuda else "peak_rss_mib"] for row in rows),
        device="cuda" if cuda else "cpu",
        steps=steps,
    )


# The one line a run shows while it runs.

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
