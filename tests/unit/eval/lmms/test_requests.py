"""What requests of lmms-eval ask."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

from llava_pdrop.errors import UserError
from llava_pdrop.eval.lmms.requests import MAX_NEW_TOKENS, Limits, asked, by_limits, limits_of, question_of
from llava_pdrop.eval.questions import ask
from tests.messages import meant, says

PICTURE = Image.new("RGB", (4, 4))
DOCUMENTS = {"t": {"test": [[PICTURE], [], None, "broken"]}}


def visuals(document):
    if document == "broken":
        raise OSError("cannot identify image file")
    return document


def request(doc_id=0, context="Which?", settings=None, padding=False):
    metadata = {"__padding_only__": True} if padding else {}
    return SimpleNamespace(args=(context, settings, visuals, doc_id, "t", "test"), metadata=metadata)


def test_a_picture_stands_in_front_as_in_our_benchmarks():
    question = question_of("t test[0]", "Which?", lambda: [PICTURE, PICTURE])
    (picture, _) = question.record.images
    same = ask("t test[0]", "Which?", [picture, picture], "t test[0]", "")
    assert question == same and question.record.turns[0].text == "<image>\n<image>\nWhich?"
    assert question_of("t test[0]", "Which?", lambda: None).record.turns[0].text == "Which?"


def test_markers_of_the_task_stay_where_they_are():
    question = question_of("t test[0]", "In <image> or <image>?", lambda: [PICTURE, PICTURE])
    assert question.record.turns[0].text == "In <image> or <image>?" and len(question.record.images) == 2
    with pytest.raises(UserError, match=says("t test[0]", "2", "1")):
        question_of("t test[0]", "In <image> or <image>?", lambda: [PICTURE])


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({}, Limits(MAX_NEW_TOKENS)),
        ({"max_new_tokens": 16, "temperature": 0, "do_sample": False, "num_beams": 1, "top_p": 1.0}, Limits(16)),
        ({"temperature": 0.2, "do_sample": False}, Limits()),  # mmvet
        ({"temperature": 0, "do_sample": True}, Limits()),
        ({"temperature": None, "top_p": None, "top_k": 3, "seed": 1, "image_aspect_ratio": "original"}, Limits()),
        ({"until": ["\n\n"]}, Limits()),
        ({"until": ["\n\n", "ASSISTANT:", ""]}, Limits(until=("ASSISTANT:",))),
        ({"until": "\n"}, Limits(until=("\n",))),
        ({"until": None}, Limits()),
    ],
)
def test_limits(settings, limits):
    assert limits_of("t", settings) == limits


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"temperature": 0.5}, ("sampling", "0.5", "do_sample=false,temperature=0")),
        ({"temperature": 0.5, "do_sample": True}, ("sampling", "0.5")),
        ({"do_sample": True}, ("sampling", "do_sample True")),
        ({"num_beams": 4}, ("num_beams 4",)),
        ({"max_new_tokens": 0}, ("max_new_tokens", "0")),
        ({"max_new_tokens": "x"}, ("max_new_tokens", "x")),
        ({"max_new_tokens": True}, ("max_new_tokens", "True")),
        ({"until": 6}, ("until", "6")),
        ({"until": [6]}, ("until", "6")),
        ({"max_new_token": 3}, ("max_new_token", meant("max_new_tokens"))),
        ({"repetition_penalty": 1.1}, ("repetition_penalty",)),
    ],
)
def test_what_is_not_offered_is_one_line_with_the_task(settings, parts):
    with pytest.raises(UserError, match=says("t", "generation_kwargs", *parts)):
        limits_of("t", settings)


def test_requests_in_their_order_each_question_once():
    twice, short = request(0), request(1, settings={"max_new_tokens": 3})
    found = asked([twice, short, twice, request(2), request(padding=True)], DOCUMENTS)
    assert [entry and entry.question.id for entry in found] == [
        "t test[0]",
        "t test[1]",
        "t test[0]",
        "t test[2]",
        None,
    ]
    groups = by_limits(found)
    assert {limits.max_new_tokens: len(group) for limits, group in groups.items()} == {MAX_NEW_TOKENS: 2, 3: 1}


def test_two_requests_about_one_document_are_two_questions():
    first, second = asked([request(0, "One?"), request(0, "Two?")], DOCUMENTS)
    assert first.question.id != second.question.id and second.question.text == "Two?"


def test_a_picture_that_cannot_be_read_is_kept_with_why():
    (found, other) = asked([request(3), request(0)], DOCUMENTS)
    assert "cannot identify image file" in found.problem and other.problem is None
    assert by_limits([found, other]) == {Limits(): [other.question]}
