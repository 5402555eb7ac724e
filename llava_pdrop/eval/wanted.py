"""What benchmarks need on disk, in words: for ``llava-pdrop benchmarks``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_pdrop.eval.benchmarks.base import Benchmark

FILES = ["benchmark", "file or directory", "there", "comes from", "licence"]
RULES = ["benchmark", "in the paper", "split", "number", "rule"]


def files(benchmarks: Sequence[Benchmark], root: str | Path) -> list[list[str]]:
    """A line per file or directory: whether it is below ``root``, where it comes from, under which licence."""
    lines = []
    for row in benchmarks:
        for place, wanted in enumerate(row.wanted):
            found = "yes" if there(row, wanted.path, Path(root)) else "no"
            lines.append(
                [row.name if place == 0 else "", f"{row.folder}/{wanted.path}", found, wanted.source, wanted.licence]
            )
    return lines


def there(benchmark: Benchmark, path: str, root: Path) -> bool:
    """Whether a file of ``benchmark`` lies in its own directory below ``root`` or, a table, in ``root`` itself."""
    own = (root / benchmark.folder / path).exists()
    return own or (path.endswith(".tsv") and (root / path).exists())


def rules(benchmarks: Sequence[Benchmark]) -> list[list[str]]:
    """A line per benchmark: split, and whose rule its score follows."""
    return [[row.name, row.title, _split(row), row.headline or "-", row.rule or "a judge's"] for row in benchmarks]


def _split(row: Benchmark) -> str:
    return f"{row.split} (paper: {row.paper_split})" if row.paper_split else row.split
