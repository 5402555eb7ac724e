"""One run at a time writes to an ``output_dir``: its owner's name stands in ``OUTPUT_DIR/.lock``.

The file names host, process and start time, and its owner touches it every `INTERVAL` seconds. Whether an owner lives
is decided on its own machine by the process and its start time; seen from another one it is dead when the file has not
been touched for `DEAD_AFTER` seconds by the clock of the file system. The system's file locks are not asked: network
file systems keep them unreliably, or not at all. What a killed run leaves is taken over.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from llava_pdrop.errors import UserError
from llava_pdrop.runtime.processes import machine, started

LOCK_FILE = ".lock"
INTERVAL = 10.0
DEAD_AFTER = 60.0
ENDING = 3.0
"""Seconds for which a process of this machine is waited for that may just be ending."""

TAKEN_OVER_EXIT = 88
"""Of a run that was taken for dead (it was suspended), and another has its ``output_dir`` by now."""

_held: set[str] = set()

Found = tuple["Owner | None", float, float]
"""A lock as `_read` finds it: its owner, when it was touched last, and how many seconds ago that was."""


class InUse(UserError):
    """Another run writes to this ``output_dir``."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. ``machine`` is what its process number is valid on, ``ticks`` when that process was started,
    ``token`` this very taking of the lock."""

    host: str
    process: int
    since: str
    machine: str = ""
    ticks: int | None = None
    token: str = ""

    @staticmethod
    def me() -> Owner:
        """This process, now."""
        ticks = None
        with suppress(OSError):
            ticks = started(os.getpid())
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return Owner(socket.gethostname(), os.getpid(), now, machine(), ticks, uuid.uuid4().hex)

    def lives(self) -> bool | None:
        """Whether its process does; None where only its heartbeat tells."""
        if self.ticks is None or (self.host, self.machine) != (socket.gethostname(), machine()):
            return None
        if self.process == os.getpid() and self.token not in _held:
            return False  # left by this process, before it became this program
        with suppress(OSError):
            return started(self.process) == self.ticks
        return None


@contextmanager
def owning(directory: Path, name: str, say: Callable[[str], None] = print) -> Iterator[None]:
    """Owns ``directory`` as long as it lasts.

    Args:
        name: begins the message: who asks for it.
        say: is told when it takes a while to see whether another owner lives.

    Raises:
        InUse: somebody else does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file, me, over = directory / LOCK_FILE, Owner.me(), threading.Event()
    _held.add(me.token)
    try:
        while not _taken(file, me):
            _clear_away(file, me, name, say)
        keeper = threading.Thread(target=_keep, args=(file, me, over), name="lock", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()
            if _is(file, me):
                file.unlink(missing_ok=True)
    finally:
        _held.discard(me.token)


def _taken(file: Path, me: Owner) -> bool:
    """Makes the lock, in a way of which every file system lets only one succeed, and with its content at once."""
    aside = file.with_name(f"{file.name}.{me.token}")
    text = json.dumps(asdict(me)) + "\n"
    try:
        aside.write_text(text, encoding="utf-8")
        try:
            os.link(aside, file)
        except FileExistsError:
            return _is(file, me)  # a network file system that asks twice is told that it is there already
        except OSError:  # a file system without links
            try:
                with file.open("x", encoding="utf-8") as lock:
                    lock.write(text)
            except FileExistsError:
                return _is(file, me)
    finally:
        with suppress(OSError):
            aside.unlink()
    return True


def _clear_away(file: Path, me: Owner, name: str, say: Callable[[str], None]) -> None:
    """Comes back when the lock is gone: its owner has left it, or is dead and it was taken away."""
    began, touched, said = time.monotonic(), None, False
    unchanged = began
    while True:
        found = _read(file)
        if found is None:
            return
        owner, changed, age = found
        lives = owner.lives() if owner is not None else None
        beats = touched is not None and changed != touched
        if changed != touched:
            unchanged = time.monotonic()
        if beats or (lives and time.monotonic() - began > ENDING):
            raise InUse(_in_use(name, file, owner))
        if lives is False or (lives is None and max(age, time.monotonic() - unchanged) > DEAD_AFTER):
            return _take_away(file, me, found)
        if lives is None and not said:
            say(f"{name}: {file.parent} was used {age:.0f} s ago{_by(owner)}: looking whether that run still lives")
            said = True
        touched = changed if lives is None else None
        time.sleep(0.2)


def _take_away(file: Path, me: Owner, dead: Found) -> None:
    """Removes the lock that was found ``dead``, if it is still that very one, untouched. Only one start at a time may,
    so that none removes the lock of a faster one: who holds the claim on it, which is a lock like any other. A dead
    claim is taken away in the same way."""
    claim = file.with_name(f"{LOCK_FILE}.{_token(dead) or 'unread'}.claim")
    if not _taken(claim, me):
        other = _read(claim)
        if other is not None and _is_dead(other):
            _take_away(claim, me, other)
        else:
            time.sleep(0.05)
        return
    try:
        found = _read(file)
        if found is not None and found[:2] == dead[:2] and _is(claim, me):
            file.unlink(missing_ok=True)
    finally:
        if _is(claim, me):
            claim.unlink(missing_ok=True)


def _keep(file: Path, me: Owner, over: threading.Event) -> None:
    """Touches the lock until it is ``over``. Ends the process if it is another's by now, or was and nobody's again."""
    beat = time.time()
    while not over.wait(INTERVAL):
        try:
            found = _read(file)
            if found is None and time.time() - beat <= DEAD_AFTER:
                _taken(file, me)
            elif _token(found) == me.token:
                os.utime(file)
            elif not over.is_set():
                where = _in_use("", file, found[0]) if found else f"{file.parent} may have been used by another run"
                line = f"error: {where.removeprefix(': ')}; this one was silent for too long"
                print(f"{line} (suspended?) and ends without saving", file=sys.stderr, flush=True)
                os._exit(TAKEN_OVER_EXIT)
            beat = time.time()
        except OSError:  # a disk that is full or away for a while
            continue


def _read(file: Path) -> Found | None:
    """(owner, when it was touched last, seconds since then by the clock of the file system); None where there is no
    lock. An owner that cannot be read, as it is being written, is None too."""
    try:
        with file.open(encoding="utf-8", errors="replace") as lock:  # opening asks a network file system anew
            changed, text = os.fstat(lock.fileno()).st_mtime, lock.read()
    except FileNotFoundError:
        return None
    owner = None
    with suppress(ValueError, TypeError):
        owner = Owner(**json.loads(text))
    return owner, changed, _now(file.parent) - changed


def _now(directory: Path) -> float:
    probe = directory / f"{LOCK_FILE}.{uuid.uuid4().hex}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return time.time()
    return now


def _is_dead(found: Found) -> bool:
    owner, _, age = found
    lives = owner.lives() if owner is not None else None
    return lives is False or (lives is None and age > DEAD_AFTER)


def _is(file: Path, me: Owner) -> bool:
    return _token(_read(file)) == me.token


def _token(found: Found | None) -> str:
    return "" if found is None or found[0] is None else found[0].token


def _by(owner: Owner | None) -> str:
    return "" if owner is None else f" by process {owner.process} on {owner.host}, running since {owner.since}"


def _in_use(name: str, file: Path, owner: Owner | None) -> str:
    return f"{name}: {file.parent} is in use{_by(owner)}: wait for that run, stop it, or give another output_dir"
