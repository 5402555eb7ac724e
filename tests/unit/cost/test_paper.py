"""Ratios for a budget: of image tokens, of TFLOP; where layers have to move; what is impossible."""

from __future__ import annotations

import re

import pytest

from llava_pdrop.cost.paper import LEAST_RATIO, paper_tflop, solve_budget, solve_shape
from llava_pdrop.errors import UserError
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


SHAPES = {
    "pyramiddrop": Schedule((8, 16, 24), (0.5, 0.25, 0.125)),
    "one drop": Schedule((2,), (0.5,), ranker="fastv"),
    "early exit": Schedule((8, 16), (0.5, 0.0)),
    "counts": Schedule((2, 6, 15), keep=(300, 200, 110)),
    "before the decoder": Schedule((0,), (0.098,), ranker="divprune"),
    "late entry": Schedule((10, 14, 25), keep=(215, 10, 0), inject=8),
    "all at first": Schedule((4, 8), keep=(1.0, 64)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_shape_meets_a_budget_at_its_own_layers(shape):
    cost = average(576, 32)
    for budget in (0.95 * cost(shape), 1.2 * cost(shape)):
        solution = solve_shape(cost, budget, 576, 32, shape)
        found = solution.schedule
        assert (found.layers, found.inject, found.ranker) == (shape.layers, shape.inject, shape.ranker)
        assert 0 <= budget - cost(found) < 2 and solution.cost == cost(found) and not found.keep
        for drop, ratio in enumerate(found.ratios):
            own = shape.kept(576, drop)
            assert (ratio == 0) == (own == 0) and (ratio == 1) == (own == 576)
        assert solution.ratio == pytest.approx(max(ratio for ratio in found.ratios if ratio < 1), abs=1e-5)


def test_a_shape_keeps_its_powers():
    lower = Schedule((8, 16, 24), (0.4, 0.16, 0.064))
    found = solve_shape(average(576, 32), 270, 576, 32, lower).schedule
    same = solve_budget(average(576, 32), 270, 576, 32, lower).schedule
    assert found.ratios == pytest.approx(same.ratios, abs=2e-6)
    steep = Schedule((8, 16), (0.5, 0.5**3))
    first, second = solve_shape(average(576, 32), 200, 576, 32, steep).schedule.ratios
    assert second == pytest.approx(first**3, abs=1e-5)
    single = Schedule((8, 16, 24), (0.5, 0.25, 0.125)).single_drop(2, 32, "fastv")
    found = solve_shape(average(576, 32), 270, 576, 32, SHAPES["one drop"]).schedule
    assert found.ratios == pytest.approx(single.ratios, abs=2e-3)


@pytest.mark.parametrize(
    ("shape", "budget", "parts"),
    [
        (Schedule((16, 24), (0.5, 0.0)), 270, ["[16, 24]", "288", "432", "270"]),
        (Schedule((16, 24), (0.5, 0.0)), 500, ["432", "500"]),
        (Schedule((24,), (0.0,)), 300, ["432", "300"]),
        (Schedule((1, 2, 3), (0.5, 0.05, 0.001)), 20, ["[1, 2, 3]", "20"]),
    ],
)
def test_a_shape_that_cannot_cost_that(shape, budget, parts):
    with pytest.raises(UserError, match=says(*parts)):
        solve_shape(average(576, 32), budget, 576, 32, shape)
