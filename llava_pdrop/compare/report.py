"""``report.md`` of a comparison, and the material for its pictures (drawn in `figures.py`)."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava_pdrop.checkpoint.build import Parts
from llava_pdrop.compare import figures
from llava_pdrop.compare.rows import Comparison, Example
from llava_pdrop.config.schema import Config
from llava_pdrop.data.images import fit_to_canvas, load_image, pad_to_square
from llava_pdrop.eval import scores
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.score import as_json
from llava_pdrop.geometry import NEWLINE, ImageGeometry
from llava_pdrop.report.environment import commit, package_version, processor
from llava_pdrop.report.style import markdown_table

COMPARISON_FILE, RESULTS_FILE = "report.md", "results.json"
EXAMPLES = 6
"""Held-out pictures shown with the image tokens that survive."""

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "Pillow")


def examples(config: Config, parts: Parts, questions: Sequence[Question], answer: Callable[..., Any]) -> list[Example]:
    """Answers ``questions`` and looks at what ``generate`` kept of their first image at every stage."""
    shown = []
    for question in questions:
        if not question.record.images:
            continue
        result = answer(config, parts, [question], config.schedule, None, trace=True)
        prompt, picture = result.steps[0], load_image(question.record.images[0])
        tokens = range(parts.geometry.num_tokens(picture.size))
        stages = [list(tokens), *(prompt.kept(drop)[0] for drop in range(len(config.schedule.layers)))]
        kept = [patch_grid(parts.geometry, picture.size, stage) for stage in stages]
        text = result.predictions[0]
        seen = as_seen(parts.geometry, picture, parts.image_processor.image_mean)
        shown.append(Example(text.question, text.gold, text.answer, seen, parts.geometry.patch, kept))
    return shown


def as_seen(geometry: ImageGeometry, picture: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The picture as it is cut into patches: one padded square, or the canvas of the anyres tiles."""
    if geometry.aspect == "anyres":
        return fit_to_canvas(picture, geometry.canvas(picture.size))
    square = pad_to_square(picture, tuple(int(255 * value) for value in mean))
    return square.resize((geometry.tile, geometry.tile), Image.Resampling.BICUBIC)


def patch_grid(geometry: ImageGeometry, size: tuple[int, int], kept: Sequence[int]) -> np.ndarray:
    """Which patches (rows, columns) of the picture of ``size`` (width, height) the image tokens ``kept`` show. With
    anyres these are the patches of the tiles; the tokens of the whole picture are left out."""
    feature = geometry.merge_index(size)[np.asarray(kept, dtype=np.int64)]
    side, patches = geometry.patches_per_side, geometry.patches
    if geometry.aspect == "anyres":
        width, height = (length // geometry.tile for length in geometry.canvas(size))
        feature = feature[(feature != NEWLINE) & (feature >= patches)] - patches
    else:
        width = height = 1
    tile, place = feature // patches, feature % patches
    grid = np.zeros((height * side, width * side), dtype=bool)
    grid[tile // width * side + place // side, tile % width * side + place % side] = True
    return grid


def write(comparison: Comparison, directory: Path, rows: list[list[str]]) -> Path:
    """Writes ``report.md``, its PNGs, ``results.json`` and the predictions of every row.

    Args:
        rows: the table as text, head first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pictures = figures.draw(comparison, directory)
    for row in comparison.rows:
        if row.result is not None:
            row.result.write(directory / "predictions", row.name.replace(" + ", "_on_") + ".jsonl")
    (directory / RESULTS_FILE).write_text(
        json.dumps(_plain(comparison), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    file = directory / COMPARISON_FILE
    file.write_text(markdown(comparison, rows, pictures), encoding="utf-8")
    return file


def markdown(comparison: Comparison, rows: list[list[str]], pictures: dict[str, str]) -> str:
    """The text of the report; ``pictures``: what is shown -> file name."""
    config, schedule = comparison.config, comparison.config.schedule
    timed = [row for row in comparison.rows if row.timing is not None]
    lines = [f"# {config.name}: vanilla and PyramidDrop", "", markdown_table(rows[0], rows[1:])]
    lines += [
        "Accuracy is measured by generation on held-out questions "
        f"(`{config.eval.scorer}`, {_questions(comparison)} questions); chance is what answering at random from "
        "the distribution of the gold answers would reach (the sum of their squared shares). "
        "A row `vanilla + x` is the vanilla model with dropping at inference only. Seconds per step are "
        "medians of the two runs without warm-up, fetching data left out; CPU seconds are the time all cores were "
        "busy. *Predicted* is what the matrix products and attention of the same batches save, text, tower, "
        "ranking and backward included; the factor behind *realised* is realised over predicted."
        + "".join(f" {row.saving.describe()}" for row in comparison.rows if row.saving is not None),
        "",
    ]
    captions = {
        "loss": "Training loss",
        "time": "Time per training step",
        "tokens": "Image tokens that survive each stage, on held-out pictures (dropped patches are dark)",
    }
    for key, caption in captions.items():
        if key in pictures:
            lines += [f"## {caption}", "", f"![{caption}]({pictures[key]})", ""]
    if comparison.scores:
        lines += [scores.markdown(comparison.scores, "Benchmarks")]
    lines += ["## Settings", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _settings(comparison, schedule.to_dict(), timed).items()]
    return "\n".join([*lines, ""])


def _questions(comparison: Comparison) -> int:
    return max((len(row.result.predictions) for row in comparison.rows if row.result), default=0)


def _settings(comparison: Comparison, schedule: dict[str, Any], timed: Sequence[Any]) -> dict[str, str]:
    config = comparison.config
    arguments = {**config.train.arguments, "seed": config.seed}
    return {
        "config": f"`{config.file or config.name}`",
        "schedule": ", ".join(f"{name} `{value}`" for name, value in schedule.items()),
        "steps": ", ".join(f"{row.name} {row.timing.steps}" for row in timed),
        "training": ", ".join(f"{name} `{value}`" for name, value in sorted(arguments.items())),
        "runs": ", ".join(f"`{directory.name}`" for directory in comparison.runs.values()),
        "machine": _machine(),
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {package_version(name)}" for name in PACKAGES),
        "commit": commit() or "not a git checkout",
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _plain(comparison: Comparison) -> dict[str, Any]:
    """The numbers of the table, for programs."""
    rows = []
    for row in comparison.rows:
        entry: dict[str, Any] = {"name": row.name, "schedule": row.schedule.to_dict()}
        if row.result is not None:
            entry |= {
                "accuracy": row.result.accuracy,
                "chance": row.result.chance,
                "questions": len(row.result.predictions),
                "image_tokens": row.result.image_tokens,
                "eval_seconds": row.result.seconds,
            }
        entry |= {"timing": asdict(row.timing) if row.timing else None}
        entry |= {"predicted": row.predicted, "realised": row.realised}
        rows.append(entry | {"saving": asdict(row.saving) if row.saving else None})
    found = {"name": comparison.config.name, "seed": comparison.config.seed, "rows": rows}
    return found | {"benchmarks": [as_json(score) for score in comparison.scores]}


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
