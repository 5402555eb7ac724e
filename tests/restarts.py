"""One more start for processes that ended by signal 11, once in a whole pytest run, and said in its summary.

Seen once, in a whole run of the suite: a rank of an FSDP2 run to which nothing was done ended by a segmentation fault
in the thread of PyTorch's that runs the collectives of gloo (``pt_gloo_runloop``). The cause is not known, and it could
not be made to happen again. Any other end, a second one, and one in a test that does something to its processes are
failures as ever.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

DIRECTORY = "LLAVA_PDROP_TEST_RESTARTS"
"""Environment variable with a directory of this pytest run; the workers of xdist inherit it."""

TAIL = 2000
"""Characters that are kept of what the processes wrote."""


def begin(config: Any) -> None:
    """``pytest_configure``."""
    if not hasattr(config, "workerinput"):
        os.environ[DIRECTORY] = tempfile.mkdtemp(prefix="restarts-")


def end(config: Any) -> None:
    """``pytest_unconfigure``."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(DIRECTORY), ignore_errors=True)


def report(terminalreporter: Any) -> None:
    """``pytest_terminal_summary``: the restart, if there was one."""
    file = Path(os.environ[DIRECTORY]) / "restart"
    if file.is_file():
        terminalreporter.section("restarted after signal 11: 1")
        terminalreporter.write_line(file.read_text())


def once_more(
    start: Callable[[], T],
    crashed: Callable[[T], bool],
    output: Callable[[T], str],
    restore: Callable[[], None] = lambda: None,
) -> T:
    """What ``start`` returns; where that ``crashed`` by signal 11, for the first time in this pytest run, what it
    returns when it is called again.

    Args:
        output: what the processes wrote, of which the end goes into the summary.
        restore: puts back what the first start has changed.
    """
    result = start()
    if crashed(result) and _is_first(output(result)):
        restore()
        result = start()
    return result


def _is_first(text: str) -> bool:
    if DIRECTORY not in os.environ:
        return False
    try:
        with (Path(os.environ[DIRECTORY]) / "restart").open("x") as file:
            file.write(f"{os.environ.get('PYTEST_CURRENT_TEST')}\n{text[-TAIL:]}")
    except FileExistsError:
        return False
    return True
