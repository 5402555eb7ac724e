"""The command line of the server: what it is started with, and what is wrong with that, in one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_pdrop.__main__ import main
from llava_pdrop.serve import server
from llava_pdrop.serve.service import Service
from tests.messages import says

DROP = "pyramid_drop={layers: [1, 2, 3], ratios: [0.5, 0.25, 0.125]}"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Service, str, int]]:
    """What would be served, and where."""
    found = list[Any]()
    monkeypatch.setattr(server, "serve", lambda *given: found.append(given))
    return found


def test_what_is_given_holds(vip: Path, tmp_path: Path, started: list, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("secret\n")
    words = [
        "serve", str(vip), DROP, "--port", "0", "--name", "mine", "--key-file", str(tmp_path / "key"), "--rows", "3",
        "--queue", "2", "--seconds", "9.5", "--max-new-tokens", "7", "--most-new-tokens", "8", "--temperature", "0",
        "--pictures", str(tmp_path), "--allow-urls", "--most-pictures", "1", "--most-pixels", "10",
        "--most-bytes", "11",
    ]  # fmt: skip
    assert main(words) == 0
    ((service, host, port),) = started
    own, limits = service.settings, service.settings.limits
    assert (host, port, own.name, own.key, own.rows, own.queue) == ("127.0.0.1", 0, "mine", "secret", 3, 2)
    assert (own.seconds, own.max_new_tokens, own.most_new_tokens, own.temperature) == (9.5, 7, 8, 0)
    assert (limits.directory, limits.urls, limits.pictures) == (tmp_path, True, 1)
    assert (limits.pixels, limits.picture_bytes) == (10, 11)
    assert service.schedule.layers == (1, 2, 3) and service.loop.rows == 3
    monkeypatch.setenv("LLAVA_PDROP_API_KEY", "from outside")
    assert main(["serve", str(vip), "--host", "::1"]) == 0
    service, host, port = started[-1]
    assert (service.settings.name, service.settings.key, host, port) == (vip.name, "from outside", "::1", 8000)
    assert service.schedule.vanilla and service.settings.limits.directory is None and not service.settings.limits.urls


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone"], says("gone")),
        (["{vip}", "other"], says("other", "one model")),
        (["{vip}", "pyramid_drop={layers: [9], ratios: [0.5]}"], says("pyramid_drop.layers", "9", "4 layers")),
        (["{vip}", "--rows", "0"], says("--rows", "0")),
        (["{vip}", "--queue", "-1"], says("--queue", "-1")),
        (["{vip}", "--seconds", "nan"], says("--seconds", "nan")),
        (["{vip}", "--temperature", "3"], says("--temperature", "3.0")),
        (["{vip}", "--max-new-tokens", "0"], says("--max-new-tokens", "0")),
        (["{vip}", "--max-new-tokens", "9999"], says("--most-new-tokens", "9999")),
        (["{vip}", "--most-pixels", "0"], says("--most-pixels", "0")),
        (["{vip}", "--pictures", "gone"], says("--pictures", "gone")),
        (["{vip}", "--key-file", "gone"], says("gone")),
        (["{vip}", "--key-file", "{empty}"], says("key", "empty")),
    ],
)
def test_what_is_wrong_is_one_line(
    vip: Path, tmp_path: Path, started: list, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "empty").write_text("\n")
    assert main(["serve", *(word.format(vip=vip, empty=tmp_path / "empty") if "{" in word and "[" not in word else word
                            for word in words)]) == 2  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.search(message, lines[0]) and not started


def test_a_package_that_is_missing_is_named(
    vip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    assert main(["serve", str(vip)]) == 2
    assert re.search(says("uvicorn", "llava_pdrop[serve]"), capsys.readouterr().err)


def test_only_server_and_page_import_the_web() -> None:
    """They are extras: every other command works without them."""
    package = Path(server.__file__).parents[1]
    using = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"^\s*(import|from) (fastapi|starlette|uvicorn|httpx|openai)\b", path.read_text(), re.MULTILINE)
    ]
    assert sorted(using) == ["serve/guard.py", "serve/page.py", "serve/server.py"] and "fastapi" in sys.modules
