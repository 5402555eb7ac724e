"""The page of ``llava-pdrop demo`` in a real browser: what a visitor does, sees, and does wrong. All waiting is for a
condition of the page; a test has a page of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from PIL import Image

from llava_pdrop.serve.conversation import Conversation, Settings
from llava_pdrop.serve.demo import Demo
from tests.browser.conftest import ROOT, Asked, Served
from tests.messages import says

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="no gradio here: make test-browser"),
    pytest.mark.process,
    pytest.mark.xdist_group("browser"),
]
if importlib.util.find_spec("playwright") is not None:
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)

OWN = "256 > 128 > 64 > 32"
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class Visitor:
    """One page of one visitor."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.requests = page, list[str]()
        page.on("request", lambda request: self.requests.append(request.url))
        page.set_default_timeout(60_000)
        page.goto(address)
        expect(page.locator("#ask")).to_be_enabled()

    def upload(self, picture: Path) -> None:
        self.page.set_input_files("#picture input[type=file]", str(picture))
        expect(self.page.locator("#picture img")).to_have_count(1)

    def set(self, name: str, value: float | str) -> None:
        """The number beside a slider, as somebody types it."""
        box = self.page.locator(f"#{name} input[type=number]")
        box.fill(str(value))
        box.press("Tab")

    def ask(self, question: str) -> None:
        self.page.locator("#question textarea").fill(question)
        self.page.locator("#ask").click()

    def row(self, number: int) -> Any:
        """One of the two rows of the table: 0 vanilla, 1 with dropping."""
        return self.page.locator("#figures tbody tr").nth(number).locator("td")

    def answers(self, vanilla: str, dropping: str, stages: str = OWN) -> None:
        """Waits until the table says so."""
        expect(self.row(1).nth(2)).to_have_text(stages)
        expect(self.row(1).nth(1)).to_have_text(dropping)
        expect(self.row(0).nth(2)).to_have_text("256")
        expect(self.row(0).nth(1)).to_have_text(vanilla)

    def captions(self, place: str, count: int) -> list[str]:
        expect(self.page.locator(f"#{place} figure")).to_have_count(count)
        return self.page.locator(f"#{place} figcaption").all_inner_texts()

    def problem(self, message: str) -> None:
        expect(self.page.locator("#problem textarea")).to_have_value(re.compile(message))


@pytest.fixture
def visit(chromium: Any, demo: Served) -> Iterator[Callable[[], Visitor]]:
    """Opens the page; at the end nothing that any visitor's browser asked for was outside of this machine."""
    visitors = list[Visitor]()

    def one() -> Visitor:
        context = chromium.new_context(viewport={"width": 1180, "height": 1000})
        visitors.append(Visitor(context.new_page(), demo.address))
        return visitors[-1]

    yield one
    for visitor in visitors:
        asked = [url for url in visitor.requests if urlsplit(url).scheme not in ("data", "blob")]
        assert len(asked) > 10, "else nothing is shown"
        assert {f"http://{urlsplit(url).netloc}" for url in asked} == {demo.address}
        visitor.page.context.close()


@pytest.fixture(scope="module")
def own(evaluated: Any) -> list[str]:
    return evaluated()


@pytest.fixture(scope="module")
def vanilla(evaluated: Any) -> list[str]:
    return evaluated("pyramid_drop=null")


def test_answers_are_those_of_eval_and_stages_are_drawn(
    visit: Any, questions: list[Asked], own: list[str], vanilla: list[str]
) -> None:
    assert len(set(own)) > 2, "else nothing is shown"
    for number in range(3):
        visitor = visit()
        visitor.upload(questions[number].picture)
        visitor.ask(questions[number].question)
        visitor.answers(vanilla[number], own[number])
        assert visitor.captions("stages", 4) == [
            "at first: 256 tokens", "from layer 1 on: 128 tokens", "from layer 2 on: 64 tokens",
            "from layer 3 on: 32 tokens",
        ]  # fmt: skip
        assert visitor.page.locator("#vanilla [role=button]").all_inner_texts()[0].strip() == vanilla[number]
        assert visitor.page.evaluate("[...document.querySelectorAll('#stages img')].every(x => x.naturalWidth >= 320)")
        expect(visitor.page.locator("#problem")).to_be_hidden()


def test_sliders_are_the_schedule(visit: Any, questions: list[Asked], evaluated: Any, vanilla: list[str]) -> None:
    moved = evaluated("pyramid_drop.layers=[2]", "pyramid_drop.ratios=[0.125]")
    visitor = visit()
    expect(visitor.page.locator("#layer2")).to_be_visible()
    visitor.set("drops", 1)
    expect(visitor.page.locator("#layer1")).to_be_hidden()
    visitor.set("layer0", 2)
    visitor.set("ratio0", 0.125)
    visitor.upload(questions[3].picture)
    visitor.ask(questions[3].question)
    visitor.answers(vanilla[3], moved[3], "256 > 32")
    assert visitor.captions("stages", 2) == ["at first: 256 tokens", "from layer 2 on: 32 tokens"]
    visitor.set("ratio0", 0)
    visitor.page.locator("#ask").click()
    expect(visitor.row(1).nth(2)).to_have_text("256 > 0")


