"""POPE: every word but three is a yes."""

from __future__ import annotations

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.pope import POPE
from tests.messages import says
from tests.unit.eval.benchmarks.made import ask_of, numbers, write_lines

CATEGORIES = ("adversarial", "popular", "random")


@pytest.fixture
def made(tmp_path):
    rows = []
    for place, name in enumerate(CATEGORIES):
        labels = []
        for number, label in enumerate(("yes", "no", "yes", "no")):
            question = f"Is there a {name} {number}?"
            rows.append(ask_of(10_000_000 * place + number, f"{number}.jpg", question, category=name))
            labels.append({"question_id": number, "image": f"{number}.jpg", "text": question, "label": label})
        write_lines(tmp_path / "coco" / f"coco_pope_{name}.json", labels)
    write_lines(tmp_path / "llava_pope_test.jsonl", rows)
    return tmp_path, rows


def test_the_mean_of_three_is_printed(made) -> None:
    questions = POPE.read(made[0], True)
    assert [question.gold for question in questions] == ["yes", "no"] * 6
    found = numbers(POPE, questions, ["yes", "no", "yes", "no", *(["yes"] * 4), "no", "no", "no", "yes"])
    assert found["adversarial/f1"] == 1
    assert found["popular/f1"] == pytest.approx(2 / 3) and found["popular/yes_ratio"] == 1
    assert found["random/f1"] == 0 and found["random/precision"] == 0
    assert found[POPE.headline] == pytest.approx(5 / 9)


def test_the_mean_is_that_of_the_categories_that_are_asked(made) -> None:
    questions = POPE.read(made[0], True)
    assert numbers(POPE, questions[:4], ["yes", "no"] * 2)[POPE.headline] == 1
    assert numbers(POPE, questions[:8], ["yes", "no"] * 2 + ["yes"] * 4)[POPE.headline] == pytest.approx(5 / 6)


def test_two_other_rules_count_what_is_neither_word_differently(made) -> None:
    questions = POPE.read(made[0], True)[:4]
    answers = ["Yes", "no", "It is.", "Yes it is, no?"]
    lmms = numbers(POPE.also["lmms_eval"], questions, answers)
    assert lmms["pooled/accuracy"] == 0.5 and lmms["pooled/recall"] == 1 and lmms["pooled/yes_ratio"] == 0.5
    other = numbers(POPE.also["vlmevalkit"], questions, answers)
    assert other["Overall/acc"] == 50 and other["Overall/recall"] == 50 and other["Overall/precision"] == 100
    assert other["adversarial/Overall"] == pytest.approx(200 / 3) and other["random/Overall"] == 0


def test_what_was_never_answered_is_wrong(made) -> None:
    questions = POPE.read(made[0], True)
    assert numbers(POPE, questions, [None] * 12)["random/accuracy"] == 0
    assert numbers(POPE, questions, [""] * 12)["random/accuracy"] == 0.5


def test_labels_that_do_not_fit(made) -> None:
    root, rows = made
    write_lines(root / "llava_pope_test.jsonl", rows[1:])
    with pytest.raises(UserError, match=says("llava_pope_test.jsonl", "question_id 1", "coco_pope_adversarial.json")):
        POPE.read(root, True)
    write_lines(root / "llava_pope_test.jsonl", rows[:-1])
    with pytest.raises(UserError, match=says("llava_pope_test.jsonl", "3 questions", "coco_pope_random.json", "of 4")):
        POPE.read(root, True)
    write_lines(root / "llava_pope_test.jsonl", [*rows, ask_of(99, "0.jpg", "One more?", category="random")])
    with pytest.raises(UserError, match=says("question_id 99", "coco_pope_random.json")):
        POPE.read(root, True)
    write_lines(root / "llava_pope_test.jsonl", [ask_of(1, "0.jpg", "?", category="other")])
    with pytest.raises(UserError, match=says("question_id 1", "coco_pope_other.json")):
        POPE.read(root, True)
    write_lines(root / "llava_pope_test.jsonl", [rows[0], rows[0]])
    with pytest.raises(UserError, match=says("question_id 0", "2 times")):
        POPE.read(root, True)
    write_lines(root / "llava_pope_test.jsonl", rows)
    label = {"question_id": 1, "image": "0.jpg", "text": "?", "label": "Yes"}
    write_lines(root / "coco" / "coco_pope_random.json", [label])
    with pytest.raises(UserError, match=says("coco_pope_random.json", "question 1", "label", "Yes")):
        POPE.read(root, True)
