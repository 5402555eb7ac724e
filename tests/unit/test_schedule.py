"""Validation and counts of schedules; the paper's TFLOP figures."""

from __future__ import annotations

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
        ({"layers": [0], "ratios": [0.5]}, says("pyramid_drop.layers", "at least 1")),
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


def test_round_trip_through_a_config():
    assert Schedule.from_dict(PAPER.to_dict()) == PAPER
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
