"""``llava-pdrop benchmarks``: what the benchmarks need on disk, and how they are scored."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_pdrop.commands.arguments import a_place

NUMBERS = ["number", "rule", "value", "as the paper prints it"]
FILES = ["benchmark", "file or directory", "there", "comes from", "licence"]
RULES = ["benchmark", "in the paper", "split", "number", "rule"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="benchmarks to list; paper: those of its tables (default: all)"
    )
    parser.add_argument("--root", type=a_place, metavar="DIR", help="where they lie (default: playground/data/eval)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--rules", action="store_true", help="list splits and rules instead of files")
    what.add_argument(
        "--score", type=a_place, metavar="FILE", help="score the answers in FILE (LLaVA's JSON lines) to the one NAME"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UserError: a name that no benchmark has; answers or files that are not what they should be.
    """
    from llava_pdrop.errors import UserError
    from llava_pdrop.eval.benchmarks import BENCHMARKS, benchmarks_of
    from llava_pdrop.eval.benchmarks.files import ROOT
    from llava_pdrop.report.page import Table

    names = [name for names in args.names for name in names.split(",")]
    wanted = benchmarks_of(names, "NAME")
    rows = [row for row in BENCHMARKS.values() if not names or row in wanted]
    if args.rules:
        Table(RULES, rules(rows), "How benchmarks are scored", left=len(RULES)).show()
        return
    root = args.root or Path(ROOT)
    if args.score is not None:
        if len(rows) != 1 or not names:
            raise UserError(f"--score {args.score}: name the one benchmark that it answers")
        found = numbers(rows[0], root, args.score)
        Table(NUMBERS, found, f"{rows[0].title}: {args.score}", left=2).show()
        return
    Table(FILES, files(rows, root), f"Files of the benchmarks below {root}", left=len(FILES)).show()


def numbers(benchmark: Any, root: Path, file: Path) -> list[list[str]]:
    """A line per number of every rule; behind the one that the paper prints stands its 95 % interval, in its unit.

    Raises:
        UserError: wrong files, or only a server knows the answers.
    """
    import numpy as np

    from llava_pdrop.errors import UserError
    from llava_pdrop.eval.benchmarks.files import read_answers
    from llava_pdrop.eval.score import interval_of, statistics_of

    questions = benchmark.read(root / benchmark.folder, True)
    texts = read_answers(file, questions)
    found = statistics_of(benchmark, questions, texts)
    if not found:
        raise UserError(f"{benchmark.name} ({benchmark.split_of(questions)}): only a server, or a judge, can score it")
    ones = np.ones(len(questions))
    edges = (0.0, 0.0)
    if benchmark.headline in found[benchmark.rule](ones):
        _, edges = interval_of(benchmark, questions, found[benchmark.rule])
    lines = [["questions", "", f"{len(questions):,}", ""], ["not answered", "", f"{texts.count(None):,}", ""]]
    for rule, statistic in found.items():
        for name, value in statistic(ones).items():
            is_headline = rule == benchmark.rule and name == benchmark.headline
            printed = f"{benchmark.factor * value:.1f} [{edges[0]:.1f}, {edges[1]:.1f}]" if is_headline else ""
            lines.append([name, rule, f"{value:.6g}", printed])
    return lines


def files(benchmarks: Sequence[Any], root: Path) -> list[list[str]]:
    """A line per file or directory: whether it is below ``root``, where it comes from, under which licence."""
    lines = []
    for row in benchmarks:
        for place, wanted in enumerate(row.wanted):
            found = "yes" if there(row, wanted, root) else "no"
            name, path = row.name if place == 0 else "", f"{row.folder}/{wanted.path}"
            lines.append([name, path, found, wanted.source, wanted.licence])
    return lines


def there(benchmark: Any, wanted: Any, root: Path) -> bool:
    """Whether a file of ``benchmark`` lies in its own directory below ``root``, or elsewhere where it is looked for."""
    folders = (benchmark.folder, *wanted.elsewhere)
    return any((root / folder / wanted.path).exists() for folder in folders)


def rules(benchmarks: Sequence[Any]) -> list[list[str]]:
    """A line per benchmark: split, and whose rule its score follows."""
    return [[row.name, row.title, _split(row), row.headline or "-", row.rule or "a judge's"] for row in benchmarks]


def _split(row: Any) -> str:
    return f"{row.split} (paper: {row.paper_split})" if row.paper_split else row.split
