"""Answers of the loop are those of the same requests one by one, whoever joins or leaves beside them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_pdrop.errors import UserError
from llava_pdrop.eval.answering import answer_all
from llava_pdrop.eval.questions import Question, ask
from llava_pdrop.eval.respondent import LlavaRespondent, open_respondent
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve.loop import Finish, Job, Late, Loop
from llava_pdrop.serve.sampling import Sampler
from tests.messages import says
from tests.unit.serve.conftest import DROP

WAIT = 60
SCHEDULES = (DROP, Schedule(), Schedule((2, 3), (0.5, 0.1), inject=2), Schedule((1, 2), (0.5, 0.25), positions="keep"))


class Asked:
    """A request and what comes of it."""

    def __init__(self, respondent: Any, question: Question, schedule: Schedule, most: int, **job: Any) -> None:
        inputs, tokens = respondent.inputs([respondent.prepare(question)], schedule)
        self.question, self.schedule, self.most = question, schedule, most
        self.pieces, self.ends = list[str](), queue.Queue[Any]()
        job = {"sampler": Sampler()} | job
        self.job = Job(inputs, tokens[0], schedule, most, say=self.pieces.append, end=self.ends.put, **job)

    def finish(self) -> Finish:
        found = self.ends.get(timeout=WAIT)
        assert isinstance(found, Finish) and self.ends.empty(), found
        assert "".join(self.pieces) == found.text
        return found


def questions(pictures: list[Path]) -> list[Question]:
    """Of no picture, one, two and three, short and long."""
    texts = ["Which colour is it", "Hm", "And this one here, what would you say of it", "Is it red or blue"]
    return [ask(f"q{n}", text, pictures[: n % 4], "q", "") for n, text in enumerate(texts * 4)]


@pytest.fixture
def loop(respondent: LlavaRespondent) -> Iterator[Loop]:
    made = Loop(respondent, rows=5).start()
    yield made
    made.stop()


def idle(loop: Loop) -> bool:
    """Whether it comes to rest."""
    for _ in range(WAIT * 100):
        if not loop.running and not loop.waiting:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("mixed", [False, True], ids=["one schedule", "four schedules"])
def test_greedy_answers_are_those_of_generate(
    loop: Loop, respondent: LlavaRespondent, pictures: list[Path], mixed: bool
) -> None:
    asked = [
        Asked(respondent, question, SCHEDULES[n * mixed % 4], most=1 + 3 * (n % 5))
        for n, question in enumerate(questions(pictures))
    ]
    for one in asked:
        loop.submit(one.job)
    finishes = [one.finish() for one in asked]
    loop.stop()
    for one, finish in zip(asked, finishes):
        options = {"schedule": one.schedule, "max_new_tokens": one.most}
        (answer,) = answer_all(respondent, [one.question], **options).answers
        assert finish.text == answer.text and 1 <= finish.tokens <= one.most
        assert (finish.reason == "length") <= (finish.tokens == one.most)
        entering, shown = sum(answer.image_tokens), len(one.question.record.images)
        assert finish.stages[0] == entering == 16 * shown
        kept = [shown * int(16 * ratio) for ratio in one.schedule.ratios] if shown else []
        assert list(finish.stages[1:]) == kept


def test_drawn_answers_are_those_of_the_seed(loop: Loop, respondent: LlavaRespondent, pictures: list[Path]) -> None:
    def drawn(question: Question, seed: int) -> Asked:
        return Asked(respondent, question, DROP, 12, sampler=Sampler(1.2, 0.95, seed))

    alone = []
    for seed, question in enumerate(questions(pictures)):
        one = drawn(question, seed)
        loop.submit(one.job)
        alone.append(one.finish())
    together = [drawn(question, seed) for seed, question in enumerate(questions(pictures))]
    for one in together:
        loop.submit(one.job)
    assert [one.finish() for one in together] == alone
    texts = set()
    for seed in range(6):
        one = drawn(questions(pictures)[1], seed)
        loop.submit(one.job)
        texts.add(one.finish().text)
    assert len(texts) > 1


def test_rows_that_join_and_leave_at_every_step(
    respondent: LlavaRespondent, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request arrives at every turn of the loop, and every third is left in the middle of its answer."""
    made = Loop(respondent, rows=4)
    asked = [
        Asked(respondent, question, SCHEDULES[n % 2], most=4 + n % 3) for n, question in enumerate(questions(pictures))
    ]
    arriving, turn = iter(asked), made._turn

    def a_turn() -> None:
        if (one := next(arriving, None)) is not None:
            made.submit(one.job)
        for gone in asked[2::3]:
            gone.job.left = gone.job.left or len(gone.pieces) >= 2
        turn()

    monkeypatch.setattr(made, "_turn", a_turn)
    made.submit(next(arriving).job)
    made.start()
    ends = [one.ends.get(timeout=WAIT) for one in asked]
    made.stop()
    finished = [(one, end) for one, end in zip(asked, ends) if isinstance(end, Finish)]
    assert len(finished) >= 10 and all(isinstance(end, Finish | Late) for end in ends)
    assert all(one.job.left for one, end in zip(asked, ends) if isinstance(end, Late))
    for one, end in finished:
        options = {"schedule": one.schedule, "max_new_tokens": one.most}
        assert answer_all(respondent, [one.question], **options).answers[0].text == end.text


