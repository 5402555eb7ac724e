"""What the demo's page shows, without the page: answers, stages, attention, and everything that it refuses."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_pdrop.__main__ import main
from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.errors import UserError
from llava_pdrop.eval import respondent as respondent_module
from llava_pdrop.eval.answering import answer_all
from llava_pdrop.eval.questions import ask
from llava_pdrop.eval.respondent import LlavaRespondent
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve import demo as demo_module
from llava_pdrop.serve.conversation import Conversation, Settings
from llava_pdrop.serve.demo import Demo, enlarged, pictures_of, pieces_of, table_of
from llava_pdrop.serve.pictures import Limits
from llava_pdrop.study.attended import attention_of
from tests.messages import says
from tests.unit.serve.conftest import DROP

QUESTION = "Which colour is it"
OWN = list(zip(DROP.layers, DROP.ratios))


@pytest.fixture
def demo(conversation: Conversation) -> Demo:
    conversation.take(DROP)
    return Demo(conversation, Limits(pixels=10_000, picture_bytes=5_000))


def answered(respondent: LlavaRespondent, picture: Path, schedule: Schedule) -> str:
    question = ask("q", QUESTION, [picture], "q", "")
    return answer_all(respondent, [question], schedule, max_new_tokens=6).answers[0].text


def test_both_answers_are_those_of_evaluation(demo: Demo, respondent: LlavaRespondent, pictures: list[Path]) -> None:
    demo.warm()
    for drops, schedule in ((OWN, DROP), ([(2, 0.25)], Schedule((2,), (0.25,)))):
        found = demo.compare(pictures[0], QUESTION, drops)
        assert found.vanilla.reply.text == answered(respondent, pictures[0], Schedule())
        assert found.dropping.reply.text == answered(respondent, pictures[0], schedule)
        assert found.vanilla.reply.stages == (16,) and not found.note
        assert found.dropping.reply.stages == (16, *(int(16 * ratio) for ratio in schedule.ratios))
        assert "".join(found.dropping.pieces).strip() == found.dropping.reply.text
    assert demo.conversation.turns == [], "nothing of one visitor is seen by the next"


def test_the_picture_at_every_stage(demo: Demo, pictures: list[Path]) -> None:
    shown = demo.stages(demo.compare(pictures[0], QUESTION, OWN))
    captions = [
        "at first: 16 tokens",
        "from layer 1 on: 8 tokens",
        "from layer 2 on: 4 tokens",
        "from layer 3 on: 2 tokens",
    ]
    assert [caption for _, caption in shown] == captions
    dark = [np.asarray(picture).max(-1) < 90 for picture, _ in shown]
    assert [round(16 * (1 - own.mean())) for own in dark] == [16, 8, 4, 2] and not dark[0].any()
    assert all(max(picture.size) >= 320 for picture, _ in shown)
    page = pictures_of(shown)
    assert page.count("<figure>") == 4 and "from layer 2 on: 4 tokens" in page and pictures_of([]) == ""


def test_pooled_pictures_have_a_stage_and_vanilla_its_own_patches(
    conversation: Conversation, pictures: list[Path]
) -> None:
    conversation.take(Schedule((2,), (0.5,), downsample=4))
    demo = Demo(conversation)
    found = demo.compare(pictures[0], QUESTION, demo.sliders)
    assert [caption for _, caption in demo.stages(found)] == ["at first: 4 tokens", "from layer 2 on: 2 tokens"]
    assert len(np.unique(found.vanilla.sight.token_RC)) == 16 and len(np.unique(found.dropping.sight.token_RC)) == 4
    none = demo.compare(pictures[0], QUESTION, [])
    assert none.dropping.reply.stages == (4,) and len(demo.stages(none)) == 1


def test_captions_tell_tokens_that_are_not_drawn(tiny_files: Path, tmp_path: Path) -> None:
    """Of a LLaVA-NeXT's 52 tokens 16 are the whole picture's and 4 newlines."""
    torch.manual_seed(0)
    parts = build_parts(
        language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"), aspect="anyres",
        merge="spatial_unpad", pinpoints=((48, 96), (96, 48), (96, 96)),
    )  # fmt: skip
    Image.new("RGB", (90, 40), (200, 30, 30)).save(tmp_path / "wide.png")
    demo = Demo(Conversation(LlavaRespondent(parts, TEMPLATES["qa"]), DROP, Settings(max_new_tokens=2)))
    found = demo.compare(tmp_path / "wide.png", QUESTION, [(2, 0.5)])
    first, later = (caption for _, caption in demo.stages(found))
    assert first == "at first: 52 tokens, 32 drawn"
    assert re.fullmatch(r"from layer 2 on: 26 tokens, \d+ drawn", later)
    for dropping in (False, True):
        for _, caption in demo.attention(found, dropping, 0):
            whole, drawn = re.search(r": ([\d.]+)% on the picture, ([\d.]+)% on the patches drawn$", caption).groups()
            assert 0 < float(drawn) < float(whole) < 100


def test_attention_is_recorded_once_and_named_by_its_layers(demo: Demo, pictures: list[Path], monkeypatch) -> None:
    calls = list[int]()
    monkeypatch.setattr("llava_pdrop.serve.demo.attention_of", lambda *a: calls.append(1) or attention_of(*a))
    found = demo.compare(pictures[0], QUESTION, [(1, 0.5), (3, 0.125)])
    first, again = demo.attention(found, True, 0), demo.attention(found, True, 0)
    assert [picture.tobytes() for picture, _ in first] == [picture.tobytes() for picture, _ in again] and len(
        calls
    ) == 1
    names = [caption.split(":")[0] for _, caption in first]
    assert names == ["mean of layers 0 to 3", "layer 0", "mean of layers 1 to 2", "layer 3"]
    seen = attention_of(
        demo.conversation.respondent, found.dropping.written.question, found.dropping.written.ids[:1],
        found.dropping.schedule,
    )  # fmt: skip
    shares = [float(seen.weight_QLN[0, layers].mean(0).sum()) for layers in ([0, 1, 2, 3], [0], [1, 2], [3])]
    assert [caption.split()[-4] for _, caption in first] == [f"{share:.1%}" for share in shares]
    demo.attention(found, False, 0)
    assert len(calls) == 2, "the vanilla answer has a forward of its own"
    with pytest.raises(UserError, match=says("no token 99")):
        demo.attention(found, True, 99)


def test_the_table_says_what_each_answer_took_and_is_no_markup(demo: Demo, pictures: list[Path]) -> None:
    found = demo.compare(pictures[0], QUESTION, OWN)
    found.vanilla.reply = replace(found.vanilla.reply, text="<b>&", finished=False)
    table = table_of(found)
    assert "&lt;b&gt;&amp; [cut]" in table and "<b>" not in table
    for words in ("16 &gt; 8 &gt; 4 &gt; 2", f"{found.dropping.reply.prompt_tokens} tokens", "KiB", "ms"):
        assert words in table


def files(directory: Path, pictures: list[Path]) -> dict[str, Path | None]:
    """Pictures that are none, by name."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(directory / "heavy.png")
    Image.new("RGB", (200, 100)).save(directory / "wide.png")
    (directory / "text.png").write_text("no picture")
    (directory / "empty.png").write_bytes(b"")
    (directory / "cut.png").write_bytes(pictures[0].read_bytes()[:60])
    names = ("heavy", "wide", "text", "empty", "cut")
    return {name: directory / f"{name}.png" for name in names} | {"none": None, "good": pictures[0]}


