"""How an answer to a record of ``data.eval`` is judged, by one gold answer. A new rule is one function and one row in
`SCORERS`. Nothing is taken out of a text that could be all there is to it: a sign, a decimal point, an article.

Benchmarks have rules of their own (`llava_pdrop.eval.benchmarks`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

_NUMBER = re.compile(r"(?<![\w.:/])[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?![:/]?\d)")
_EDGES = "\"'`*()[]{}<>.,;:!?"


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stops at the end: what two equal answers must share, as LLaVA does for GQA
    (``scripts/convert_gqa_for_eval.py``), and without the blanks around it, as VLMEvalKit does."""
    return " ".join(text.lower().split()).rstrip(". ")


def exact_match(answer: str, gold: str) -> float:
    """1 if both are the same after `normalise`."""
    return float(normalise(answer) == normalise(gold))


def first_word(answer: str, gold: str) -> float:
    """`exact_match` of the answer's first word, without the punctuation around it, for models that go on talking:
    ``B. krill`` is B, as in LLaVA's ScienceQA."""
    words = answer.lower().split()
    return float(bool(words) and words[0].strip(_EDGES) == normalise(gold).strip(_EDGES))


def contains(answer: str, gold: str) -> float:
    """1 if the gold answer stands in the answer, as whole words and numbers: 5 is not in -5, 1.5 or 3:05."""
    gold = normalise(gold)
    if not gold:
        return exact_match(answer, gold)
    before = r"(?<!\w)(?<!\d[.,:/])" + (r"(?<![-+.])" if re.match(r"[\d.]", gold) else "")
    after = r"(?!\w)" + (r"(?![.,:/]\d)" if re.search(r"\d$", gold) else "")
    return float(re.search(before + re.escape(gold) + after, normalise(answer)) is not None)


def number(answer: str, gold: str) -> float:
    """1 if the first number in both has the same value (thousands separators are ignored). A time or a date is none."""
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
