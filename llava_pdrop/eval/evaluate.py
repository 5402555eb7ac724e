"""Questions -> answers by Hugging Face's own ``generate`` -> scores."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from llava_pdrop.checkpoint.build import Parts, build_parts
from llava_pdrop.config.load import RUN_FILE
from llava_pdrop.config.paths import check_name
from llava_pdrop.config.schema import Config
from llava_pdrop.data.conversation import TEMPLATES, Template
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.eval.generation import generating, model_inputs, prompt_sample, until_stop
from llava_pdrop.eval.questions import Question, llava_json
from llava_pdrop.eval.scoring import SCORERS, normalise
from llava_pdrop.eval.team import ALONE, Team, team_of
from llava_pdrop.generate.prefill import ForwardStep
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.runtime.device import autocast_dtype
from llava_pdrop.schedule import Schedule, image_tokens_by_stage

PREDICTIONS_FILE, EVALUATION_FILE = "predictions.jsonl", "evaluation.json"

VANILLA, DROPPING = "vanilla", "pyramid_drop"
"""Subdirectories of ``output_dir`` and names of the two trained runs."""


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

    def write(self, directory: Path, name: str = PREDICTIONS_FILE) -> Path:
        """One line per prediction."""
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / name
        file.write_text(
            "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in self.predictions),
            encoding="utf-8",
        )
        return file


@dataclass
class Answers:
    """What one process has answered: predictions by the number of their batch, and the image tokens of every image."""

    batches: dict[int, list[Prediction]] = field(default_factory=dict)
    image_tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def evaluate(
    hf: Any,
    tokenizer: Any,
    image_processor: Any,
    geometry: ImageGeometry,
    questions: Sequence[Question],
    template: Template,
    schedule: Schedule = Schedule(),
    batch_size: int = 16,
    max_new_tokens: int = 16,
    scorer: str = "exact_match",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: str | None = None,
    trace: bool = False,
    team: Team = ALONE,
) -> Result:
    """Answers ``questions`` greedily and scores the answers.

    Batches are the same, and so are the answers, whatever the number of processes that share them.

    Args:
        hf: a Hugging Face LLaVA; left as it was.
        schedule: how image tokens are dropped while the prompt is read.
        dtype: half precision to run in by autocast, as training does; None: the weights' own.
        seed: of the ``random`` ranker; every batch begins with numbers of its own.
        progress: text of the progress bar; None: no bar.
        trace: keep what each forward dropped (`Result.steps`), of this process's batches.
        team: the processes that share the questions; all call this and have the same result.

    Raises:
        UserError: no questions, an unknown scorer, or a schedule that does not fit the model.
    """
    if not questions:
        raise UserError("there are no questions to evaluate")
    if scorer not in SCORERS:
        raise UserError(f"unknown eval.scorer {scorer!r}: choose one of {sorted(SCORERS)}")
    device, start, cpu_start = next(hf.parameters()).device, time.perf_counter(), time.process_time()
    steps: list[ForwardStep] = []
    own = Answers()
    batches = [questions[first : first + batch_size] for first in range(0, len(questions), batch_size)]
    with (
        generating(hf, schedule, steps if trace else None),
        torch.autocast(device.type, dtype, dtype is not None),
    ):
        for turn in tqdm(range(team.rounds(len(batches))), desc=progress, disable=progress is None, leave=False):
            team.at(f"round {turn + 1} of the questions")
            number = team.task(turn)
            if number >= len(batches):
                break
            torch.manual_seed(seed + number)
            samples = [prompt_sample(q, template, tokenizer, hf, geometry, image_processor) for q in batches[number]]
            inputs = {name: value.to(device) for name, value in model_inputs(samples, tokenizer, hf).items()}
            ids = hf.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            own.batches[number] = []
            for question, row in zip(batches[number], ids[:, inputs["input_ids"].shape[1] :].tolist()):
                text = until_stop(tokenizer.decode(row, skip_special_tokens=True), template.stop)
                score = SCORERS[scorer](text, question.gold)
                own.batches[number].append(Prediction(question.record.id, question.text, question.gold, text, score))
            own.image_tokens += [stop - start for sample in samples for start, stop in sample.image_spans]
    own.seconds, own.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    team.at("gathering the answers")
    return _result(team.gather(own), schedule, steps)


def _result(shares: Sequence[Answers], schedule: Schedule, steps: list[ForwardStep]) -> Result:
    """The answers of all processes put together."""
    batches = {number: batch for share in shares for number, batch in share.batches.items()}
    predictions = [entry for number in sorted(batches) for entry in batches[number]]
    tokens = image_tokens_by_stage([count for share in shares for count in share.image_tokens], schedule)
    return Result(
        accuracy=sum(entry.score for entry in predictions) / len(predictions),
        chance=chance_of([entry.gold for entry in predictions]),
        predictions=predictions,
        image_tokens=[count / len(predictions) for count in tokens],
        seconds=max(share.seconds for share in shares),
        cpu_seconds=sum(share.cpu_seconds for share in shares),
        steps=steps,
    )


def chance_of(golds: Sequence[str]) -> float:
    """Expected accuracy of answers drawn at random from ``golds``: the sum of the squared shares."""
    return sum((count / len(golds)) ** 2 for count in Counter(normalise(gold) for gold in golds).values())


def check_scorer(config: Config) -> None:
    """Raises `ConfigError` if ``eval.scorer`` is unknown."""
    check_name(config, "eval.scorer", config.eval.scorer, SCORERS)


def evaluate_config(config: Config) -> Result:
    """Evaluates the finished run of ``config`` with its schedule, prints the score and writes ``predictions.jsonl``
    and ``evaluation.json`` beside the weights. A config that was read from a run's own directory stands for that one.
    The processes that a launcher has started share the questions; the first one prints and writes.

    Raises:
        ConfigError: no questions are named, or there is no finished run, or it lies where nothing can be written.
    """
    check_scorer(config)
    own = Path(config.file).name == RUN_FILE
    directory = Path(config.file).parent if own else Path(config.output_dir)
    if not (directory / "config.json").is_file():
        inside = sorted(str(file.parent) for file in directory.glob("*/config.json"))
        remedy = f"name one of {', '.join(inside)}" if inside else "train it first"
        raise ConfigError(f"{config.file}: output_dir: {directory} holds no finished run: {remedy}")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"{config.file}: {directory} is to hold the answers and cannot be written to: copy it first")
    questions = load_questions(config)
    if not questions:
        raise ConfigError(f"{config.file}: data.eval: names no file with questions")
    with team_of(config, directory) as team:
        parts = build_parts(path=str(directory))
        result = answer(config, parts, questions, config.schedule, config.name, team)
    if not team.first:
        return result
    file = result.write(directory)
    facts = {"scorer": config.eval.scorer, "accuracy": result.accuracy, "chance": result.chance}
    facts |= {"questions": len(questions), "image_tokens": result.image_tokens, "schedule": config.schedule.to_dict()}
    (directory / EVALUATION_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    tokens = " -> ".join(f"{count:g}" for count in result.image_tokens)
    Console().print(
        f"{config.name}: {config.eval.scorer} {result.accuracy:.1%} (chance {result.chance:.1%}), {len(questions)} "
        f"questions, image tokens {tokens} ({used_schedule(config.schedule, parts.schedule)}), {result.seconds:.0f} s; "
        f"answers in {file}",
        soft_wrap=True,
        markup=False,
    )
    return result


def used_schedule(used: Schedule, own: Schedule | None) -> str:
    """In words: the schedule of an evaluation beside the one in the checkpoint (None: it says nothing)."""
    drops = f"dropping after layers {list(used.layers)}" if used.layers else "no dropping"
    if own is None:
        return f"{drops}; the checkpoint names no schedule"
    if used == own:
        return f"{drops}, the checkpoint's own schedule"
    return f"{drops}; the checkpoint's own schedule has layers {list(own.layers)}, ratios {list(own.ratios)}"


def load_questions(config: Config) -> list[Question]:
    """The questions of ``data.eval``, at most ``eval.limit``; none where the config names no file."""
    if config.data.eval is None:
        return []
    return llava_json(config.data.eval, config.data.image_root)[: config.eval.limit]


def answer(
    config: Config,
    parts: Parts,
    questions: Sequence[Question],
    schedule: Schedule,
    label: str | None,
    team: Team = ALONE,
    **options: Any,
) -> Result:
    """`evaluate` with the settings of ``config``, on the device and in the precision it trains in.

    Args:
        label: text of the progress bar.
        team: the processes that share the questions.
        options: arguments of `evaluate` that go before those of the config.
    """
    name, asked = config.model.template, config.train.arguments
    check_name(config, "model.template", name, TEMPLATES)
    cuda = torch.cuda.is_available() and not asked.get("use_cpu")
    device = torch.device("cuda" if cuda else "cpu")
    settings = dict(
        batch_size=config.eval.batch_size,
        max_new_tokens=config.eval.max_new_tokens,
        scorer=config.eval.scorer,
        dtype=autocast_dtype(device, bool(asked.get("bf16")), bool(asked.get("fp16"))),
        seed=config.seed,
        progress=label if team.first else None,
        team=team,
    )
    return evaluate(
        parts.hf.to(device),
        parts.tokenizer,
        parts.image_processor,
        parts.geometry,
        questions,
        TEMPLATES[name],
        schedule,
        **{**settings, **options},
    )
