"""The table of benchmarks: on the screen, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import ceil
from pathlib import Path

from llava_pdrop.eval.kept import HOME
from llava_pdrop.eval.score import Score, as_json
from llava_pdrop.report.style import markdown_table, print_table, text_of

TABLE, RESULTS = "scores.md", "scores.json"

NOTES = (
    "Scores are those of each benchmark's own rule, in brackets their 95 % interval (1000 draws of the questions); "
    "*against* is the difference from the first column on the same questions, drawn in pairs. Nothing stands under "
    "*paper* where its number is of another split, schedule or number of questions."
)


def table_rows(scores: Sequence[Score]) -> list[list[str]]:
    """The table as text, head first. Columns of which nothing is known are left out."""
    columns: list[tuple[str, list[str]]] = [
        ("benchmark", [score.benchmark.title for score in scores]),
        ("schedule", [score.column for score in scores]),
        ("score", [_score(score) for score in scores]),
        ("paper", [text_of(score.paper, ".1f") for score in scores]),
        ("difference", [_difference(score) for score in scores]),
        ("against", [_against(score) for score in scores]),
        ("questions", [f"{score.questions:,}" for score in scores]),
        ("not read", [f"{score.unread:,}" if score.unread else "" for score in scores]),
        ("s/question", [f"{score.seconds:.3f}" for score in scores]),
        ("image tokens", [" → ".join(f"{count:g}" for count in _rounded(score.image_tokens)) for score in scores]),
    ]
    known = [(head, cells) for head, cells in columns if any(cells)]
    return [[head for head, _ in known], *map(list, zip(*(cells for _, cells in known)))]


def show(scores: Sequence[Score], title: str) -> None:
    """Prints prompts, table, and where answers and files for servers lie."""
    for score in scores:
        if score.against is None:
            print(f"{score.benchmark.name}: asks {score.prompt!r}; rule: {score.benchmark.rule}; split: {score.split}")
    print_table(title, table_rows(scores))
    for score in scores:
        line = f"{score.benchmark.name} ({score.column}): {', '.join(map(str, score.files))}"
        print(line if score.problem is None else f"{line}; {score.unread:,} not read, the first: {score.problem}")


def write(scores: Sequence[Score], directory: Path, title: str) -> Path:
    """Writes the table below ``directory`` and returns its path."""
    home = directory / HOME
    home.mkdir(parents=True, exist_ok=True)
    (home / RESULTS).write_text(
        json.dumps([as_json(score) for score in scores], indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    file = home / TABLE
    file.write_text(markdown(scores, title), encoding="utf-8")
    return file


def refuse_unread(scores: Sequence[Score], allowed: float) -> None:
    """Raises `SystemExit` with status 1, naming the worst, where of some benchmark a larger share of questions than
    ``allowed`` could not be asked. All is written by then."""
    worst = max(scores, key=lambda score: score.unread / score.questions, default=None)
    if worst is None or (share := worst.unread / worst.questions) <= allowed:
        return
    print(
        f"{worst.benchmark.name} ({worst.column}): {worst.unread:,} of {worst.questions:,} questions could not be "
        f"asked: mend them and start again, or allow it: eval.max_unread={ceil(share * 1000) / 1000:g}"
    )
    raise SystemExit(1)


def markdown(scores: Sequence[Score], title: str) -> str:
    """The table with what it means."""
    head, *rows = table_rows(scores)
    rules = "".join(
        f"- {score.benchmark.title}: {score.benchmark.rule}; split: {score.split}\n"
        for score in scores
        if score.against is None
    )
    return f"## {title}\n\n{markdown_table(head, rows)}\n{NOTES}\n\n{rules}"


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


def _rounded(counts: Sequence[float]) -> list[float]:
    return [round(count, 1) for count in counts]
