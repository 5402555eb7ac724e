"""What a study says in words, tables and numbers."""

from __future__ import annotations

import json

import pytest

from llava_pdrop.report.page import markdown_of
from llava_pdrop.report.pictures import save_picture
from llava_pdrop.schedule import Schedule
from llava_pdrop.study.attention import LayerAttention
from llava_pdrop.study.budget import plans
from llava_pdrop.study.findings import Findings
from llava_pdrop.study.grid import Grid
from llava_pdrop.study.report import Study, depth_table, draw, horizon_line, page, plan_table
from tests.unit.study.test_findings import COUNT, scored

MACHINE = {
    "device": "a CPU", "device_count": 2, "threads": 1, "device_memory_gib": None, "torch": "2", "cuda": None,
    "transformers": "5", "python": "3", "commit": "c", "date": "d", "command": "x", "seed": 7,
}  # fmt: skip


def right(percent: int):
    return scored([number * 100 < percent * COUNT for number in range(COUNT)])


def made(shares=(0.5, 0.0), random=(50, 90), depth=4) -> Study:
    """The ranking loses nothing; random choice, and an early exit, only at layer 1."""
    grid = Grid.of(depth, [1, 2], shares)
    scores = {}
    for cell in grid.cells:
        late = cell.layer - 1
        scores[cell] = right(random[late]) if cell.ranker == "random" or not cell.share else right(90)
    found = Findings(grid, right(90), scores)
    sought = plans(found.costs, depth, 8.0, [5], Schedule())
    seen = [LayerAttention(layer, 0.4, 0.8, 0.3, (0.01, 0.01, 0.01)) for layer in range(depth)]
    return Study("run", found, 8.0, seen, found.costs.front(depth), sought, [right(90)] * len(sought))


def test_a_row_per_depth() -> None:
    table = depth_table(made())
    assert list(table.head) == [
        "layer",
        "keep 50%",
        "keep 0%",
        "gain",
        "ranking is",
        "attention",
        "entropy",
        "top 10%",
    ]
    first, second = table.rows
    assert first[:3] == ("1", "90.0 / 50.0", "50.0") and first[4] == "better"
    assert second[:5] == ("2", "90.0 / 90.0", "90.0", "+0.0 ± 0.0", "tie") and second[5:] == ("40.0%", "80.0%", "30.0%")


@pytest.mark.parametrize(
    ("random", "words"), [((50, 90), "From layer 2"), ((50, 50), "down to layer 2"), ((90, 90), "at no measured layer")]
)
def test_where_the_ranking_stops_beating_random_choice(random: tuple[int, int], words: str) -> None:
    assert words in horizon_line(made(random=random).findings)


def test_without_a_choice_nothing_is_compared() -> None:
    study = made(shares=(0.0,))
    assert "No share" in horizon_line(study.findings) and "gain" not in depth_table(study).head


def test_the_papers_schedule_stands_beside_the_budgets() -> None:
    paper, budget = plan_table(made()).rows
    assert paper[:3] == ("paper", "1, 2, 3", "50.0%, 25.0%, 12.5%") and "-" in paper
    assert budget[0] == "budget-5" and float(budget[3]) <= 5


def test_the_page_holds_all_and_its_numbers_are_json() -> None:
    study = made()
    found = page(study, MACHINE)
    text, numbers = markdown_of(found.blocks), json.loads(json.dumps(found.facts))
    assert "(seed 7;" in text and "400 questions with 8 image tokens" in text and "From layer 2" in text
    assert numbers["horizon"] == 2 and numbers["vanilla"]["score"] == 90
    assert numbers["against_random"][0] | {"error": 0} == {
        "layer": 1, "share": 0.5, "value": 40, "error": 0, "verdict": "better",
    }  # fmt: skip


@pytest.mark.parametrize("study", [made(), made(shares=(0.0,)), made(depth=3)], ids=["whole", "exit only", "shallow"])
def test_the_picture_is_drawn(study: Study, tmp_path) -> None:
    assert save_picture(tmp_path / "a.png", lambda: draw(study))
