"""A row per variant, however it was measured, and the table of them: for `compare`, `ablate` and finished runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from llava_pdrop.compare.survivors import Example
from llava_pdrop.config.load import RUN_FILE, load_config
from llava_pdrop.config.schema import Config, PaperRow
from llava_pdrop.cost.plan import TokenPlan
from llava_pdrop.errors import ConfigError
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.evaluate import EVALUATION_FILE
from llava_pdrop.eval.score import Score, as_json, paired
from llava_pdrop.eval.score_table import blocks as benchmark_blocks
from llava_pdrop.eval.score_table import refuse_unread
from llava_pdrop.files import read_json
from llava_pdrop.report.console import say
from llava_pdrop.report.page import Block, Note, Page, Picture, Table
from llava_pdrop.report.units import MEMORY, MIB, TIME, Unit, mean_and_error, spread_of, text_of, unit_of
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.history import FINISHED_FILE
from llava_pdrop.train.metrics import METRICS_FILE, Timing, timing_of

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Saving:
    """The share of the time without drops that dropping saves.

    Attributes:
        realised: where turns were taken the median over the pairs of steps, else by two figures measured one after the
            other.
        quartiles: first and third over the pairs; None where no turns were taken.
        pairs: what every pair of steps saved.
        steps: of the run, whose batches were timed: optimizer steps of its first epoch from 0 on.
        on_cpu: by CPU seconds of one thread, otherwise between CUDA events.
        predicted: share of the operations of these steps.
        reason: why no turns were taken.
    """

    realised: float
    quartiles: tuple[float, float] | None = None
    pairs: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    on_cpu: bool = True
    predicted: float | None = None
    reason: str | None = None

    def describe(self) -> str:
        """A sentence for the report: which of the two it is."""
        if self.quartiles is None:
            return (
                "*Realised* compares times that were measured one after the other, so it holds what else the machine "
                f"did ({self.reason})."
            )
        clock = "CPU seconds of one thread" if self.on_cpu else "seconds between CUDA events"
        return (
            f"*Realised* is the median over {len(self.pairs)} pairs of steps, in brackets the first and third "
            "quartile: after training, the two schedules took turns on the same batches with one model and one "
            f"optimizer ({clock}). *Predicted* is for these batches."
        )


@dataclass(frozen=True)
class VariantRow:
    """One variant of a run, and what is known of it; None where something is not.

    Attributes:
        config: of the run, or of the evaluation where nothing is trained.
        plan: of a picture that fills every tile.
        timing: of its training.
        hours: device hours, those of stage 1 included where its directory is found.
        evaluation: on ``data.eval``, with the keys of `EVALUATION_FILE`.
        answer_seconds: of an answer, on ``answer_device``.
        predicted: share of the operations of a training step without drops that is saved; where nothing is trained, of
            those of the prompt.
        saving: the same share of the time, of a step or of an answer.
        paper: what it reports for the run.
        scores: of ``eval.benchmarks``.
        examples: which image tokens survive, on held-out pictures.
        over: the runs of several seeds that this row is the mean of.
    """

    name: str
    config: Config
    plan: TokenPlan | None = None
    timing: Timing | None = None
    hours: float | None = None
    evaluation: dict[str, Any] | None = None
    answer_seconds: float | None = None
    answer_device: str = "cpu"
    predicted: float | None = None
    saving: Saving | None = None
    paper: PaperRow | None = None
    scores: tuple[Score, ...] = ()
    examples: tuple[Example, ...] = ()
    over: tuple[VariantRow, ...] = ()

    @property
    def runs(self) -> tuple[VariantRow, ...]:
        """The rows of single runs: itself, or what it is the mean of."""
        return self.over or (self,)

    @property
    def schedule(self) -> Schedule:
        """What it drops; the empty one: nothing."""
        return self.config.schedule

    @property
    def seconds(self) -> float | None:
        """Of a training step, or of an answer where nothing was trained."""
        return self.timing.seconds if self.timing else self.answer_seconds

    @property
    def device(self) -> str:
        """Where `seconds` were measured, ``cpu`` or ``cuda``."""
        return self.timing.device if self.timing else self.answer_device

    @property
    def realised(self) -> float | None:
        """Share of the time that is saved."""
        return self.saving.realised if self.saving else None

    @property
    def saved_in_paper(self) -> float | None:
        """Share of the GPU hours that the paper saves."""
        return self.paper.saved if self.paper and not self.schedule.vanilla else None

    @property
    def accuracy(self) -> float | None:
        """On ``data.eval``."""
        return self.evaluation["accuracy"] if self.evaluation else None

    def facts(self) -> dict[str, Any]:
        """What all reports tell programs of a row; shares between 0 and 1."""
        return {
            "name": self.name,
            "schedule": self.schedule.to_dict(),
            "timing": asdict(self.timing) if self.timing else None,
            "seconds": self.seconds,
            "device": self.device,
            "predicted": self.predicted,
            "realised": self.realised,
            "saving": asdict(self.saving) if self.saving else None,
            "evaluation": self.evaluation,
            "paper": asdict(self.paper) if self.paper else None,
            "benchmarks": [as_json(score) for score in self.scores],
        }


def finished_run(directory: Path) -> VariantRow:
    """A finished run from what it left in its directory.

    Raises:
        ConfigError: a file of a finished run is missing.
    """
    for name in (RUN_FILE, FINISHED_FILE):
        if not (directory / name).is_file():
            inside = sorted(str(file.parent) for file in directory.glob(f"*/{FINISHED_FILE}"))
            hint = f": name one of {', '.join(inside)}" if inside else ""
            raise ConfigError(f"{directory} is no finished run, it has no {name}{hint}")
    config, scores = load_config(directory / RUN_FILE), directory / EVALUATION_FILE
    evaluation = read_json(scores) if scores.is_file() else None
    return with_times(VariantRow(config.name, config, evaluation=evaluation, paper=config.paper), directory)


def with_times(row: VariantRow, directory: Path) -> VariantRow:
    """The row of the finished run in ``directory`` with what its training took."""
    timing, hours = timing_of(directory / METRICS_FILE), None
    if timing is not None and timing.device == "cuda" and (directory / FINISHED_FILE).is_file():
        projector = load_config(directory / RUN_FILE).model.projector  # of the stage 1 that it started from
        stage1 = [Path(projector).parent] if projector else []
        runs = [read_json(file) for place in (directory, *stage1) if (file := place / FINISHED_FILE).is_file()]
        hours = sum(run["seconds"] * run["processes"] for run in runs) / SECONDS_PER_HOUR
    return replace(row, timing=timing, hours=hours)


def table(rows: Sequence[VariantRow], title: str, more: Sequence[tuple[str, Sequence[str]]] = ()) -> Table:
    """The rows as a table. Columns of which nothing is known are left out; a row of several runs has their means, with
    the standard error of what was measured.

    Args:
        more: (head, cells) of columns behind the names.
    """

    def cells(style: str, value: Callable[[VariantRow], float | None]) -> list[str]:
        return [spread_of([value(run) for run in row.runs], lambda mean: text_of(mean, style)) for row in rows]

    def counted(style: str, value: Callable[[VariantRow], float | None]) -> list[str]:
        """Of what runs do not measure: the mean alone."""
        means = [mean_and_error([value(run) for run in row.runs]) for row in rows]
        return [text_of(mean and mean[0], style) for mean in means]

    def measured(
        title: str, value: Callable[[VariantRow], float | None], units: Sequence[Unit] = TIME
    ) -> tuple[str, list[str]]:
        values = [[value(run) for run in row.runs] for row in rows]
        unit = unit_of([found[0] if (found := mean_and_error(runs)) else None for runs in values], units)
        return f"{title}, {unit.name}", [spread_of(runs, unit.text) for runs in values]

    cuda = any(row.device == "cuda" for row in rows)
    benchmarks = dict.fromkeys(score.benchmark for row in rows for run in row.runs for score in run.scores)
    return Table.of_columns(
        [
            ("variant", [row.name for row in rows]),
            *more,
            ("after layers", [", ".join(map(str, row.schedule.shortening)) or "-" for row in rows]),
            ("image tokens per stage", [_image_tokens(row) for row in rows]),
            ("average", counted(".0f", lambda row: row.plan.average_tokens if row.plan else None)),
            ("TFLOP", counted(".3g", lambda row: row.plan.paper.dropping if row.plan else None)),
            ("saved, predicted", counted(".1%", lambda row: row.predicted)),
            ("saved, realised", [_realised(row) for row in rows]),
            measured("CPU time of a step", lambda row: row.timing.cpu if row.timing else None),
            measured("wall time of a step", lambda row: row.timing.wall if row.timing else None),
            measured(f"peak {'CUDA' if cuda else 'RSS'}", _peak, MEMORY),
            ("device hours", cells(".3g", lambda row: row.hours)),
            ("accuracy", cells(".1%", lambda row: row.accuracy)),
            ("chance", counted(".1%", lambda row: row.evaluation.get("chance") if row.evaluation else None)),
            measured(f"{'GPU' if cuda else 'CPU'} time of an answer", lambda row: row.answer_seconds),
            *((benchmark.title, cells(".1f", partial(_score, benchmark))) for benchmark in benchmarks),
            ("paper", [row.paper.table if row.paper else "" for row in rows]),
            ("paper: TFLOP", cells(".3g", lambda row: row.paper.tflop if row.paper else None)),
            ("paper: saved", cells(".1%", lambda row: row.saved_in_paper)),
            ("paper: GPU hours", cells(".3g", lambda row: row.paper.gpu_hours if row.paper else None)),
        ],
        title,
    )


def legend(rows: Sequence[VariantRow]) -> str:
    """What the columns of the table mean, as far as it has them."""
    planned, trained = any(row.plan for row in rows), [row for row in rows if row.timing]
    found = next((row.evaluation for row in rows if row.evaluation), {})
    texts = {
        "Image tokens are of a picture that fills every tile; *average* is their mean over the decoder's layers; TFLOP "
        "is their cost by the paper's formula (arXiv 2410.17247, section 3.3).": planned,
        "Image tokens are means over the held-out questions.": not planned and bool(found),
        "*Predicted* is what the matrix products and attention of the run's own batches save: text, tower, ranking and "
        "backward included; the factor behind *realised* is realised over predicted.": any(
            row.predicted is not None for row in trained
        ),
        **{row.saving.describe(): True for row in rows if row.saving},
        "Times of a step are medians without warm-up, fetching data left out; CPU time is the time all cores were "
        "busy.": bool(trained),
        "Device hours are processes times training time, stage 1 included where its directory was found.": any(
            row.hours for row in rows
        ),
        f"Accuracy is measured by generation on {found.get('questions', 'the')} held-out questions "
        f"(`{found.get('scorer')}`); chance is what answering at random from the distribution of the gold answers "
        "would reach (the sum of their squared shares).": bool(found),
        "A figure ± another is a mean over seeds and its standard error, which holds what seeds change: the start of "
        "fresh weights, the order of batches, what is drawn. The questions are the same.": any(
            len(row.runs) > 1 for row in rows
        ),
        "A row `a + b` is the model of row `a` with the schedule `b` at inference only.": any(
            " + " in row.name for row in rows
        ),
        f"Nothing was trained: one model, `{rows[0].config.model.path}`, answered all questions with each schedule. "
        "Seconds are of a whole answer, reading the picture included; *predicted* counts the operations of reading a "
        "full picture and 200 text tokens.": not trained and any(row.answer_seconds for row in rows),
    }
    return " ".join(text for text, holds in texts.items() if holds)


def publish(
    rows: Sequence[VariantRow],
    title: str,
    out: Path,
    files: Sequence[str],
    pictures: Sequence[Picture],
    more: Sequence[Block] = (),
    facts: Any = None,
    tables: Sequence[Table] = (),
) -> Path:
    """Prints the table and writes the page into ``out``; returns its path.

    Args:
        files: name of the page, and of the JSON file with the ``facts`` where there are any.
        pictures: below the table.
        more: what stands at the end.
        tables: in the place of the one of all ``rows``.

    Raises:
        SystemExit: with status 1, after all is written, where too many pictures of a benchmark cannot be read.
    """
    scores = [score for row in rows for run in row.runs for score in run.scores]
    blocks: list[Block] = [*(tables or [table(rows, "Variants")]), Note(legend(rows)), *pictures]
    blocks += [
        Note(f"The paper's {row.paper.table} for {row.name}: {', '.join(f'{k} {v:g}' for k, v in reported.items())}.")
        for row in rows
        if row.paper and (reported := row.paper.scores)
    ]
    page = Page(title, [*blocks, *(benchmark_blocks(paired(scores), "Benchmarks") if scores else ()), *more], facts)
    page.show()
    file, *_ = page.write(out, *files)
    say(f"report: {file}")
    refuse_unread(scores, rows[0].config.eval.max_unread)
    return file


def _image_tokens(row: VariantRow) -> str:
    """By the plan, else by what was measured; where neither is there, the ratios."""
    if row.plan:
        return " → ".join(f"{stage.image_tokens:g}" for stage in row.plan.stages)
    if row.evaluation and "image_tokens" in row.evaluation:
        return " → ".join(f"{count:g}" for count in row.evaluation["image_tokens"])
    return row.schedule.amounts_text


def _realised(row: VariantRow) -> str:
    """The realised saving, its quartiles where there are any, and how much of the predicted one it is. Of several runs
    the mean and its standard error."""
    if len(row.runs) > 1:
        return spread_of([run.realised for run in row.runs], lambda share: text_of(share, ".1%"))
    (row,) = row.runs
    if row.saving is None:
        return ""
    inside = []
    if row.saving.quartiles is not None:
        inside.append(" to ".join(f"{100 * share:.1f}" for share in row.saving.quartiles))
    if row.predicted:
        inside.append(f"{row.saving.realised / row.predicted:.2f}x")
    return f"{row.saving.realised:.1%}" + (f" ({'; '.join(inside)})" if inside else "")


def _peak(row: VariantRow) -> float | None:
    """Bytes."""
    return row.timing.peak_mib * MIB if row.timing and row.timing.peak_mib else None


def _score(benchmark: Benchmark, row: VariantRow) -> float | None:
    """Of the variant's own schedule."""
    return next((score.value for score in row.scores if (score.benchmark, score.column) == (benchmark, row.name)), None)
