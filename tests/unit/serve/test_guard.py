"""What a program may send instead of what the page sends: files of the server, pipes, floods, values of any type."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from llava_pdrop.errors import UserError
from llava_pdrop.serve.guard import NOT_UPLOADED, BodyLimit, attempted, clicked_token, padded, uploaded
from llava_pdrop.serve.protocol import MISTAKE
from tests.messages import says


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Uploads of a server, with ways out of it; beside it a file and a folder whose name begins alike."""
    made = tmp_path / "uploads"
    (made / "1").mkdir(parents=True)
    (made / "1" / "own.png").write_bytes(b"own")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "uploads2").mkdir()
    (tmp_path / "uploads2" / "secret.png").write_bytes(b"secret")
    (made / "link.png").symlink_to(tmp_path / "secret.png")
    (made / "up").symlink_to(tmp_path)
    (made / "loop").symlink_to(made / "loop")
    os.mkfifo(made / "pipe")
    return made


def test_an_upload_is_taken_with_and_without_what_gradio_marks_it_by(folder: Path) -> None:
    own = folder / "1" / "own.png"
    assert uploaded({"path": str(own)}, folder) == own.resolve()
    assert uploaded({"path": str(own), "meta": {"_type": "gradio.FileData"}}, str(folder)) == own.resolve()
    assert uploaded({"path": f"{folder}/1/../1/own.png"}, folder) == own.resolve()
    assert uploaded(None, folder) is None


@pytest.mark.parametrize(
    "path",
    [
        "{folder}/../secret.png", "{folder}/../uploads2/secret.png", "{folder}/link.png", "{folder}/up/secret.png",
        "{folder}/loop", "{folder}/pipe", "{folder}/1", "{folder}", "{folder}/1/gone.png", "/dev/stdin", "/dev/zero",
        "/etc/hostname", "/nowhere/at/all.png", "own.png", "", "a\0b", "\ud800", "x" * 5000,
        "data:image/png;base64," + "A" * 5000, "http://127.0.0.1:1/x.png", None, 5, ["{folder}/1/own.png"],
    ],
)  # fmt: skip
def test_nothing_else_is_and_whether_it_exists_is_not_told(folder: Path, path: Any) -> None:
    sent = path.replace("{folder}", str(folder)) if isinstance(path, str) else path
    with pytest.raises(UserError) as error:
        uploaded({"path": sent, "url": "x", "meta": 5}, folder)
    assert str(error.value) == NOT_UPLOADED


@pytest.mark.parametrize("sent", ["/etc/hostname", 5, True, [], [[{}]], {}, {"url": "http://127.0.0.1:1/x.png"}])
def test_a_picture_of_another_type_is_no_upload(folder: Path, sent: Any) -> None:
    with pytest.raises(UserError, match=says("uploaded")):
        uploaded(sent, folder)
    with pytest.raises(UserError, match=says("uploaded")):
        uploaded({"path": str(folder / "1" / "own.png")}, folder / "gone")


def test_a_click_is_on_a_whole_number() -> None:
    assert clicked_token({"index": 3, "value": "x"}) == 3
    for event in (None, {}, [], "x", 5, {"index": "a"}, {"index": [0, 1]}, {"index": None}, {"index": True}):
        assert clicked_token(event) is None, event
    assert clicked_token({"index": 1.0}) is None


def test_missing_values_are_none() -> None:
    assert padded([1, 2, 3], 3) == [1, 2, 3] and padded([1, 2, 3], 2) == [1, 2] and padded([1], 3) == [1, None, None]


def test_what_a_visitor_can_mend_is_told_and_a_bug_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def act(error: Exception | None) -> list[int]:
        if error is not None:
            raise error
        return []

    assert attempted(act, None) == ([], "")
    assert attempted(act, UserError("mend\n  this")) == (None, "mend this")
    assert len(attempted(act, UserError("x" * 10_000))[1]) <= 500
    assert not caplog.records
    bugs = ValueError("operands could not be broadcast"), FileNotFoundError(2, "gone", "/secret/file"), MemoryError()
    for bug in bugs:
        with caplog.at_level(logging.ERROR):
            assert attempted(act, bug) == (None, MISTAKE)
        assert caplog.records[-1].exc_info[1] is bug, "its traceback is in the log"
    assert len(caplog.records) == len(bugs)


def limited(seconds: float = 10) -> BodyLimit:
    """Says how many bytes it was given; bodies may have 100 bytes, uploads 200."""
    app = FastAPI()

    @app.post("/{path:path}")
    async def length(request: Request) -> int:
        return len(await request.body())

    @app.get("/")
    async def page() -> str:
        return "page"

    return BodyLimit(app, 100, {"/upload": 200}, seconds)


async def asked(app: Any, *requests: tuple[str, str, Any]) -> list[httpx.Response]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://demo") as client:
        return [await client.request(method, path, content=content) for method, path, content in requests]


async def dripping(pause: float, *parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
        await asyncio.sleep(pause)


def test_bodies_are_limited_and_others_arrive_whole() -> None:
    found = asyncio.run(
        asked(
            limited(),
            ("GET", "/", None), ("POST", "/join", b"a" * 100), ("POST", "/join", b"a" * 101),
            ("POST", "/upload", b"a" * 200), ("POST", "/upload/", b"a" * 201),
            ("POST", "/join", dripping(0, b"a" * 60, b"b" * 40)), ("POST", "/join", dripping(0, *[b"a"] * 101)),
            ("PUT", "/upload/join", b"a" * 101),
        )
    )  # fmt: skip
    assert [answer.status_code for answer in found] == [200, 200, 413, 200, 413, 200, 413, 413]
    assert [found[place].json() for place in (0, 1, 3, 5)] == ["page", 100, 200, 100]
    assert found[2].json() == {"detail": "the body has more than 100 bytes"}


def test_a_body_that_does_not_come_is_given_up() -> None:
    (answer,) = asyncio.run(asked(limited(0.05), ("POST", "/join", dripping(5, b"a", b"b"))))
    assert answer.status_code == 408 and answer.json() == {"detail": "the body took more than 0.05 s"}
