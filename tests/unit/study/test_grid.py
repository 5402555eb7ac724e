"""Which cells a study measures."""

from __future__ import annotations

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.schedule import Schedule
from llava_pdrop.study.grid import SHARES, Cell, Grid
from tests.messages import meant, says


@pytest.mark.parametrize(
    ("depth", "first", "layers"),
    [(32, 0, (1, 4, 8, 12, 16, 20, 24, 28)), (4, 0, (1, 2, 3)), (2, 0, (1,)), (32, 3, (3, 4, 8, 12, 16, 20, 24, 28))],
)
def test_layers_are_spread_over_the_depth(depth: int, first: int, layers: tuple[int, ...]) -> None:
    assert Grid.of(depth, first=first).layers == layers


def test_where_nothing_stays_there_is_one_cell() -> None:
    grid = Grid.of(4, [2, 1, 2], [0.0, 0.5])
    assert grid.layers == (1, 2) and grid.shares == (0.5, 0.0)
    assert [cell.name for cell in grid.cells] == [
        "layer1-keep0.5-last_instruction", "layer1-keep0.5-random", "layer1-keep0",
        "layer2-keep0.5-last_instruction", "layer2-keep0.5-random", "layer2-keep0",
    ]  # fmt: skip
    assert grid.cell(1, 0.0, "random") == grid.cell(1, 0.0, "last_instruction")
    assert len(Grid.of(32).cells) == 8 * 7


def test_a_cell_is_a_schedule_of_one_drop() -> None:
    assert Cell(3, 0.25, "random").schedule("keep") == Schedule((3,), (0.25,), "random", "keep")


def test_before_the_first_layer_only_for_those_who_ask() -> None:
    assert Grid.of(4, [0, 1]).layers == (0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [4]}, says("--layers", "4", "3")),
        ({"layers": [0], "ranker": "fastv"}, says("--layers", "0", "1")),
        ({"layers": [2], "first": 3}, says("--layers", "2", "3")),
        ({"shares": [1.0]}, says("--shares", "1", "0.5")),
        ({"shares": [-0.5]}, says("--shares", "-0.5")),
        ({"ranker": "random"}, says("--ranker", "'random'", "uniform")),
        ({"ranker": "fastvv"}, says("--ranker", "'fastvv'", meant("fastv"))),
    ],
)
def test_what_cannot_be_asked_is_one_line(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Grid.of(4, **{"shares": SHARES, **options})
