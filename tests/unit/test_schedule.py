"""Validation and counts of schedules; the paper's TFLOP figures."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from llava_pdrop.cost.paper import paper_tflop
from llava_pdrop.schedule import Schedule, image_tokens_by_stage
from tests.messages import says

PAPER = Schedule(layers=(8, 16, 24), ratios=(0.5, 0.25, 0.125))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [8, 16], "ratios": [0.5]}, says("pyramid_drop.layers", "2", "pyramid_drop.ratios", "1")),
        ({"layers": [16, 8], "ratios": [0.5, 0.25]}, says("pyramid_drop.layers", "grow")),
        ({"layers": [8, 8], "ratios": [0.5, 0.25]}, says("pyramid_drop.layers", "grow")),
        ({"layers": [-1], "ratios": [0.5]}, says("pyramid_drop.layers", "at least 0")),
        ({"layers": [8], "keep": [1.5]}, says("pyramid_drop.keep", "[0, 1]", "1.5", "whole number")),
        ({"layers": [8], "keep": [-3]}, says("pyramid_drop.keep", "count", "at least 0", "-3")),
        ({"layers": [8, 16], "keep": [9]}, says("pyramid_drop.layers", "2", "pyramid_drop.keep", "1")),
        ({"layers": [8, 16], "keep": [9, 10]}, says("pyramid_drop.keep", "grow")),
        ({"layers": [8, 16], "keep": [0.2, 0.3]}, says("pyramid_drop.keep", "grow")),
        ({"layers": [8], "ratios": [0.5], "inject": 9}, says("pyramid_drop.inject", "[8]", "9")),
        ({"layers": [8], "ratios": [0.5], "inject": -1}, says("pyramid_drop.inject", "-1")),
        ({"layers": [8], "ratios": [0.5], "merge": "all"}, says("pyramid_drop.merge", "'nearest'", "'all'")),
        ({"layers": [1.5], "ratios": [0.5]}, says("pyramid_drop.layers", "whole numbers", "1.5")),
        ({"layers": 8, "ratios": 0.5}, says("pyramid_drop.layers", "list", "8")),
        ({"layers": [8], "ratios": ["half"]}, says("pyramid_drop.ratios", "numbers", "half")),
        ({"layers": [8], "keep": [True]}, says("pyramid_drop.keep", "numbers", "True")),
        ({"layers": [8], "ratios": [0.5], "ranker": None}, says("pyramid_drop.ranker", "None")),
        ({"downsample": 64.0}, says("pyramid_drop.downsample", "whole number", "64.0")),
        ({"inject": 3}, says("pyramid_drop.inject", "[]", "3")),
        ({"downsample": -1}, says("pyramid_drop.downsample", "-1")),
        ({"layers": [8], "keep": [9], "ratios": [0.5]}, says("pyramid_drop.keep", "pyramid_drop.ratios", "not both")),
        (
            {"layers": [8], "ratios": [0.5], "ranker": ["random", "fastv"]},
            says("pyramid_drop.layers", "1", "pyramid_drop.ranker", "2"),
        ),
        ({"layers": [8], "ratios": [1.5]}, says("pyramid_drop.ratios", "[0, 1]")),
        ({"layers": [8, 16], "ratios": [0.25, 0.5]}, says("pyramid_drop.ratios", "grow")),
        (
            {"layers": [8], "ratios": [0.5], "positions": "shuffle"},
            says("pyramid_drop.positions", "'renumber'", "'keep'"),
        ),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


def test_numbers_of_numpy_are_numbers():
    """A float32 is no Python float, and would count as a number of tokens."""
    schedule = Schedule(np.array([8, 16]), keep=(np.float32(0.5), np.int64(7)))
    assert schedule == Schedule((8, 16), keep=(0.5, 7)) and schedule.kept(100, 0) == 50
    assert json.dumps(schedule.to_dict())


def test_layer_behind_the_decoder():
    assert PAPER.check(32) is PAPER
    with pytest.raises(ValueError, match=says("pyramid_drop.layers", "24 layers", "23")):
        PAPER.check(24)


def test_counts_truncate_the_float_product():
    schedule = Schedule(layers=(2, 4), ratios=(0.58, 0.29))
    assert [schedule.kept(100, stage) for stage in (0, 1)] == [57, 28]  # golden/README 4.1


def test_tokens_per_layer_and_average():
    assert PAPER.tokens_per_layer(576, 32) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert PAPER.average_ratio(32) == pytest.approx(0.46875)
    assert Schedule().average_ratio(32) == 1.0


def test_single_drop_has_the_same_average():
    fastv = PAPER.single_drop(2, 32, "fastv")
    assert fastv.average_ratio(32) == pytest.approx(PAPER.average_ratio(32))
    assert (fastv.layers, fastv.ranker) == ((2,), "fastv")
    with pytest.raises(ValueError, match="cannot average"):
        PAPER.single_drop(16, 32, "fastv")


def test_counts_and_shares_of_keep():
    schedule = Schedule((3, 17, 22), keep=(0.5, 0.25, 1))
    assert [schedule.kept(577, stage) for stage in range(3)] == [288, 144, 1]
    assert [schedule.kept(0, stage) for stage in range(3)] == [0, 0, 0]
    counts = Schedule((2, 6), keep=(300, 200))
    assert [counts.kept(576, stage) for stage in (0, 1)] == [300, 200]
    assert [counts.kept(250, stage) for stage in (0, 1)] == [250, 200]  # never more than there are
    assert Schedule((2, 6), keep=(0.5, 300)).kept(576, 1) == 288  # nor more than the drop before has left
    assert Schedule((2,), keep=(1.0,)).kept(576, 0) == 576


def test_a_drop_before_the_decoder():
    assert Schedule((0, 4), (0.5, 0.25)).tokens_per_layer(576, 6) == [288] * 4 + [144] * 2
    assert Schedule((0, 4), (0.5, 0.25)).average_ratio(6) == pytest.approx((4 * 0.5 + 2 * 0.25) / 6)


def test_image_tokens_may_enter_late():
    late = Schedule((10, 14, 16, 18, 25), keep=(215, 10, 5, 1, 0), inject=8)
    assert late.tokens_per_layer(576, 32) == [0] * 8 + [576] * 2 + [215] * 4 + [10] * 2 + [5] * 2 + [1] * 7 + [0] * 7
    assert late.average_ratio(32, 576) == pytest.approx(64.03 / 576, abs=1e-5)
    assert late.at("renumber").positions == "keep" and PAPER.at("renumber").positions == "renumber"
    assert replace(late, positions="renumber").at("keep").positions == "renumber"
    assert late.scaled_to(40).inject == 10
    assert Schedule((10,), keep=(1.0,), inject=10).tokens_per_layer(7, 12) == [0] * 10 + [7] * 2
    assert Schedule.from_dict(late.to_dict()) == late


def test_the_average_of_counts_depends_on_the_picture():
    counts = Schedule((8,), keep=(144,))
    assert counts.average_ratio(32, 576) == pytest.approx((8 + 24 / 4) / 32)
    assert counts.average_ratio(32, 100) == 1.0
    with pytest.raises(ValueError, match=says("pyramid_drop.keep", "[144]", "shares")):
        counts.single_drop(2, 32, "fastv")
    assert Schedule((8, 16), keep=(0.5, 0.25)).single_drop(2, 32, "fastv").keep == ()


def test_layers_are_scaled_to_the_depth():
    assert PAPER.scaled_to(32) == PAPER
    assert PAPER.scaled_to(40).layers == (10, 20, 30) and PAPER.scaled_to(8).layers == (2, 4, 6)
    assert Schedule((2,), (0.5,)).scaled_to(24).layers == (2,)  # 1.5 is nearer to no whole number: the even one
    assert Schedule((4,), (0.5,)).scaled_to(6, depth=8).layers == (3,)
    with pytest.raises(ValueError, match=says("pyramid_drop.layers", "[10, 14, 16, 18, 25]", "[2, 4, 4, 4, 6]", "8")):
        Schedule((10, 14, 16, 18, 25), keep=(215, 10, 5, 1, 0)).scaled_to(8)
    with pytest.raises(
        ValueError, match=says("pyramid_drop.layers", "[31]", "[4] of 4", "4 layers", "pyramid_drop.depth=null")
    ):
        Schedule((31,), (0.5,)).scaled_to(4)


def test_round_trip_through_a_config():
    assert PAPER.to_dict() == {  # as before there were other keys: runs are known by it
        "layers": [8, 16, 24], "ratios": [0.5, 0.25, 0.125], "ranker": "last_instruction", "positions": "auto",
    }  # fmt: skip
    several = Schedule((0, 4), keep=(0.5, 10), ranker=["divprune", "last_instruction"])
    for schedule in (PAPER, several, Schedule((1,), keep=(1.0,))):
        assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert several.rankers == ("divprune", "last_instruction") and PAPER.rankers == ("last_instruction",) * 3
    assert Schedule.from_dict(None) == Schedule()


def test_stage_counts_are_per_image():
    assert image_tokens_by_stage([7, 9], PAPER) == [16, 3 + 4, 1 + 2, 0 + 1]


@pytest.mark.parametrize(
    ("tokens", "schedule", "figure"),
    [
        (576, Schedule(), 3.82),
        (576, PAPER, 1.78),
        (576, Schedule((8, 16, 24), (0.4, 0.16, 0.064)), 1.54),
        (576, Schedule((8, 16, 24), (0.6, 0.36, 0.216)), 2.06),
        (576, Schedule((10, 20), (0.5, 0.25)), 2.13),
        (576, Schedule((6, 12, 18, 24), (0.5, 0.25, 0.125, 0.0625)), 1.39),
        (576, Schedule((2,), (0.5,)), 2.01),
        (2880, Schedule(), 20.83),
        (2880, PAPER, 9.46),
        (2880, Schedule((8, 16, 24), (0.4, 0.16, 0.064)), 8.22),
        (2880, Schedule((8, 16, 24), (0.6, 0.36, 0.216)), 10.98),
        (2880, Schedule((2,), (0.5,)), 10.55),
        (5184, Schedule(), 40.62),
        (5184, PAPER, 18.08),
    ],
)
def test_every_figure_of_the_paper(tokens, schedule, figure):
    """Tables 1, 3, 5, 7, 9 for a 7B decoder (hidden 4096, intermediate 11008, 32 layers)."""
    assert paper_tflop(tokens, 32, 4096, 11008, schedule) == pytest.approx(figure, abs=0.006)


def test_where_the_stages_of_a_prompt_start() -> None:
    assert Schedule((2, 3, 5), (0.5, 0.25, 0.125)).stage_starts == [2, 3, 5]
    assert Schedule((3, 5), (0.5, 0.2), inject=2).stage_starts == [0, 2, 3, 5]
    assert Schedule((2,), (0.5,), downsample=2).stage_starts == [0, 2]
    assert Schedule().stage_starts == []