def test_a_click_on_a_token_shows_what_it_attended_to(visit: Any, run: Path, questions: list[Asked]) -> None:
    reference = Demo(Conversation.of(run, [], Settings()))
    found = reference.compare(questions[1].picture, questions[1].question, reference.sliders)
    visitor = visit()
    visitor.upload(questions[1].picture)
    visitor.ask(questions[1].question)
    expect(visitor.page.locator("#attention figure")).to_have_count(0)
    for place, dropping in (("dropping", True), ("vanilla", False)):
        expected = [caption for _, caption in reference.attention(found, dropping, 0)]
        assert expected[0].startswith("mean of layers 0 to 3: ") and len(expected) == 5
        visitor.page.locator(f"#{place} [role=button]").first.click()
        expect(visitor.page.locator("#attention figcaption")).to_have_text(expected)
    assert visitor.page.evaluate("[...document.querySelectorAll('#attention img')].every(x => x.naturalWidth >= 320)")
    if file := os.environ.get("LLAVA_PDROP_SCREENSHOT"):
        visitor.page.locator("#dropping [role=button]").first.click()
        expect(visitor.page.locator("#attention figcaption").first).not_to_have_text(expected[0])
        visitor.page.wait_for_function("!document.querySelector('.pending') && !document.getAnimations().length")
        with Image.open(BytesIO(visitor.page.screenshot(full_page=True))) as shot:
            shot.convert("RGB").quantize(160, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)


@pytest.fixture(scope="module")
def spoilt(questions: list[Asked], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures that are none, or too large for this server, by name."""
    home = tmp_path_factory.mktemp("spoilt")
    files = {name: home / f"{name}.png" for name in ("text", "cut", "wide", "heavy")}
    files["text"].write_text("no picture", encoding="utf-8")
    files["cut"].write_bytes(questions[0].picture.read_bytes()[:2000])
    Image.new("RGB", (1200, 1000)).save(files["wide"])
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(files["heavy"])
    return files | {"good": questions[0].picture}


@pytest.mark.parametrize(
    ("picture", "question", "values", "message"),
    [
        (None, "What?", {}, says("no picture")),
        ("good", "", {}, says("nothing is asked")),
        ("good", "  ", {}, says("nothing is asked")),
        ("text", "What?", {}, says("no picture of PNG")),
        ("cut", "What?", {}, says("the picture", "cannot be read")),
        ("wide", "What?", {}, says("1200 x 1000", "1,000,000")),
        ("good", "What?", {"drops": 0}, says("no drop")),
        ("good", "What?", {"layer0": 3}, says("pyramid_drop.layers", "grow")),
        ("good", "What?", {"ratio2": 0.75}, says("pyramid_drop.ratios", "grow")),
    ],
)
def test_what_is_wrong_is_one_line_and_the_page_goes_on(
    visit: Any, questions: list[Asked], own: list[str], vanilla: list[str], spoilt: dict[str, Path],
    picture: str | None, question: str, values: dict[str, float], message: str,
) -> None:  # fmt: skip
    visitor = visit()
    if picture is not None:
        visitor.upload(spoilt[picture])
    for name, value in values.items():
        visitor.set(name, value)
    visitor.ask(question)
    visitor.problem(message)
    assert "\n" not in visitor.page.locator("#problem textarea").input_value()
    expect(visitor.page.locator("#figures table")).to_have_count(0)
    visitor.page.reload()
    visitor.upload(questions[2].picture)
    visitor.ask(questions[2].question)
    visitor.answers(vanilla[2], own[2])


def test_after_a_wrong_question_the_same_page_answers(visit: Any, questions: list[Asked], own, vanilla) -> None:
    visitor = visit()
    visitor.upload(questions[4].picture)
    visitor.set("layer0", 3)
    visitor.ask(questions[4].question)
    visitor.problem(says("pyramid_drop.layers"))
    visitor.set("layer0", 1)
    visitor.page.locator("#ask").click()
    visitor.answers(vanilla[4], own[4])
    expect(visitor.page.locator("#problem")).to_be_hidden()


def test_a_file_that_is_too_large_is_not_taken(visit: Any, spoilt: dict[str, Path]) -> None:
    visitor = visit()
    visitor.page.set_input_files("#picture input[type=file]", str(spoilt["heavy"]))
    expect(visitor.page.get_by_text("exceed the maximum allowed size")).to_be_visible()
    visitor.ask("What?")
    visitor.problem(says("no picture"))


def test_visitors_at_one_time_have_each_their_own_schedule(
    visit: Any, questions: list[Asked], own: list[str], vanilla: list[str], evaluated: Any
) -> None:
    moved = evaluated("pyramid_drop.layers=[1]", "pyramid_drop.ratios=[0.0]")
    first, second = visit(), visit()
    second.set("drops", 1)
    second.set("ratio0", 0)
    for number in (5, 6):
        for visitor in (first, second):
            visitor.upload(questions[number].picture)
            visitor.page.locator("#question textarea").fill(questions[number].question)
        for visitor in (first, second):
            visitor.page.locator("#ask").click()
        first.answers(vanilla[number], own[number])
        second.answers(vanilla[number], moved[number], "256 > 0")
        for visitor in (first, second):
            visitor.page.locator("#picture").get_by_label("Remove Image").click()
            expect(visitor.page.locator("#picture img")).to_have_count(0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "{port}"], says("--port {port}", "another one")),
        (["--port", "99999"], says("--port", "99999")),
        (["--host", "203.0.113.9"], says("--host 203.0.113.9")),
    ],
)
def test_an_address_that_cannot_be_had_is_one_line(demo: Served, run: Path, words: list[str], message: str) -> None:
    port = str(urlsplit(demo.address).port)
    command = [sys.executable, "-m", "llava_pdrop", "demo", str(run), *(word.replace("{port}", port) for word in words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert re.search(message.replace(re.escape("{port}"), port), line)


def test_the_server_listens_here_only_and_speaks_with_nobody(demo: Served) -> None:
    own = psutil.Process(demo.pid).net_connections("inet")
    assert {entry.laddr.ip for entry in own if entry.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    spoken = set(demo.connections.read_text(encoding="utf-8").split())
    assert "127.0.0.1" in spoken, "else nothing is noted"
    assert spoken - {"None"} <= LOOPBACK
