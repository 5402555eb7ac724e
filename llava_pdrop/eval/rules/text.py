"""Rules for short answers, as VLMEvalKit applies them (``vlmeval/dataset/utils/vqa_eval.py``).

It writes answers into a spreadsheet and reads them back, which turns what a spreadsheet takes for missing into ``nan``.
"""

from __future__ import annotations

import ast
import warnings

MISSING = frozenset(
    {
        "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
        "NULL", "NaN", "None", "n/a", "nan", "null",
    }
)  # fmt: skip
"""Cells that pandas takes for missing values, and all that read tables with it do."""

THRESHOLD = 0.5
"""ANLS below it is 0."""

TOLERANCE = 0.05
"""Of the gold number, by which another may differ in relaxed accuracy."""


def from_sheet(text: str | None) -> str:
    """An answer as it comes back from the spreadsheet."""
    return "nan" if text is None or text in MISSING else text


def alternatives(gold: str) -> list[str]:
    """The answers of a cell: those of a list in Python's notation, else the cell itself."""
    if "[" not in gold:
        return [gold]
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is no code: [2nd]
            found = ast.literal_eval(gold)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [gold]
    return [str(entry) for entry in found] if isinstance(found, list) else [gold]


def anls(answer: str, golds: list[str]) -> float:
    """Average normalised Levenshtein similarity of one answer (arXiv 1907.00490): 1 - the smallest edit distance over
    the longer length, and 0 below a half. The distance ignores case and blanks; the lengths are those of the texts as
    they stand."""
    similarity = max(1 - _distance(_plain(gold), _plain(answer)) / _longer(gold, answer) for gold in golds)
    return similarity if similarity >= THRESHOLD else 0.0


def relaxed(answer: str, gold: str) -> bool:
    """Relaxed accuracy of ChartQA (arXiv 2203.10244): a number within 5 % of the gold one; else the same text but for
    case. A gold 0 is never a number, and one that is no number within nothing (NaN)."""
    number, target = _number(answer), _number(gold)
    if number is not None and target:
        return abs(number - target) / abs(target) <= TOLERANCE
    return answer.lower() == gold.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def same(answer: str, gold: str) -> bool:
    """Equal but for case and outer blanks."""
    return answer.strip().lower() == gold.strip().lower()


def _longer(gold: str, answer: str) -> int:
    """Of both in capitals, as the official code counts: they may have more letters (ß)."""
    return max(len(gold.upper()), len(answer.upper()), 1)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _distance(left: str, right: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions."""
    row = list(range(len(left) + 1))
    for i, letter in enumerate(right, 1):
        before, row[0] = row[0], i
        for j, own in enumerate(left, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (own != letter))
    return row[-1]
