"""What all benchmarks share."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from llava_pdrop.eval.benchmarks import BENCHMARKS
from llava_pdrop.eval.benchmarks.base import Grade, grader, grouped, known, mean, means
from llava_pdrop.eval.questions import ask


def question(id: str, **facts):
    return ask(id, "?", [], f"file[{id}]", "yes", **facts)


@grader
def grade(asked, answer: str) -> Grade:
    return Grade(float(answer == asked.gold), answer)


def test_an_answer_that_was_never_given_is_wrong() -> None:
    assert grade(question("1"), None) == Grade(0.0, "", answered=False)
    assert grade(question("1"), "yes") == Grade(1.0, "yes")


def test_what_only_a_server_knows_has_no_value_and_no_numbers() -> None:
    asked = [question("1", known=False), question("2", known=False)]
    grades = [grade(asked[0], "yes"), grade(asked[1], None)]
    assert all(math.isnan(one.value) for one in grades)
    assert [one.answered for one in grades] == [True, False]
    assert means(asked, grades)(np.ones(2)) == {}
    assert not known(asked) and known([question("1")])


def test_means_by_group_and_weight() -> None:
    asked = [question(str(i), kind=kind) for i, kind in enumerate("aabb")]
    grades = [Grade(value) for value in (1.0, 0.0, 0.5, 0.5)]
    statistic = means(asked, grades, "kind", scale=1)
    assert statistic(np.ones(4)) == {"Overall": 0.5, "a": 0.5, "b": 0.5}
    assert statistic(np.array([3.0, 1, 0, 0])) == {"Overall": 0.75, "a": 0.75, "b": 0.0}
    only = means(asked, grades, "kind", overall="all", only=np.array([True, False, True, False]), prefix="x/")
    assert only(np.array([1.0, 9, 3, 9])) == {"x/all": 62.5, "x/a": 100.0, "x/b": 50.0}
    assert mean(np.array([1.0, 0]), np.zeros(2)) == 0


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


@pytest.mark.parametrize("row", BENCHMARKS.values(), ids=lambda row: row.name)
def test_every_row_says_what_it_needs_and_whose_rule_it_has(row) -> None:
    assert row.title and row.rule and row.split and row.wanted
    assert all(wanted.path and wanted.source for wanted in row.wanted)
    assert not [wanted.path for wanted in row.wanted if " or " in wanted.path]
    assert (row.grade is None) == (row.total is None) == (row.headline == "")
    assert row.max_new_tokens in (128, 512, 1024)
    assert isinstance(hash(row), int)


def test_titles_are_those_of_the_papers_scores() -> None:
    names = {name for row in BENCHMARKS.values() for name in (row.title, *row.aliases)}
    paper = {
        "MME",
        "MMB",
        "MMB-CN",
        "SEED-I",
        "MMStar",
        "POPE",
        "SQA-I",
        "AI2D",
        "DocVQA",
        "InfoVQA",
        "TextVQA",
        "ChartQA",
    }
    assert paper | {"OCRVQA", "VQAv2", "VizWiz", "GQA"} <= names
    assert [row.title for row in BENCHMARKS.values()][:3] == ["MME", "MMB", "MMB-CN"]


def test_splits_decide_whether_the_papers_score_stands_beside() -> None:
    row = BENCHMARKS["vqav2"]
    assert row.split_of([question("1", split="val")]) == "val"
    assert not row.is_of_the_paper([question("1", split="val")])
    assert row.is_of_the_paper([question("1", split="test-dev")])
    assert BENCHMARKS["gqa"].is_of_the_paper([question("1")])
