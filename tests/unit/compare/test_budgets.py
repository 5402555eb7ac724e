"""One budget for several schedules, in what an ablation file says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_pdrop.compare.budgets import Budget, at_budget, average_tokens, counts
from llava_pdrop.compare.variants import load_ablation
from llava_pdrop.config.load import load_config
from llava_pdrop.config.schema import check_budgets
from llava_pdrop.errors import ConfigError, Problem, UserError
from tests.messages import says

DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
"""16 image tokens in 4 layers: 16, 8, 4, 2, which are 7.5 on average."""

VARIANTS = {
    "vanilla": {"pyramid_drop": None},
    "paper": {},
    "lower": {"pyramid_drop.ratios": [0.4, 0.16, 0.064]},
    "random": {"pyramid_drop.ranker": "random"},
    "one": {"pyramid_drop": {"layers": [1, 3], "ratios": [0.9, 0.9]}},
    "first": {"pyramid_drop": {"layers": [0, 2, 3], "keep": [8, 2, 1], "ratios": []}},
    "pooled": {"pyramid_drop": {"layers": [], "ratios": [], "downsample": 4}},
}


@pytest.fixture
def write(tiny_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    tiny_config("base", pyramid_drop=DROP)

    def write(**content: object) -> Path:
        file = tmp_path / "ablation.yaml"
        file.write_text(json.dumps({"base": "base.yaml", "name": "ab", "output_dir": str(tmp_path / "ab"), **content}))
        return file

    return write


def test_every_variant_at_the_average_of_the_base(write) -> None:
    variants = {**VARIANTS, "one": {"pyramid_drop": {"layers": [1], "ratios": [0.9]}}}
    ablation = load_ablation(write(variants=variants, budgets=["own", "same"]))
    assert ablation.budgets == (Budget(), Budget(7.5))
    runs = {variant.name: variant for variant in ablation.variants}
    assert list(runs) == [*variants, "one-at_7.5", "first-at_7.5"]
    for name in ("vanilla", "paper", "random", "pooled"):  # 2x2 is the largest square below 7.5
        assert runs[name].budgets == ablation.budgets
    for name in ("lower", "one", "first"):
        assert runs[name].budgets == (Budget(),)
    assert ablation.notes == ("lower at 7.5 image tokens is paper.",)
    for name in ("one", "first"):
        solved = runs[f"{name}-at_7.5"]
        assert 6.5 <= average_tokens(solved.config) <= 7.5 and solved.budgets == (Budget(7.5),)
        assert solved.config.schedule.layers == runs[name].config.schedule.layers and not solved.config.schedule.keep
        file, *words = solved.words
        assert load_config(file, words) == solved.config


def test_pooling_takes_the_largest_square_below(write) -> None:
    ablation = load_ablation(write(variants=VARIANTS), ["budgets=[9.5]"])
    assert [budget.tokens for budget in ablation.budgets] == [9.5]
    runs = {variant.row: variant.config for variant in ablation.variants}
    assert runs["pooled-at_9.5"].schedule.downsample == 9
    runs = {
        variant.row for variant in load_ablation(write(variants={"pooled": VARIANTS["pooled"]}, budgets=[4])).variants
    }
    assert "pooled" in runs, "what has the budget already stays as it is"


def test_counts_see_no_difference_behind_the_point(write) -> None:
    def config(**changes: object):
        variants = {"a": {"pyramid_drop": {**DROP, **changes}}}
        return load_ablation(write(variants=variants)).variants[0].config

    assert counts(config(ratios=[0.51, 0.26, 0.13])) == counts(config()) == counts(config(keep=[8, 4, 2], ratios=[]))
    assert counts(config(ratios=[0.6, 0.25, 0.125])) != counts(config()) != counts(config(ranker="random"))
    pooled = {"layers": [], "ratios": []}
    assert counts(config(**pooled, downsample=9)) == counts(config(**pooled, downsample=12))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"variants": {"late": {"pyramid_drop.layers": [3], "pyramid_drop.ratios": [0.5]}}, "budgets": ["same"]},
         says("late", "budgets", "7.5", "[3]", "12", "budgets: [own]")),
        ({"variants": {"late": {"pyramid_drop.inject": 1}}, "budgets": [13]}, says("late", "budgets", "13", "12")),
        ({"variants": {"pooled": VARIANTS["pooled"]}, "budgets": [0.5]}, says("pooled", "budgets", "0.5", "feature")),
        ({"variants": VARIANTS, "budgets": ["sam"]}, says("budgets[0]", "'same'", "'sam'")),
        ({"variants": VARIANTS, "budgets": []}, says("budgets", "empty")),
        ({"variants": VARIANTS, "budgets": [0]}, says("budgets", "above 0", "0")),
        ({"variants": VARIANTS, "budgets": ["own", 12, "own"]}, says("budgets", "own", "twice")),
        ({"variants": {"a": {"budgets": [-1]}}}, says("variants.a.budgets", "-1")),
    ],
)  # fmt: skip
def test_what_cannot_have_a_budget_is_one_line(write, content: dict, expected: str) -> None:
    file = write(**content)
    with pytest.raises(ConfigError) as error:
        load_ablation(file)
    assert re.match(re.escape(f"{file}: ") + expected, str(error.value)) and "\n" not in str(error.value)


def test_a_variant_leaves_a_budget_out(write) -> None:
    late = {"pyramid_drop.layers": [3], "pyramid_drop.ratios": [0.5], "budgets": ["own"]}
    runs = load_ablation(write(variants={"paper": {}, "late": late}, budgets=["own", "same"])).variants
    assert [(run.name, len(run.budgets)) for run in runs] == [("paper", 2), ("late", 1)]


def test_same_wants_a_base_that_drops(write, tiny_config) -> None:
    file = write(variants={"a": {"pyramid_drop": DROP}}, budgets=["same"])
    tiny_config("base")
    with pytest.raises(ConfigError, match=says("budgets", "same", "base", "number")):
        load_ablation(file)


def test_a_number_that_no_tile_can_have(write) -> None:
    config = load_ablation(write(variants={"pooled": VARIANTS["pooled"]})).variants[0].config
    with pytest.raises(UserError, match=says("one feature")):
        at_budget(config, 0.9)


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), 0.0])
def test_no_average_is_endless_or_no_number(budget: float) -> None:
    with pytest.raises(Problem, match=says("budgets", "above 0", f"{budget:g}")):
        check_budgets((budget,), "budgets")
