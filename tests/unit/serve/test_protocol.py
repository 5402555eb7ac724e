"""What a request may ask, word by word; whatever is wrong is a 4xx of one line, and the server goes on."""

from __future__ import annotations

import base64
import json
import re
import socket
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from llava_pdrop.errors import UserError
from llava_pdrop.eval.respondent import LlavaRespondent
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve.loop import Finish, Late, Unable
from llava_pdrop.serve.pictures import Limits
from llava_pdrop.serve.protocol import Refusal, error_body, read_request, usage
from llava_pdrop.serve.service import Service
from llava_pdrop.types import Turn
from tests.messages import says
from tests.unit.serve.serving import NAME, at_rest, client_of, served

ASKS = {"role": "user", "content": "Which colour is it"}
BODY: dict[str, Any] = {"model": NAME, "messages": [ASKS], "max_tokens": 2, "temperature": 0}


def read(**more: Any) -> Any:
    return read_request(BODY | more, NAME, Schedule((1,), (0.5,)), 4)


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def picture(size: tuple[int, int] = (6, 4), kind: str = "PNG", mode: str = "RGB") -> bytes:
    file = BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def shows(*urls: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "Which"}]}]}


def part(**given: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [given, {"type": "text", "text": "Which"}]}]}


def said(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def test_what_a_request_asks() -> None:
    asked = read(
        messages=[
            {"role": "developer", "content": "Be brief"},
            {"role": "user", "content": [
                {"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "a"}},
                {"type": "text", "text": "What"}]},
            {"role": "assistant", "content": "A bus", "refusal": None},
            ASKS,
        ],
        stop="END", max_tokens=None, max_completion_tokens=7, temperature=0.5, top_p=0.25, seed=-3, stream=True,
        stream_options={"include_usage": True}, n=1, frequency_penalty=0, response_format={"type": "text"}, tools=None,
    )  # fmt: skip
    assert asked.turns == (
        Turn("human", "See\n<image>\nWhat"), Turn("gpt", "A bus"), Turn("human", "Which colour is it"),
    )  # fmt: skip
    assert asked.system == "Be brief" and asked.pictures == (("messages[1].content[1]", "a"),)
    assert (asked.stops, asked.most, asked.temperature, asked.top_p, asked.seed) == (("END",), 7, 0.5, 0.25, -3)
    assert asked.stream and asked.with_usage and asked.schedule == Schedule((1,), (0.5,))
    plain = read_request({"model": NAME, "messages": [ASKS]}, NAME, Schedule(), 4)
    assert (plain.temperature, plain.top_p, plain.seed, plain.most, plain.stops, plain.stream) == (
        1, 1, None, None, (), False,
    )  # fmt: skip


def test_the_schedule_of_a_request() -> None:
    assert read(pyramid_drop=None).schedule == Schedule()
    assert read(pyramid_drop={"layers": [1, 2], "keep": [9, 3]}).schedule == Schedule((1, 2), keep=(9, 3))
    assert read(pyramid_drop={"layers": [1], "ratios": [0.5], "positions": "keep"}).schedule.positions == "keep"
    assert read(pyramid_drop={"layers": [8, 16, 24], "ratios": [0.5, 0.25, 0.1], "depth": 32}).schedule.layers == (
        1, 2, 3,
    )  # fmt: skip
    assert read(pyramid_drop="pyramiddrop").schedule == Schedule((1, 2, 3), (0.5, 0.25, 0.125))
    deep = read_request(BODY | {"pyramid_drop": "hidrop"}, NAME, Schedule(), 32).schedule
    assert (deep.inject, deep.positions) == (8, "keep")


BAD: dict[str, tuple[dict[str, Any] | bytes, str, int]] = {
    "no JSON": (b"{", says("JSON"), 400),
    "half a letter": (b'{"model": "\xff"}', says("JSON"), 400),
    "nothing": (b"", says("JSON"), 400),
    "a list": (b"[]", says("object"), 400),
    "not a number": (b'{"temperature": NaN}', says("NaN"), 400),
    "a deep list": (b"[" * 50_000, says("JSON"), 400),
    "a long number": (b'{"seed": ' + b"9" * 5000 + b"}", says("JSON"), 400),
    "too large": (b" " * 70_000, says("65,536", "bytes"), 413),
    "no model": ({"model": None}, says("model", NAME), 400),
    "another model": ({"model": "gpt-5"}, says("gpt-5", NAME), 404),
    "no messages": ({"messages": None}, says("messages"), 400),
    "empty messages": ({"messages": []}, says("messages"), 400),
    "messages of text": ({"messages": "hello"}, says("messages"), 400),
    "a message of text": (said("hello"), says("messages[0]"), 400),
    "a role": (said({"role": "tool", "content": "x"}), says("messages[0].role", "'tool'"), 400),
    "no role": (said({"content": "x"}), says("messages[0].role"), 400),
    "an answer first": (said({"role": "assistant", "content": "x"}), says("messages[0].role", "user"), 400),
    "an answer last": (said(ASKS, {"role": "assistant", "content": "x"}), says("last message"), 400),
    "two questions": (said(ASKS, ASKS), says("messages[1].role", "assistant"), 400),
    "only a system": (said({"role": "system", "content": "x"}), says("last message"), 400),
    "a late system": (said(ASKS, {"role": "system", "content": "x"}), says("messages[1]", "first"), 400),
    "no content": (said({"role": "user"}), says("messages[0].content"), 400),
    "empty content": (said({"role": "user", "content": " "}), says("asks nothing"), 400),
    "no parts": (said({"role": "user", "content": []}), says("messages[0].content"), 400),
    "a number": (said({"role": "user", "content": 7}), says("messages[0].content"), 400),
    "a name": (said(ASKS | {"name": "Eve"}), says("messages[0].name"), 400),
    "tool calls": (said(ASKS, {"role": "assistant", "content": "", "tool_calls": [{}]}), says("tool_calls"), 400),
    "a marker": (said({"role": "user", "content": "<image> which"}), says("<image>"), 400),
    "half a character": (said({"role": "user", "content": "a\ud800"}), says("request"), 400),
    "audio": (part(type="input_audio", input_audio={}), says("messages[0].content[0]", "image_url"), 400),
    "a text of numbers": (part(type="text", text=5), says("messages[0].content[0].text"), 400),
    "a part with more": (part(type="text", text="a", cache_control={}), says("messages[0].content[0]"), 400),
    "a part of text": (said({"role": "user", "content": ["a"]}), says("messages[0].content[0]"), 400),
    "an unknown key": ({"max_token": 5}, says("max_token", "max_tokens"), 400),
    "a key of lines": ({"a\nb": 5}, says("unknown parameter"), 400),
    "tools": ({"tools": [{"type": "function"}]}, says("tools"), 400),
    "logprobs": ({"logprobs": True}, says("logprobs"), 400),
    "a penalty": ({"frequency_penalty": 0.5}, says("frequency_penalty"), 400),
    "a format": ({"response_format": {"type": "json_object"}}, says("response_format"), 400),
    "two answers": ({"n": 2}, says("n", "1"), 400),
    "no tokens": ({"max_tokens": 0}, says("max_tokens", "0"), 400),
    "half a token": ({"max_tokens": 1.5}, says("max_tokens", "1.5"), 400),
    "true tokens": ({"max_tokens": True}, says("max_tokens", "True"), 400),
    "too many tokens": ({"max_tokens": 5000}, says("max_tokens", "5000", "4096"), 400),
    "no room": ({"max_tokens": 2040}, says("2048", "2040"), 400),
    "a long prompt": (said({"role": "user", "content": "a" * 3000}), says("2048"), 400),
    "tokens twice": ({"max_completion_tokens": 5}, says("max_tokens", "max_completion_tokens"), 400),
    "a cold temperature": ({"temperature": -1}, says("temperature", "-1"), 400),
    "a hot temperature": ({"temperature": 2.1}, says("temperature", "2.1"), 400),
    "a warm temperature": ({"temperature": "warm"}, says("temperature", "warm"), 400),
    "no top_p": ({"top_p": 0}, says("top_p", "0"), 400),
    "a seed": ({"seed": 2**63}, says("seed"), 400),
    "half a seed": ({"seed": 0.5}, says("seed", "0.5"), 400),
    "five stops": ({"stop": ["a"] * 5}, says("stop", "4"), 400),
    "an empty stop": ({"stop": ""}, says("stop"), 400),
    "a stop of numbers": ({"stop": [1]}, says("stop"), 400),
    "stream": ({"stream": "yes"}, says("stream", "yes"), 400),
    "stream options": ({"stream_options": {"include_usage": True}}, says("stream_options", "stream"), 400),
    "stream options of more": ({"stream": True, "stream_options": {"x": 1}}, says("include_usage"), 400),
    "a schedule of more layers": ({"pyramid_drop": {"layers": [8], "ratios": [0.5]}}, says("pyramid_drop.layers"), 400),
    "a schedule without ratios": ({"pyramid_drop": {"layers": [1]}}, says("pyramid_drop.ratios"), 400),
    "an unknown key of a schedule": ({"pyramid_drop": {"layer": [1]}}, says("pyramid_drop.layer"), 400),
    "an unknown ranker": ({"pyramid_drop": {"layers": [1], "ratios": [0.5], "ranker": "best"}}, says("best"), 400),
    "an unknown preset": ({"pyramid_drop": "hidrops"}, says("hidrops", "did you mean 'hidrop'"), 400),
    "a file as a preset": ({"pyramid_drop": "/etc/passwd"}, says("/etc/passwd"), 400),
    "a number as a schedule": ({"pyramid_drop": 7}, says("pyramid_drop"), 400),
    # ---- pictures
    "no url": (part(type="image_url", image_url={}), says("messages[0].content[0].image_url"), 400),
    "a url of text": (part(type="image_url", image_url="a.png"), says("messages[0].content[0].image_url"), 400),
    "details": (part(type="image_url", image_url={"url": "a", "detail": "high"}), says("detail"), 400),
    "a picture of an answer": (
        said(ASKS, {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}, ASKS),
        says("messages[1].content[0]"), 400,
    ),
    "no base64": (shows("data:image/png;base64,%%%"), says("messages[0].content[0]", "base64"), 400),
    "no picture": (shows(uri(b"hello")), says("messages[0].content[0]", "no picture"), 400),
    "half a picture": (shows(uri(picture((40, 40))[:-30])), says("messages[0].content[0]"), 400),
    "another format": (shows(uri(picture(kind="TIFF"))), says("no picture"), 400),
    "many pixels": (shows(uri(picture((200, 200)))), says("200 x 200", "10,000"), 400),
    "a bomb": (shows(uri(picture((6000, 6000), mode="1"))), says("6000 x 6000"), 400),
    "many bytes": (shows(uri(b"x" * 30_000)), says("20,000", "bytes"), 400),
    "many pictures": (shows(*[uri(picture())] * 4), says("4 pictures", "3"), 400),
    "the second picture": (shows(uri(picture()), "data:,"), says("messages[0].content[1]"), 400),
    "a file outside": (shows("../llm/tokenizer.json"), says("no such file"), 400),
    "a secret file": (shows("file:///etc/passwd"), says("no such file"), 400),
    "no such file": (shows("gone.png"), says("gone.png"), 400),
    "a url": (shows("http://127.0.0.1/a.png"), says("--allow-urls"), 400),
    "a scheme": (shows("javascript:1"), says("data URI"), 400),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(respondent: LlavaRespondent, tiny_files: Path) -> Iterator[tuple[Service, str]]:
    limits = Limits(
        pictures=3, picture_bytes=20_000, pixels=10_000, directory=tiny_files / "data/images", body_bytes=2**16,
        body_seconds=0.5,
    )  # fmt: skip
    with served(respondent, limits=limits) as made:
        yield made


def test_there_are_enough_of_them() -> None:
    pictures = list(BAD)[list(BAD).index("no url") :]
    assert len(BAD) >= 40 and len(pictures) >= 10


@pytest.mark.parametrize(("body", "message", "status"), BAD.values(), ids=BAD)
def test_bad_requests(server: tuple[Service, str], body: dict[str, Any] | bytes, message: str, status: int) -> None:
    sent = body if isinstance(body, bytes) else json.dumps(BODY | body).encode()
    kind = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server[1]}/v1/chat/completions", content=sent, headers=kind, timeout=60)
    assert_refused(answer, message, status)
    assert at_rest(server[0])
    good = httpx.post(f"{server[1]}/v1/chat/completions", json=BODY, timeout=60)
    assert good.status_code == 200, "the server is alive"


@pytest.mark.parametrize("name", ["no room", "tools", "half a picture", "a schedule of more layers", "no such file"])
def test_bad_requests_of_a_stream_have_a_status_too(server: tuple[Service, str], name: str) -> None:
    body, message, status = BAD[name]
    assert isinstance(body, dict)
    answer = httpx.post(f"{server[1]}/v1/chat/completions", json=BODY | {"stream": True} | body, timeout=60)
    assert_refused(answer, message, status)


def assert_refused(answer: httpx.Response, message: str, status: int) -> None:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"} and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    found = answer.json()["error"]["message"]
    assert re.search(message, found) and "\n" not in found and len(found) <= 600, found


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("POST", "/v1/completions", 404), ("GET", "/v1/chat/completions", 405), ("GET", "/docs", 404),
     ("DELETE", "/v1/models", 405), ("GET", "/openapi.json", 404), ("GET", "/v1/models/%0a..%2f", 404)],
)  # fmt: skip
def test_other_addresses(server: tuple[Service, str], method: str, path: str, status: int) -> None:
    assert_refused(httpx.request(method, f"{server[1]}{path}"), "", status)


