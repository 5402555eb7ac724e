"""What a run writes down about itself: time, tokens and memory of every step, in ``metrics.jsonl``."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from llava_pdrop.model.vlm import Output
from llava_pdrop.train.clock import PARTS, StepClock

METRICS_FILE = "metrics.jsonl"
MIB = 2**20
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


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
        self._marks: list[tuple[Any, Any]] = []
        self._began: tuple[float, float, Any] = (0.0, 0.0, None)
        self._reset()

    def _reset(self) -> None:
        self.steps, self.samples, self.tokens, self.flops = 0, 0, 0, 0.0
        self.wall = self.cpu = self.data = 0.0
        self.stage_tokens: list[int] = []
        self.image_tokens: list[int] = []
        self._marks = []
        self._drained = time.perf_counter()

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Times the fetching of a step's batches."""
        start = time.perf_counter()
        yield
        self.data += time.perf_counter() - start

    def count(self, samples: int, output: Output) -> None:
        """Adds one micro-batch."""
        self.samples += samples
        self.tokens += output.tokens[0]
        self.stage_tokens = _plus(self.stage_tokens, output.tokens)
        self.image_tokens = _plus(self.image_tokens, output.image_tokens)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reset_peak_memory()
        self._reset()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = (time.perf_counter(), time.process_time(), self._mark())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.clock is not None and args.deepspeed_plugin is None:  # DeepSpeed has made its step already
            self.clock.begins("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.clock is not None:
            self.clock.ends("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wall, cpu, mark = self._began
        self.cpu += time.process_time() - cpu
        self.steps += 1
        if mark is None:
            self.wall += time.perf_counter() - wall
        else:
            self._marks.append((mark, self._mark()))

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
            self._marks[-1][1].synchronize()
            self.wall += sum(start.elapsed_time(stop) for start, stop in self._marks) / 1000
        stages = len(self.image_tokens)
        parts = {} if self.clock is None else self.clock.drain()
        times = [self.data, *(parts.get(part, 0.0) for part in PARTS)]
        sums = total([self.flops, self.samples, self.tokens, *times, *self.stage_tokens, *self.image_tokens])
        flops, all_samples, tokens, *sums = sums
        data, *seconds = (value / ranks for value in sums[: len(times)])
        per_stage = sums[len(times) :]
        samples = max(1.0, all_samples)
        passed = max(1e-9, time.perf_counter() - self._drained)
        metrics = {
            "tokens_per_second": tokens / passed,
            "step_seconds": self.wall / steps,
            "step_cpu_seconds": self.cpu / steps,
            "data_seconds": data / steps,
            "data_wait_share": data / passed,
            "samples": all_samples / steps,
        }
        if self.peak_flops is not None:
            metrics["mfu"] = flops / (passed * self.peak_flops * ranks)
        if self.clock is not None:
            metrics |= {f"{part}_seconds": value / steps for part, value in zip(PARTS, seconds) if part in parts}
            metrics["rest_seconds"] = max(0.0, passed - data - sum(seconds)) / steps
        metrics |= {f"tokens_{k}": n / samples for k, n in enumerate(per_stage[:stages])}
        metrics |= {f"image_tokens_{k}": n / samples for k, n in enumerate(per_stage[stages:])}
        metrics |= peak_memory(self.device)
        self._reset()
        return metrics

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class MetricsFile(TrainerCallback):
    """Writes every log line of the first rank to ``metrics.jsonl``, whatever else ``report_to`` names. The last step is
    logged whatever ``logging_steps`` is, so that no step is missing in what is summed up."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / METRICS_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        old = read_metrics(self.file) if state.global_step and self.file.is_file() else []
        kept = [row for row in old if row["step"] <= state.global_step and "loss" in row]
        aside = self.file.with_suffix(".partial")  # a run that is killed here must not lose what it had
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(aside, self.file)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            row = {"step": state.global_step, **logs, "time": time.time()}
            with writing(self.file), self.file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """What keeps a run from writing ``file`` becomes a `ValueError` of one line, which ends the run: nothing that it
    should have left is missing without a word, and its checkpoints are as they were."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{file} could not be written: {error.strerror or error}; mend that (make room if the disk is full) and "
            "start the same command again: it goes on from the newest checkpoint"
        ) from error


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that was cut off by a crash is left out."""
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def steps_of(rows: Sequence[dict[str, Any]]) -> list[int]:
    """How many steps each of all log lines of a run is the mean of: those since the line before
    (``train.logging_steps``, and at the end what is left)."""
    return [step - before for before, step in pairwise([0, *(row["step"] for row in rows)])]


def reset_peak_memory() -> None:
    """Lets `peak_memory` start from now, where the system can (Linux; not in every container)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        CLEAR_REFS.write_text("5")


def peak_memory(device: torch.device) -> dict[str, float]:
    """Highest memory in MiB since `reset_peak_memory`: resident memory of this process and, where ``device`` is a GPU,
    of CUDA's allocator."""
    peaks = {"peak_rss_mib": _peak_rss() / MIB}
    if device.type == "cuda":
        peaks["peak_cuda_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return peaks


def release_memory() -> None:
    """Gives freed memory back to the system, so that the peak of the next run in this process is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def _peak_rss() -> int:
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _plus(left: list[int], right: list[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)] if left else list(right)