def test_an_answer_ends_at_a_stop_text(loop: Loop, respondent: LlavaRespondent, pictures: list[Path]) -> None:
    (question, *_) = questions(pictures)
    whole = Asked(respondent, question, DROP, 24)
    loop.submit(whole.job)
    text = whole.finish().text
    stop = next(text[n : n + 2] for n in range(1, len(text) - 3) if len(text[n : n + 2].strip()) == 2)
    cut = Asked(respondent, question, DROP, 24, stops=(stop,))
    loop.submit(cut.job)
    finish = cut.finish()
    assert (finish.text, finish.reason) == (text.split(stop)[0].strip(), "stop") and finish.tokens < 24


def test_of_a_long_and_a_short_request_the_short_one_ends_first(
    loop: Loop, respondent: LlavaRespondent, pictures: list[Path]
) -> None:
    order = list[str]()
    ends = {name: (lambda finish, name=name: order.append(name)) for name in ("long", "short")}
    long = Asked(respondent, questions(pictures)[1], DROP, 200)
    short = Asked(respondent, questions(pictures)[2], DROP, 2)
    loop.ends, loop.stops = [], ()  # the long one is not to end by chance
    loop.submit(replace(long.job, end=ends["long"]))
    loop.submit(replace(short.job, end=ends["short"]))
    assert idle(loop) and order == ["short", "long"]


def test_who_leaves_frees_the_row_and_who_is_late_is_told(
    loop: Loop, respondent: LlavaRespondent, pictures: list[Path]
) -> None:
    loop.ends, loop.stops = [], ()
    many = [Asked(respondent, question, DROP, 1500) for question in questions(pictures)[:5]]
    for one in many:
        loop.submit(one.job)
    late = Asked(respondent, questions(pictures)[1], DROP, 4, deadline=time.monotonic() + 0.5)
    loop.submit(late.job)  # all rows are taken
    with pytest.raises(Late, match=says("time")):
        raise late.ends.get(timeout=WAIT)
    assert loop.running == 5 and loop.waiting == 0
    after = Asked(respondent, questions(pictures)[1], DROP, 4)
    loop.submit(after.job)
    for one in many[:2]:
        one.job.left = True
    assert after.finish().tokens == 4 and loop.running <= 3
    for one in many:
        one.job.left = True
    assert idle(loop) and all(isinstance(one.ends.get(timeout=1), Late) for one in many)