@pytest.mark.parametrize(
    ("picture", "question", "drops", "message"),
    [
        ("none", QUESTION, OWN, says("no picture")),
        ("heavy", QUESTION, OWN, says("5,000 bytes")),
        ("wide", QUESTION, OWN, says("200 x 100", "10,000")),
        ("text", QUESTION, OWN, says("PNG", "JPEG")),
        ("empty", QUESTION, OWN, says("PNG", "JPEG")),
        ("cut", QUESTION, OWN, says("the picture", "cannot be read")),
        ("good", " ", OWN, says("nothing is asked")),
        ("good", "a <image>", OWN, says("<image>")),
        ("good", QUESTION, [], says("no drop", "vanilla")),
        ("good", QUESTION, [(2, 0.5), (1, 0.25)], says("pyramid_drop.layers", "grow")),
        ("good", QUESTION, [(1, 0.25), (2, 0.5)], says("pyramid_drop.ratios", "grow")),
        ("good", QUESTION, [(4, 0.25)], says("4", "4 layers")),
        ("good", QUESTION, [(1, 1.5)], says("pyramid_drop.ratios", "[0, 1]")),
        ("good", QUESTION, [(None, 0.5)], says("without a number")),
        ("good", QUESTION, [(1, None)], says("without a number")),
        ("good", QUESTION, [(1, 0.5), (1.7, 0.25)], says("layer of drop 2", "whole", "1.7")),
        ("good", QUESTION, [(math.nan, 0.5)], says("layer of drop 1", "nan")),
        ("good", QUESTION, [(math.inf, 0.5)], says("layer of drop 1", "inf")),
        ("good", QUESTION, [("1", 0.5)], says("layer of drop 1", "'1'")),
        ("good", QUESTION, [(True, 0.5), (2, 0.25), (3, 0.125)], says("layer of drop 1", "True")),
        ("good", QUESTION, [(10**4000, 0.5)], says("layer of drop 1", "4,001 characters")),
        ("good", QUESTION, [([1], 0.5)], says("layer of drop 1", "a list")),
        ("good", QUESTION, [(1, math.nan)], says("share", "drop 1", "nan")),
        ("good", QUESTION, [(1, -math.inf)], says("share", "drop 1", "-inf")),
        ("good", QUESTION, [(1, {})], says("share", "drop 1", "a dict")),
        ("good", QUESTION, [(1, True)], says("share", "drop 1", "True")),
        ("good", None, OWN, says("no text")),
        ("good", ["a"], OWN, says("no text")),
        ("good", "a" * 4001, OWN, says("4,001 characters", "4,000")),
    ],
)
def test_what_is_refused_is_one_line(
    demo: Demo, pictures: list[Path], tmp_path: Path, picture: str, question: object, drops: list, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        demo.compare(files(tmp_path, pictures)[picture], question, drops)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert not re.search("/clear|replace or remove", str(error.value)), "these are no words of a page"
    assert demo.compare(pictures[0], QUESTION, OWN).dropping.reply.stages == (16, 8, 4, 2), "it goes on"


def test_a_long_question_is_not_tokenised(demo: Demo, pictures: list[Path], monkeypatch) -> None:
    monkeypatch.setattr(Conversation, "ask", lambda *given: pytest.fail("it was asked"))
    with pytest.raises(UserError, match=says("60,000,000 characters")):
        demo.compare(pictures[0], "a " * 30_000_000, OWN)


def test_a_question_that_the_model_has_no_room_for_is_refused_in_words_of_the_page(
    demo: Demo, pictures: list[Path]
) -> None:
    with pytest.raises(UserError, match=says("2048", "shorter question")) as error:
        demo.compare(pictures[0], "a " * 2000, OWN)
    assert "/clear" not in str(error.value)


@pytest.mark.parametrize("sent", [1.9, math.nan, math.inf, "3", None, True, [3], -1, 7, 10**4000])
def test_the_number_of_drops_is_a_whole_one(demo: Demo, sent: object) -> None:
    assert demo.count(3, 6) == 3 and demo.count(0.0, 6) == 0
    with pytest.raises(UserError, match=says("number of drops")) as error:
        demo.count(sent, 6)
    assert len(str(error.value)) < 120


def test_both_answers_pay_for_reading_the_picture(demo: Demo, pictures: list[Path], monkeypatch) -> None:
    read, begun = list[str](), list[str]()
    own, side = respondent_module.preprocess, Demo._side
    monkeypatch.setattr(respondent_module, "preprocess", lambda *given: read.append(begun[-1]) or own(*given))

    def noted(self: Demo, shown, question, schedule: Schedule, settings):
        begun.append("vanilla" if schedule.vanilla else "dropping")
        return side(self, shown, question, schedule, settings)

    monkeypatch.setattr(Demo, "_side", noted)
    begun.append("outside")
    for _ in range(2):
        demo.compare(pictures[0], QUESTION, OWN)
    assert read == ["vanilla", "dropping"] * 2, "each within its own seconds, the same picture again too"


def test_the_first_attention_picture_is_of_all_layers_where_the_picture_enters_later(
    conversation: Conversation, pictures: list[Path]
) -> None:
    conversation.take(Schedule((2,), (0.5,), inject=1))
    demo = Demo(conversation)
    found = demo.compare(pictures[0], QUESTION, demo.sliders)
    for side, dropping in ((found.vanilla, False), (found.dropping, True)):
        own = demo.attention(found, dropping, 0)
        names = [caption.split(":")[0] for _, caption in own]
        assert names == ["mean of layers 0 to 3", "layer 1", "mean of layers 2 to 3"]
        seen = attention_of(demo.conversation.respondent, side.written.question, side.written.ids[:1], side.schedule)
        assert f"{float(seen.weight_QLN[0].mean(0).sum()):.1%}" in own[0][1]
        assert bool(seen.alive_LN[0].any()) is not dropping and (seen.weight_QLN[0, 0].sum() > 0) != dropping
    found = demo.compare(pictures[0], QUESTION, [(1, 0.5)])
    names = [caption.split(":")[0] for _, caption in demo.attention(found, True, 0)]
    assert names == ["mean of layers 0 to 3", "mean of layers 1 to 3"]


def test_sliders_begin_with_the_models_schedule_or_the_papers(respondent: LlavaRespondent) -> None:
    def begun(schedule: Schedule) -> Demo:
        return Demo(Conversation(respondent, schedule, Settings()))

    assert begun(DROP).sliders == OWN and begun(DROP).schedule(OWN) is DROP
    assert begun(Schedule()).own == Schedule((1, 2, 3), (0.5, 0.25, 0.125))
    counts = begun(Schedule((1, 2), keep=(9, 3), ranker=("fastv", "random"), merge="nearest"))
    assert counts.sliders == [(1, 0.5), (2, 0.25)] and counts.schedule(counts.sliders).keep == (9, 3)
    moved = counts.schedule([(1, 0.5), (3, 0.25)])
    assert (moved.keep, moved.ratios, moved.ranker, moved.merge) == ((), (0.5, 0.25), ("fastv", "random"), "nearest")
    assert counts.schedule([(3, 0.25)]).ranker == "fastv"


def test_two_visitors_do_not_mix_schedules(demo: Demo, pictures: list[Path]) -> None:
    asked = [(pictures[number % 2], [(1 + number % 3, 0.5 / (1 + number % 2))]) for number in range(6)]
    alone = [demo.compare(picture, QUESTION, drops).dropping.reply for picture, drops in asked]
    found: dict[int, tuple] = {}

    def visit(number: int) -> None:
        shown = demo.compare(asked[number][0], QUESTION, asked[number][1])
        demo.attention(shown, True, 0)
        found[number] = (shown.dropping.reply.text, shown.dropping.reply.stages)

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(6)] == [(reply.text, reply.stages) for reply in alone]


