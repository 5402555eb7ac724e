"""Processes that end by signal 11 are started once more, once in a pytest run; other ends are not touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import restarts
from tests.faults import processes
from tests.faults.processes import Ended, Fault, run_ranks

ROOT = Path(__file__).parents[2]

COMMAND = """\
import os, sys
from pathlib import Path
with open(sys.argv[1], "a") as starts:
    starts.write("x")
if len(Path(sys.argv[1]).read_text()) <= int(sys.argv[2]):
    print("here it happens", flush=True)
    os.kill(os.getpid(), int(sys.argv[3])) if int(sys.argv[3]) else sys.exit(1)
"""
"""FILE TIMES SIGNAL: dies by a signal (0: exits with 1) as often as it is told."""


@pytest.fixture(autouse=True)
def own_directory(tmp_path_factory, monkeypatch) -> Path:
    """These tests must not use up the restart of the pytest run they are in."""
    directory = tmp_path_factory.mktemp("restarts")
    monkeypatch.setenv(restarts.DIRECTORY, str(directory))
    return directory


def start(file: Path, times: int, number: int, restored: list) -> tuple[int, int]:
    """Exit code, and how often it was started."""
    command = [sys.executable, "-c", COMMAND, str(file), str(times), str(number)]
    done = restarts.once_more(
        lambda: subprocess.run(command, capture_output=True, text=True, check=False),
        lambda done: done.returncode == -signal.SIGSEGV,
        lambda done: done.stdout,
        lambda: restored.append(file),
    )
    return done.returncode, len(file.read_text())


@pytest.mark.parametrize(
    ("times", "number", "code", "starts"),
    [
        (0, signal.SIGSEGV, 0, 1),
        (1, signal.SIGSEGV, 0, 2),
        (2, signal.SIGSEGV, -11, 2),
        (1, signal.SIGKILL, -9, 1),
        (1, signal.SIGABRT, -6, 1),
        (1, 0, 1, 1),
    ],
)
def test_signal_11_alone_is_started_once_more(tmp_path, own_directory, times, number, code, starts):
    restored: list[Path] = []
    assert start(tmp_path / "starts", times, number, restored) == (code, starts)
    assert len(restored) == starts - 1
    record = own_directory / "restart"
    assert record.is_file() == (starts == 2)
    if starts == 2:
        assert "test_signal_11_alone" in record.read_text() and "here it happens" in record.read_text()


def test_only_one_in_a_run(tmp_path):
    assert start(tmp_path / "one", 1, signal.SIGSEGV, []) == (0, 2)
    assert start(tmp_path / "two", 1, signal.SIGSEGV, []) == (-11, 1)


def test_none_outside_of_pytest(tmp_path, monkeypatch):
    monkeypatch.delenv(restarts.DIRECTORY)
    assert start(tmp_path / "starts", 1, signal.SIGSEGV, []) == (-11, 1)


@pytest.fixture
def ends(monkeypatch, tiny_config):
    """Lets `run_ranks` end as it is told, one after the other, each leaving a file in the output directory; returns the
    files that each start has found there."""

    def of(*codes: list[int]) -> list[list[str]]:
        left, found = list(codes), []

        def once(config, *arguments):
            output = config.parent / "out" / config.stem
            found.append(sorted(file.name for file in output.glob("*")))
            output.mkdir(parents=True, exist_ok=True)
            (output / f"of start {len(found)}").touch()
            ended = left.pop(0)
            return Ended(ended, [f"rank {rank} ends by {code}" for rank, code in enumerate(ended)])

        monkeypatch.setattr(processes, "_run_once", once)
        return found

    return of


def test_ranks_that_nothing_happens_to_begin_where_they_began(ends, tiny_config, own_directory):
    """A run that goes on from a checkpoint goes on from the same one, and one from the start starts over."""
    config = tiny_config()
    found = ends([0, -11], [0, 0], [-11, -9])
    assert run_ranks(config, ranks=2).codes == [0, 0]
    assert found == [[], []]
    assert "rank 1 ends by -11" in (own_directory / "restart").read_text()
    assert run_ranks(config, ranks=2).codes == [-11, -9]  # the second one of this run
    (own_directory / "restart").unlink()
    found = ends([-11, 0], [0, 0])
    assert run_ranks(config, ranks=2).codes == [0, 0]
    assert found == [["of start 2", "of start 3"]] * 2


@pytest.mark.parametrize(("options", "codes"), [
    ({"ranks": 2, "fault": Fault("nan", 1)}, [-11, 0]),
    ({"ranks": 1}, [-11]),
    ({"ranks": 2}, [-9, 0]),
    ({"ranks": 2}, [1, 2]),
])  # fmt: skip
def test_other_ranks_are_not_started_again(ends, tiny_config, own_directory, options, codes):
    found = ends(codes)
    assert run_ranks(tiny_config(), **options).codes == codes
    assert len(found) == 1 and not (own_directory / "restart").exists()


INNER = """\
import subprocess, sys
import pytest
from tests.restarts import once_more

@pytest.mark.parametrize("name", ["one", "two"])
def test_inner(name, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / name
    command = [sys.executable, "-c", {command!r}, str(file), "1", "11"]
    done = once_more(
        lambda: subprocess.run(command, capture_output=True, text=True),
        lambda done: done.returncode == -11,
        lambda done: done.stdout,
    )
    assert done.returncode == 0
"""

CONFTEST = """\
from tests.restarts import begin, end, report

pytest_configure, pytest_unconfigure, pytest_terminal_summary = begin, end, report
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_workers_of_a_run_share_one_restart_and_its_summary_says_so(tmp_path, workers):
    (tmp_path / "test_inner.py").write_text(INNER.format(command=COMMAND))
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    words = ["-q", "-n", workers, "-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini"), str(tmp_path)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        env={**kept, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "restarted after signal 11: 1" in done.stdout and "here it happens" in done.stdout
    assert "test_inner.py::test_inner[" in done.stdout.partition("restarted after signal 11: 1")[2]
