"""The process that runs stages one after the other. Whatever happens in one is written down before the next begins.

A stage that raises, or runs out of time, costs itself only. One that breaks the CUDA context, or the process, ends this
process; `runner` starts another for the rest.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llava_pdrop.bench.gpu.runner import DONE, say, stage_file
from llava_pdrop.bench.gpu.stages import STAGES, CheckStage, missing
from llava_pdrop.files import write_json
from llava_pdrop.report.environment import environment
from llava_pdrop.runtime.device import release_memory

BROKEN = 75
"""Exit status of a process whose CUDA context no longer works."""

LEAST = 10.0
"""Seconds below which a stage is not begun."""

machine = cache(environment)
"""`report.environment`, asked for once."""


class TimeUp(BaseException):
    """The stage's time is over. No `Exception`: a stage that outlives errors of its parts must not outlive this."""


@dataclass
class Check:
    """What a stage is given, and where it leaves what it finds.

    Attributes:
        name: of the stage.
        work: directory of the whole check.
        device: that is checked; a CPU means a rehearsal, at tiny shapes.
        end: when the stage has to be over, in seconds of `time.time`.
        result: what it found; `put` adds to it and saves it.
    """

    name: str
    work: Path
    device: torch.device
    end: float
    result: dict[str, Any] = field(default_factory=dict)
    status: str = "running"
    error: str | None = None
    began: float = field(default_factory=time.time)

    @property
    def rehearsal(self) -> bool:
        return self.device.type == "cpu"

    @property
    def card(self) -> str | None:
        """Whose memory and modelled time count: the device's own; a rehearsal pretends."""
        return "H100" if self.rehearsal else None

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.time()

    @property
    def benchmarks(self) -> Path:
        """Where JSON, Markdown and pictures go that belong into the repository."""
        return self.work / "playground" / "benchmarks" / "gpu" / self.name

    def log(self, suffix: str) -> Path:
        """A file of this stage for what is not a figure."""
        file = self.work / "logs" / f"{self.name}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    @contextlib.contextmanager
    def printed(self) -> Iterator[None]:
        """What is printed in it goes into a log: the tables of a bench, the progress of a training."""
        with self.log(".log").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            yield

    def put(self, **found: Any) -> None:
        """Adds to the result and saves it: it stays, whatever comes after."""
        self.result |= found
        self.save()

    def note(self, line: str) -> None:
        """A line of the summary."""
        say(self.work, f"{self.name}: {line}")

    def save(self) -> None:
        """Writes the stage's JSON."""
        record = {
            "stage": self.name,
            "status": self.status,
            "error": self.error,
            "missing": missing(STAGES[self.name], self.result, self.rehearsal),
            "seconds": round(time.time() - self.began, 1),
            "environment": machine(self.device, seed=0),
            "result": self.result,
        }
        write_json(stage_file(self.work, self.name), record)


def run_stages(names: list[str], ends: dict[str, float], work: Path, device: torch.device) -> int:
    """Runs ``names`` one after the other; returns 0, or `BROKEN` where the device no longer works.

    Args:
        ends: when each has to be over, in seconds of `time.time`.
    """
    signal.signal(signal.SIGALRM, _time_up)
    for name in names:
        (work / "current").write_text(name, encoding="utf-8")
        check = Check(name, work, device, ends[name])
        if check.left < LEAST:
            check.status, check.error = "not run", f"less than {LEAST:g} s were left: give more --seconds"
            check.save()
            continue
        check.save()
        run_stage(STAGES[name], check)
        check.note(f"{check.status} in {time.time() - check.began:.0f} s" + (f": {check.error}" if check.error else ""))
        if not works(device):
            check.note("the device no longer works in this process")
            return BROKEN
    (work / "current").write_text(DONE, encoding="utf-8")
    return 0


def run_stage(stage: CheckStage, check: Check) -> None:
    """One stage, to its end, its error or the end of its time."""
    try:
        signal.setitimer(signal.ITIMER_REAL, check.left)
        stage.load()(check)
        check.status = "done"
    except TimeUp:
        check.status, check.error = "out of time", f"not finished after {time.time() - check.began:.0f} s"
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, the next stage must run
        check.status, check.error = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        check.log("-error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    check.save()
    if works(check.device):
        release_memory()


def works(device: torch.device) -> bool:
    """Whether the device still computes. An illegal access in one kernel makes every later call fail."""
    try:
        return torch.ones(8, device=device).sum().item() == 8
    except RuntimeError as error:
        print(f"{device}: {error}", file=sys.stderr)
        return False


def _time_up(*_: Any) -> None:
    raise TimeUp
