"""The server of ``llava-pdrop demo`` without its page: what a program may send instead. All of it is answered in one
line, with nothing in the log, and the next request is answered."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser.conftest import Asked, Served
from tests.messages import says

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="no gradio here: make test-browser"),
    pytest.mark.process,
    pytest.mark.xdist_group("browser"),
]

NAMES = ("layer", "ratio")


class Program:
    """What speaks with the server without the page."""

    def __init__(self, demo: Served) -> None:
        self.address = demo.address
        entries = httpx.get(f"{demo.address}/config").json()["dependencies"]
        (self.ask,) = (entry for entry in entries if len(entry["inputs"]) > 5)
        self.clicks = [entry for entry in entries if len(entry["inputs"]) == 1 and len(entry["outputs"]) == 2]
        (self.drops,) = (entry for entry in entries if len(entry["outputs"]) == 6)

    def upload(self, picture: Path) -> str:
        with picture.open("rb") as file:
            return httpx.post(f"{self.address}/gradio_api/upload", files={"files": file}).json()[0]

    def values(self, picture: Any, question: Any, **other: Any) -> list[Any]:
        """What the page would send, but for ``other`` values by the names of `gr.Slider`."""
        given = {"drops": 3} | {f"layer{drop}": drop + 1 for drop in range(6)}
        given |= {f"ratio{drop}": 0.5 ** (drop + 1) for drop in range(6)} | other
        return [picture, question, given["drops"], *(given[f"{k}{drop}"] for drop in range(6) for k in NAMES)]

    def post(self, function: dict[str, Any], data: Any, session: str, event: Any = None) -> httpx.Response:
        body = {"data": data, "fn_index": function["id"], "session_hash": session, "event_data": event}
        return httpx.post(f"{self.address}/gradio_api/queue/join", json=body, timeout=60)

    def told(self, function: dict[str, Any], data: list[Any], session: str, event: Any = None) -> list[Any]:
        """What the function returns."""
        self.post(function, data, session, event).raise_for_status()
        url = f"{self.address}/gradio_api/queue/data?session_hash={session}"
        with httpx.stream("GET", url, timeout=60) as stream:
            completed = next(line for line in stream.iter_lines() if "process_completed" in line)
        message = json.loads(completed.removeprefix("data:"))
        assert message["success"], completed[:500]
        return message["output"]["data"]


@pytest.fixture(scope="module")
def program(demo: Served) -> Program:
    return Program(demo)


@pytest.fixture
def quiet(demo: Served) -> Iterator[None]:
    """Nothing comes into the log meanwhile."""
    before = demo.log.read_text(encoding="utf-8")
    yield
    assert demo.log.read_text(encoding="utf-8") == before


def problem_of(told: list[Any]) -> str:
    assert told[0]["visible"] and not any(told[1:]), "nothing is answered"
    assert "\n" not in told[0]["value"] and len(told[0]["value"]) <= 500
    return told[0]["value"]


@pytest.mark.parametrize(
    "meta", [{"meta": {"_type": "gradio.FileData"}}, {}, {"meta": 5}], ids=["marked", "bare", "odd"]
)
@pytest.mark.parametrize(
    "path", ["http://pictures.example/x.png", "{secret}", "{fifo}", "/dev/stdin", "/nowhere", "data:"]
)
def test_requests_without_the_page_get_nothing_from_elsewhere(
    program: Program, quiet: None, questions: list[Asked], tmp_path: Path, path: str, meta: dict[str, Any]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    secret = str(questions[0].picture)  # a readable picture, which was not uploaded
    path = path.replace("{secret}", secret).replace("{fifo}", str(tmp_path / "fifo"))
    path += "image/png;base64," + "A" * 10_000 if path == "data:" else ""
    told = program.told(program.ask, program.values({"path": path, **meta}, "What?"), f"{tmp_path.name}")
    assert re.search(says("was not uploaded"), problem_of(told))


@pytest.mark.parametrize(
    ("question", "other", "message"),
    [
        (None, {}, says("no text")), (5, {}, says("no text")), (["a"], {}, says("no text")),
        ("a" * 100_000, {}, says("100,000 characters")),
        ("What?", {"layer0": 1.7}, says("layer of drop 1", "1.7")), ("What?", {"layer0": "a"}, says("layer of drop 1")),
        ("What?", {"ratio1": [1]}, says("drop 2", "a list")), ("What?", {"ratio1": True}, says("drop 2", "True")),
        ("What?", {"layer0": None}, says("without a number")), ("What?", {"layer0": {"path": "/x"}}, says("a dict")),
        ("What?", {"drops": 1.9}, says("number of drops", "1.9")), ("What?", {"drops": "3"}, says("number of drops")),
        ("What?", {"drops": 100}, says("number of drops", "100")), ("What?", {"drops": None}, says("number of drops")),
    ],
)  # fmt: skip
def test_values_of_another_type_are_one_line(
    program: Program, quiet: None, questions: list[Asked], question: Any, other: dict[str, Any], message: str
) -> None:
    picture = {"path": program.upload(questions[0].picture), "meta": {"_type": "gradio.FileData"}}
    told = program.told(program.ask, program.values(picture, question, **other), f"values{question!r:.9}{other}")
    assert re.search(message, problem_of(told))
    shown = program.told(program.drops, [other.get("drops", 2)], "rows")
    assert sum(row["visible"] for row in shown) == (2 if "drops" not in other else 0)


def test_clicks_on_no_token_are_one_line(program: Program, quiet: None, questions: list[Asked]) -> None:
    picture = {"path": program.upload(questions[0].picture), "meta": {"_type": "gradio.FileData"}}
    assert program.told(program.ask, program.values(picture, questions[0].question), "clicks")[0]["visible"] is False
    for click in program.clicks:
        for event in (None, {}, [], "x", {"index": "a"}, {"index": [0, 1]}, {"index": None}, {"path": "/etc/hostname"}):
            assert re.search(says("no token"), problem_of(program.told(click, [None], "clicks", event)))
        assert re.search(says("no token 99"), problem_of(program.told(click, [None], "clicks", {"index": 99})))
        assert re.search(says("ask again"), problem_of(program.told(click, [{}], "others", {"index": 0})))
        assert "figure" in program.told(click, [None], "clicks", {"index": 0})[1]


def test_large_requests_are_refused_and_others_go_on(program: Program, quiet: None, questions: list[Asked]) -> None:
    picture = {"path": program.upload(questions[0].picture), "meta": {"_type": "gradio.FileData"}}
    large = program.post(program.ask, program.values(picture, "a" * 2**20), "large")
    assert large.status_code == 413 and re.search(says("1,048,576 bytes"), large.json()["detail"])
    files = [("files", ("a.png", b"0" * 250_000))] * 8
    many = httpx.post(f"{program.address}/gradio_api/upload", files=files)
    assert many.status_code == 413 and re.search(says("bytes"), many.json()["detail"])
    assert "table" in program.told(program.ask, program.values(picture, questions[0].question), "after")[2]
