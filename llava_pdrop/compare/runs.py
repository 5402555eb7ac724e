"""Finished runs side by side, and beside what the paper reports for them: ``llava-pdrop compare RUN RUN ...``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llava_pdrop.compare import figures
from llava_pdrop.compare.rows import Saving, VariantRow, below_the_table, finished_run, legend, table, with_savings
from llava_pdrop.cost.plan import make_plan
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.report.console import say
from llava_pdrop.report.page import Note, Page, Picture

RUNS_FILE, RUNS_PICTURE = "runs.md", "runs.png"


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
    rows = [planned(finished_run(Path(directory))) for directory in directories]
    rows = with_savings(rows, one_after_the_other)
    saved = any(share is not None for row in rows for share in (row.realised, row.saved_in_paper))
    picture = [Picture(RUNS_PICTURE, "tokens, time saved, accuracy", lambda: figures.variants(rows))] * saved
    title = "Runs, and what the paper reports"
    page = Page("Finished runs", [table(rows, title), Note(legend(rows)), *picture, *below_the_table(rows)])
    page.show()
    file, *_ = page.write(out, RUNS_FILE)
    say(f"report: {file}")
    return file


def planned(row: VariantRow) -> VariantRow:
    """``row`` with its plan, if the sizes of its model are known on this machine."""
    try:
        return replace(row, plan=make_plan(row.config, ()))
    except UserError:
        return row


def one_after_the_other(row: VariantRow, before: float, after: float) -> Saving:
    """What ``row`` saves by the seconds of its own median step, ``after``, and of the vanilla run's, ``before``."""
    return Saving.one_after_the_other(before, after, "the median steps of finished runs of the same model")
