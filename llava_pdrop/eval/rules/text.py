"""Rules for short answers, as VLMEvalKit applies them (``vlmeval/dataset/utils/vqa_eval.py``).

It writes answers into a spreadsheet and reads them back, which turns what a spreadsheet takes for missing into ``nan``.
"""

from __future__ import annotations

import ast

from llava_pdrop.eval.benchmarks.files import MISSING

THRESHOLD = 0.5
"""ANLS below it is 0."""


def from_sheet(text: str | None) -> str:
    """An answer as it comes back from the spreadsheet."""
    return "nan" if text is None or text in MISSING else text


def alternatives(gold: str) -> list[str]:
    """The answers of a cell: those of a list in Python's notation, else the cell itself."""
    try:
        found = ast.literal_eval(gold)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [gold]
    return [str(entry) for entry in found] if isinstance(found, list) else [gold]


def anls(answer: str, golds: list[str]) -> float:
    """Average normalised Levenshtein similarity of one answer (arXiv 1907.00490): 1 - the smallest edit distance over
    the longer length, and 0 below a half. The distance ignores case and blanks; the lengths are those of the texts as
    they stand."""
    similarity = max(1 - _distance(_plain(gold), _plain(answer)) / max(len(gold), len(answer), 1) for gold in golds)
    return similarity if similarity >= THRESHOLD else 0.0


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
