"""No run hangs in silence: every rank says where it is and, when nothing moves for too long, who is behind.

A thread in every process writes its rank's place (the same sequence of places on every rank) to a file in
``OUTPUT_DIR/.heartbeat`` every few seconds. A rank whose place has not changed for 0.9 of ``train.ddp_timeout``
compares the files, prints one line and raises an alarm, just before torch.distributed would give up without saying
whose fault it is. The alarm lets every other rank say at once what it knows; the stuck one shows its stack. No process
ends before the others have spoken, because the end of one is an error of the network in all. It costs no
communication; to be at a place is one assignment.

Of a training this is everything from the search for a checkpoint to the report; of a single process, for which nobody
waits while it loads the model and counts tokens, the training and its saves.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from llava_pdrop.files import read_json, write_json

DIRECTORY, ALARM = ".heartbeat", "alarm"
STUCK_EXIT = 86
"""Of a process that ends because some rank is stuck."""

SHARE_OF_TIMEOUT = 0.9
LONGEST_INTERVAL = 10.0
"""Seconds between two lines of a heartbeat, at most."""

PATIENCE = 20.0
"""Seconds for which a process may be silent, at least, before it is taken for gone: a busy machine is no fault."""

NAMED = 8
"""Ranks that one line names, at most."""


@dataclass(frozen=True)
class Place:
    """Where a rank is: the ``number``-th place of its way, and which process that is. ``beat`` counts the lines
    written, so that a silent process is seen. Who has ``left`` writes no more: it is done, or has said what it knows
    and ends."""

    rank: int
    number: int
    name: str
    where: str
    beat: int = 0
    left: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.where}), {self.name}"


class Watchdog:
    """Knows this rank's place and looks at those of the others.

    Args:
        directory: ``output_dir``, which all ranks see.
        timeout: seconds without a new place after which the process ends. Those in which it was suspended do not count.
    """

    def __init__(self, directory: Path, rank: int, ranks: int, timeout: float) -> None:
        self.directory = directory / DIRECTORY
        self.ranks, self.timeout = ranks, timeout
        self.interval = min(LONGEST_INTERVAL, timeout / 10)
        self.patience = max(PATIENCE, 3 * self.interval)
        self._place = Place(rank, 0, "starting", f"{socket.gethostname()}, process {os.getpid()}")
        self._limited = True
        self._beat = 0
        self._still = 0.0
        self._began = 0.0  # by the clock of the file system; what is older there is of an earlier run
        self._write_failed = False
        self._stop = threading.Event()

    def at(self, name: str, limited: bool = True) -> None:
        """This rank is now at ``name``. Every rank calls this with the same names in the same order. It may stay there
        for the timeout, or for as long as it takes where that is not ``limited``."""
        self._limited = limited
        self._place = replace(self._place, number=self._place.number + 1, name=name)

    @contextmanager
    def led_by(self, first: bool, name: str) -> Iterator[None]:
        """What one rank, the ``first``, does at ``name`` while the others wait: it is behind them until it is done.
        With a single process nobody waits, and it may take any time."""
        self.at(name, limited=self.ranks > 1)
        if not first:
            self.at(f"the end of {name}")
        yield
        if first:
            self.at(f"the end of {name}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watches as long as it lasts."""
        self._stop.clear()
        self._place = replace(self._place, left=False)
        self.at("starting", limited=self.ranks > 1)
        if self.ranks > 1:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write()
            with suppress(FileNotFoundError):  # a full disk, which `_write` has said
                self._began = self._file().stat().st_mtime
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            if self._alarm() or self._still > self.timeout:  # its traceback would not be shown
                print(f"[rank {self._place.rank}] {type(error).__name__}: {error}", file=sys.stderr)
            self._end(thread)
            if self._alarm():  # most likely the error is that another rank has ended before this one saw the alarm
                self._speak()
            raise  # the files stay: others may still have to say that this rank is gone
        self.at("the end")
        self._end(thread)
        self._place = replace(self._place, left=True)
        self._write()
        others = self._read()
        if len(others) == self.ranks - 1 and all(place.left for place in others):
            shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self, thread: threading.Thread) -> None:
        self._stop.set()
        thread.join()  # for as long as it is speaking, and then the process ends there

    def _watch(self) -> None:
        number, last = self._place.number, time.monotonic()
        self._still = 0.0
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            self._still += min(now - last, 2 * self.interval)
            last = now
            if self._place.number != number or not self._limited:
                number, self._still = self._place.number, 0.0
            self._write()
            if self._still > self.timeout or self._alarm():
                self._speak()

    def _speak(self) -> None:
        """Says who is behind and ends the process; comes back if this rank is going on after all."""
        own = self._place
        before, after = self._listen()
        if self._place.number != own.number and not self._alarm():
            return
        line, own_fault = diagnose(own, before, after, self.ranks)
        print(f"[rank {own.rank}] error: no progress for {self._still:.0f} s, {line}", file=sys.stderr, flush=True)
        if own_fault:
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        if self.ranks > 1:
            self._place = replace(self._place, left=True)
            self._write()
            with suppress(OSError):
                (self.directory / ALARM).touch()
            self._wait_for({place.rank for place in after} - silent_ranks(before, after))
        os._exit(STUCK_EXIT)

    def _listen(self) -> tuple[list[Place], list[Place]]:
        """The places of the other ranks at two times, between which every one has written or patience has ended."""
        before, over = self._read(), time.monotonic() + self.patience
        while True:
            time.sleep(self.interval / 2)
            self._write()
            after = self._read()
            all_there = len(after) == self.ranks - 1 and not silent_ranks(before, after)
            if all_there or time.monotonic() > over:
                return before, after

    def _wait_for(self, ranks: set[int]) -> None:
        """Until all of these have left, or patience has ended."""
        over = time.monotonic() + self.patience
        while ranks - {place.rank for place in self._read() if place.left} and time.monotonic() < over:
            time.sleep(self.interval / 2)
            self._write()

    def _file(self, rank: int | None = None) -> Path:
        return self.directory / f"rank_{self._place.rank if rank is None else rank}.json"

    def _write(self) -> None:
        if self.ranks == 1:
            return
        self._beat += 1
        try:
            write_json(self._file(), replace(self._place, beat=self._beat), indent=None)
        except OSError as error:  # a full disk must not end the thread that watches
            if not self._write_failed:
                print(f"[rank {self._place.rank}] heartbeat not written: {error}", file=sys.stderr)
            self._write_failed = True

    def _read(self) -> list[Place]:
        """The places of the other ranks, as far as they have written one in this run."""
        places = []
        for rank in range(self.ranks):
            with suppress(OSError, ValueError):  # it is being replaced, on a file system that lets one see it
                if rank != self._place.rank and self._file(rank).stat().st_mtime >= self._began:
                    places.append(Place(**read_json(self._file(rank))))
        return places

    def _alarm(self) -> bool:
        with suppress(OSError):
            return self.ranks > 1 and (self.directory / ALARM).stat().st_mtime >= self._began
        return False


