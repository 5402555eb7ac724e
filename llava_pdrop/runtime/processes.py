"""Processes of this machine: which one is which, whether it still lives, and whether this one's launcher does.

A number alone does not name a process, since the system gives it away again; with the time it was started, in ticks
since the machine was, it does.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from llava_pdrop.world import rank

PROC = Path("/proc")

LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher.launch")
"""Words of the command line by which the program that starts the ranks of a machine is known."""

STARTED_BY = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""Environment variables that these programs, torchrun and DeepSpeed's, set for the ranks they start."""

SECONDS_BETWEEN_LOOKS = 0.5
ORPHANED_EXIT = 87
"""Of a rank whose launcher is gone."""

_watching = threading.Lock()


def machine() -> str:
    """What process numbers mean something on: this host since its last start, and the container in it."""
    boot = container = "?"  # no Linux, or a sandbox
    with suppress(OSError):
        boot = (PROC / "sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    with suppress(OSError):
        container = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {container}"


def started(process: int) -> int | None:
    """When ``process`` was started, in ticks; None where there is none (one that has ended and is not yet collected by
    its parent is none).

    Raises:
        OSError: it is there, but not to be looked at; or this system does not tell.
    """
    try:
        state, *fields = _stat(process)
    except (FileNotFoundError, ProcessLookupError):
        os.stat(PROC / "self" / "stat")  # raises where no process can be looked at
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        raise  # hidden from this user
    return None if state in "ZX" else int(fields[18])


def _stat(process: int) -> list[str]:
    """What the system says of ``process``, from its state on: the name before it may hold anything."""
    text = (PROC / str(process) / "stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


def launcher() -> int | None:
    """The process that started this one as a rank; None where nobody did. A script in between (``torchrun
    --no-python``) is passed over."""
    if not any(name in os.environ for name in STARTED_BY):
        return None
    process = os.getppid()
    while process > 1:
        try:
            words = (PROC / str(process) / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(Path(word).name in LAUNCHERS for word in words):
                return process
            process = int(_stat(process)[1])
        except (OSError, ValueError, IndexError):
            break
    return os.getppid()


def end_with_launcher() -> None:
    """From here on this process ends, at once and without saving, when its launcher is gone: what is killed with
    SIGKILL takes nobody along, and the same command, started again, would find this rank in its way. Called again, or
    where nobody launched it, this does nothing."""
    process = launcher()
    if process is None or not _watching.acquire(blocking=False):
        return
    parent = os.getppid()
    since = None  # then the parent alone tells
    with suppress(OSError):
        since = started(process)

    def lives() -> bool:
        with suppress(OSError):
            return since is None or started(process) == since
        return True

    def watch() -> None:
        while os.getppid() == parent and lives():
            time.sleep(SECONDS_BETWEEN_LOOKS)
        line = f"[rank {rank()}] error: its launcher (process {process}) is gone, so it ends without saving; start the "
        print(f"{line}same command again: it goes on from the newest checkpoint", file=sys.stderr, flush=True)
        os._exit(ORPHANED_EXIT)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
