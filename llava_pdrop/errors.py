"""Errors that are for the user, and their messages in one line."""

from __future__ import annotations

import difflib
import errno
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk, or of this user's share of it, that is full."""

PACKAGE = Path(__file__).resolve().parent


class ConfigError(ValueError):
    """A config that cannot be run; the message is one line for the user."""


class Problem(ValueError):
    """What is wrong with one dotted ``key``; becomes a `ConfigError` line once the file is known."""

    def __init__(self, key: str, message: str, unknown: bool = False) -> None:
        super().__init__(message)
        self.key, self.unknown = key, unknown


class RecordError(ValueError):
    """A record that cannot be used: where it stands, its id (where that could be read) and why, in one line."""

    def __init__(self, origin: str, id: str | None, reason: str) -> None:
        super().__init__(f"{origin} (id {id}): {reason}" if id is not None else f"{origin}: {reason}")
        self.origin, self.id, self.reason = origin, id, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordError, (self.origin, self.id, self.reason)


def is_for_the_user(error: BaseException) -> bool:
    """Whether the message of ``error`` says all, so that a traceback would only hide it: it was raised by this package
    on purpose (not somewhere inside a library), or is about a file that is missing, cannot be used, or has no room."""
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError) or error.filename is not None or error.errno in FULL
    frames = traceback.extract_tb(error.__traceback__)
    return (
        bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(PACKAGE) and isinstance(error, ValueError)
    )


def line_of(error: BaseException) -> str:
    """The message of ``error`` in one line; what the system says about a file begins with the file."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        if error.errno in FULL:
            text = f"{text}: make room and start the same command again"
    return " ".join(text.split())


def first_line(error: BaseException) -> str:
    """The first line of what a YAML library, or the system, complains of."""
    text = getattr(error, "problem", None) or getattr(error, "strerror", None) or str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__


def did_you_mean(name: str, valid: Iterable[Any], cutoff: float = 0.5) -> str:
    """`` (did you mean 'x'?)`` for the nearest of ``valid``, the first that begins like it, or nothing."""
    names = [str(entry) for entry in valid]
    near = [entry for entry in names if len(name) > 2 and entry.startswith(name)]
    near = near or difflib.get_close_matches(name, names, 1, cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""
