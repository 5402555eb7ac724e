"""Templates: the text of a conversation and which of it is trained on."""

from __future__ import annotations

import json

import pytest

from llava_pdrop.data.conversation import TEMPLATES, image_to_front
from llava_pdrop.types import Turn


def turns(*texts):
    return [Turn("gpt" if i % 2 else "human", text) for i, text in enumerate(texts)]


def written(name, *texts):
    """The whole text, and the trained parts of it."""
    template = TEMPLATES[name]
    pieces = template.pieces(template.rounds(turns(*texts)))
    return "".join(p.text for p in pieces), [p.text for p in pieces if p.is_target]


def test_v1():
    text, targets = written("v1", "<image>\nWhat?", "A cat.", "Sure?", "Yes.", "And now?")
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT: A cat.</s>"
        "USER: Sure? ASSISTANT: Yes.</s>USER: And now? "
    )
    assert targets == [" A cat.</s>", " Yes.</s>"]


def test_plain_keeps_only_the_images_of_the_question():
    assert written("plain", "Describe <image> briefly.", "A cat.") == ("<image>A cat.\n", ["A cat.\n"])
    assert written("plain", "<image><image>", "Cats.")[0] == "<image><image>Cats.\n"


def test_qa():
    assert written("qa", "<image>\nWhich?", "7", "And?", "8") == ("<image>\nWhich? 7\nAnd? 8\n", [" 7\n", " 8\n"])


def test_empty_answers():
    assert written("v1", "What?", "", "Again?", "Yes.")[1] == [" Yes.</s>"]
    assert written("plain", "<image>", "")[1] == ["\n"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_stands_before_the_answer_in_training(name):
    template = TEMPLATES[name]
    conversation = turns("<image>\nWhat?", "A cat.") + ([] if name == "plain" else turns("Sure?", "Yes."))
    rounds = template.rounds(conversation)
    prompt = "".join(p.text for p in template.generation_prompt(rounds))
    *before, last = template.pieces(rounds)
    assert last.is_target and prompt == "".join(p.text for p in before)
    assert "".join(p.text for p in template.generation_prompt(template.rounds(conversation[:-1]))) == prompt
    assert template.stop and last.text.endswith(template.stop)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Look at <image> now. ", "<image>\nLook at  now."),
        ("Describe it.\n<image>", "<image>\nDescribe it."),
        ("<image>", "<image>"),
        (" no image ", " no image "),
        ("First <image>, then <image>?", "First <image>, then <image>?"),
    ],
)
def test_image_to_front(text, expected):
    assert image_to_front(text) == expected


@pytest.mark.parametrize(
    ("name", "conversation", "message"),
    [
        ("v1", [], "no question"),
        ("v1", [Turn("gpt", "Hi")], "no question"),
        ("v1", [Turn("gpt", "<image>"), *turns("What?", "A cat.")], "starts with an answer that shows an image"),
        ("v1", [Turn("human", "a"), Turn("human", "b")], "two turns by 'human' in a row"),
        ("v1", [*turns("a", "b"), Turn("gpt", "c")], "two turns by 'gpt' in a row"),
        ("plain", turns("What?", "A cat."), "exactly one question with an image"),
        ("plain", turns("<image>", "a", "b", "c"), "exactly one question with an image"),
    ],
)
def test_conversations_a_template_cannot_write(name, conversation, message):
    with pytest.raises(ValueError, match=message):
        TEMPLATES[name].rounds(conversation)


def test_a_greeting_is_left_out():
    assert TEMPLATES["v1"].rounds([Turn("gpt", "Welcome!"), *turns("What?", "A cat.")]) == [("What?", "A cat.")]


def test_prompts_equal_the_official_ones(golden):
    """get_prompt() of the official v1, questions with and without answer."""
    path = golden / "text" / "prompts.json"
    if not path.exists():
        pytest.skip("prompts.json is not in this reference directory")
    compared = 0
    for case in json.loads(path.read_text(encoding="utf-8")):
        if case["template"] not in ("v1", "vicuna_v1"):
            continue
        template = TEMPLATES["v1"]
        texts = [text for turn in case["turns"] for text in turn if text is not None]
        rounds = template.rounds(turns("<image>\n" + texts[0], *texts[1:]))
        open_question = case["turns"][-1][1] is None
        pieces = template.generation_prompt(rounds) if open_question else template.pieces(rounds)
        assert "".join(p.text for p in pieces) == case["prompt"]
        compared += 1
    assert compared