def silent_ranks(before: Sequence[Place], after: Sequence[Place]) -> set[int]:
    """Ranks that have neither written between these two times nor left."""
    beats = {place.rank: place.beat for place in before}
    return {place.rank for place in after if not place.left and beats.get(place.rank) == place.beat}


def diagnose(own: Place, before: Sequence[Place], after: Sequence[Place], ranks: int) -> tuple[str, bool]:
    """Who keeps ``own`` waiting: the rest of one line, and whether it may be this rank itself.

    Args:
        before, after: the places of all ranks that wrote one, read at two times.
        ranks: how many there should be.
    """
    silent = silent_ranks(before, after)
    others = [place for place in after if place.rank != own.rank]
    missing = sorted(set(range(ranks)) - {place.rank for place in others} - {own.rank})
    moving = [own, *(place for place in others if place.rank not in silent)]
    front = max(place.number for place in moving)
    behind = [place for place in moving if place.number < front]
    reasons = [f"{place} has not arrived" for place in behind]
    reasons += [f"{place} is silent, its process is gone or stopped" for place in others if place.rank in silent]
    reasons += [f"rank {rank} has ended or never started" for rank in missing]
    if not reasons and ranks == 1:
        reasons = ["this process hangs"]
    elif not reasons:
        reasons = [f"all ranks have come to the same place ({own.name}), so what they do there together hangs"]
    if len(reasons) > NAMED:
        reasons[NAMED:] = [f"and {len(reasons) - NAMED} more"]
    line = f"waiting at {own.name}: {'; '.join(reasons)}. What takes longer needs a larger train.ddp_timeout"
    # A rank ahead that is silent by now may have waited for this one: then its stack is wanted too.
    overtaken = any(place.number > own.number for place in others)
    return line, overtaken or (not behind and not silent and not missing)
