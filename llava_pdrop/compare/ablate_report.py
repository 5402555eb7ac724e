"""The table of an ablation: on the screen, as Markdown, as JSON and as a picture."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from llava_pdrop.compare.ablate import AblationRow
from llava_pdrop.compare.variants import Ablation
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.score import as_json, paired
from llava_pdrop.eval.scores import markdown
from llava_pdrop.report.environment import environment
from llava_pdrop.report.pictures import save_picture, subplots
from llava_pdrop.report.style import COLOURS, INK, markdown_table, print_table, text_of

ABLATION_FILE, RESULTS_FILE, PICTURE_FILE = "ablation.md", "ablation.json", "ablation.png"

TRAINED = (
    "Seconds are medians of training steps without warm-up; *realised* is against the variant without drops; "
    "*predicted* is what the operations of the run's own batches say: text, tower, ranking and backward included. Runs "
    "follow one another, so other work on the machine shows in them."
)
EVALUATED = (
    "Nothing was trained: one model answered all questions with each schedule. Seconds are of a whole answer, reading "
    "the picture included; *predicted* counts the operations of reading a full picture and 200 text tokens."
)


def table_rows(ablation: Ablation, rows: Sequence[AblationRow]) -> list[list[str]]:
    """The table as text, head first. Columns of which nothing is known are left out."""
    clock = "GPU" if any(row.device == "cuda" for row in rows) else "CPU"
    unit = "step" if ablation.checkpoint is None else "answer"
    columns: list[tuple[str, list[str]]] = [
        ("variant", [row.name for row in rows]),
        ("after layers", [", ".join(map(str, row.plan.schedule.layers)) or "-" for row in rows]),
        ("image tokens per stage", [" → ".join(str(stage.image_tokens) for stage in row.plan.stages) for row in rows]),
        ("average", [f"{row.plan.average_tokens:.0f}" for row in rows]),
        ("TFLOP", [f"{row.plan.paper.dropping:.3g}" for row in rows]),
        ("saved, predicted", [text_of(row.predicted, ".1%") for row in rows]),
        ("saved, realised", [text_of(row.realised, ".1%") for row in rows]),
        (f"{clock} s/{unit}", [text_of(row.seconds, ".3f") for row in rows]),
        ("accuracy", [text_of(row.evaluation["accuracy"] if row.evaluation else None, ".1%") for row in rows]),
        *((benchmark.title, [_score(row, benchmark) for row in rows]) for benchmark in _benchmarks(rows)),
        ("paper: TFLOP", [text_of(row.paper.tflop if row.paper else None, ".3g") for row in rows]),
        ("saved", [text_of(_saved_in_paper(row), ".1%") for row in rows]),
        ("GPU hours", [text_of(row.paper.gpu_hours if row.paper else None, "g") for row in rows]),
    ]
    known = [(head, cells) for head, cells in columns if any(cells)]
    return [[head for head, _ in known], *map(list, zip(*(cells for _, cells in known)))]


def show(ablation: Ablation, rows: Sequence[AblationRow], title: str) -> None:
    """Prints the table."""
    print_table(title, table_rows(ablation, rows))


def write(ablation: Ablation, rows: Sequence[AblationRow]) -> Path:
    """Writes ``ablation.md``, ``ablation.json`` and ``ablation.png`` into the ablation's directory."""
    directory = ablation.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RESULTS_FILE).write_text(json.dumps(_plain(ablation, rows), indent=1) + "\n", encoding="utf-8")
    pictured = save_picture(directory / PICTURE_FILE, lambda: draw(ablation, rows), facecolor="white")
    file = directory / ABLATION_FILE
    file.write_text("\n".join(_markdown(ablation, rows, pictured)), encoding="utf-8")
    return file


