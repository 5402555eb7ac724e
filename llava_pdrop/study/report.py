"""A study as a page: one table over the depth, one of schedules, one picture, and all numbers as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

from llava_pdrop.eval.score import Score
from llava_pdrop.report.environment import settings
from llava_pdrop.report.page import Block, Note, Page, Picture, Table
from llava_pdrop.report.pictures import COLOURS, INK, subplots
from llava_pdrop.report.units import text_of
from llava_pdrop.study.attention import TOP, LayerAttention
from llava_pdrop.study.budget import BudgetPlan, Option
from llava_pdrop.study.findings import ERRORS, Difference, Findings, horizon
from llava_pdrop.study.grid import RANDOM

SHADES = ("#2F5D8A", "#2B7A4B", "#E2703A", "#8A4F9E", "#B3372F", "#6B7C8F")
"""Colours of shares, the largest first."""


@dataclass(frozen=True)
class Study:
    """All that was measured of the run ``name``.

    Attributes:
        tokens: image tokens of a question.
        seen: attention, layer by layer.
        front: the schedules that are predicted to lose least, from few image tokens to all.
        plans: the paper's schedule and those for budgets; ``measured``: their scores.
    """

    name: str
    findings: Findings
    tokens: float
    seen: Sequence[LayerAttention]
    front: Sequence[Option]
    plans: Sequence[BudgetPlan]
    measured: Sequence[Score]

    @property
    def realised(self) -> list[Difference]:
        """What the schedules of the ``plans`` really lose."""
        return [Difference.of((self.findings.vanilla, score)) for score in self.measured]


def page(study: Study, machine: Mapping[str, Any]) -> Page:
    """The study for people and programs.

    Args:
        machine: `environment`.
    """
    found, vanilla = study.findings, study.findings.vanilla
    benchmark = vanilla.benchmark
    caption = "Scores, attention, ranking against random choice, and predicted losses"
    blocks: list[Block] = [
        f"{benchmark.title}: {vanilla.value:.1f} without drops [{vanilla.low:.1f}, {vanilla.high:.1f}], "
        f"{vanilla.questions:,} questions with {study.tokens:.4g} image tokens each.",
        depth_table(study),
        Note(NOTES.format(ranker=found.grid.ranker, seed=machine["seed"])),
        horizon_line(found),
        plan_table(study),
        Note(PREDICTED),
        Picture(f"{benchmark.name}.png", caption, lambda: draw(study)),
        Note(f"## Settings\n\n{settings(machine, rule=benchmark.rule).markdown()}"),
    ]
    return Page(f"{study.name}: a study on {benchmark.title}", blocks, facts(study, machine))


NOTES = (
    "*keep 50%*: the score when half of the image tokens stay from that layer on, chosen by {ranker} / at random "
    "(seed {seed}; every batch draws anew). *gain*: the first less the second, mean of the shares, ± its standard "
    f"error over the questions, asked in pairs; up to {ERRORS:g} standard errors are a tie. *attention*: what the "
    "last token of the prompt pays the picture in that layer; *entropy*: of how it is spread, 100% being evenly; "
    f"*top {TOP:.0%}*: what the best tokens get of it."
)

PREDICTED = (
    "Losses are points against no drops; below 0 is a gain. Predicted from the cells by the ranker: a band of "
    "tokens costs what its single drop costs beyond that of the worse bands, made monotone, and bands add up; between "
    "measured layers it is linear. *tokens*: image tokens of a question, averaged over the layers."
)


def depth_table(study: Study) -> Table:
    """A row per measured layer."""
    found, grid = study.findings, study.findings.grid
    seen = {row.layer: row for row in study.seen}
    gains = found.by_layer
    columns = [("layer", [str(layer) for layer in grid.layers])]
    for share in grid.shares:
        cells = []
        for layer in grid.layers:
            ours, random = found.pair(layer, share)
            cells.append(f"{ours.value:.1f} / {random.value:.1f}" if share else f"{ours.value:.1f}")
        columns.append((f"keep {100 * share:.3g}%", cells))
    columns += [
        ("gain", [_with_error(gains.get(layer)) for layer in grid.layers]),
        ("ranking is", [gains[layer].verdict if layer in gains else "" for layer in grid.layers]),
    ]
    for head, name in (("attention", "mass"), ("entropy", "entropy"), (f"top {TOP:.0%}", "top")):
        columns.append((head, [f"{getattr(seen[layer], name):.1%}" if layer in seen else "" for layer in grid.layers]))
    return Table.of_columns(columns, "By depth")


def horizon_line(found: Findings) -> str:
    """Where the ranking stops beating random choice, in words."""
    gains, ranker, layers = found.by_layer, found.grid.ranker, found.grid.layers
    if not gains:
        return "No share leaves a choice, so the ranking is not compared with random choice."
    start = horizon(gains)
    if start is None:
        return f"{ranker} is better than random choice down to layer {layers[-1]}, the last one that was measured."
    unseen = max(ERRORS * gain.error for layer, gain in gains.items() if layer >= start)
    line = f"From layer {start} on {ranker} is no better than random choice"
    if start == layers[0]:
        line = f"{ranker} is at no measured layer better than random choice"
    return f"{line}. On these questions, differences of up to {unseen:.2g} points are a tie there."


def plan_table(study: Study) -> Table:
    """The paper's schedule beside those found for budgets."""
    plans = study.plans
    columns = [
        ("schedule", [plan.name for plan in plans]),
        ("layers", [", ".join(map(str, plan.schedule.layers)) for plan in plans]),
        ("keep", [plan.schedule.amounts_text for plan in plans]),
        ("tokens", [f"{plan.average * study.tokens:.1f}" for plan in plans]),
        ("predicted loss", [text_of(plan.predicted, ".1f") or "-" for plan in plans]),
        ("measured loss", [_with_error(loss) for loss in study.realised]),
        ("score", [text_of(score.value, ".1f") for score in study.measured]),
    ]
    return Table.of_columns(columns, "Schedules", left=3)


