"""What a report says of where and how it was made, and where its files go."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llava_pdrop.errors import UserError
from llava_pdrop.report.page import Table

COMMIT = "LLAVA_PDROP_COMMIT"
"""Environment variable that names the commit of a copy without its history."""

COMMAND = "LLAVA_PDROP_COMMAND"
"""Environment variable that names the command line, in a process that another one of this project has started."""


def environment(device: Any, seed: int) -> dict[str, Any]:
    """Everything needed to run a bench again: device, versions, commit, date, command line and seed."""
    import torch  # not at the top: who only asks where files may go needs none

    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "device_type": device.type,
        "driver": driver() if cuda else None,
        "device_count": torch.cuda.device_count() if cuda else os.cpu_count(),
        "device_memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1) if cuda else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
        "flash_attn": package_version("flash-attn"),
        "cuda": torch.version.cuda,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": os.environ.get(COMMAND) or " ".join(["llava-pdrop", *sys.argv[1:]]),
        "seed": seed,
    }


def settings(made: Mapping[str, Any], **others: str) -> Table:
    """An `environment` and the ``others`` for people."""
    memory = made["device_memory_gib"]
    size = f"{made['device_count']} cores, {made['threads']} used" if memory is None else f"{memory} GiB"
    versions = f"torch {made['torch']}, CUDA {made['cuda'] or 'none'}, transformers {made['transformers']}, Python "
    rows = {
        "device": f"{made['device']}, {size}",
        "versions": versions + made["python"],
        "commit": str(made["commit"]),
        "date": made["date"],
        "command": f"`{made['command']}`",
        "seed": str(made["seed"]),
    }
    return Table(["setting", ""], list((rows | others).items()), left=2)


def check_out(directory: Path) -> None:
    """Makes ``directory``, or says before the first measurement that its files could not be written.

    Raises:
        UserError: it or what it lies in is a file, or cannot be written to.
    """
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {directory}: {path} is a file: name a directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"--out {directory}: {error.strerror}: name a directory that can be written to") from None


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def driver() -> str | None:
    """The version of NVIDIA's driver; None where its tool is not there to tell."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def commit() -> str | None:
    """The commit of the checkout this file lies in. Where files were changed since, and outside of a checkout (copies
    on another machine): what the environment variable `COMMIT` says; else the mark that they were, or None."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        head, dirty = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get(COMMIT)
    return os.environ.get(COMMIT, f"{head} with uncommitted changes") if dirty else head


def package_version(package: str) -> str | None:
    """The installed version of ``package``, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def file_name(bench: str, name: str, device: str) -> str:
    """Of a report, without its ending. A config's ``name`` may hold what a file's must not."""
    safe = re.sub(r"[^\w.-]+", "-", name).strip("-")
    return f"{bench}-{safe}-{device}"