def test_other_families_are_shown_and_those_on_no_grid_are_answered_without_pictures(
    vip: Path, pictures: list[Path], monkeypatch
) -> None:
    demo = Demo(Conversation.of(vip, [], Settings(max_new_tokens=4)))
    found = demo.compare(pictures[0], QUESTION, demo.sliders)
    assert len(demo.stages(found)) == 4 and len(demo.attention(found, True, 0)) == 5
    refuse = UserError("its tokens lie on no single grid")
    monkeypatch.setattr("llava_pdrop.serve.demo.sight_of", lambda *a: (_ for _ in ()).throw(refuse))
    found = demo.compare(pictures[0], QUESTION, demo.sliders)
    assert found.note == str(refuse) and demo.stages(found) == [] and found.dropping.reply.tokens
    with pytest.raises(UserError, match=says("no single grid")):
        demo.attention(found, True, 0)


def test_a_character_of_several_tokens_is_one_piece(respondent: LlavaRespondent) -> None:
    ids = respondent.tokenizer("né!").input_ids
    ids = [token for token in ids if token != respondent.tokenizer.bos_token_id]
    assert pieces_of(ids, respondent) == ["n", "", "é", "!"]
    assert pieces_of([*ids, respondent.ends[0], *ids], respondent) == ["n", "", "é", "!"]


