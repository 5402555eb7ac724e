"""No run hangs in silence: every rank says where it is and, when nothing moves for too long, who is behind.

A thread in every process writes its rank's place (the same sequence of places on every rank) to a file in
``OUTPUT_DIR/.heartbeat`` every few seconds. A rank whose place has not changed for 0.9 of ``train.ddp_timeout``
compares the files, prints one line and ends the process, just before torch.distributed would give up without saying
whose fault it is. It costs no communication; to be at a place is one assignment.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

DIRECTORY = ".heartbeat"
EXIT_CODE = 86
"""Of a process that ends because some rank is stuck."""

SHARE_OF_TIMEOUT = 0.9
LONGEST_INTERVAL = 10.0
"""Seconds between two lines of a heartbeat, at most."""


@dataclass(frozen=True)
class Place:
    """Where a rank is: the ``number``-th place of its way, reached at ``since`` (its own clock, seconds), and which
    process that is. ``beat`` counts the lines written, so that a silent process is seen."""

    rank: int
    number: int
    name: str
    since: float
    where: str
    beat: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.where}), {self.name}"


class Watchdog:
    """Knows this rank's place and looks at those of the others.

    Args:
        directory: ``output_dir``, which all ranks see.
        timeout: seconds without a new place after which the process ends; in a run of one process it never does.
    """

    def __init__(self, directory: Path, rank: int, ranks: int, timeout: float) -> None:
        self.directory = directory / DIRECTORY
        self.ranks, self.timeout = ranks, timeout
        self.interval = min(LONGEST_INTERVAL, timeout / 10)
        self._place = Place(rank, 0, "starting", time.time(), f"{socket.gethostname()}, process {os.getpid()}")
        self._beat = 0
        self._stop = threading.Event()

    def at(self, name: str) -> None:
        """This rank is now at ``name``. Every rank calls this with the same names in the same order."""
        self._place = replace(self._place, number=self._place.number + 1, name=name, since=time.time())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watches as long as it lasts."""
        if self.ranks == 1:
            yield
            return
        self._stop.clear()
        self.at("starting")
        self.directory.mkdir(parents=True, exist_ok=True)
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
        if self._place.rank == 0:  # not after an error: others may still have to say that this rank is gone
            shutil.rmtree(self.directory, ignore_errors=True)

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._write()
            if time.time() - self._place.since > self.timeout:
                before = self._read()
                self._stop.wait(2 * self.interval)
                self._write()
                after = self._read()
                if self._stop.is_set() or time.time() - self._place.since <= self.timeout:
                    continue
                line, own_fault = diagnose(self._place, before, after, self.ranks)
                print(f"[rank {self._place.rank}] error: {line}", file=sys.stderr, flush=True)
                if own_fault:
                    faulthandler.dump_traceback(sys.__stderr__ or 2)
                self._stop.wait(2 * self.interval)  # lets the others read this rank's place and speak too
                os._exit(EXIT_CODE)

    def _write(self) -> None:
        self._beat += 1
        file = self.directory / f"rank_{self._place.rank}.json"
        aside = file.with_suffix(".partial")
        try:
            aside.write_text(json.dumps(asdict(replace(self._place, beat=self._beat))))
            os.replace(aside, file)
        except FileNotFoundError:
            return  # the first rank has finished and tidied up
        except OSError as error:  # a full disk must not end the thread that watches
            print(f"[rank {self._place.rank}] heartbeat not written: {error}", file=sys.stderr)

    def _read(self) -> list[Place]:
        return [Place(**json.loads(file.read_text())) for file in sorted(self.directory.glob("rank_*.json"))]


def diagnose(own: Place, before: Sequence[Place], after: Sequence[Place], ranks: int) -> tuple[str, bool]:
    """Who keeps ``own`` waiting: one line, and whether it may be this rank itself.

    Args:
        before, after: the places of all ranks that wrote one, read at two times. Files of an earlier run in the same
            directory are silent ranks.
        ranks: how many there should be.
    """
    now = time.time()
    beats = {place.rank: place.beat for place in before}
    others = [place for place in after if place.rank != own.rank]
    silent = [place for place in others if beats.get(place.rank) == place.beat]
    missing = sorted(set(range(ranks)) - {place.rank for place in others} - {own.rank})
    moving = [own, *(place for place in others if place not in silent)]
    front = max(place.number for place in moving)
    behind = [place for place in moving if place.number < front]
    reasons = [f"{place} has not arrived" for place in behind]
    reasons += [f"{place} is silent, its process is gone or stopped" for place in silent]
    reasons += [f"rank {rank} has ended or never started" for rank in missing]
    if not reasons:
        reasons = [f"all ranks have come to the same place ({own.name}), so what they do there together hangs"]
    line = (
        f"no progress for {now - own.since:.0f} s, waiting at {own.name}: {'; '.join(reasons)}. Longer steps or saves "
        "than this need a larger train.ddp_timeout"
    )
    # A rank ahead that is silent by now has given up waiting, perhaps for this one: then its stack is wanted too.
    overtaken = any(place.number > own.number for place in others)
    return line, overtaken or (not behind and not silent and not missing)