def test_an_error_ends_its_request_and_no_other(
    loop: Loop, respondent: LlavaRespondent, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [Asked(respondent, question, DROP, 30) for question in questions(pictures)[:2]]
    loop.submit(good[0].job)
    unfit = Asked(respondent, questions(pictures)[1], DROP, 4)
    unfit.job.schedule = Schedule((9,), (0.5,))
    broken = Asked(respondent, questions(pictures)[1], DROP, 4)
    broken.job.inputs = {"input_ids": torch.tensor([[10**6]])}
    hopeless = Asked(respondent, questions(pictures)[1], DROP, 4)
    monkeypatch.setattr(hopeless.job.sampler, "pick", lambda logits_V: 1 // 0)
    for one in (unfit, broken, hopeless, good[1]):
        loop.submit(one.job)
    with pytest.raises(UserError, match=says("pyramid_drop.layers", "9")):
        raise unfit.ends.get(timeout=WAIT)
    assert isinstance(broken.ends.get(timeout=WAIT), IndexError)
    assert isinstance(hopeless.ends.get(timeout=WAIT), ZeroDivisionError)
    assert [one.finish().tokens > 0 for one in good] == [True, True]


def test_a_model_that_somebody_else_attached_in_between(
    loop: Loop, respondent: LlavaRespondent, pictures: list[Path]
) -> None:
    stages = []
    for _ in range(2):
        one = Asked(respondent, questions(pictures)[1], DROP, 3)
        loop.submit(one.job)
        stages.append(one.finish().stages)
        assert idle(loop)
        answer_all(respondent, questions(pictures)[:1], schedule=Schedule())  # leaves it detached
    assert stages == [(16, 8, 4, 2)] * 2


def test_weights_that_give_no_numbers(loop: Loop, respondent: LlavaRespondent, pictures: list[Path]) -> None:
    one = Asked(respondent, questions(pictures)[1], DROP, 4)
    norm = respondent.hf.get_decoder().norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(float("nan"))
        loop.submit(one.job)
        error = one.ends.get(timeout=WAIT)
        norm.copy_(kept)
    with pytest.raises(UserError, match=says("no numbers")):
        raise error


def test_models_that_cannot_be_joined_answer_one_by_one(vip: Path, pictures: list[Path]) -> None:
    respondent = open_respondent(vip)
    asked = [Asked(respondent, question, DROP, 5) for question in questions(pictures)[1:8:4]]
    drawn = [
        Asked(respondent, question, DROP, 9, sampler=Sampler(1.0, 1.0, 4)) for question in questions(pictures)[1:2] * 2
    ]
    joined = Loop(respondent).start()
    for one in [*asked, *drawn]:
        joined.submit(one.job)
    expected = [one.finish() for one in [*asked, *drawn]]
    joined.stop()
    respondent.hf.generation_config.repetition_penalty = 1.0000001  # changes nothing, and only `generate` knows it
    alone = Loop(respondent)
    assert alone.rows == 1 and "repetition_penalty" in str(alone.alone)
    alone.start()
    again = [Asked(respondent, one.question, DROP, one.most, sampler=replace(one.job.sampler)) for one in asked]
    again += [Asked(respondent, one.question, DROP, 9, sampler=Sampler(1.0, 1.0, 4)) for one in drawn]
    for one in again:
        alone.submit(one.job)
    gone = Asked(respondent, asked[0].question, DROP, 500)
    gone.job.left = True
    alone.submit(gone.job)
    assert [one.finish() for one in again] == expected
    assert isinstance(gone.ends.get(timeout=WAIT), Late)
    alone.stop()


def test_what_is_left_at_the_end_is_told(respondent: LlavaRespondent, pictures: list[Path]) -> None:
    made = Loop(respondent, rows=1).start()
    made.ends, made.stops = [], ()
    asked = [Asked(respondent, question, DROP, 1500) for question in questions(pictures)[:3]]
    for one in asked:
        made.submit(one.job)
    made.stop()
    for one in asked:
        with pytest.raises(UserError, match=says("stopping")):
            raise one.ends.get(timeout=WAIT)
    with pytest.raises(UserError, match=says("stopping")):
        made.submit(asked[0].job)
    assert not hasattr(respondent.hf, "_pyramid_drop") and threading.active_count() < 10
