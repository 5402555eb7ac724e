"""Errors that are the user's to mend, and their messages in one line."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk, or of this user's share of it, that is full."""

UNUSABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EIO, errno.ESTALE, errno.EFBIG,
)  # fmt: skip
"""What the system says of a file that is named: it may not be used, is not there or of another kind, or its disk does
not work. The rest (a closed descriptor, too many open files, a broken connection) is no matter of files: a bug, or
nothing that its name would help to mend."""

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Line ends, other control characters, and halves of characters, which no terminal takes."""

QUOTED = 200
"""Characters of a user's data that stand in a message at most."""


class UserError(ValueError):
    """The user's to mend: the message is one line that names file, key, sample or argument and says what to do. All
    errors that this package raises on purpose are of this class; any other exception is a bug and keeps its traceback.

    ``key``: the config key that it is about, where the code that failed knows it (see `naming`). ``kind``: of a record,
    the name that `llava_pdrop.doctor.checks.PROBLEM_KINDS` has for what is wrong, where that code knows one.
    """

    key: str | None = None
    kind: str | None = None


class MissingFileError(UserError, FileNotFoundError):
    """A file or directory that is not there."""


class ConfigError(UserError):
    """A config that cannot be run; the message is one line for the user."""


class Problem(UserError):
    """What is wrong with one dotted ``key``; becomes a `ConfigError` line once the file is known."""

    key: str

    def __init__(self, key: str, message: str, unknown: bool = False) -> None:
        super().__init__(message)
        self.key, self.unknown = key, unknown

    def __reduce__(self) -> tuple[Any, ...]:
        return Problem, (self.key, str(self), self.unknown)


class Unfit(UserError):
    """What makes a record unfit, said where the record is not known: becomes a `RecordError` of the same ``kind``."""

    kind: str

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return Unfit, (self.kind, str(self))


class RecordError(UserError):
    """A record that cannot be used: where it stands, its id (where that could be read) and why, in one line."""

    def __init__(self, origin: str, id: str | None, reason: str, kind: str | None = None) -> None:
        name = f"{origin} (id {clip(id)})" if id is not None else origin
        super().__init__(f"{name}: {reason}")
        self.origin, self.id, self.reason, self.kind = origin, id, reason, kind

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordError, (self.origin, self.id, self.reason, self.kind)


@contextmanager
def naming(key: str, *foreign: type[Exception]) -> Iterator[None]:
    """Errors for the user that are raised inside carry the config key ``key``. Of two around each other the outer one
    tells: a LoRA run has a decoder and a tower of its own, but the config names the run.

    Args:
        foreign: what libraries raise there at files that do not fit; it becomes a `UserError`. So does what the system
            says of a file.
    """
    unfit: tuple[type[Exception], ...] = (OSError, *foreign)
    try:
        yield
    except UserError as error:
        error.key = key
        raise
    except unfit as error:
        if isinstance(error, OSError) and not is_about_a_file(error):
            raise
        named = UserError(line_of(error))
        named.key = key
        raise named from error


def is_about_a_file(error: OSError) -> bool:
    """Whether the system speaks of what a user can mend, so that a traceback would only hide it: a file is missing, or
    is named and cannot be used, or the disk is full."""
    named = error.filename is not None and error.errno in UNUSABLE
    return named or isinstance(error, FileNotFoundError) or error.errno in FULL


def line_of(error: BaseException) -> str:
    """The message of ``error`` in one line; what the system says about a file begins with the file."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        if error.errno in FULL:
            text = f"{text}: make room and start the same command again"
    return " ".join(text.split())


def first_line(error: BaseException) -> str:
    """The first line of what a YAML library, the system or any other code complains of; the kind of the error where
    the message is empty or only a name."""
    text, kind = str(getattr(error, "problem", None) or error).strip(), type(error).__name__
    if isinstance(error, OSError) and error.strerror is not None:
        text = text.removeprefix(f"[Errno {error.errno}] ")
    if not text:
        return kind
    return f"{kind} {text.splitlines()[0]}" if isinstance(error, KeyError) else text.splitlines()[0]


def clip(value: object, most: int = QUOTED) -> str:
    """``value`` as it stands in a message: without its middle where it is longer than ``most`` characters, since data
    may hold whole pictures where a name is expected; and what would break the line, or cannot be printed, escaped."""
    text = UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], str(value))
    if len(text) <= most:
        return text
    left_out = f"... ({len(text):,} characters) ..."
    head = (most - len(left_out)) * 2 // 3
    return text[:head] + left_out + text[head + len(left_out) - most :]


def listed(problems: Mapping[str, Sequence[str]]) -> str:
    """``kind: name, name; other kind: name``, without the kinds that have no names."""
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)


def did_you_mean(name: str, valid: Iterable[Any], cutoff: float = 0.5) -> str:
    """`` (did you mean 'x'?)`` for the nearest of ``valid``, the first that begins like it, or nothing."""
    names = [str(entry) for entry in valid]
    near = [entry for entry in names if len(name) > 2 and entry.startswith(name)]
    near = near or difflib.get_close_matches(name, names, 1, cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_name(key: str, name: str, known: Collection[str], file: str = "") -> None:
    """Raises at a ``name`` that is none of ``known``.

    Args:
        key: where it was given.
        file: the config that gives it, once that is known.

    Raises:
        Problem: without ``file``. ConfigError: with it.
    """
    if name not in known:
        line = f"{key} cannot be {name!r}: choose one of {', '.join(known)}{did_you_mean(name, known)}"
        raise ConfigError(f"{file}: {line}") if file else Problem(key, line)
