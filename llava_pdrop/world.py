"""The processes that a launcher has started, as it tells each of them in the environment.

This holds before torch is there, and before the processes have found each other. What they say to each other then is
`llava_pdrop.runtime.ranks`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def number_of_processes() -> int:
    """Processes of this run, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among them."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that prints, and writes what the run needs once."""
    return rank() == 0


def is_first_here() -> bool:
    """Whether this process is the first one of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


@contextmanager
def environment_kept(beginnings: tuple[str, ...] = ("",)) -> Iterator[None]:
    """Takes back what is changed meanwhile in the environment variables that begin so (default: in all)."""

    def variables() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(beginnings)}

    before = variables()
    try:
        yield
    finally:
        for name in variables().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
