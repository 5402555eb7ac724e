"""What all benchmarks share."""

from __future__ import annotations

import pytest

from llava_pdrop.eval.benchmarks import BENCHMARKS
from llava_pdrop.eval.questions import ask


def question(id: str, **facts):
    return ask(id, "?", [], f"file[{id}]", "yes", **facts)


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


def test_questions_say_which_split_they_are_of() -> None:
    row = BENCHMARKS["vqav2"]
    assert row.split_of([question("1", split="val")]) == "val" != row.paper_split
    assert row.split_of([question("1", split="test-dev")]) == row.paper_split
    assert BENCHMARKS["gqa"].split_of([question("1")]) == BENCHMARKS["gqa"].split
