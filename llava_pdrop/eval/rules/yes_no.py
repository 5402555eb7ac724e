"""Which of yes and no an answer says: as LLaVA's POPE script, MME's tool, lmms-eval and VLMEvalKit read it."""

from __future__ import annotations

import numpy as np

from llava_pdrop.eval.rules.text import from_sheet
from llava_pdrop.eval.rules.vqa import without_marks


def no_among_words(text: str) -> str:
    """LLaVA's POPE script: ``no`` if one of three words stands before the first full stop, else ``yes``."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def four_letters(text: str) -> str:
    """MME's tool: ``yes`` or ``no`` within the first four characters, else ``other``."""
    return next((word for word in ("yes", "no") if word in text.lower()[:4]), "other")


def without_stops(text: str) -> str:
    """lmms-eval on MME: outer blanks and full stops do not count, and a lone letter does."""
    words = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(words) or four_letters(words)


def whole_answer(text: str) -> str:
    """lmms-eval on POPE: the answer is the word, or something else."""
    return text.strip().lower()


def one_word(text: str) -> str:
    """VLMEvalKit: exactly one of the words, wherever it stands, or ``Unknown``."""
    words = set(without_marks(from_sheet(text).lower()).split()) & {"yes", "no"}
    return words.pop().capitalize() if len(words) == 1 else "Unknown"


def rates(
    weights: np.ndarray, true: np.ndarray, yes: np.ndarray, no: np.ndarray, right: np.ndarray
) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of ``yes``.

    Args:
        weights: (questions,), how often each counts.
        true, yes, no, right: (questions,) bool: the label is yes; the answer counts as yes; as a no that misses one; it
            is right. An answer may be neither yes nor no.
    """
    hit = weights @ (yes & true)
    precision, recall = share(hit, weights @ yes), share(hit, hit + weights @ (no & true))
    f1 = share(2 * precision * recall, precision + recall)
    return {"accuracy": share(weights @ right, weights.sum()), "precision": precision, "recall": recall, "f1": f1}


def share(part: float, whole: float) -> float:
    """0 of nothing: where the official code divides by zero."""
    return float(part / whole) if whole else 0.0
