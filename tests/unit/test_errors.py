"""The one class for errors that are the user's to mend, and that bugs are not taken for one."""

from __future__ import annotations

import ast
import builtins
import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_pdrop import __main__ as cli
from llava_pdrop.commands import plan
from llava_pdrop.errors import (
    ConfigError,
    MissingFileError,
    Problem,
    RecordError,
    Unfit,
    UserError,
    is_about_a_file,
    naming,
)
from llava_pdrop.train.checkpoints import CheckpointError
from llava_pdrop.train.trainer import NotFiniteError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "llava_pdrop"
WORDS = ["plan", str(ROOT / "configs/llava15_7b/finetune_pdrop.yaml")]

NOT_FOR_USERS = {"ValueError", "FileNotFoundError", "OSError", "TypeError", "KeyError", "Exception"}
"""What only a bug may raise: a user's error of such a class would be printed as a traceback."""

ALLOWED: dict[str, str] = {}
"""File of the package -> why it raises one of them."""

BUGS: dict[str, str] = {
    "an index": "[1].index(5)",
    "a zip": "list(zip([1], [], strict=True))",
    "an unpacking": "a, b = [1]",
    "a number": "int('x')",
    "a key": "{}['a']",
}


def raised(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every exception that is raised by its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(kind, ast.Name):
                yield node.lineno, kind.id


def own_errors(tree: ast.AST) -> Iterator[ast.ClassDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
            yield node


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_raised_on_purpose_is_a_users_error(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [f"{path}:{line}: raise {name}" for line, name in raised(tree) if name in NOT_FOR_USERS]
    if str(path.relative_to(PACKAGE)) not in ALLOWED:
        assert not found, f"{found}: raise UserError, or assert"
    for node in own_errors(tree):
        bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
        plain = {name for name in bases if isinstance(getattr(builtins, name, None), type)}
        assert node.name == "UserError" or not plain or "UserError" in bases, f"{path}: {node.name}: derive UserError"


def test_the_walk_sees_what_it_is_for() -> None:
    code = "def f():\n    raise ValueError('x')\n    raise OSError\n    raise UserError('y')\n    raise\n"
    assert list(raised(ast.parse(code))) == [(2, "ValueError"), (3, "OSError"), (4, "UserError")]


@pytest.mark.parametrize("code", BUGS.values(), ids=BUGS)
def test_a_bug_on_a_line_of_the_package_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    """As if the line stood in the command's own module: its frame is the last one."""
    there: dict[str, Any] = {}
    exec(compile(f"def run(args):\n    {code}\n", plan.__file__, "exec"), there)
    monkeypatch.setattr(plan, "run", there["run"])
    with pytest.raises((ValueError, KeyError)) as caught:
        cli.main(WORDS)
    assert caught.traceback[-1].path == Path(plan.__file__) and not isinstance(caught.value, UserError)
    assert not capsys.readouterr().err


def from_the_command_line(code: str) -> subprocess.CompletedProcess[str]:
    """The command, as a process, with ``code`` in the place of its `run`."""
    program = (
        "import sys\n"
        "from llava_pdrop import __main__ as cli\n"
        "from llava_pdrop.commands import plan\n"
        "from llava_pdrop.errors import UserError\n"
        f"def run(args):\n    {code}\n"
        "plan.run = run\n"
        f"sys.exit(cli.main({WORDS!r}))\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)


def test_exit_status_and_output_of_a_bug_and_of_a_users_error() -> None:
    bug = from_the_command_line(BUGS["an index"])
    assert bug.returncode == 1 and "Traceback" in bug.stderr and "5 is not in list" in bug.stderr
    mistake = from_the_command_line("raise UserError('a.yaml: train.seed: give a number')")
    assert (mistake.returncode, mistake.stderr) == (2, "error: a.yaml: train.seed: give a number\n")


@pytest.mark.parametrize(
    "error",
    [
        UserError("x"),
        MissingFileError("x"),
        ConfigError("x"),
        Problem("a.b", "x"),
        RecordError("f.json[1]", "7", "x", "format"),
        Unfit("format", "x"),
        CheckpointError("x"),
        NotFiniteError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_for_users_is_one_line_and_travels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: UserError
) -> None:
    """Also to other processes: the first rank's error is raised on all, and that of a worker in its parent."""

    def fail(args: Any) -> None:
        raise error

    monkeypatch.setattr(plan, "run", fail)
    assert cli.main(WORDS) == 2 and capsys.readouterr().err == f"error: {error}\n"
    assert isinstance(error, ValueError)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


def test_a_missing_file_may_be_caught_as_one() -> None:
    with pytest.raises(FileNotFoundError, match="a.json: no such file"):
        raise MissingFileError("a.json: no such file")


def missing() -> None:
    Path("/nowhere/file").read_text()


def not_a_directory() -> None:
    (Path(__file__) / "file").read_text()


def a_directory() -> None:
    ROOT.read_text()


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def closed_descriptor() -> None:
    os.close(10**6)


def named_but_closed() -> None:
    raise OSError(errno.EBADF, "Bad file descriptor", "/a/b")


def broken_pipe() -> None:
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def without_number() -> None:
    raise OSError("what a library says")


def error_of(fail: Callable[[], None]) -> OSError:
    try:
        fail()
    except OSError as error:
        return error
    raise AssertionError("it did not fail")


@pytest.mark.parametrize(
    ("fail", "users"),
    [
        (missing, True),
        (not_a_directory, True),
        (a_directory, True),
        (full, True),
        (closed_descriptor, False),
        (named_but_closed, False),
        (broken_pipe, False),
        (without_number, False),
    ],
)
def test_of_what_the_system_says_only_files_and_full_disks_are_the_users(
    monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None], users: bool
) -> None:
    monkeypatch.setattr(plan, "run", lambda args: fail())
    said = error_of(fail)
    assert is_about_a_file(said) is users
    if users:
        assert cli.main(WORDS) == 2
    else:
        with pytest.raises(type(said)):
            cli.main(WORDS)


def test_naming_adds_the_key_and_keeps_the_class() -> None:
    with pytest.raises(MissingFileError, match="a: no such file") as caught, naming("model.path"), naming("inner"):
        raise MissingFileError("a: no such file")
    assert caught.value.key == "model.path"


def test_naming_takes_what_it_is_told_and_no_bug() -> None:
    with pytest.raises(UserError, match="torn") as caught, naming("model.projector", LookupError):
        raise LookupError("torn")
    assert caught.value.key == "model.projector" and isinstance(caught.value.__cause__, LookupError)
    with pytest.raises(UserError, match="/nowhere/file") as caught, naming("model.path"):
        missing()
    assert caught.value.key == "model.path"
    with pytest.raises(ValueError, match="not in list") as bug, naming("model.path"):
        [1].index(5)
    assert not isinstance(bug.value, UserError)
    with pytest.raises(BrokenPipeError), naming("model.path"):
        broken_pipe()
