"""Predicted losses, the schedules that lose least, and their files."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
import pytest

from llava_pdrop.config.load import load_config
from llava_pdrop.errors import UserError
from llava_pdrop.schedule import Schedule
from llava_pdrop.study.budget import Losses, as_yaml, plans
from tests.messages import says

DEPTH = 12
MEASURED = {
    (2, 0.5): 6.0, (2, 0.2): 20.0, (2, 0.0): 50.0,
    (6, 0.5): 1.0, (6, 0.2): 4.0, (6, 0.0): 30.0,
    (10, 0.5): 0.0, (10, 0.2): 0.0, (10, 0.0): 5.0,
}  # fmt: skip


def test_measured_cells_are_predicted_as_measured_and_others_lie_between():
    losses = Losses.of(MEASURED)
    for (layer, share), loss in MEASURED.items():
        assert losses.predicted(Schedule((layer,), (share,))) == pytest.approx(loss)
    assert losses.at(4, 0.5) == pytest.approx(3.5) and losses.at(2, 0.35) == pytest.approx(13)
    assert losses.predicted(Schedule()) == 0
    assert losses.predicted(Schedule((1,), (0.5,))) is None and losses.predicted(Schedule((11,), (0.5,))) is None
    assert Losses.of({(2, 0.5): 1.0}).predicted(Schedule((2,), (0.4,))) is None


def test_bands_add_up():
    losses = Losses.of(MEASURED)
    assert losses.predicted(Schedule((2, 6), (0.5, 0.2))) == pytest.approx(6 + 4 - 1)
    assert losses.predicted(Schedule((2, 10), (0.5, 0.5))) == pytest.approx(6), "a drop of nothing costs nothing"


def test_noise_is_no_gain():
    """A later or smaller drop costs at most as much, and none gives points."""
    noisy = MEASURED | {(2, 0.5): -3.0, (2, 0.2): 2.0, (10, 0.5): 0.5, (10, 0.2): -1.0}
    losses = Losses.of(noisy)
    assert losses.at(2, 0.5) == 1 and losses.at(2, 0.2) == 4 and losses.at(10, 0.2) == 0.5
    assert Losses.of({(1, 0.5): -2.0}).at(1, 0.5) == 0
    assert (np.diff(losses.loss_LS, axis=0) <= 0).all() and (np.diff(losses.loss_LS, axis=1) >= 0).all()
    assert (losses.loss_LS[:, 0] == 0).all()


def test_the_front_is_that_of_trying_everything():
    losses = Losses.of(MEASURED)
    tried = []
    for exits in combinations_with_replacement([*range(2, 11), DEPTH], 3):
        kept = sum(width * layer / DEPTH for width, layer in zip((0.5, 0.3, 0.2), exits))
        schedule = losses.schedule(type("O", (), {"exits": exits}), DEPTH)
        tried.append((kept, losses.predicted(schedule)))
        assert schedule.average_ratio(DEPTH) == pytest.approx(kept)
    front = losses.front(DEPTH)
    for budget in np.linspace(losses.least(DEPTH) + 1e-6, 1, 60):
        best = [option for option in front if option.average <= budget + 1e-9][-1]
        assert best.loss == pytest.approx(min(loss for kept, loss in tried if kept <= budget + 1e-9))
    assert losses.least(DEPTH) == pytest.approx(min(kept for kept, _ in tried)) == front[0].average
    assert all(a.average < b.average and a.loss > b.loss for a, b in zip(front, front[1:]))


def test_the_papers_schedule_stands_beside_what_loses_least_for_as_many_tokens():
    losses, like = Losses.of(MEASURED), Schedule(ranker="fastv", positions="keep")
    paper, found = plans(losses, DEPTH, 576, [], like)
    assert (paper.name, paper.schedule.layers, paper.budget) == ("paper", (3, 6, 9), None)
    assert found.budget == pytest.approx(paper.average * 576) and found.average <= paper.average + 1e-9
    assert found.predicted <= paper.predicted
    assert {plan.schedule.ranker for plan in (paper, found)} == {"fastv"} and found.schedule.positions == "keep"
    assert [plan.name for plan in plans(losses, DEPTH, 576, [200, 300.5], like)] == [
        "paper",
        "budget-200",
        "budget-300.5",
    ]
    (alone,) = plans(Losses.of({(1, 0.5): 1.0, (2, 0.5): 0.0}), 3, 100, [], like)
    assert alone.budget is not None, "three layers have no place for the paper's drops"
    late = Losses.of({(9, 0.5): 1.0})
    assert plans(late, DEPTH, 576, [], like)[1].average == late.least(DEPTH), "where the paper's budget is out of reach"


@pytest.mark.parametrize("budget", [50, 576, -1, float("nan")])
def test_a_budget_that_cannot_be_met_is_one_line(budget):
    with pytest.raises(UserError, match=says("--average-tokens", "576", "96", "--layers")):
        plans(Losses.of(MEASURED), DEPTH, 576, [budget], Schedule())


def test_the_file_is_what_the_config_takes(tiny_config, tmp_path):
    plan = plans(Losses.of({(1, 0.5): 9.0, (2, 0.5): 0.0, (3, 0.5): 0.0}), 4, 100, [80], Schedule())[-1]
    file = tmp_path / "found.yaml"
    file.write_text(as_yaml(plan, 4, "made by a test"))
    assert file.read_text().startswith("# made by a test\n")
    config = load_config(tiny_config(), [f"pyramid_drop={file}"])
    assert config.schedule.layers == plan.schedule.layers == (2,) and config.schedule.ratios == (0.5,)
