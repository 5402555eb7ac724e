"""Finished runs side by side, and beside what the paper reports for them: ``llava-pdrop compare RUN RUN ...``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_pdrop.checkpoint.shards import read_json
from llava_pdrop.config.load import RUN_FILE, load_config
from llava_pdrop.config.paths import part_configs
from llava_pdrop.config.schema import Config
from llava_pdrop.cost.paper import paper_tflop
from llava_pdrop.errors import ConfigError
from llava_pdrop.eval.evaluate import EVALUATION_FILE
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.report.pictures import save_picture, subplots
from llava_pdrop.report.style import COLOURS, markdown_table, print_table, text_of
from llava_pdrop.train.history import FINISHED_FILE
from llava_pdrop.train.metrics import METRICS_FILE, Timing, timing_of

REPORT, PICTURE = "runs.md", "runs.png"
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Run:
    """One finished run: what it was, and what it measured.

    ``tflop`` is the cost of a nominal picture's tokens by the paper's formula (None where the sizes of the model are
    not known here); ``hours`` are device hours, those of stage 1 included where its directory is found; ``saved`` is
    the share of the vanilla run's step time that this one needs less.
    """

    name: str
    config: Config
    timing: Timing | None
    hours: float | None
    tflop: float | None
    evaluation: dict[str, Any] | None
    saved: float | None = None


def compare_runs(directories: Sequence[str | Path], out: Path = Path("checkpoints")) -> Path:
    """Prints a table of finished runs beside the paper's rows, and writes it as ``runs.md`` and ``runs.png``.

    Args:
        directories: output directories of finished runs.
        out: where the report goes.

    Raises:
        ConfigError: a directory that holds no finished run, or one that is named twice.
    """
    places = [Path(directory).resolve() for directory in directories]
    if twice := next((given for given, place in zip(directories, places) if places.count(place) > 1), None):
        raise ConfigError(f"{twice} is named twice: name every run once")
    runs = with_savings([read_run(Path(directory)) for directory in directories])
    rows = table_rows(runs)
    print_table("Runs, and what the paper reports", rows)
    out.mkdir(parents=True, exist_ok=True)
    pictured = draw(runs, out / PICTURE)
    file = out / REPORT
    file.write_text("\n".join(markdown(runs, rows, pictured)), encoding="utf-8")
    Console().print(f"report: {file}", soft_wrap=True)
    return file


def read_run(directory: Path) -> Run:
    """A finished run from what it left in its directory.

    Raises:
        ConfigError: a file of a finished run is missing.
    """
    for name in (RUN_FILE, FINISHED_FILE):
        if not (directory / name).is_file():
            inside = sorted(str(file.parent) for file in directory.glob(f"*/{FINISHED_FILE}"))
            hint = f": name one of {', '.join(inside)}" if inside else ""
            raise ConfigError(f"{directory} is no finished run, it has no {name}{hint}")
    config = load_config(directory / RUN_FILE)
    scores = directory / EVALUATION_FILE
    return Run(
        name=config.name,
        config=config,
        timing=timing_of(directory / METRICS_FILE),
        hours=_hours(directory, config),
        tflop=_tflop(config),
        evaluation=read_json(scores) if scores.is_file() else None,
    )


def with_savings(runs: Sequence[Run]) -> list[Run]:
    """Adds to every run with dropping how much less time a step takes than the vanilla run's of the same model."""
    vanilla = {_model(run): run.timing for run in runs if not run.config.schedule.layers}
    compared = []
    for run in runs:
        before = vanilla.get(_model(run))
        if run.config.schedule.layers and run.timing is not None and before is not None:
            run = replace(run, saved=1 - run.timing.seconds / before.seconds)
        compared.append(run)
    return compared


