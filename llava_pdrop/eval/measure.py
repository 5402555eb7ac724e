"""Benchmarks of one model: which ones, with which schedules, what they are worth, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_pdrop.config.schema import Config
from llava_pdrop.errors import ConfigError, UserError, did_you_mean
from llava_pdrop.eval.answering import Answer, answer_all
from llava_pdrop.eval.benchmarks import BENCHMARKS
from llava_pdrop.eval.benchmarks.base import Benchmark, Statistic
from llava_pdrop.eval.evaluate import dtype_of, image_tokens_of, settings_of
from llava_pdrop.eval.interval import draws_of, interval
from llava_pdrop.eval.kept import Kept, questions_digest, weights_of
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.respondent import Respondent
from llava_pdrop.eval.team import Team
from llava_pdrop.schedule import Schedule

PAPER = "paper"
"""Instead of names: the benchmarks that the paper reports for the run, or all that it has."""

HOME = "benchmarks"
"""Directory of all answers, below that of the run."""


@dataclass(frozen=True)
class Score:
    """One benchmark with one schedule.

    Attributes:
        value, low, high: as the paper prints it, and its 95 % interval; None where only a server knows the answers.
        paper: what the paper has; None where it is not about this: another split, schedule or number of questions.
        against: (first column of the benchmark, difference, low, high) on the same questions, drawn in pairs.
        unread: questions that could not be asked, with empty answers; ``problem`` of the first.
        seconds: per question; ``image_tokens`` per question, before any drop and after each one.
        numbers: all that its rule gives.
        prompt: of the first question.
        files: what was written.
    """

    benchmark: Benchmark
    column: str
    schedule: Schedule
    questions: int
    split: str
    value: float | None
    low: float | None
    high: float | None
    paper: float | None
    unread: int
    problem: str | None
    seconds: float
    image_tokens: list[float]
    numbers: dict[str, float]
    prompt: str
    files: list[Path]
    against: tuple[str, float, float, float] | None = None
    draws: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)


def chosen(config: Config) -> list[Benchmark]:
    """The benchmarks that ``eval.benchmarks`` names.

    Raises:
        ConfigError: a name that none has.
    """
    by_name = {name.lower(): row for row in BENCHMARKS.values() for name in (row.name, row.title, *row.aliases)}
    rows: list[Benchmark] = []
    for name in config.eval.benchmarks:
        if name == PAPER:
            told = [
                by_name[key.lower()] for key in (config.paper.scores if config.paper else {}) if key.lower() in by_name
            ]
            rows += told or [row for row in BENCHMARKS.values() if row.total is not None]
        elif name.lower() in by_name:
            rows.append(by_name[name.lower()])
        else:
            raise ConfigError(
                f"{config.file}: eval.benchmarks: unknown benchmark {name!r}: choose among {', '.join(BENCHMARKS)} or "
                f"{PAPER!r}{did_you_mean(name, by_name)}"
            )
    return list(dict.fromkeys(rows))


def load_benchmarks(config: Config, llava: bool) -> dict[Benchmark, list[Question]]:
    """The questions of `chosen`, of each the first ``eval.limit`` units.

    Args:
        llava: whether a LLaVA is asked.

    Raises:
        ConfigError: files that are missing or not what is expected, of the first benchmark that has such.
    """
    loaded = {}
    for benchmark in chosen(config):
        directory = Path(config.eval.root) / benchmark.folder
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


def unit_of(question: Question) -> str:
    return question.unit or question.id


def columns_of(config: Config, own: str, layers: int) -> dict[str, Schedule]:
    """Name -> schedule: the run's ``own``, and what ``eval.training_free`` names.

    Raises:
        ConfigError: a name that is neither ``vanilla`` nor in ``compare.training_free``, or a schedule that cannot be.
    """
    found, known = {own: config.schedule}, config.training_free(layers) | {"vanilla": Schedule()}
    for name in config.eval.training_free:
        if name not in known:
            raise ConfigError(
                f"{config.file}: eval.training_free: {name!r} is none of {', '.join(known)} (compare.training_free "
                f"makes others){did_you_mean(name, known)}"
            )
        if known[name] not in found.values():
            found[name] = known[name]
    return found


def measure(
    config: Config,
    respondent: Respondent,
    loaded: Mapping[Benchmark, Sequence[Question]],
    columns: Mapping[str, Schedule],
    directory: Path,
    team: Team,
    paper: Mapping[str, Mapping[str, float]],
) -> list[Score]:
    """Asks all questions with every schedule and writes what was answered below ``directory``.

    Args:
        loaded: of `load_benchmarks`.
        directory: of the model.
        paper: column -> what the paper has for it.

    Returns:
        scores, those of a benchmark one after the other; nothing on all but the first process of ``team``.
    """
    scores = []
    for benchmark, questions in loaded.items():
        of_one: list[Score] = []
        for column, schedule in columns.items():
            asked = _Asked(config, benchmark, questions, column, schedule, directory)
            score = _measure_one(asked, respondent, team)
            if score is not None:
                of_one.append(_beside_paper(score, config, paper.get(column, {})))
                asked.kept(respondent).score(as_json(of_one[-1]))
        scores += of_one
    return paired(scores)


def paired(scores: Sequence[Score]) -> list[Score]:
    """Scores of one benchmark behind one another, all but the first with their difference from it."""
    first: dict[Benchmark, Score] = {}
    for score in scores:
        first.setdefault(score.benchmark, score)
    return [
        score if score is first[row] else _against(first[row], score)
        for row in first
        for score in scores
        if score.benchmark == row
    ]


@dataclass(frozen=True)
class _Asked:
    """The questions of one benchmark, to be answered with one schedule."""

    config: Config
    benchmark: Benchmark
    questions: Sequence[Question]
    column: str
    schedule: Schedule
    directory: Path

    @property
    def max_new_tokens(self) -> int:
        return self.config.eval.max_new_tokens or self.benchmark.max_new_tokens

    def kept(self, respondent: Respondent) -> Kept:
        """Where the answers lie."""
        facts = {
            "benchmark": self.benchmark.name,
            "questions": questions_digest(self.questions),
            "model": weights_of(self.directory),
            "schedule": self.schedule.to_dict(),
            "seed": self.config.seed if self.schedule.ranker == "random" else None,
            "prompt": respondent.text(self.questions[0]),
            "max_new_tokens": self.max_new_tokens,
            "dtype": str(dtype_of(self.config)),
        }
        return Kept(self.directory / HOME / self.benchmark.name, self.column, facts)


def _measure_one(asked: _Asked, respondent: Respondent, team: Team) -> Score | None:
    """None on all but the first process."""
    benchmark, questions, kept = asked.benchmark, asked.questions, asked.kept(respondent)
    found = answer_all(
        respondent,
        questions,
        asked.schedule,
        **settings_of(asked.config, respondent, team),
        max_new_tokens=asked.max_new_tokens,
        progress=f"{benchmark.name} ({asked.column})" if team.first else None,
        known=kept.read(),
        keep=kept.writer(team.rank, questions),
        strict=False,
    )
    if not team.first:
        return None
    kept.finish(questions, found.answers, asked.directory.name)
    score = score_of(benchmark, questions, found.answers, asked.column, asked.schedule, kept.facts["prompt"])
    files = [kept.directory]
    if benchmark.upload is not None:
        texts = [answer.text for answer in found.answers]
        files.append(benchmark.upload(questions, texts, kept.directory, asked.column))
    return replace(score, files=files)


def score_of(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    column: str,
    schedule: Schedule,
    prompt: str,
) -> Score:
    """What ``answers`` are worth."""
    statistic = _statistic(benchmark, questions, answers)
    value = low = high = None
    numbers, draws = dict[str, float](), np.empty(0)
    if statistic is not None:
        numbers = statistic(np.ones(len(questions)))
        value = benchmark.factor * numbers[benchmark.headline]
        units = [unit_of(question) for question in questions]
        draws = draws_of(units, [lambda weights: benchmark.factor * statistic(weights)[benchmark.headline]])[:, 0]
        low, high = interval(draws, len(set(units)), benchmark.best)
    problems = [answer.problem for answer in answers if answer.problem is not None]
    asked = [answer.seconds for answer in answers if answer.problem is None]
    return Score(
        benchmark=benchmark,
        column=column,
        schedule=schedule,
        questions=len(questions),
        split=str(questions[0].facts.get("split", benchmark.split)),
        value=value,
        low=low,
        high=high,
        paper=None,
        unread=len(problems),
        problem=problems[0] if problems else None,
        seconds=sum(asked) / max(len(asked), 1),
        image_tokens=image_tokens_of(answers, schedule),
        numbers=numbers,
        prompt=prompt,
        files=[],
        draws=draws,
    )


def _statistic(benchmark: Benchmark, questions: Sequence[Question], answers: Sequence[Answer]) -> Statistic | None:
    if benchmark.total is None or benchmark.grade is None:
        return None
    grades = [benchmark.grade(question, answer.text) for question, answer in zip(questions, answers)]
    return benchmark.total(questions, grades)


def _beside_paper(score: Score, config: Config, reported: Mapping[str, float]) -> Score:
    row = score.benchmark
    of_paper = config.eval.limit is None and score.split == (row.paper_split or row.split)
    found = next((reported[name] for name in (row.title, *row.aliases) if name in reported), None)
    return replace(score, paper=found) if of_paper else score


def _against(first: Score, score: Score) -> Score:
    """Both are drawn with the same questions, so that their difference varies less than either."""
    if first.value is None or score.value is None:
        return score
    low, high = (float(edge) for edge in np.quantile(score.draws - first.draws, [0.025, 0.975]))
    return replace(score, against=(first.column, score.value - first.value, low, high))


def as_json(score: Score) -> dict[str, Any]:
    """The score for programs."""
    return {
        "benchmark": score.benchmark.name,
        "rule": score.benchmark.rule,
        "split": score.split,
        "column": score.column,
        "schedule": score.schedule.to_dict(),
        "questions": score.questions,
        "score": score.value,
        "interval": None if score.low is None else [score.low, score.high],
        "paper": score.paper,
        "against": None if score.against is None else list(score.against),
        "unread": score.unread,
        "problem": score.problem,
        "seconds_per_question": score.seconds,
        "image_tokens": score.image_tokens,
        "prompt": score.prompt,
        "numbers": score.numbers,
    }