def _with_error(difference: Difference | None) -> str:
    return "" if difference is None else f"{difference.value:+.1f} ± {difference.error:.1f}"


def facts(study: Study, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The study for programs."""
    found, grid = study.findings, study.findings.grid
    cells, losses = found.scores, found.losses
    return {
        "name": study.name,
        "benchmark": found.vanilla.benchmark.name,
        "rule": found.vanilla.benchmark.rule,
        "questions": found.vanilla.questions,
        "unread": found.vanilla.unread,
        "image_tokens": study.tokens,
        "decoder_layers": grid.depth,
        "vanilla": _score(found.vanilla),
        "grid": [{**asdict(cell), **_score(cells[cell]), "loss": asdict(losses[cell])} for cell in grid.cells],
        "against_random": [
            {"layer": layer, "share": share, **asdict(gain), "verdict": gain.verdict}
            for (layer, share), gain in found.against.items()
        ],
        "by_layer": [
            {"layer": layer, **asdict(gain), "verdict": gain.verdict} for layer, gain in found.by_layer.items()
        ],
        "horizon": horizon(found.by_layer),
        "attention": [asdict(row) for row in study.seen],
        "schedules": [
            {
                "name": plan.name,
                "budget": plan.budget,
                "schedule": plan.schedule.to_dict(),
                "average_tokens": plan.average * study.tokens,
                "predicted_loss": plan.predicted,
                "loss": asdict(loss),
                **_score(score),
            }
            for plan, loss, score in zip(study.plans, study.realised, study.measured)
        ],
        "front": [[option.average * study.tokens, option.loss] for option in study.front],
        "environment": dict(machine),
    }


def _score(score: Score) -> dict[str, Any]:
    return {"score": score.value, "interval": [score.low, score.high]}


def draw(study: Study) -> Any:
    """Four panels over the depth, and over the budget."""
    figure, ((scores, gains), (attention, budget)) = subplots(2, 2, figsize=(11, 7.6), layout="constrained")
    _draw_scores(scores, study.findings)
    _draw_gains(gains, study.findings)
    depth = [row.layer for row in study.seen]
    for label, values, colour in (
        ("entropy, 100% being evenly spread", [100 * row.entropy for row in study.seen], SHADES[0]),
        (f"share of the top {TOP:.0%} of the tokens", [100 * row.top for row in study.seen], SHADES[2]),
        ("attention on the picture", [100 * row.mass for row in study.seen], SHADES[1]),
    ):
        attention.plot(depth, values, "o-", color=colour, markersize=3, label=label)
    attention.set(title="Attention of the last token", xlabel="decoder layer", ylabel="%", ylim=(0, 105))
    attention.legend(fontsize=8)
    _draw_budget(budget, study)
    for axes in (scores, gains, attention):
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _draw_scores(axes: Any, found: Findings) -> None:
    layers = found.grid.layers
    for share, colour in zip(found.grid.shares, cycle(SHADES)):
        ours, random = zip(*(found.pair(layer, share) for layer in layers))
        axes.plot(layers, [score.value for score in ours], "o-", color=colour, label=f"keep {100 * share:.3g}%")
        axes.plot(layers, [score.value for score in random], "o--", color=colour, alpha=0.6, markersize=3)
    axes.axhline(found.vanilla.value, color=INK, linewidth=1, linestyle=":", label="all stay")
    axes.plot([], [], "--", color=INK, label=RANDOM)
    axes.set(title=found.vanilla.benchmark.title, xlabel="image tokens are dropped before layer", ylabel="score")
    axes.legend(fontsize=8)


def _draw_gains(axes: Any, found: Findings) -> None:
    shares = [share for share in found.grid.shares if share]
    for share, colour in zip(shares, cycle(SHADES)):
        values = [found.against[layer, share].value for layer in found.grid.layers]
        axes.plot(found.grid.layers, values, color=colour, linewidth=1, alpha=0.7, label=f"keep {100 * share:.3g}%")
    gains = found.by_layer
    if gains:
        errors = [ERRORS * gain.error for gain in gains.values()]
        values = [gain.value for gain in gains.values()]
        axes.errorbar(
            list(gains), values, errors, fmt="o-", color=INK, capsize=3, label=f"mean, {ERRORS:g} standard errors"
        )
        axes.legend(fontsize=8)
    axes.axhline(0, color=INK, linewidth=1)
    axes.set(title=f"{found.grid.ranker} against random choice", xlabel="decoder layer", ylabel="points")


def _draw_budget(axes: Any, study: Study) -> None:
    tokens = [option.average * study.tokens for option in study.front]
    axes.plot(tokens, [option.loss for option in study.front], color=INK, linewidth=1, label="least predicted")
    for plan, loss in zip(study.plans, study.realised):
        colour = COLOURS["vanilla" if plan.budget is None else "pyramid_drop"]
        place = plan.average * study.tokens
        axes.errorbar([place], [loss.value], [ERRORS * loss.error], fmt="s", color=colour, capsize=3, label=plan.name)
        if plan.predicted is not None:
            axes.plot([place], [plan.predicted], "x", color=colour)
    axes.set(title="Loss for a budget (x predicted)", xlabel="image tokens, mean of the layers", ylabel="points lost")
    axes.legend(fontsize=8)