def draw(ablation: Ablation, rows: Sequence[AblationRow]) -> Any:
    """Bars side by side, a variant per line: image tokens, time saved (with marks where the count of operations and the
    paper have it) and accuracy."""
    panels = 2 + any(row.evaluation for row in rows)
    figure, (tokens, saved, *rest) = subplots(
        1, panels, sharey=True, figsize=(1.6 + 3.1 * panels, 1.5 + 0.42 * len(rows)), layout="constrained"
    )
    for axes in (tokens, saved, *rest):
        axes.margins(x=0.1)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    tokens.set_yticks(range(len(rows)), [row.name for row in rows])
    tokens.set_ylim(len(rows) - 0.5, -0.5)

    _bars(tokens, rows, [row.plan.average_tokens for row in rows], "{:.0f}")
    tokens.set(title="image tokens, mean of the layers")

    measured = any(row.realised is not None for row in rows)
    marks = {"the paper, GPU hours": ("o", [_percent(_saved_in_paper(row)) for row in rows])}
    if measured:
        marks["predicted"] = ("|", [_percent(row.predicted) for row in rows])
    _bars(saved, rows, [_percent(row.realised if measured else row.predicted) for row in rows], "{:.0f} %", marks)
    what = "a training step" if ablation.checkpoint is None else "an answer"
    saved.set(title=f"time of {what} saved" if measured else f"operations of {what} saved")

    for axes in rest:
        _bars(
            axes, rows, [_percent(row.evaluation["accuracy"] if row.evaluation else None) for row in rows], "{:.1f} %"
        )
        chance = next(row.evaluation["chance"] for row in rows if row.evaluation)
        axes.axvline(100 * chance, color=INK, linestyle=":", linewidth=1, zorder=0.5, label="chance")
        axes.set(title="accuracy", xlim=(0, 100))
    if any(axes.get_legend_handles_labels()[0] for axes in figure.axes):
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _bars(
    axes: Any,
    rows: Sequence[AblationRow],
    values: Sequence[float | None],
    text: str,
    marks: Mapping[str, tuple[str, Sequence[float | None]]] = MappingProxyType({}),
) -> None:
    """A bar for every row with its value in it, or behind it where it is short.

    Args:
        marks: label -> (marker, where it is on each bar).
    """
    ends = [value or 0.0 for value in values]
    longest = max(ends)
    axes.barh(range(len(rows)), ends, 0.6, color=[COLOURS[_kind(row)] for row in rows])
    for row, value in enumerate(values):
        if value is None:
            continue
        inside = value > 0.25 * longest
        where = dict(textcoords="offset points", va="center", color="white" if inside else INK, fontweight="bold")
        axes.annotate(text.format(value), (0.0 if inside else max(value, 0.0), row), (7, 0), **where)
    for label, (marker, places) in marks.items():
        points = [(value, row) for row, value in enumerate(places) if value is not None]
        if points:
            axes.plot(*zip(*points), marker, color=INK, markersize=9, label=label)


def _kind(row: AblationRow) -> str:
    return "pyramid_drop" if row.plan.schedule.layers else "vanilla"


def _markdown(ablation: Ablation, rows: Sequence[AblationRow], pictured: bool) -> list[str]:
    head, *lines = table_rows(ablation, rows)
    trained = ablation.checkpoint is None
    text = [f"# {ablation.name}", "", markdown_table(head, lines)]
    text += [
        "Image tokens are of a picture that fills every tile; *average* is their mean over the decoder's layers; TFLOP "
        "is their cost by the paper's formula (arXiv 2410.17247, section 3.3). " + (TRAINED if trained else EVALUATED),
        "",
        *([] if trained else [f"The model is `{ablation.checkpoint}`.", ""]),
        *([f"![{ablation.name}]({PICTURE_FILE})", ""] if pictured else []),
    ]
    for row in rows:
        if row.paper and row.paper.scores:
            scores = ", ".join(f"{name} {score:g}" for name, score in row.paper.scores.items())
            text += [f"The paper's {row.paper.table} for {row.name}: {scores}.", ""]
    if measured := paired([score for row in rows for score in row.scores]):
        text += [markdown(measured, "Benchmarks")]
    text += ["| variant | what it is |", "|---|---|"]
    text += [f"| {variant.name} | `{shlex.join(variant.words)}` |" for variant in ablation.variants]
    return [*text, ""]


def _plain(ablation: Ablation, rows: Sequence[AblationRow]) -> dict[str, Any]:
    """The report for programs; shares between 0 and 1."""
    entries = [
        {
            "name": row.name,
            "words": variant.words,
            "pyramid_drop": row.plan.schedule.to_dict(),
            "image_tokens": [stage.image_tokens for stage in row.plan.stages],
            "average_tokens": row.plan.average_tokens,
            "tflop_paper_formula": row.plan.paper.dropping,
            "predicted": row.predicted,
            "realised": row.realised,
            "seconds": row.seconds,
            "device": row.device,
            "evaluation": row.evaluation,
            "benchmarks": [as_json(score) for score in row.scores],
            "paper": asdict(row.paper) if row.paper else None,
        }
        for variant, row in zip(ablation.variants, rows)
    ]
    device = torch.device("cuda" if any(row.device == "cuda" for row in rows) else "cpu")
    where = environment(device, ablation.variants[0].config.seed)
    return {"name": ablation.name, "checkpoint": ablation.checkpoint, "environment": where, "variants": entries}


def _benchmarks(rows: Sequence[AblationRow]) -> list[Benchmark]:
    return list(dict.fromkeys(score.benchmark for row in rows for score in row.scores))


def _score(row: AblationRow, benchmark: Benchmark) -> str:
    """Of the variant's own schedule."""
    own = next((score.value for score in row.scores if (score.benchmark, score.column) == (benchmark, row.name)), None)
    return text_of(own, ".1f")


def _saved_in_paper(row: AblationRow) -> float | None:
    return row.paper.saved if row.paper and row.plan.schedule.layers else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
