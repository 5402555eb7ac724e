"""What the decoder of the easy-vqa runs is pretrained on: described pictures, with questions and answers.

A described picture stands where image tokens will: every place holds a full stop, or at the places of the shape two
words at once, its shape and its colour (the sum of their embeddings, which is what the projector will give).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from base_text import COLORS, SHAPES, encode
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

BLANK = "."
"""The word for a patch without the shape, as on the pages of the embedded default."""

KINDS = ("what shape", "what colour", "yes/no, word absent", "yes/no, word present")


def form_of(question: str) -> str:
    """``is there a teal shape?`` -> ``is there a {color} shape?``"""
    named = {**dict.fromkeys(SHAPES, "{shape}"), **dict.fromkeys(COLORS, "{color}")}
    return " ".join(named.get(word, word) for word in question.rstrip("?").split()) + "?"


def is_negated(form: str) -> bool:
    return bool({"no", "not"} & set(form.rstrip("?").split()))


def is_what(form: str) -> bool:
    return form.startswith("what ")


def kind_of(question: str, answer: str) -> str:
    """Which of `KINDS` a question, or its form, and its right answer are."""
    if is_what(question):
        return KINDS["color" in question.split()]
    return KINDS[2 + ((answer == "yes") != is_negated(question))]


def answer_to(form: str, asked: tuple[str, str], shown: tuple[str, str]) -> str:
    """The answer to a question that names of the shape and colour ``asked`` what its form has a place for."""
    if is_what(form):
        return shown["color" in form.split()]
    number = int("{color}" in form)
    return "yes" if (asked[number] == shown[number]) != is_negated(form) else "no"


@dataclass(frozen=True)
class Described:
    """B described pictures of V places, each with Q questions and answers; texts are padded to one length N.

    ``ids`` (B, N) start with ``<s>``, V full stops and a line break; ``shown`` (B, V) says where the shape is, and
    ``words`` (B, 2) are the tokens of its shape and colour. ``targets`` (B, 2 Q) are the positions whose next token is
    learnt: of every question its end, then its answer, behind which a line break stands. ``kinds`` (B, Q) are indices
    into `KINDS`.
    """

    ids: Tensor
    shown: Tensor
    words: Tensor
    targets: Tensor
    kinds: Tensor

    @property
    def next_ids(self) -> Tensor:
        """The tokens (B, 2 Q) behind ``targets``."""
        return self.ids.gather(1, self.targets + 1)


class DescribedPictures:
    """Draws `Described` with questions of the given forms: a quarter asks what, half of the rest name what is there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, forms: list[str], rng: np.random.Generator) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self.what = [form for form in forms if is_what(form)]
        self.confirm = [form for form in forms if not is_what(form)]
        self.affirmed = [form for form in self.confirm if not is_negated(form)]
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = encode(self.tokenizer, text)
        return self.known[text]

    def draw(self, texts: int, places: int, turns: int, negation: bool = True) -> Described:
        """``negation``: also questions with "no" or "not"."""
        rows, words, targets, kinds = [], [], [], []
        start = [self.tokenizer.bos_token_id, *self.encode(" " + BLANK) * places, *self.encode("\n")]
        for _ in range(texts):
            shown = self._pick(SHAPES), self._pick(COLORS)
            ids, at, kind = list(start), [], []
            for _ in range(turns):
                form, asked = self._ask(shown, self.confirm if negation else self.affirmed)
                answer = answer_to(form, asked, shown)
                ids += self.encode(form.format(shape=asked[0], color=asked[1]))
                at += [len(ids) - 1, len(ids)]
                ids += [*self.encode(" " + answer), *self.encode("\n")]
                kind.append(KINDS.index(kind_of(form, answer)))
            rows.append(torch.tensor(ids))
            words.append([self.encode(" " + word)[0] for word in shown])
            targets.append(at)
            kinds.append(kind)
        share = self.rng.uniform(0.02, 0.28, (texts, 1))  # as 98 % of the training pictures have it
        where = self.rng.random((texts, places)) < share
        where[np.arange(texts), self.rng.integers(0, places, texts)] = True  # at least one
        return Described(
            ids=pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            shown=torch.from_numpy(where),
            words=torch.tensor(words),
            targets=torch.tensor(targets),
            kinds=torch.tensor(kinds),
        )

    def _ask(self, shown: tuple[str, str], confirm: list[str]) -> tuple[str, tuple[str, str]]:
        """The form of a question, and the shape and colour to put into it."""
        form = self._pick(self.what if self.rng.random() < 0.25 else confirm)
        asked = shown
        if not is_what(form) and self.rng.random() < 0.5:
            shape, color = ([word for word in those if word not in shown] for those in (SHAPES, COLORS))
            asked = self._pick(shape), self._pick(color)
        return form, asked

    def _pick(self, those: tuple[str, ...] | list[str]) -> str:
        return those[int(self.rng.integers(len(those)))]
