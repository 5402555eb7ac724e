"""What an answer is worth, and numbers of all."""

from __future__ import annotations

import time

import numpy as np

from llava_pdrop.eval.questions import ask
from llava_pdrop.eval.rules.grades import Grade, grader, grouped, known, means


def question(id: str, **facts):
    return ask(id, "?", [], f"file[{id}]", "yes", **facts)


@grader
def grade(asked, answer: str) -> Grade:
    return Grade(float(answer == asked.gold), answer)


def test_an_answer_that_was_never_given_is_wrong() -> None:
    assert grade(question("1"), None) == Grade(0.0, "", answered=False)
    assert grade(question("1"), "yes") == Grade(1.0, "yes")


def test_what_only_a_server_knows_is_said() -> None:
    assert not known([question("1", known=False), question("2")]) and known([question("1")])


def test_means_by_group_and_weight() -> None:
    asked = [question(str(i), kind=kind) for i, kind in enumerate("aabb")]
    grades = [Grade(value) for value in (1.0, 0.0, 0.5, 0.5)]
    statistic = means(asked, grades, ["kind"], scale=1)
    assert statistic(np.ones(4)) == {"Overall": 0.5, "a": 0.5, "b": 0.5}
    assert statistic(np.array([3.0, 1, 0, 0])) == {"Overall": 0.75, "a": 0.75, "b": 0.0}
    only = means(asked, grades, ["kind"], overall="all", only=np.array([True, False, True, False]))
    assert only(np.array([1.0, 9, 3, 9])) == {"all": 62.5, "a": 100.0, "b": 50.0}


def test_a_thousand_draws_of_the_largest_set_take_seconds() -> None:
    """214,354 questions of 65 types (VQAv2 val): 20 draws here, in a twentieth of a few seconds each thousand."""
    count = 214_354
    generator = np.random.default_rng(0)
    statistic = grouped(generator.random(count), [f"type {i % 65}" for i in range(count)])
    weights = generator.integers(0, 3, count).astype(float)
    begin = time.process_time()
    for _ in range(20):
        found = statistic(weights)
    assert len(found) == 65
    assert time.process_time() - begin < 2
