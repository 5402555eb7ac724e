"""Questions -> answers by Hugging Face's own ``generate`` -> scores."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from llava_pdrop.config import RUN_FILE, Config, ConfigError
from llava_pdrop.data.conversation import TEMPLATES, Template
from llava_pdrop.data.images import load_image, preprocess
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.eval.benchmarks import BENCHMARKS, Question
from llava_pdrop.eval.scoring import SCORERS, normalise
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.build import Parts, build_parts
from llava_pdrop.model.plugin import Step, attach, detach
from llava_pdrop.model.precision import autocast_dtype
from llava_pdrop.model.schedule import Schedule, image_tokens_by_stage
from llava_pdrop.train.checks import check_name
from llava_pdrop.types import Sample

PREDICTIONS_FILE, EVALUATION_FILE = "predictions.jsonl", "evaluation.json"


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
    would reach; ``image_tokens`` are per question: before any drop, and after each one. ``steps`` holds what every
    forward of ``generate`` did, where asked.
    """

    accuracy: float
    chance: float
    predictions: list[Prediction]
    image_tokens: list[float]
    seconds: float
    steps: list[Step] = field(default_factory=list, repr=False)

    def write(self, directory: Path, name: str = PREDICTIONS_FILE) -> Path:
        """One line per prediction."""
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / name
        file.write_text("".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in self.predictions))
        return file


def evaluate(
    host: Any,
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
) -> Result:
    """Answers ``questions`` greedily and scores the answers.

    Args:
        host: a Hugging Face LLaVA; left as it was.
        schedule: how image tokens are dropped while the prompt is read.
        dtype: half precision to run in by autocast, as training does; None: the weights' own.
        seed: of the ``random`` ranker.
        progress: text of the progress bar; None: no bar.
        trace: keep what each forward dropped (`Result.steps`).

    Raises:
        ValueError: no questions, an unknown scorer, or a schedule that does not fit the model.
    """
    if not questions:
        raise ValueError("there are no questions to evaluate")
    if scorer not in SCORERS:
        raise ValueError(f"unknown eval.scorer {scorer!r}: choose one of {sorted(SCORERS)}")
    device, start = next(host.parameters()).device, time.perf_counter()
    steps: list[Step] = []
    predictions: list[Prediction] = []
    totals: list[int] = []
    with (
        _generating(host, schedule, steps if trace else None, seed),
        torch.autocast(device.type, dtype, dtype is not None),
    ):
        batches = range(0, len(questions), batch_size)
        for first in tqdm(batches, desc=progress, disable=progress is None, leave=False):
            asked = questions[first : first + batch_size]
            samples = [_prompt(q, template, tokenizer, host, geometry, image_processor) for q in asked]
            inputs = {name: value.to(device) for name, value in model_inputs(samples, tokenizer, host).items()}
            ids = host.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            for question, row in zip(asked, ids[:, inputs["input_ids"].shape[1] :].tolist()):
                answer = _until(tokenizer.decode(row, skip_special_tokens=True), template.stop)
                score = SCORERS[scorer](answer, question.gold)
                predictions.append(Prediction(question.record.id, question.text, question.gold, answer, score))
            totals += [stop - start for sample in samples for start, stop in sample.image_spans]
    return Result(
        accuracy=sum(entry.score for entry in predictions) / len(predictions),
        chance=chance_of([question.gold for question in questions]),
        predictions=predictions,
        image_tokens=[count / len(questions) for count in image_tokens_by_stage(totals, schedule)],
        seconds=time.perf_counter() - start,
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

    Raises:
        ConfigError: no questions are named, or there is no finished run.
    """
    check_scorer(config)
    own = Path(config.file).name == RUN_FILE
    directory = Path(config.file).parent if own else Path(config.output_dir)
    if not (directory / "config.json").is_file():
        inside = sorted(str(file.parent) for file in directory.glob("*/config.json"))
        remedy = f"name one of {', '.join(inside)}" if inside else "train it first"
        raise ConfigError(f"{config.file}: output_dir: {directory} holds no finished run: {remedy}")
    questions = load_questions(config)
    if not questions:
        raise ConfigError(f"{config.file}: data.eval: names no file with questions")
    parts = build_parts(path=str(directory))
    result = answer(config, parts, questions, config.schedule, config.name)
    file = result.write(directory)
    facts = {"scorer": config.eval.scorer, "accuracy": result.accuracy, "chance": result.chance}
    facts |= {"questions": len(questions), "image_tokens": result.image_tokens, "schedule": config.schedule.to_dict()}
    (directory / EVALUATION_FILE).write_text(json.dumps(facts, indent=1) + "\n")
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
    return BENCHMARKS["llava_json"](config.data.eval, config.data.image_root)[: config.eval.limit]


def answer(
    config: Config, parts: Parts, questions: Sequence[Question], schedule: Schedule, label: str | None, **options: Any
) -> Result:
    """`evaluate` with the settings of ``config``, on the device and in the precision it trains in.

    Args:
        label: text of the progress bar.
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
        progress=label,
    )
    return evaluate(
        parts.host.to(device),
        parts.tokenizer,
        parts.image_processor,
        parts.geometry,
        questions,
        TEMPLATES[name],
        schedule,
        **{**settings, **options},
    )


def model_inputs(samples: Sequence[Sample], tokenizer: Any, host: Any) -> dict[str, Tensor]:
    """Prompts as ``generate`` wants them: ``input_ids`` and ``attention_mask`` (B, N) padded on the left, and where
    there are images ``pixel_values`` ((images, 3, h, w) for LLaVA; (images, tiles, 3, h, w), the missing tiles 0, with
    ``image_sizes`` (images, (height, width)) for LLaVA-NeXT)."""
    longest = max(len(sample.input_ids) for sample in samples)
    ids = torch.full((len(samples), longest), tokenizer.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, longest - len(sample.input_ids) :] = sample.input_ids
        mask[row, longest - len(sample.input_ids) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    images = [image for sample in samples for image in sample.images]
    if not images:
        return inputs
    if host.config.model_type != "llava_next":
        return inputs | {"pixel_values": torch.cat([image.pixels for image in images])}
    tiles = max(len(image.pixels) for image in images)
    pixels = torch.zeros(len(images), tiles, *images[0].pixels.shape[1:])
    for row, image in enumerate(images):
        pixels[row, : len(image.pixels)] = image.pixels
    sizes = torch.tensor([(image.size[1], image.size[0]) for image in images])
    return inputs | {"pixel_values": pixels, "image_sizes": sizes}


@contextmanager
def _generating(host: Any, schedule: Schedule, trace: list[Step] | None, seed: int) -> Iterator[None]:
    """``host`` in evaluation mode with ``schedule`` attached and random numbers from ``seed``; afterwards as before."""
    training = host.training
    host.eval()
    attach(host, schedule, trace)
    try:
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            yield
    finally:
        detach(host)
        host.train(training)


def _prompt(
    question: Question, template: Template, tokenizer: Any, host: Any, geometry: ImageGeometry, image_processor: Any
) -> Sample:
    images = [preprocess(load_image(path), geometry, image_processor) for path in question.record.images]
    return Encoder(template, tokenizer, host.config.image_token_id, geometry).prompt(question.record, images)


def _until(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of ``stops`` behind its leading white space, stripped."""
    text = text.lstrip()
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()
