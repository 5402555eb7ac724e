"""Questions of ``data.eval`` -> answers -> accuracy."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_pdrop.checkpoint.build import ModelParts, build_parts, require_tokenizer
from llava_pdrop.checkpoint.lora import config_directory, is_lora
from llava_pdrop.config.load import RUN_FILE
from llava_pdrop.config.schema import Config
from llava_pdrop.data.conversation import template_of
from llava_pdrop.errors import ConfigError, UserError, check_name
from llava_pdrop.eval.answering import Answer, answer_all
from llava_pdrop.eval.questions import Question, llava_json
from llava_pdrop.eval.respondent import LlavaRespondent, Respondent, open_respondent
from llava_pdrop.eval.scorers import SCORERS, normalise
from llava_pdrop.eval.subject import CHAT, is_ours
from llava_pdrop.eval.team import ALONE, Team, team_of
from llava_pdrop.files import write_json, write_lines
from llava_pdrop.generate.prefill import ForwardStep
from llava_pdrop.report.console import say
from llava_pdrop.report.units import time_text
from llava_pdrop.runtime.device import autocast_dtype
from llava_pdrop.schedule import Schedule, image_tokens_by_stage
from llava_pdrop.train.arguments import on_cpu

PREDICTIONS_FILE, EVALUATION_FILE = "predictions.jsonl", "evaluation.json"

VANILLA, DROPPING = "vanilla", "pyramid_drop"
"""Subdirectories of ``output_dir`` and names of the two trained runs."""

MAX_NEW_TOKENS = 16
"""Of an answer to a record of ``data.eval``, where ``eval.max_new_tokens`` says nothing."""


@dataclass(frozen=True)
class Prediction:
    """One answered question. ``score`` is in [0, 1]."""

    id: str
    question: str
    gold: str
    answer: str
    score: float


@dataclass(frozen=True)
class Result:
    """What a model reached on a set of questions.

    ``accuracy`` is the mean score; ``chance`` what answering at random from the distribution of the gold answers
    would reach; ``image_tokens`` are per question: before any drop, and after each one. ``seconds`` are those of the
    slowest process, ``cpu_seconds`` of all together. ``steps`` holds what every forward of ``generate`` did, where
    asked.
    """

    accuracy: float
    chance: float
    predictions: list[Prediction]
    image_tokens: list[float]
    seconds: float
    cpu_seconds: float
    steps: list[ForwardStep] = field(default_factory=list, repr=False)

    def facts(self) -> dict[str, Any]:
        """What reports tell programs of it."""
        return {
            "accuracy": self.accuracy,
            "chance": self.chance,
            "questions": len(self.predictions),
            "image_tokens": self.image_tokens,
        }

    def write(self, directory: Path, name: str = PREDICTIONS_FILE) -> Path:
        """One line per prediction."""
        return write_lines(directory / name, self.predictions)


def evaluate(
    respondent: Respondent,
    questions: Sequence[Question],
    schedule: Schedule = Schedule(),
    scorer: str = "exact_match",
    trace: bool = False,
    **options: Any,
) -> Result:
    """Answers ``questions`` greedily and scores the answers.

    Args:
        trace: keep what each forward dropped (`Result.steps`), of this process's batches.
        options: the other arguments of `answer_all`.

    Raises:
        UserError: no questions, an unknown scorer, a picture that cannot be read, or a schedule that does not fit.
    """
    if not questions:
        raise UserError("there are no questions to evaluate")
    check_name("eval.scorer", scorer, SCORERS)
    steps: list[ForwardStep] = []
    found = answer_all(respondent, questions, schedule, steps=steps if trace else None, **options)
    score = SCORERS[scorer]
    predictions = [
        Prediction(question.id, question.text, question.gold, answer.text, score(answer.text, question.gold))
        for question, answer in zip(questions, found.answers)
    ]
    return Result(
        accuracy=sum(entry.score for entry in predictions) / len(predictions),
        chance=chance_of([entry.gold for entry in predictions]),
        predictions=predictions,
        image_tokens=image_tokens_of(found.answers, schedule),
        seconds=found.seconds,
        cpu_seconds=found.cpu_seconds,
        steps=steps,
    )


def image_tokens_of(answers: Sequence[Answer], schedule: Schedule) -> list[float]:
    """Image tokens per question: before any drop, and after each one."""
    tokens = image_tokens_by_stage([count for answer in answers for count in answer.image_tokens], schedule)
    return [count / len(answers) for count in tokens]


def chance_of(golds: Sequence[str]) -> float:
    """Expected accuracy of answers drawn at random from ``golds``: the sum of the squared shares."""
    return sum((count / len(golds)) ** 2 for count in Counter(normalise(gold) for gold in golds).values())


def check_scorer(config: Config) -> None:
    """Raises `ConfigError` if ``eval.scorer`` is unknown."""
    check_name("eval.scorer", config.eval.scorer, SCORERS, config.file)


def evaluate_config(config: Config) -> Result:
    """Evaluates the finished run of ``config`` with its schedule on ``data.eval``, prints the score and writes
    ``predictions.jsonl`` and ``evaluation.json`` beside the weights; those of another data set, schedule or format are
    kept under another name. A config that was read from a run's own directory stands for that one. The processes that a
    launcher has started share the questions; the first one prints and writes.

    Raises:
        ConfigError: no questions are named, an unknown scorer, or there is no finished run, or it lies where nothing
            can be written.
    """
    directory = finished(config)
    questions = load_questions(config)
    if not questions:
        raise ConfigError(f"{config.file}: data.eval: names no file with questions")
    with team_of(config, directory) as team:
        respondent = respondent_in(directory, config)
        result = answer(AnswerSettings.of(config), respondent, questions, config.schedule, config.name, team)
    if team.first:
        leave(config, directory, respondent, questions, result)
    return result


def leave(
    config: Config, directory: Path, respondent: Respondent, questions: Sequence[Question], result: Result
) -> dict[str, Any]:
    """Writes and prints what the finished run of ``config``, in ``directory``, has answered; returns what is in its
    ``evaluation.json``."""
    asked = {
        "data": os.path.abspath(str(config.data.eval)),
        "scorer": config.eval.scorer,
        "template": config.model.template,
        "questions": len(questions),
        "schedule": config.schedule.to_dict(),
    }
    _keep_others(directory, asked)
    file, found = result.write(directory), asked | result.facts()
    write_json(directory / EVALUATION_FILE, found)
    tokens = " -> ".join(f"{count:g}" for count in result.image_tokens)
    say(f"{config.name}: asks {respondent.text(questions[0])!r}")
    say(
        f"{config.name}: {config.eval.scorer} {result.accuracy:.1%} (chance {result.chance:.1%}), {len(questions)} "
        f"questions, image tokens {tokens} ({used_schedule(config.schedule, respondent.schedule)}), "
        f"{time_text(result.seconds)}; answers in {file}"
    )
    return found


def finished(config: Config, writes: bool = True) -> Path:
    """The directory of the finished run, where answers can be written.

    Args:
        writes: whether they are to lie there.

    Raises:
        ConfigError: there is none, or nothing can.
    """
    own = Path(config.file).name == RUN_FILE
    directory = Path(config.file).parent if own else Path(config.output_dir)
    if not (directory / "config.json").is_file() and not is_lora(directory):
        inside = sorted(str(file.parent) for file in directory.glob("*/config.json"))
        remedy = f"name one of {', '.join(inside)}" if inside else "train it first"
        raise ConfigError(f"{config.file}: output_dir: {directory} holds no finished run: {remedy}")
    if writes and not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"{config.file}: {directory} is to hold the answers and cannot be written to: copy it first")
    return directory


def _keep_others(directory: Path, asked: dict[str, Any]) -> None:
    """Moves the answers of an earlier evaluation aside, if it asked something else."""
    file = directory / EVALUATION_FILE
    if not file.is_file() or not (directory / PREDICTIONS_FILE).is_file():
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        before = {key: before.get(key) for key in asked}
    except (ValueError, AttributeError):
        before = {}
    if before == asked:
        return
    digest = hashlib.blake2b(json.dumps(before, sort_keys=True).encode(), digest_size=4).hexdigest()
    for name in (PREDICTIONS_FILE, EVALUATION_FILE):
        old = directory / name
        os.replace(old, old.with_name(f"{old.stem}-{digest}{old.suffix}"))


def used_schedule(used: Schedule, own: Schedule | None) -> str:
    """In words: the schedule of an evaluation beside the one in the checkpoint (None: it says nothing)."""
    drops = f"dropping after layers {list(used.layers)}" if used.layers else "no dropping"
    if own is None:
        return f"{drops}; the checkpoint names no schedule"
    if used == own or not (used.layers or own.layers):
        return f"{drops}, the checkpoint's own schedule"
    return f"{drops}; the checkpoint's own schedule has layers {list(own.layers)}, keeps {own.amounts_text}"


def load_questions(config: Config) -> list[Question]:
    """The questions of ``data.eval``, at most ``eval.limit``; none where the config names no file.

    Raises:
        ConfigError: ``eval.scorer``, by which they are scored, is unknown. UserError: as `llava_json`.
    """
    check_scorer(config)
    if config.data.eval is None:
        return []
    return llava_json(config.data.eval, config.data.image_root)[: config.eval.limit]


@dataclass(frozen=True)
class AnswerSettings:
    """How the questions of a config are answered: on the device and in the half precision (None: none) that it trains
    in. ``max_new_tokens`` is None where the questions say how many, ``limit`` where all are asked."""

    device: torch.device
    dtype: torch.dtype | None
    batch_size: int
    max_new_tokens: int | None
    limit: int | None
    seed: int
    scorer: str

    @classmethod
    def of(cls, config: Config) -> AnswerSettings:
        """What ``config`` says."""
        given, section = config.train.arguments, config.eval
        device = torch.device("cpu" if on_cpu(given) else "cuda")
        dtype = autocast_dtype(device, bool(given.get("bf16")), bool(given.get("fp16")))
        asked = (section.batch_size, section.max_new_tokens, section.limit)
        return cls(device, dtype, *asked, config.seed, section.scorer)

    def options(self, respondent: Respondent, team: Team) -> dict[str, Any]:
        """Arguments of `answer_all`; the model is moved to the device."""
        respondent.hf.to(self.device)
        return {"batch_size": self.batch_size, "dtype": self.dtype, "seed": self.seed, "team": team}


def answer(
    settings: AnswerSettings,
    respondent: Respondent,
    questions: Sequence[Question],
    schedule: Schedule,
    label: str | None,
    team: Team = ALONE,
    trace: bool = False,
) -> Result:
    """`evaluate` with ``settings``.

    Args:
        label: text of the progress bar.
        team: the processes that share the questions.
    """
    return evaluate(
        respondent,
        questions,
        schedule,
        settings.scorer,
        trace,
        max_new_tokens=settings.max_new_tokens or MAX_NEW_TOKENS,
        progress=label if team.first else None,
        **settings.options(respondent, team),
    )


def respondent_of(parts: ModelParts, config: Config) -> LlavaRespondent:
    """A LLaVA that is asked by ``model.template``.

    Raises:
        ConfigError: there is no such template.
    """
    return LlavaRespondent(parts, None if config.model.template == CHAT else template_of(config))


def respondent_in(directory: Path, config: Config) -> Respondent:
    """The model in ``directory``, ready to be asked: a LLaVA of ours, or one of another family by its own processor.

    Raises:
        MissingFileError: it has no tokenizer. ConfigError: ``model.template`` is unknown.
    """
    if not is_ours(config_directory(directory)):
        if config.model.template != CHAT:
            raise ConfigError(
                f"{config.file}: model.template={config.model.template} is for LLaVAs: {directory} is asked by its own "
                "processor's chat template: leave it out"
            )
        return open_respondent(directory)
    parts = build_parts(path=str(directory))
    require_tokenizer(parts, directory)
    for line in parts.notes:
        say(line)
    return respondent_of(parts, config)
