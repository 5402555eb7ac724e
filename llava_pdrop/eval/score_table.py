"""The table of benchmarks: on the screen, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path

from llava_pdrop.eval.kept import HOME
from llava_pdrop.eval.score import Score, as_json
from llava_pdrop.report.console import say
from llava_pdrop.report.page import Block, Note, Page, Table
from llava_pdrop.report.units import column, text_of

TABLE, RESULTS = "scores.md", "scores.json"

NOTES = (
    "Scores are those of each benchmark's own rule, in brackets their 95 % interval (1000 draws of the questions); "
    "*against* is the difference from the first column on the same questions, drawn in pairs. Nothing stands under "
    "*paper* where its number is of another split, schedule or number of questions."
)


def blocks(scores: Sequence[Score], title: str = "") -> list[Block]:
    """The table with what it means. Columns of which nothing is known are left out."""
    columns = [
        ("benchmark", [score.benchmark.title for score in scores]),
        ("schedule", [score.column for score in scores]),
        ("score", [_score(score) for score in scores]),
        ("paper", [text_of(score.paper, ".1f") for score in scores]),
        ("difference", [_difference(score) for score in scores]),
        ("against", [_against(score) for score in scores]),
        ("questions", [f"{score.questions:,}" for score in scores]),
        ("not read", [f"{score.unread:,}" if score.unread else "" for score in scores]),
        column("time of a question", [score.seconds for score in scores]),
        ("image tokens", [" → ".join(f"{round(count, 1):g}" for count in score.image_tokens) for score in scores]),
    ]
    first = [score for score in scores if score.against is None]
    rules = [f"- {score.benchmark.title}: {score.benchmark.rule}; split: {score.split}" for score in first]
    return [Table.of_columns(columns, title, left=2), Note(NOTES), Note("\n".join(rules))]


def publish(scores: Sequence[Score], title: str, directory: Path) -> None:
    """Writes the table below ``directory``; prints prompts, the table, and where all files lie."""
    page = Page(title, blocks(scores), [as_json(score) for score in scores])
    file, _ = page.write(directory / HOME, TABLE, RESULTS)
    for score in scores:
        if score.against is None:
            say(f"{score.benchmark.name}: asks {score.prompt!r}; rule: {score.benchmark.rule}; split: {score.split}")
    Page(title, blocks(scores, title)).show()
    for score in scores:
        line = f"{score.benchmark.name} ({score.column}): {', '.join(map(str, score.files))}"
        say(line if score.problem is None else f"{line}; {score.unread:,} not read, the first: {score.problem}")
    say(f"table: {file}")


def refuse_unread(scores: Sequence[Score], allowed: float) -> None:
    """Raises `SystemExit` with status 1, naming the worst, where of some benchmark a larger share of questions than
    ``allowed`` could not be asked. All is written by then."""
    worst = max(scores, key=lambda score: score.unread / score.questions, default=None)
    if worst is None or (share := worst.unread / worst.questions) <= allowed:
        return
    say(
        f"{worst.benchmark.name} ({worst.column}): {worst.unread:,} of {worst.questions:,} questions could not be "
        f"asked: mend them and start again, or allow it: eval.max_unread={ceil(share * 1000) / 1000:g}"
    )
    raise SystemExit(1)


def _score(score: Score) -> str:
    if score.value is None:
        return "none asked" if score.numbers else "server"
    return f"{score.value:.1f} [{score.low:.1f}, {score.high:.1f}]"


def _difference(score: Score) -> str:
    if score.paper is not None and score.value is not None:
        return f"{score.value - score.paper:+.1f}"
    row = score.benchmark
    if row.paper_split and score.split != row.paper_split:
        return f"(paper: {row.paper_split})"
    return ""


def _against(score: Score) -> str:
    if score.against is None:
        return ""
    _, value, low, high = score.against
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
