"""How an answer is judged. A new rule is one function and one row in `SCORERS`."""

from __future__ import annotations

import re
import string
from collections.abc import Callable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*")


def normalise(text: str) -> str:
    """Lower case, no punctuation, no English articles, single spaces: what two equal answers must share."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> float:
    """1 if both are the same after `normalise`. An empty answer is only right where nothing was asked for."""
    return float(normalise(answer) == normalise(gold))


def first_word(answer: str, gold: str) -> float:
    """`exact_match` of the answer's first word or number, for models that go on talking."""
    words = normalise(answer).split()
    return float((words[0] if words else "") == normalise(gold))


def contains(answer: str, gold: str) -> float:
    """1 if the normalised gold answer stands in the answer, as whole words."""
    return float(f" {normalise(gold)} " in f" {normalise(answer)} ")


def number(answer: str, gold: str) -> float:
    """1 if the first number in both has the same value (thousands separators are ignored)."""
    values = [_NUMBER.search(text) for text in (answer, gold)]
    if None in values:
        return 0.0
    left, right = (float(value[0].replace(",", "")) for value in values if value is not None)
    return float(left == right)


SCORERS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "first_word": first_word,
    "contains": contains,
    "number": number,
}
"""``eval.scorer`` -> score in [0, 1] of (answer, gold answer)."""
