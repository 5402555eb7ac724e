"""Runs a study: asks every cell of the grid, looks at the attention, seeks schedules for budgets and asks them too, and
writes the page. Every answer is kept as soon as it is there, so a second start goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_pdrop.checkpoint.lora import config_directory
from llava_pdrop.config.schema import Config
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.evaluate import MAX_NEW_TOKENS, VANILLA, AnswerSettings, finished, load_questions, respondent_in
from llava_pdrop.eval.kept import FACTS
from llava_pdrop.eval.measure import Examinee, chosen, load_benchmarks
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import by_text, known, means
from llava_pdrop.eval.score import Score
from llava_pdrop.eval.scorers import SCORERS
from llava_pdrop.eval.subject import is_ours
from llava_pdrop.eval.team import team_of
from llava_pdrop.files import read_json, save_text, write_json
from llava_pdrop.generate.families import ATTACHABLE
from llava_pdrop.report.console import say
from llava_pdrop.report.environment import check_out, environment
from llava_pdrop.report.units import text_of
from llava_pdrop.runtime.ranks import by_first_rank
from llava_pdrop.schedule import Schedule
from llava_pdrop.study.attention import LayerAttention, look, probe_schedule
from llava_pdrop.study.budget import BudgetPlan, Losses, as_yaml, plans
from llava_pdrop.study.findings import Findings
from llava_pdrop.study.grid import ATTENTION, SHARES, Grid
from llava_pdrop.study.report import Study, page

HOME, OWN = "study", "data_eval"
"""Directory of a study below that of its run; name of the benchmark that ``data.eval`` is."""

SEEN = "attention.json"


def study(
    config: Config,
    out: Path | None = None,
    layers: Sequence[int] = (),
    shares: Sequence[float] = SHARES,
    ranker: str = ATTENTION,
    budgets: Sequence[float] = (),
) -> list[Score]:
    """Studies the finished run of ``config``, or another model, prints the tables and writes ``NAME.md``,
    ``NAME.json``, ``NAME.png`` and a YAML file for each budget, NAME being the benchmark. The processes that a launcher
    has started share the questions; the first one prints and writes.

    Args:
        out: where everything goes; default: ``study`` below the run.
        layers, shares, ranker: as `Grid.of` takes them. budgets: as `plans` does.

    Returns:
        all scores; nothing on all but the first process.

    Raises:
        ConfigError: not one set of questions with known answers, or there is no finished run. UserError: layers,
            shares or budgets that do not fit the model.
    """
    directory = finished(config, writes=out is None)
    out = directory / HOME if out is None else out
    check_out(out)
    if wrong := [budget for budget in budgets if not 0 < budget < math.inf]:
        raise UserError(f"--average-tokens {wrong[0]:g}: give numbers of image tokens above 0")
    benchmark, questions = questions_of(config, is_ours(config_directory(directory)))
    with team_of(config, out) as team:
        for key in left_out(config.schedule) if team.first else ():
            say(f"pyramid_drop.{key} is left out: a study asks with drops of its own, and of all image tokens")
        model = Examinee(AnswerSettings.of(config), respondent_in(directory, config), team, out, directory)
        lab, hf, positions = Lab(model, benchmark, questions), model.respondent.hf, config.schedule.positions
        depth = hf.config.get_text_config().num_hidden_layers
        first = ATTACHABLE[hf.config.model_type].first_drop(hf.config) if hf.config.model_type in ATTACHABLE else 0
        grid = Grid.of(depth, layers, shares, ranker, first)
        like = Schedule(ranker=grid.ranker, positions=positions)
        found = lab.ask({VANILLA: Schedule()})
        tokens = by_first_rank(lambda: image_tokens(found[VANILLA]))
        nothing = Losses.of(dict.fromkeys(grid.places, 0.0))
        by_first_rank(lambda: plans(nothing, depth, tokens, budgets, like))  # a budget is refused before hours
        found |= lab.ask({cell.name: cell.schedule(positions) for cell in grid.cells})
        seen = lab.look(probe_schedule(first, depth, positions))
        sought = by_first_rank(lambda: plans(findings(grid, found).costs, depth, tokens, budgets, like))
        names = {plan.schedule: plan.name for plan in reversed(sought)}  # one schedule is asked once
        found |= lab.ask({name: schedule for schedule, name in names.items()})
    if not team.first:
        return []
    measured = [found[names[plan.schedule]] for plan in sought]
    told = findings(grid, found)
    made = Study(config.name, told, tokens, seen, told.costs.front(depth), sought, measured)
    write(made, out, environment(model.settings.device, config.seed))
    return list(found.values())


def left_out(schedule: Schedule) -> list[str]:
    """Keys of a run's ``schedule`` by which it sees its pictures otherwise than it is asked about them here."""
    plain = Schedule()
    return [key for key in ("downsample", "inject", "merge") if getattr(schedule, key) != getattr(plain, key)]