def table_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The table as text, head first. What was not measured, or the paper does not report, is left empty."""
    head = ["run", "layers", "ratios", "TFLOP", "s/step", "saved", "hours", "score"]
    lines = [[*head, "paper", "TFLOP", "saved", "GPU hours"]]
    for run in runs:
        schedule, paper, found = run.config.schedule, run.config.paper, run.evaluation
        lines.append(
            [
                run.name,
                ", ".join(map(str, schedule.layers)) or "vanilla",
                ", ".join(f"{ratio:g}" for ratio in schedule.ratios),
                text_of(run.tflop, ".3g"),
                text_of(run.timing.seconds if run.timing else None, ".3f"),
                text_of(run.saved, ".1%"),
                text_of(run.hours, ".3g"),
                f"{found['accuracy']:.1%} ({found['scorer']})" if found else "",
                paper.table if paper else "",
                text_of(paper.tflop if paper else None, ".3g"),
                text_of(paper.saved if paper and schedule.layers else None, ".1%"),
                text_of(paper.gpu_hours if paper else None, ".3g"),
            ]
        )
    return lines


def markdown(runs: Sequence[Run], rows: list[list[str]], pictured: bool) -> list[str]:
    """The lines of the report."""
    lines = ["# Runs, and what the paper reports", "", markdown_table(rows[0], rows[1:])]
    lines += [
        "TFLOP: cost of the image tokens of a picture that fills every tile, by the paper's formula (arXiv 2410.17247, "
        "section 3.3). Step times are medians without warm-up; *saved* is against the vanilla run of the same model in "
        "this table. Hours are processes times training time, stage 1 included where its directory was found.",
        "",
    ]
    if pictured:
        lines += [f"![time saved]({PICTURE})", ""]
    for run in runs:
        if run.config.paper and run.config.paper.scores:
            scores = ", ".join(f"{name} {score:g}" for name, score in run.config.paper.scores.items())
            lines += [f"Scores the paper reports for {run.name} ({run.config.paper.table}): {scores}.", ""]
    return lines


def draw(runs: Sequence[Run], file: Path) -> bool:
    """Bars of the time saved, measured beside reported; False where no run has either, or it cannot be drawn."""
    bars = [(run.name, run.saved, run.config.paper.saved if run.config.paper else None) for run in runs]
    bars = [bar for run, bar in zip(runs, bars) if run.config.schedule.layers and bar[1:] != (None, None)]
    if not bars:
        return False

    def bars_of() -> Any:
        from matplotlib.patches import Rectangle

        figure, axis = subplots(figsize=(7, 1 + 0.6 * len(bars)), layout="constrained")
        for row, (_, measured, reported) in enumerate(bars):
            for place, value, colour in ((-0.2, measured, "pyramid_drop"), (0.2, reported, "vanilla")):
                if value is not None:
                    bar = axis.barh(row + place, 100 * value, 0.36, color=COLOURS[colour])
                    axis.bar_label(bar, fmt="%.1f %%", padding=3)
        axis.set_yticks(range(len(bars)), [name for name, *_ in bars])
        axis.invert_yaxis()
        axis.set_xlabel("training time saved (%): step time of these runs; GPU hours in the paper")
        handles = [Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in ("pyramid_drop", "vanilla")]
        axis.legend(handles, ["these runs", "the paper"], loc="lower right")
        return figure

    return save_picture(file, bars_of)


def _model(run: Run) -> tuple[Any, ...]:
    """What two runs must have in common for their step times to be compared."""
    model, data = run.config.model, run.config.data
    parts = (model.path or model.language_model, model.vision_tower, model.aspect, model.pinpoints, model.trainable)
    return (*parts, str(run.config.lora), data.samples_per_batch, data.tokens_per_batch)


def _hours(directory: Path, config: Config) -> float | None:
    """Device hours of a run and, where its directory is known, of its stage 1; None on a CPU."""
    timing = timing_of(directory / METRICS_FILE)
    if timing is None or timing.device != "cuda":
        return None
    facts = read_json(directory / FINISHED_FILE)
    hours = facts["seconds"] * facts["processes"] / SECONDS_PER_HOUR
    stage1 = Path(config.model.projector).parent if config.model.projector else None
    if stage1 is not None and (stage1 / FINISHED_FILE).is_file():
        first = read_json(stage1 / FINISHED_FILE)
        hours += first["seconds"] * first["processes"] / SECONDS_PER_HOUR
    return hours


def _tflop(config: Config) -> float | None:
    decoder, tower = part_configs(config.model)
    if decoder is None or tower is None:
        return None
    model = config.model
    tile = model.image_size or tower["image_size"]
    geometry = ImageGeometry(tile, tower["patch_size"], model.aspect, model.merge, model.pinpoints, model.rounding)
    tiles = max((geometry.num_tiles(canvas) for canvas in model.pinpoints), default=1)
    layers, hidden, inner = (decoder[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    return paper_tflop(tiles * geometry.patches, layers, hidden, inner, config.schedule)
