"""Entries -> records: both layouts, what they say about training, and what cannot be shown."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from llava_pdrop.data.entries import parse_entry, unknown_keys
from llava_pdrop.data.images import image_size, load_image
from llava_pdrop.data.records import read_records
from llava_pdrop.errors import QUOTED, RecordError, clip
from llava_pdrop.types import Turn
from tests.messages import says

ROOT = Path("pictures")
KEYS = "'conversations'", "'messages'"
ASK, ANSWER = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}
TALK = [{"from": "human", "value": "What?"}, ANSWER]
USER, ASSISTANT = {"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}


def encoded(format: str = "PNG", size: tuple[int, int] = (30, 20)) -> str:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, format)
    return base64.b64encode(buffer.getvalue()).decode()


def parse(entry):
    return parse_entry(entry, ROOT, "d.json[0]")


def image(value, **more):
    return {"type": "image", "image": value, **more}


def text(value):
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("entry", "asked", "images"),
    [
        ({"image": "a.png", "conversations": [ASK, ANSWER]}, "<image>\nWhat?", ["a.png"]),
        ({"images": ["a.png"], "messages": [USER, ASSISTANT]}, "<image>What?", ["a.png"]),
        ({"images": [{"path": "a.png", "bytes": None}], "messages": [USER, ASSISTANT]}, "<image>What?", ["a.png"]),
        ({"images": ["a.png"], "conversations": [USER, ASSISTANT]}, "<image>What?", ["a.png"]),
        ({"image": "a.png", "images": ["a.png"], "messages": [USER, ASSISTANT]}, "<image>What?", ["a.png"]),
        ({"messages": [{"role": "user", "content": [image("a.png"), text("What?")]}]}, "<image>\nWhat?", ["a.png"]),
        (
            {"messages": [{"role": "user", "content": [text("Is"), image("a.png"), text("\nor"), image("b.png")]}]},
            "Is\n<image>\nor\n<image>",
            ["a.png", "b.png"],
        ),
        (
            {"messages": [{"role": "user", "content": [text("One"), text(" two\n"), text("\nthree")]}]},
            "One two\n\nthree",
            [],
        ),
        (
            {"images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "image"}, text("What?")]}]},
            "<image>\nWhat?",
            ["a.png"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]},
            "<image>",
            ["a.png"],
        ),
        (  # as a table of parts gives them, where every part has every key
            {"messages": [{"role": "user", "content": [{**text("What?"), "image": None, "image_url": None}]}]},
            "What?",
            [],
        ),
    ],
)
def test_both_layouts(entry, asked, images):
    record = parse(entry)
    assert record.turns[0] == Turn("human", asked) and record.images == tuple(ROOT / name for name in images)
    assert record.turns[1:] in ((), (Turn("gpt", "A cat."),)) and record.system is None


@pytest.mark.parametrize(
    "made",
    [
        lambda: f"data:image/png;base64,{encoded()}",
        lambda: f"data:image/jpeg;name=a.jpg;base64,{encoded('JPEG')}",
        lambda: f"DATA:image/png;base64,{encoded().replace('+', '%2B').replace('/', '%2F')}",
        lambda: encoded("WEBP"),
        lambda: encoded("GIF").rstrip("="),
        lambda: "\n".join(encoded("BMP")[i : i + 76] for i in range(0, 4000, 76)),
        lambda: {"url": f"data:image/png;base64,{encoded().translate(str.maketrans('+/', '-_'))}", "detail": "high"},
        lambda: {"base64": encoded("TIFF")},
    ],
)
def test_pictures_inside_a_record(made):
    for entry in (
        {"image": made(), "conversations": [ASK, ANSWER]},
        {"messages": [{"role": "user", "content": [image(made()), text("What?")]}]},
    ):
        (source,) = parse(json.loads(json.dumps(entry))).images
        assert image_size(source) == (30, 20) and load_image(source).mode == "RGB"
        assert len(str(source)) < QUOTED and source == parse(entry).images[0]


def test_file_addresses_are_paths(tmp_path):
    (source,) = parse({"image": f"file://{tmp_path}/a%20b.png", "conversations": [ASK, ANSWER]}).images
    assert source == tmp_path / "a b.png"


def test_a_broken_picture_inside_a_record_is_named_without_it(tmp_path):
    for letters in ("A" * 900_000, "é" * 5000, encoded()[:60]):
        path = tmp_path / "d.json"
        path.write_text(json.dumps([{"image": f"data:image/png;base64,{letters}", "conversations": [ASK, ANSWER]}]))
        (source,) = read_records(path)[0].images
        with pytest.raises(ValueError, match=says("base64 picture", f"{len(letters):,} characters")) as error:
            load_image(source)
        assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "entry",
    [
        {"image": "x" * 845_000, "conversations": [ASK, ANSWER]},
        {"id": "x" * 9000, "image": 3, "conversations": [ASK, ANSWER]},
        {"image": "ftp://" + "x" * 9000, "conversations": [ASK, ANSWER]},
        {"image": "data:" + "x" * 9000, "conversations": [ASK, ANSWER]},
        {"conversations": [{"from": "x" * 9000, "value": "Hi"}]},
        {"conversations": [{"from": "gpt", "value": "Hi", "loss": "x" * 9000}]},
        {"x" * 9000: 1},
        {"messages": [{"role": "user", "content": [{"type": "video" + "x" * 9000}]}]},
    ],
)
def test_no_message_holds_much_of_the_data(tmp_path, entry):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=says("d.json[0]")) as error:
        read_records(path)
    assert str(error.value).replace(str(tmp_path), "").count("x") < QUOTED


def test_clip_keeps_both_ends():
    assert clip("short") == "short" and len(clip("a" * 5000 + "end")) == QUOTED
    assert clip("a" * 5000 + "end").endswith("end") and "5,003 characters" in clip("a" * 5000 + "end")


# ---- what an entry says about training ----


@pytest.mark.parametrize(
    "mark", [{"loss": False}, {"weight": 0}, {"loss": 0}, {"weight": 0.0}, {"loss": False, "weight": 0}]
)
def test_answers_that_are_not_trained_on(mark):
    turns = [*TALK[:1], {**ANSWER, **mark}, TALK[0], ANSWER]
    assert [turn.learnt for turn in parse({"conversations": turns}).turns] == [True, False, True, True]
    messages = [{"role": "user", "content": "Hi"}, {**ASSISTANT, **mark}]
    assert [turn.learnt for turn in parse({"messages": messages}).turns] == [True, False]
    assert [turn.learnt for turn in parse({"conversations": TALK, **mark}).turns] == [True, False]  # the whole record


@pytest.mark.parametrize("mark", [{"loss": True}, {"weight": 1}, {"loss": None}, {"weight": 1.0, "loss": 1}])
def test_answers_that_are_trained_on(mark):
    assert parse({"conversations": [TALK[0], {**ANSWER, **mark}]}).turns[1].learnt


def test_a_question_may_say_that_it_is_not_trained_on():
    assert parse({"conversations": [{**TALK[0], "loss": False, "weight": 0}, ANSWER]}).turns[1].learnt


@pytest.mark.parametrize(
    "entry",
    [
        {"conversations": [{"from": "system", "value": "Be brief."}, *TALK]},
        {"system": "Be brief.", "conversations": TALK},
        {"system": "Be brief.", "conversations": [{"from": "system", "value": "Be brief."}, *TALK]},
        {"messages": [{"role": "system", "content": [text("Be brief.")]}, {"role": "user", "content": "What?"}]},
    ],
)
def test_system_prompts(entry):
    record = parse(entry)
    assert record.system == "Be brief." and record.turns[0] == Turn("human", "What?")


def test_an_empty_system_prompt_is_none():
    assert parse({"system": "", "conversations": [{"from": "system", "value": ""}, *TALK]}).system is None


# ---- what is refused ----


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, says(*KEYS, "instruction, input, output")),
        ({"prompt": "a", "response": "b", "image": "a.png"}, says(*KEYS, "prompt, response, image")),
        ({"conversations": TALK, "messages": [USER]}, says("both")),
        ({"messages": []}, says("'messages'", "at least one turn")),
        ({"messages": {"role": "user"}}, says("'messages'", "list")),
        ({"messages": [{"role": "system", "content": "Hi"}]}, says("beside the system prompt")),
        ({"messages": [{"role": "tool", "content": "3"}]}, says("messages[0]", "'tool'", "assistant")),
        ({"messages": [{"role": "assistant", "content": None}]}, says("messages[0]", "'content'")),
        ({"messages": [{**ASSISTANT, "tool_calls": [{"id": 1}]}]}, says("messages[0]", "'tool_calls'")),
        ({"messages": [{"role": "user", "content": "a", "from": "gpt", "value": "b"}]}, says("messages[0]", "'from'")),
        ({"video": "v.mp4", "conversations": TALK}, says("'video'", "cannot be shown")),
        ({"audios": ["a.wav"], "conversations": TALK}, says("'audios'", "cannot be shown")),
        ({"video_path": "v.mp4", "image": "a.png", "conversations": [ASK, ANSWER]}, says("'video_path'")),
        ({"conversations": [{**TALK[0], "video": "v.mp4"}, ANSWER]}, says("conversations[0]", "'video'")),
        ({"conversations": [{"from": "human", "value": "<video>\nA?"}, ANSWER]}, says("conversations[0]", "<video>")),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, says("content[0]", "'input_audio'")),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "v"}]}]}, says("content[0]", "'video'")),
        ({"conversations": [{**ASK, "value": "<image>\n<video>\nA?"}, ANSWER], "image": "a"}, says("[0]", "<video>")),
        ({"conversations": [{"from": "human", "value": "What moves?\n<video>"}, ANSWER]}, says("[0]", "<video>")),
        ({"conversations": [{"from": "human", "value": "<|audio|>Who?"}, ANSWER]}, says("[0]", "<|audio|>")),
        ({"movie": "a", "conversations": TALK}, says("'movie'", "cannot be shown")),
        ({"video_1": "a", "conversations": TALK}, says("'video_1'", "cannot be shown")),
        ({"video_frames": ["a.png"], "conversations": TALK}, says("'image'", "'video_frames'")),
        ({"source": "a/b.MP4", "conversations": TALK}, says("'source'", "a/b.MP4", "cannot be shown")),
        ({"media": [{"x": 1}, "b.wav?x=1"], "conversations": TALK}, says("'media'", "b.wav?x=1", "cannot be shown")),
        ({"meta": {"path": "a.mkv"}, "conversations": TALK}, says("'meta'", "a.mkv", "cannot be shown")),
        ({"conversations": [{**TALK[0], "file": "a.mp3"}, ANSWER]}, says("'conversations[0].file'", "a.mp3")),
        ({"messages": [{"role": "user", "content": [{**text("a"), "video": "v"}]}]}, says("content[0]", "'video'")),
        ({"messages": [{"role": "user", "content": [{**text("a"), "image": "b"}]}]}, says("content[0]", "two parts")),
        ({"messages": [{"role": "user", "content": [image("b", text="a")]}]}, says("content[0]", "two parts")),
        ({"messages": [{"role": "user", "content": [{"type": "box"}]}]}, says("content[0]", "'text'", "'image'")),
        ({"messages": [{"role": "user", "content": [7]}]}, says("content[0]", "'text'")),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, says("names no picture", "'images'")),
        ({"messages": [{"role": "user", "content": [image("a", url="b")]}]}, says("content[0]", "image, url")),
        ({"images": ["a"], "messages": [{"role": "user", "content": [image("b")]}]}, says("record", "parts")),
        ({"image_path": "a.png", "conversations": TALK}, says("'image'", "'image_path'")),
        ({"conversations": [{**TALK[0], "images": ["a.png"]}, ANSWER]}, says("conversations[0]", "'images'")),
        ({"image": "a", "images": ["b"], "conversations": [ASK, ANSWER]}, says("'image'", "'images'", "different")),
        ({"image": "https://x.org/a.png", "conversations": [ASK, ANSWER]}, says("https://x.org/a.png", "download")),
        ({"image": "file://[host/a.png", "conversations": [ASK, ANSWER]}, says("download")),
        ({"image": "data:video/mp4;base64,AAAA", "conversations": [ASK, ANSWER]}, says("data:video/mp4;base64")),
        ({"image": "data:image/png,%89PNG", "conversations": [ASK, ANSWER]}, says("data:image/png", "base64")),
        ({"image": {"path": "a", "url": "b"}, "conversations": [ASK, ANSWER]}, says("'image'", "file", "path, url")),
        ({"image": [{"bytes": "a"}], "conversations": [ASK, ANSWER]}, says("'image'", "file name", "keys bytes")),
        ({"image": ["a", ""], "conversations": [ASK, ANSWER]}, says("'image'", "file name", "empty text")),
        ({"system": ["Be brief."], "conversations": TALK}, says("'system'", "list")),
        ({"system": "A", "conversations": [{"from": "system", "value": "B"}, *TALK]}, says("two", "system prompts")),
        ({"system": "<image>", "image": "a", "conversations": TALK}, says("system prompt", "<image>")),
        ({"conversations": [*TALK, {"from": "system", "value": "B"}]}, says("conversations[2]", "system turn")),
        ({"conversations": [TALK[0], {**ANSWER, "weight": 0.5}]}, says("conversations[1]", "'weight'", "0.5")),
        ({"conversations": [TALK[0], {**ANSWER, "loss": "false"}]}, says("conversations[1]", "'loss'", "'false'")),
        ({"conversations": [TALK[0], {**ANSWER, "loss": True, "weight": 0}]}, says("'loss'", "'weight'", "contradict")),
        ({"conversations": TALK, "weight": 0.5}, says("the record", "'weight'", "0.5")),
        ({"conversations": TALK, "loss": "false"}, says("the record", "'loss'", "'false'")),
        ({"conversations": TALK, "loss": False, "weight": 1}, says("the record", "'loss'", "'weight'", "contradict")),
        ({"conversations": [{**TALK[0], "loss": True}, ANSWER]}, says("conversations[0]", "'loss'", "only answers")),
    ],
)  # fmt: skip
def test_entries_that_cannot_be_read(entry, message):
    with pytest.raises(RecordError, match=message) as error:
        parse({"id": "r", **entry})
    assert str(error.value).startswith("d.json[0] (id r): ") and "\n" not in str(error.value)


def test_what_only_looks_like_media_is_read():
    """HTML in a text, a number that says something about a film, a picture's path beside the picture."""
    page = "Write a page:\n<video>\n<source></video>"
    parse({"conversations": [{"from": "human", "value": page}, {"from": "gpt", "value": "<audio>"}]})
    parse({"video": None, "audio": [], "video_id": "7", "frames": 8, "conversations": TALK})
    parse({"image": "a.png", "image_path": "raw/a.png", "source": "film.mp4", "conversations": [ASK, ANSWER]})
    parse({"source": "shop.mp4.com/a", "conversations": [{**TALK[0], "value": "Is\n<video>\nHTML?"}, ANSWER]})


def test_keys_that_nobody_reads():
    turns = [{**TALK[0], "note": None}, {**ANSWER, "score": 3}]
    entry = {"id": 1, "model": "x", "loss": 2.31, "weight": 1, "conversations": turns}  # a loss that was measured
    assert parse(entry).turns[1].learnt
    assert unknown_keys(entry) == ["model", "loss", "conversations[].score"]
    entry = {"messages": [{"role": "user", "content": [image("a.png", detail="low", url=None)]}]}
    parse(entry)
    assert unknown_keys(entry) == ["messages[].content[].detail"]
