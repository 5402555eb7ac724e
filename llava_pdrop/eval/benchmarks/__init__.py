"""The benchmarks of the paper's tables. A new one is one file, one row in `BENCHMARKS` and one test."""

from __future__ import annotations

from collections.abc import Iterable

from llava_pdrop.errors import check_name
from llava_pdrop.eval.benchmarks.ai2d import AI2D
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.benchmarks.chartqa import CHARTQA
from llava_pdrop.eval.benchmarks.docvqa import DOCVQA, INFOVQA
from llava_pdrop.eval.benchmarks.gqa import GQA
from llava_pdrop.eval.benchmarks.mmbench import MMBENCH, MMBENCH_CN
from llava_pdrop.eval.benchmarks.mme import MME
from llava_pdrop.eval.benchmarks.mmstar import MMSTAR
from llava_pdrop.eval.benchmarks.mmvet import MMVET
from llava_pdrop.eval.benchmarks.ocrvqa import OCRVQA
from llava_pdrop.eval.benchmarks.pope import POPE
from llava_pdrop.eval.benchmarks.scienceqa import SCIENCEQA
from llava_pdrop.eval.benchmarks.seed_bench import SEED_BENCH
from llava_pdrop.eval.benchmarks.textvqa import TEXTVQA
from llava_pdrop.eval.benchmarks.vizwiz import VIZWIZ
from llava_pdrop.eval.benchmarks.vqav2 import VQAV2

BENCHMARKS: dict[str, Benchmark] = {
    row.name: row
    for row in (
        MME, MMBENCH, MMBENCH_CN, SEED_BENCH, MMSTAR, POPE, SCIENCEQA, AI2D, DOCVQA, INFOVQA, TEXTVQA, CHARTQA, OCRVQA,
        VQAV2, VIZWIZ, GQA, MMVET,
    )
}  # fmt: skip
"""Name -> benchmark, in the order of the paper's tables."""

BY_NAME: dict[str, Benchmark] = {
    name.lower(): row for row in BENCHMARKS.values() for name in (row.name, row.title, *row.aliases)
}
"""The same by every name, in small letters."""

PAPER = "paper"
"""Instead of names: the benchmarks that the paper reports for a run, or all that it has."""


def benchmarks_of(names: Iterable[str], key: str, reported: Iterable[str] = (), file: str = "") -> list[Benchmark]:
    """The benchmarks of these ``names``, each once.

    Args:
        key: where they were given. file: the config that gives them, if one does.
        reported: what `PAPER` stands for: names, of which those that no benchmark has are passed over; without any, the
            paper's tables.

    Raises:
        Problem, ConfigError: a name that none has (see `check_name`).
    """
    rows: list[Benchmark] = []
    for name in names:
        if name == PAPER:
            told = [BY_NAME[known.lower()] for known in reported if known.lower() in BY_NAME]
            rows += told or [row for row in BENCHMARKS.values() if row.total is not None]
            continue
        if name.lower() not in BY_NAME:
            check_name(key, name, [*BENCHMARKS, PAPER], file)
        rows.append(BY_NAME[name.lower()])
    return list(dict.fromkeys(rows))