def test_small_pictures_are_drawn_larger_by_whole_patches() -> None:
    assert enlarged(Image.new("RGB", (48, 30))).size == (336, 210)
    assert enlarged(Image.new("RGB", (500, 30))).size == (500, 30)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Demo, str, str, int]]:
    """What would be shown, and where, as if gradio were here."""
    given = list[tuple]()
    page = SimpleNamespace(serve=lambda *own: given.append(own))
    monkeypatch.setitem(sys.modules, "llava_pdrop.serve.page", page)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "gradio" or None)
    return given


def test_what_is_given_holds(vip: Path, started: list) -> None:
    words = ["--port", "0", "--max-new-tokens", "7", "--most-pixels", "8", "--most-bytes", "9"]
    assert main(["demo", str(vip), "pyramid_drop={layers: [2], ratios: [0.5]}", *words]) == 0
    ((demo, title, host, port),) = started
    assert demo.sliders == [(2, 0.5)] and demo.conversation.settings.max_new_tokens == 7
    assert (demo.limits.pixels, demo.limits.picture_bytes, host, port) == (8, 9, "127.0.0.1", 0) and "vip" in title


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone"], says("gone")),
        (["{vip}", "other"], says("other", "one model")),
        (["{vip}", "--max-new-tokens", "0"], says("--max-new-tokens", "0")),
        (["{vip}", "--most-pixels", "0"], says("--most-pixels", "0")),
        (["{vip}", "--most-bytes", "0"], says("--most-bytes", "0")),
        (["{vip}", "pyramid_drop={layers: [9], ratios: [0.5]}"], says("pyramid_drop.layers", "9")),
    ],
)
def test_a_wrong_command_line_is_one_line(
    words: list[str], message: str, vip: Path, started: list, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *(word.replace("{vip}", str(vip)) for word in words)]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1]) and not started


def test_without_gradio_one_line_says_how_to_get_it(vip: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", str(vip)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(says("gradio", "pillow", "scripts/beside.sh demo", "llava_pdrop[demo]"), line)


def test_only_the_page_imports_gradio() -> None:
    own = Path(demo_module.__file__).parents[1]
    found = [file.name for file in own.rglob("*.py") if re.search(r"^\s*(import|from) gradio", file.read_text(), re.M)]
    assert found == ["page.py"]
