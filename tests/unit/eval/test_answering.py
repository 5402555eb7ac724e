"""Batches of alike length, what is known already, questions that cannot be asked, and the end of an answer."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.errors import UserError
from llava_pdrop.eval.answering import ALIKE, Answer, answer_all, by_length
from llava_pdrop.eval.evaluate import evaluate
from llava_pdrop.eval.questions import ask, llava_json
from llava_pdrop.eval.respondent import LlavaRespondent
from llava_pdrop.schedule import Schedule
from tests.messages import says

DROP = Schedule((1, 2, 3), (0.5, 0.25, 0.125))


@pytest.fixture(scope="module")
def parts(tiny_files):
    torch.manual_seed(0)
    return build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"))


@pytest.fixture
def respondent(parts):
    return LlavaRespondent(parts, TEMPLATES["qa"])


@pytest.fixture
def questions(tiny_files):
    """Of several lengths, two without a picture."""
    picture = sorted((tiny_files / "data/images").glob("*.png"))[0]
    return [
        ask(str(i), "Which colour is it " * (1 + 5 * i % 7), [] if i in (2, 5) else [picture], f"q[{i}]", "x")
        for i in range(8)
    ]


def texts(answers):
    return [(answer.id, answer.text, answer.image_tokens) for answer in answers.answers]


def test_answers_are_those_one_by_one_and_in_the_order_of_the_questions(respondent, questions):
    alone = answer_all(respondent, questions, DROP, batch_size=1, max_new_tokens=4)
    together = answer_all(respondent, questions, DROP, batch_size=3, max_new_tokens=4)
    assert texts(alone) == texts(together)
    assert [answer.id for answer in alone.answers] == [question.id for question in questions]
    assert alone.answers[0].image_tokens == (16,) and alone.answers[2].image_tokens == ()
    assert all(answer.seconds > 0 for answer in together.answers)


def test_the_longest_are_asked_first(respondent, questions):
    order = by_length(respondent, questions)
    lengths = [len(respondent.prepare(questions[place]).input_ids) for place in order]
    alike = [length // ALIKE for length in lengths]
    assert alike == sorted(alike, reverse=True) and sorted(order) == list(range(8)) and len(set(alike)) > 1


def test_what_is_known_is_not_asked_again_and_all_else_is_kept(respondent, questions):
    known = {str(i): Answer(str(i), "known") for i in (0, 4)}
    kept: list[Answer] = []
    found = answer_all(respondent, questions, DROP, batch_size=3, max_new_tokens=2, known=known, keep=kept.extend)
    assert {answer.id for answer in kept} == {"1", "2", "3", "5", "6", "7"}
    assert [answer.text == "known" for answer in found.answers] == [i in (0, 4) for i in range(8)]
    whole = answer_all(respondent, questions, DROP, batch_size=3, max_new_tokens=2)
    assert [a.text for a in whole.answers if a.id not in known] == [a.text for a in found.answers if a.id not in known]


def test_random_drops_are_the_same_wherever_an_evaluation_was_stopped(respondent, questions):
    """Also in the middle of a batch, of which a kill kept a part."""
    random = replace(DROP, ranker="random")

    def drops(known=()):
        steps, torch_state = [], torch.get_rng_state()
        answer_all(respondent, questions, random, 3, 1, steps=steps, known={id: Answer(id, "") for id in known})
        torch.manual_seed(int(torch_state[0]) + 7)  # another state before the next one
        return [step.survivors for step in steps]

    whole = drops()
    order = [questions[place].id for place in by_length(respondent, questions)]
    assert drops() == whole
    assert drops(order[:3]) == drops(order[:4]) == whole[-len(drops(order[:3])) :] != whole


def test_a_picture_that_cannot_be_read_is_an_empty_answer_or_an_error(respondent, questions, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = ask("bad", "Which", [tmp_path / "bad.png"], "q[8]", "x")
    gone = ask("gone", "Which", [tmp_path / "gone.png"], "q[9]", "x")
    found = answer_all(respondent, [*questions, bad, gone], DROP, batch_size=4, max_new_tokens=2, strict=False)
    assert [answer.text for answer in found.answers[8:]] == ["", ""]
    assert "bad.png" in found.answers[8].problem and "gone.png" in found.answers[9].problem
    assert all(answer.problem is None for answer in found.answers[:8])
    with pytest.raises(UserError, match="bad.png"):
        answer_all(respondent, [*questions, bad], DROP)


def test_a_question_that_a_processor_refuses_costs_no_other_one(respondent, questions, monkeypatch):
    """As PaliGemma's does that has no picture."""
    original = LlavaRespondent.inputs

    def inputs(self, prepared, schedule):
        if not all(sample.images for sample in prepared):
            raise UserError("a picture is wanted")
        given, tokens = original(self, prepared, schedule)
        made.extend(map(weakref.ref, given.values()))
        return given, tokens

    made: list[weakref.ref[torch.Tensor]] = []
    monkeypatch.setattr(LlavaRespondent, "inputs", inputs)
    gc.collect()
    gc.disable()
    try:
        found = answer_all(respondent, questions, DROP, batch_size=8, max_new_tokens=2, strict=False)
        assert made and not any(tensor() is not None for tensor in made), "what is refused keeps no batch in memory"
    finally:
        gc.enable()
    assert [answer.problem is not None for answer in found.answers] == [i in (2, 5) for i in range(8)]
    assert all(answer.text for answer in found.answers if answer.problem is None)
    with pytest.raises(UserError, match=says("question", "wanted")):
        answer_all(respondent, questions, DROP, batch_size=8, max_new_tokens=2)


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_a_model_that_goes_on_behind_its_end_is_right(parts, tiny_files, monkeypatch, end):
    """A decoder leaves special tokens out, so that a stop text never matches in what it writes."""
    tokenizer = parts.tokenizer
    if tokenizer.convert_tokens_to_ids(end) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    template = replace(TEMPLATES["qa"], end=end)
    questions = llava_json(tiny_files / "data/eval.json", tiny_files / "data/images")
    golds = iter([question.gold for question in questions])

    def generate(input_ids, **options):
        rows = [tokenizer.encode(f"{next(golds)}{end} and more", add_special_tokens=False) for _ in input_ids]
        width = max(map(len, rows))
        rows = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(rows)], 1)

    monkeypatch.setattr(parts.hf, "generate", generate)
    result = evaluate(LlavaRespondent(parts, template), questions, batch_size=2)
    assert result.accuracy == 1.0, [entry.answer for entry in result.predictions]


def test_generate_is_told_the_ends_of_the_template(parts, questions, monkeypatch):
    """It would otherwise write to the last token allowed."""
    seen = {}

    def generate(input_ids, **options):
        seen.update(options)
        return torch.cat([input_ids, torch.zeros(len(input_ids), 1, dtype=torch.int64)], 1)

    monkeypatch.setattr(parts.hf, "generate", generate)
    respondent = LlavaRespondent(parts, TEMPLATES["qa"])
    answer_all(respondent, questions[:1])
    assert seen["eos_token_id"] == respondent.ends and respondent.ends