def questions_of(config: Config, llava: bool) -> tuple[Benchmark, list[Question]]:
    """The one benchmark of ``eval.benchmarks``, or ``data.eval`` as one, with its questions.

    Args:
        llava: whether a LLaVA is asked.

    Raises:
        ConfigError: there is none or more than one, it has a single question, or its answers are not known here.
    """
    if len(chosen(config)) > 1:
        raise ConfigError(f"{config.file}: eval.benchmarks: a study is of one: give benchmarks=NAME")
    ((benchmark, questions),) = (
        load_benchmarks(config, llava) or {own_questions(config): load_questions(config)}
    ).items()
    if not questions:
        raise ConfigError(
            f"{config.file}: data.eval: names no file with questions: add data.eval=FILE or benchmarks=NAME"
        )
    if len(questions) < 2:
        raise ConfigError(
            f"{config.file}: {benchmark.title}: one question cannot tell a difference from chance: give more, or raise "
            "eval.limit"
        )
    if benchmark.grade is None or benchmark.total is None or not known(questions):
        raise ConfigError(
            f"{config.file}: eval.benchmarks: the answers of {benchmark.title} are known to a server or judge only: "
            "study another one"
        )
    return benchmark, questions


def own_questions(config: Config) -> Benchmark:
    """``data.eval`` as a benchmark: the mean of what ``eval.scorer`` says of its answers, in percent."""
    return Benchmark(
        name=OWN,
        title=Path(str(config.data.eval)).name,
        wanted=(),
        rule=f"eval.scorer {config.eval.scorer}",
        split="",
        read=lambda directory, llava: load_questions(config),
        grade=by_text(str, lambda answer, gold: SCORERS[config.eval.scorer](answer, gold)),
        total=means,
        headline="Overall",
        max_new_tokens=MAX_NEW_TOKENS,
    )


@dataclass(frozen=True)
class Lab:
    """A model and the questions of a study."""

    model: Examinee
    benchmark: Benchmark
    questions: list[Question]

    def ask(self, schedules: Mapping[str, Schedule]) -> dict[str, Score]:
        """Name -> score with that schedule, each printed as soon as it is known; nothing on all but the first
        process."""
        found = {}
        for number, (name, schedule) in enumerate(schedules.items(), 1):
            for score in self.model.measure({self.benchmark: self.questions}, {name: schedule}, paper={}):
                say(f"{number} of {len(schedules)}: {self.benchmark.title}, {name}: {text_of(score.value, '.1f')}")
                found[name] = score
        return found

    def look(self, schedule: Schedule) -> list[LayerAttention]:
        """`look`, kept like an answer."""
        model, team = self.model, self.model.team
        kept = model.kept(self.benchmark, self.questions, "attention", schedule)
        file = kept.directory / SEEN
        if file.is_file():
            return [LayerAttention(**row) for row in read_json(file)["layers"]]
        options = model.settings.options(model.respondent, team)
        seen = look(model.respondent, self.questions, schedule, progress="attention" if team.first else None, **options)
        if team.first:
            write_json(kept.directory / FACTS, kept.facts)
            write_json(file, {"layers": seen})
        return seen


def image_tokens(vanilla: Score) -> float:
    """Of a question, before any drop.

    Raises:
        UserError: no question shows a picture, or none is one that the score is about.
    """
    if vanilla.value is None:
        raise UserError(f"{vanilla.benchmark.title}: none of {vanilla.questions} questions counts: raise eval.limit")
    if not vanilla.image_tokens[0]:
        raise UserError(
            f"{vanilla.benchmark.title}: none of its {vanilla.questions} questions could be asked about a picture"
        )
    return vanilla.image_tokens[0]


def findings(grid: Grid, found: Mapping[str, Score]) -> Findings:
    """What the scores of the cells, by name, say."""
    return Findings(grid, found[VANILLA], {cell: found[cell.name] for cell in grid.cells})


def write(made: Study, out: Path, machine: Mapping[str, Any]) -> None:
    """Prints the study and writes its files."""
    name, shown = made.findings.vanilla.benchmark.name, page(made, machine)
    shown.show()
    files = shown.write(out, f"{name}.md", f"{name}.json")
    for plan in made.plans:
        if plan.budget is not None:
            file = out / f"{name}-{plan.name}.yaml"
            files.append(save_text(file, as_yaml(plan, made.findings.grid.depth, _origin(made, plan))))
    say(f"study: {', '.join(map(str, files))}")


def _origin(made: Study, plan: BudgetPlan) -> str:
    """Where a budget's file comes from. (A later study with another grid leaves it there, so it says its own.)"""
    grid, vanilla = made.findings.grid, made.findings.vanilla
    measured = (
        f"layers {', '.join(map(str, grid.layers))}, shares {', '.join(f'{share:g}' for share in grid.shares)} by "
        f"{grid.ranker}, {vanilla.questions:,} questions of {vanilla.benchmark.title}"
    )
    return f"Least predicted loss for {plan.budget:.4g} of {made.tokens:.4g} image tokens. Measured: {measured}"
