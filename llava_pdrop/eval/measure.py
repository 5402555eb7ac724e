"""Benchmarks of one model: which ones, with which schedules; asks, keeps the answers, prints and writes the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from llava_pdrop.checkpoint.lora import config_directory
from llava_pdrop.config.schema import Config
from llava_pdrop.errors import ConfigError, UserError, check_name
from llava_pdrop.eval.answering import answer_all
from llava_pdrop.eval.benchmarks import benchmarks_of
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.benchmarks.files import ROOT
from llava_pdrop.eval.evaluate import DROPPING, VANILLA, AnswerSettings, finished, respondent_in
from llava_pdrop.eval.kept import HOME, Kept, model_facts, questions_digest
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.respondent import Respondent
from llava_pdrop.eval.score import Score, as_json, beside_paper, paired, score_of, unit_of
from llava_pdrop.eval.score_table import publish
from llava_pdrop.eval.subject import is_ours
from llava_pdrop.eval.team import Team, team_of
from llava_pdrop.schedule import Schedule


def chosen(config: Config) -> list[Benchmark]:
    """The benchmarks that ``eval.benchmarks`` names.

    Raises:
        ConfigError: a name that none has.
    """
    reported = config.paper.scores if config.paper else {}
    return benchmarks_of(config.eval.benchmarks, "eval.benchmarks", reported, config.file)


def load_benchmarks(config: Config, llava: bool) -> dict[Benchmark, list[Question]]:
    """The questions of `chosen`, of each the first ``eval.limit`` units.

    Args:
        llava: whether a LLaVA is asked.

    Raises:
        ConfigError: files that are missing or not what is expected, of the first benchmark that has such.
    """
    loaded = {}
    for benchmark in chosen(config):
        directory = Path(config.eval.root or ROOT) / benchmark.folder
        try:
            questions = benchmark.read(directory, llava)
        except UserError as error:
            raise ConfigError(f"{config.file}: benchmark {benchmark.name}: {error}") from None
        loaded[benchmark] = first_units(questions, config.eval.limit)
    return loaded


def first_units(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """All questions of the first ``limit`` units; None: of all."""
    if limit is None:
        return list(questions)
    wanted = set(list(dict.fromkeys(map(unit_of, questions)))[:limit])
    return [question for question in questions if unit_of(question) in wanted]


def columns_of(config: Config, own: str, layers: int) -> dict[str, Schedule]:
    """Name -> schedule: the run's ``own``, and what ``eval.training_free`` names.

    Raises:
        ConfigError: a name that is neither ``vanilla`` nor in ``compare.training_free``, or a schedule that cannot be,
            or has the name of another column.
    """
    found = {own: config.schedule}
    if not config.eval.training_free:
        return found
    known = {"vanilla": Schedule()} | config.training_free(layers)
    if not known["vanilla"].vanilla:
        raise ConfigError(f"{config.file}: compare.training_free.vanilla: drops: give it another name")
    for name in config.eval.training_free:
        check_name("eval.training_free (names of compare.training_free)", name, known, config.file)
        if known[name] in found.values():
            continue
        if name == own:
            raise ConfigError(
                f"{config.file}: compare.training_free.{name}: is another schedule than the run's own, whose column is "
                "called so: give it another name"
            )
        found[name] = known[name]
    return found


@dataclass(frozen=True)
class Examinee:
    """A model that is measured.

    Attributes:
        settings, team: how it is asked, and by which processes.
        directory: where its answers are kept.
        model: where it lies, if not there too.
    """

    settings: AnswerSettings
    respondent: Respondent
    team: Team
    directory: Path
    model: Path | None = None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What tells it from any other model."""
        return model_facts(self.model or self.directory)

    def kept(self, benchmark: Benchmark, questions: Sequence[Question], column: str, schedule: Schedule) -> Kept:
        """Where the answers to ``questions`` of a benchmark lie, with one schedule."""
        settings, respondent = self.settings, self.respondent
        facts = {
            "benchmark": benchmark.name,
            "questions": questions_digest(questions),
            "model": self.facts,
            "ends": [respondent.ends, list(respondent.stops)],
            "schedule": schedule.to_dict(),
            "seed": settings.seed if "random" in schedule.rankers else None,
            "prompt": respondent.text(questions[0]),
            "max_new_tokens": settings.max_new_tokens or benchmark.max_new_tokens,
            "dtype": str(settings.dtype),
        }
        return Kept(self.directory / HOME / benchmark.name, column, facts)

    def measure(
        self,
        loaded: Mapping[Benchmark, Sequence[Question]],
        columns: Mapping[str, Schedule],
        paper: Mapping[str, Mapping[str, float]],
    ) -> list[Score]:
        """Asks all questions with every schedule and writes what was answered.

        Args:
            loaded: of `load_benchmarks`.
            paper: column -> what the paper has for it.

        Returns:
            scores, those of a benchmark one after the other; nothing on all but the first process of the team.
        """
        team, scores = self.team, list[Score]()
        for (benchmark, questions), (column, schedule) in product(loaded.items(), columns.items()):
            kept = self.kept(benchmark, questions, column, schedule)
            found = answer_all(
                self.respondent,
                questions,
                schedule,
                **self.settings.options(self.respondent, team),
                max_new_tokens=kept.facts["max_new_tokens"],
                progress=f"{benchmark.name} ({column})" if team.first else None,
                known=kept.read(),
                keep=kept.writer(team.rank, questions),
                strict=False,
            )
            if not team.first:
                continue
            kept.finish(questions, found.answers, self.directory.name)
            score = score_of(benchmark, questions, found.answers, column, schedule, kept.facts["prompt"])
            files = [kept.directory]
            if benchmark.upload is not None:
                texts = [answer.text for answer in found.answers]
                files.append(benchmark.upload(questions, texts, kept.directory, column))
            score = beside_paper(replace(score, files=files), self.settings.limit, paper.get(column, {}))
            kept.score({key: value for key, value in as_json(score).items() if key != "against"})  # which the table has
            scores.append(score)
        return paired(scores)


def measure_config(config: Config) -> list[Score]:
    """Measures ``eval.benchmarks`` of the finished run of ``config``, with its schedule and those that
    ``eval.training_free`` names. The processes that a launcher has started share the questions; the first one prints
    and writes ``benchmarks/scores.md``.

    Returns:
        the scores; nothing on all but the first process.

    Raises:
        ConfigError: files of a benchmark are missing or wrong, or there is no finished run.
    """
    directory = finished(config)
    loaded = load_benchmarks(config, is_ours(config_directory(directory)))
    with team_of(config, directory) as team:
        return measure_run(config, directory, respondent_in(directory, config), loaded, team)


def measure_run(
    config: Config,
    directory: Path,
    respondent: Respondent,
    loaded: Mapping[Benchmark, Sequence[Question]],
    team: Team,
    others: Mapping[str, Schedule] | None = None,
) -> list[Score]:
    """Measures the finished run of ``config`` in ``directory``, with ``others`` (column -> schedule) too."""
    own = VANILLA if config.schedule.vanilla else DROPPING
    columns = {**columns_of(config, own, respondent.hf.config.get_text_config().num_hidden_layers), **(others or {})}
    paper = {own: config.paper.scores} if config.paper else {}
    found = Examinee(AnswerSettings.of(config), respondent, team, directory).measure(loaded, columns, paper)
    if team.first:
        publish(found, f"{config.name}: benchmarks", directory)
    return found
