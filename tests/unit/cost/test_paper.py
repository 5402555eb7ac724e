"""Ratios for a budget: of image tokens, of TFLOP; where layers have to move; what is impossible."""

from __future__ import annotations

import re

import pytest

from llava_pdrop.cost.paper import LEAST_RATIO, paper_tflop, solve_budget
from llava_pdrop.schedule import Schedule
from tests.messages import says


def average(tokens: int, layers: int):
    return lambda schedule: sum(schedule.tokens_per_layer(tokens, layers)) / layers


def tflop(tokens: int):
    return lambda schedule: paper_tflop(tokens, 32, 4096, 11008, schedule)


def test_the_papers_own_budgets_give_its_ratio():
    for cost, budget in ((average(576, 32), 270), (tflop(576), 1.7807)):
        solution = solve_budget(cost, budget, 576, 32)
        assert solution.schedule.layers == (8, 16, 24)
        assert solution.ratio == pytest.approx(0.5, abs=0.003)
        assert solution.schedule.ratios == pytest.approx([0.5, 0.25, 0.125], abs=0.003)


@pytest.mark.parametrize("tokens", [576, 2880, 2928])
@pytest.mark.parametrize("layers", [32, 40])
@pytest.mark.parametrize("share", [0.9, 0.5, 1 / 3, 2 / 9, 1 / 9])
def test_average_tokens_are_met(tokens, layers, share):
    solution = solve_budget(average(tokens, layers), share * tokens, tokens, layers)
    mean = average(tokens, layers)(solution.schedule)
    assert 0 <= share * tokens - mean < 1
    assert solution.cost == mean
    first, *rest = solution.schedule.ratios
    assert rest == pytest.approx([first**2, first**3], abs=1e-5)
    assert solution.schedule.kept(tokens, 2) >= 1


def test_layers_move_only_where_they_must():
    stays = solve_budget(average(576, 32), 192, 576, 32)
    assert stays.schedule.layers == (8, 16, 24) and "as in the paper" in stays.reason
    moves = solve_budget(average(576, 32), 128, 576, 32)  # 8 of 32 layers with 576 tokens are 144 on average already
    assert moves.schedule.layers == (5, 10, 15) and moves.ratio >= LEAST_RATIO
    assert re.search(says("[8, 16, 24]", "first drop"), moves.reason)
    later = Schedule((6, 12, 18), (1, 1, 1))
    assert solve_budget(average(576, 32), 128, 576, 32, later).ratio < LEAST_RATIO  # so [6, 12, 18] was not chosen
    assert solve_budget(average(576, 32), 64, 576, 32).schedule.layers == (2, 4, 6)


def test_layers_ranker_and_positions_of_the_config_are_kept():
    wanted = Schedule((2,), (0.5,), ranker="fastv", positions="keep")
    solution = solve_budget(average(576, 32), 306, 576, 32, wanted)
    assert (solution.schedule.layers, solution.schedule.ranker, solution.schedule.positions) == ((2,), "fastv", "keep")
    assert solution.schedule.ratios == pytest.approx([0.5], abs=0.002)
    assert "the config's layers" in solution.reason


def test_tflop_of_a_large_picture():
    solution = solve_budget(tflop(2880), 5.0, 2880, 32)
    assert 4.99 < tflop(2880)(solution.schedule) <= 5.0
    assert solution.schedule.layers[0] < 8  # eight layers with all tokens alone cost 5.2


def test_quarters_of_a_deeper_decoder():
    assert solve_budget(average(576, 40), 288, 576, 40).schedule.layers == (10, 20, 30)


@pytest.mark.parametrize(
    ("budget", "layers", "message"),
    [
        (576, 32, says("between 0", "576: 576")),
        (0, 32, says("between 0", "576: 0")),
        (10, 32, says("10", "first drop", "layer 1")),
        (128, 4, says("128", "144")),
    ],
)
def test_impossible_budgets(budget, layers, message):
    with pytest.raises(ValueError, match=message):
        solve_budget(average(576, layers), budget, 576, layers)
