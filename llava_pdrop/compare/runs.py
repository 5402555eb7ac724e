"""Finished runs side by side, and beside what the paper reports for them: ``llava-pdrop compare RUN RUN ...``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llava_pdrop.compare import figures
from llava_pdrop.compare.rows import VariantRow, finished_run, publish
from llava_pdrop.compare.turns import with_savings
from llava_pdrop.cost.plan import make_plan
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.report.page import Picture

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
    rows = with_savings([planned(finished_run(Path(directory))) for directory in directories], in_turns=False)
    known = any(share is not None for row in rows for share in (row.realised, row.saved_in_paper))
    picture = [Picture(RUNS_PICTURE, "tokens, time saved, accuracy", lambda: figures.variants(rows))] * known
    return publish(rows, "Finished runs, and what the paper reports", out, [RUNS_FILE], picture)


def planned(row: VariantRow) -> VariantRow:
    """``row`` with its plan, if the sizes of its model are known on this machine."""
    try:
        return replace(row, plan=make_plan(row.config, ()))
    except UserError:
        return row
