"""Rows as means over seeds, simple baselines, the Pareto front; and an ablation in miniature that has all of them."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from llava_pdrop.__main__ import main
from llava_pdrop.compare.budgets import Budget
from llava_pdrop.compare.pareto import ANSWER, TRAINING, Shown, front, is_baseline, mean_row, shown_rows
from llava_pdrop.compare.rows import Saving, VariantRow, table
from llava_pdrop.compare.variants import Ablation, Variant, load_ablation
from llava_pdrop.errors import ConfigError
from llava_pdrop.runtime.preemption import PREEMPTED_EXIT
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.metrics import Timing
from llava_pdrop.train.trainer import PyramidTrainer
from tests.messages import says

DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
VARIANTS = {
    "vanilla": {"pyramid_drop": None},
    "paper": {},
    "random": {"pyramid_drop.ranker": "random"},
    "lower": {"pyramid_drop.ratios": [0.4, 0.16, 0.064]},
}


@pytest.fixture
def write(tiny_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    tiny_config("base", pyramid_drop=DROP)

    def write(**content: object) -> Path:
        file = tmp_path / "ablation.yaml"
        content = {"base": "base.yaml", "name": "ab", "output_dir": str(tmp_path / "ab"), **content}
        file.write_text(json.dumps(content))
        return file

    return write


def complaint(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_ablation(file, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_seeds_are_runs_of_their_own(write) -> None:
    variants = {"paper": {}, "random": {**VARIANTS["random"], "seeds": [0, 4]}}
    runs = load_ablation(write(variants=variants, seeds=[0, 1, 2])).variants
    assert [(run.name, run.row, run.config.seed) for run in runs] == [
        ("paper", "paper", 0), ("paper-seed_1", "paper", 1), ("paper-seed_2", "paper", 2),
        ("random", "random", 0), ("random-seed_4", "random", 4),
    ]  # fmt: skip
    assert len({run.config.output_dir for run in runs}) == len(runs)
    assert runs[0].config.output_dir.endswith("/out/base"), "a config as it stands is its own run"
    assert runs[1].config.output_dir.endswith("/ab/paper-seed_1") and "seed=1" in runs[1].words
    cut = load_ablation(write(variants=variants, seeds=[0, 1, 2]), ["seeds=[3]"]).variants
    assert [run.name for run in cut] == ["paper-seed_3", "random-seed_3"], "the command line wins"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"variants": VARIANTS, "seeds": [1, 1]}, says("seeds", "twice", "[1, 1]")),
        ({"variants": VARIANTS, "seeds": 3}, says("seeds", "list", "3")),
        ({"variants": {"a": {"seeds": [-1]}}}, says("variants.a.seeds", "-1")),
        ({"variants": {"a": {"seeds": ["x"]}}}, says("variants.a.seeds[0]", "'x'")),
        ({"variants": {"a": {"seed": 1, "seeds": [2]}}}, says("a", "seeds", "one of the two")),
        ({"variants": {"a": {"seeds": [1]}, "a-seed_1": {"seed": 1}}}, says("two", "'a-seed_1'")),
        ({"variants": {"paper": {}}, "also_training_free": True}, says("also_training_free", "without drops", "0")),
        ({"variants": {**VARIANTS, "paper": {"seeds": [7]}}, "also_training_free": True},
         says("also_training_free", "paper", "7", "vanilla")),
        ({"variants": {**VARIANTS, "vanilla_on_paper": {"pyramid_drop.ranker": "uniform"}}, "also_training_free": True},
         says("also_training_free", "vanilla_on_paper", "_on_", "rename")),
        ({"variants": {**VARIANTS, "other": {"model.trainable": ["projector"]}}, "also_training_free": True},
         says("also_training_free", "other", "model", "vanilla")),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(write, content: dict, expected: str) -> None:
    file = write(**content)
    assert re.match(re.escape(f"{file}: ") + expected, complaint(file))


def test_a_checkpoint_is_training_free_as_it_is(write, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    file = write(variants=VARIANTS, checkpoint=str(tmp_path / "model"))
    assert re.search(says("checkpoint", "also_training_free"), complaint(file, "also_training_free=true"))


def test_baselines_look_at_nothing() -> None:
    drops = Schedule((1, 2), (0.5, 0.25))
    assert is_baseline(replace(drops, ranker="uniform")) and is_baseline(replace(drops, ranker=("random", "uniform")))
    assert is_baseline(Schedule(downsample=9))
    assert not any(map(is_baseline, (Schedule(), drops, replace(drops, ranker=("random", "fastv")))))
    assert not is_baseline(replace(drops, downsample=9))


def test_the_front_is_what_no_other_beats() -> None:
    places = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.9), (2.0, 0.4), None, (1.0, 0.5), (4.0, 0.95), (0.5, 0.1)]
    assert front(places) == [False, True, True, False, False, True, True, True]


def run_of(ablation: Ablation, name: str, accuracy: float, answer: float, realised: float | None) -> VariantRow:
    config = next(run.config for run in ablation.variants if run.name == name.split(" + ")[0])
    timing = None if " + " in name else Timing(wall=2.0, cpu=2.0, peak_mib=5.0, device="cpu", steps=10)
    saving = None if realised is None else Saving(realised, reason="made up")
    evaluation = {"accuracy": accuracy, "chance": 0.1, "questions": 10}
    return VariantRow(
        name, config, timing=timing, evaluation=evaluation, answer_seconds=answer, saving=saving, predicted=realised
    )


@pytest.fixture
def ablation(write) -> Ablation:
    return load_ablation(write(variants={**VARIANTS, "random": {**VARIANTS["random"], "seeds": [0, 1, 2]}}))


@pytest.fixture
def measured(ablation: Ablation) -> list[VariantRow]:
    return [
        run_of(ablation, "vanilla", 0.9, 4.0, None),
        run_of(ablation, "paper", 0.5, 2.0, 0.3),
        run_of(ablation, "random", 0.6, 2.0, 0.4),
        run_of(ablation, "random-seed_1", 0.7, 2.5, 0.5),
        run_of(ablation, "random-seed_2", 0.8, 1.5, 0.3),
        run_of(ablation, "lower", 0.4, 1.0, 0.6),
    ]


def test_rows_are_means_over_seeds_and_the_best_comes_first(ablation: Ablation, measured: list[VariantRow]) -> None:
    shown = shown_rows(ablation.variants, measured)
    assert [each.row.name for each in shown] == ["vanilla", "random", "paper", "lower"]
    random = shown[1]
    error = statistics.stdev([0.6, 0.7, 0.8]) / 3**0.5
    assert random.baseline and not shown[2].baseline and random.score == pytest.approx((0.7, error))
    assert random.times[TRAINING] == pytest.approx((0.6, 0.1 / 3**0.5)) and random.relative
    assert random.times[ANSWER] == pytest.approx((2.0, 0.5 / 3**0.5))
    both = ("training", "answer")
    fronts = {each.row.name: each.fronts for each in shown}
    assert fronts == {"vanilla": both, "random": both, "paper": (), "lower": both}
    facts = random.facts()
    assert facts["seeds"] == [0, 1, 2] and facts["runs"] == ["random", "random-seed_1", "random-seed_2"]
    assert facts["score"] == {"mean": random.score[0], "standard_error": random.score[1]}
    assert shown[2].facts()["score"] == {"mean": shown[2].score[0], "standard_error": None}, "one run has no error"
    lines = [dict(zip(found.head, line)) for found in [table([each.row for each in shown], "")] for line in found.rows]
    assert lines[1]["accuracy"] == "70.0% ± 5.8%" and lines[1]["saved, realised"] == "40.0% ± 5.8%"
    assert lines[2]["accuracy"] == "50.0%" and lines[1]["CPU time of an answer, s"] == "2.00 ± 0.289"


def test_without_vanilla_the_time_of_training_is_in_seconds(ablation: Ablation, measured: list[VariantRow]) -> None:
    shown = shown_rows(ablation.variants, [replace(row, saving=None) for row in measured])
    assert all(each.times[TRAINING] == (20.0, 0.0) and not each.relative for each in shown)
    assert "training_seconds" in shown[0].facts() and "training_share" not in shown[0].facts()


def test_a_training_free_row_has_the_training_of_its_model(ablation: Ablation, measured: list[VariantRow]) -> None:
    tried = [run_of(ablation, "vanilla + paper", 0.55, 2.0, None), run_of(ablation, "vanilla + lower", 0.3, 1.0, None)]
    tried = [replace(row, config=replace(row.config, pyramid_drop=Schedule(**DROP))) for row in tried]
    shown = {each.row.name: each for each in shown_rows(ablation.variants, [*measured, *tried])}
    free = shown["vanilla + paper"]
    assert free.training_free and free.times[TRAINING] == (1.0, 0.0) and free.row.plan is not None
    assert free.budgets == shown["paper"].budgets and list(shown)[-1] == "vanilla + lower"


def test_one_run_is_its_own_mean(ablation: Ablation, measured: list[VariantRow]) -> None:
    assert mean_row("paper", measured[1:2]) is measured[1]
    renamed = mean_row("random", measured[3:4])
    assert renamed.name == "random" and renamed.runs == (measured[3],) and renamed.accuracy == 0.7


def test_an_ablation_with_seeds_budgets_and_training_free_rows(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Killed in the second seed of a variant and started again: what is finished is passed over, the rest goes on."""
    seeds = {"seeds": [0, 1]}
    variants = {
        "vanilla": {"pyramid_drop": None, **seeds},
        "random": {"pyramid_drop.ranker": "random", **seeds},
        "first": {"pyramid_drop": {"layers": [1, 3], "ratios": [0.9, 0.9]}},
    }
    file = write(variants=variants, budgets=["own", "same"], also_training_free=True)
    compute_loss = PyramidTrainer.compute_loss

    def told_to_stop(self, *args, **kwargs):
        if "random-seed_1" in self.args.output_dir and self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PyramidTrainer, "compute_loss", told_to_stop)
        with pytest.raises(SystemExit) as end:
            main(["ablate", str(file)])
    assert end.value.code == PREEMPTED_EXIT and not (tmp_path / "ab" / "ablation.md").exists()
    capsys.readouterr()
    assert main(["ablate", str(file)]) == 0
    said = "".join(capsys.readouterr().out.split())
    assert said.count("finishedbeforewiththesamesettings") == 3
    assert f"resumingfrom{tmp_path}/ab/random-seed_1/checkpoint-2" in said

    found = json.loads((tmp_path / "ab" / "ablation.json").read_text())
    runs = ["vanilla", "vanilla-seed_1", "random", "random-seed_1", "first", "first-at_7.5"]
    assert [run["name"] for run in found["variants"]] == runs
    assert {path.name for path in (tmp_path / "ab").iterdir() if path.is_dir()} == {*runs, "predictions"}
    tried = [run["name"] for run in found["training_free"]]
    assert sorted(tried) == [
        "vanilla + first", "vanilla + first-at_7.5", "vanilla + random", "vanilla-seed_1 + random",
    ]  # fmt: skip
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["random"]["seeds"] == [0, 1] and rows["random"]["budgets"] == [None, 7.5] and rows["random"]["baseline"]
    assert rows["vanilla + random"]["runs"] == ["vanilla + random", "vanilla-seed_1 + random"]
    assert rows["first"]["budgets"] == [None] and rows["vanilla + first-at_7.5"]["budgets"] == [7.5]
    accuracies = [run["evaluation"]["accuracy"] for run in found["variants"] if run["name"].startswith("random")]
    assert rows["random"]["score"]["mean"] == pytest.approx(statistics.fmean(accuracies))
    assert all(row["answer_seconds"]["mean"] > 0 and row["training_share"]["mean"] > 0 for row in rows.values())
    assert any("answer" in row["pareto_front"] for row in rows.values())

    text = (tmp_path / "ab" / "ablation.md").read_text()
    own, equal = text.split("## At 7.5 image tokens on average")
    assert "| first |" in own and "| first-at_7.5 |" not in own and "| vanilla |" in own
    table_of_equal = equal.split("\n\n")[1]
    assert "| first-at_7.5 |" in table_of_equal and "| first |" not in table_of_equal
    assert "| vanilla + random | yes |" in table_of_equal and "±" in table_of_equal
    assert "Pareto front" in text and "(pareto.png)" in text and "a mean over seeds" in text
    with Image.open(tmp_path / "ab" / "pareto.png") as picture:
        assert min(picture.size) > 300


def test_a_row_without_a_score_is_on_no_front(ablation: Ablation, measured: list[VariantRow]) -> None:
    rows = [replace(row, evaluation=None) for row in measured]
    shown: list[Shown] = shown_rows(ablation.variants, rows)
    assert [each.row.name for each in shown] == ["vanilla", "paper", "random", "lower"], "as the file has them"
    assert not any(each.fronts for each in shown) and shown[1].budgets == (Budget(),)
    assert isinstance(ablation.variants[0], Variant)