def test_a_page_of_another_origin_cannot_ask(server: tuple[Service, str]) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = httpx.post(
            f"{server[1]}/v1/chat/completions", content=json.dumps(BODY).encode(), headers={"Content-Type": kind}
        )
        assert_refused(answer, says("application/json"), 415)
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("hangs_up", [False, True])
def test_a_body_that_does_not_come(server: tuple[Service, str], hangs_up: bool) -> None:
    host, port = server[1].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        start = time.monotonic()
        if not hangs_up:
            assert b" 408 " in connection.recv(1000) and time.monotonic() - start < 5
    assert at_rest(server[0])


def test_statuses_and_forms_of_errors() -> None:
    found = [
        (Refusal("a", "n", 404, "x"), (404, "invalid_request_error", "n", "x")),
        (Refusal("a", None, 429, "queue_full"), (429, "rate_limit_error", None, "queue_full")),
        (Late("a"), (504, "server_error", None, "timeout")),
        (Unable("a"), (503, "server_error", None, "unavailable")),
        (UserError("a\n b"), (400, "invalid_request_error", None, None)),
        (KeyError("secret"), (500, "server_error", None, None)),
    ]
    for error, (status, kind, param, code) in found:
        got, body = error_body(error)
        assert (got, body["error"]["type"], body["error"]["param"], body["error"]["code"]) == (
            status,
            kind,
            param,
            code,
        )
        assert "\n" not in body["error"]["message"] and "secret" not in body["error"]["message"]


def test_figures() -> None:
    assert usage(20, Finish("a", "stop", 3, (16, 8))) == {
        "prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23, "image_tokens": [16, 8],
    }  # fmt: skip


def test_a_mistake_of_the_server_is_a_500_and_tells_nothing(
    server: tuple[Service, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> Any:
        raise KeyError("a secret of the server")

    with monkeypatch.context() as patched:
        patched.setattr(server[0], "_prepared", broken)
        answer = httpx.post(f"{server[1]}/v1/chat/completions", json=BODY, timeout=60)
        assert_refused(answer, says("log"), 500)
        assert "secret" not in answer.text
    assert at_rest(server[0]) and client_of(server[1]).models.list().data[0].id == NAME
