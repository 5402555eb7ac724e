"""What the laboratory's decoder is pretrained on: pages of two-hop paths, written as text."""

from __future__ import annotations

from dataclasses import dataclass

import chains
import forms
import numpy as np
import torch
from base_text import encode
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PathText:
    """A batch of pages written as text, each followed by questions and answers, all of one length.

    ``ids`` (B, N) start with ``<s>``, the V words of the page and a line break; ``words`` (B, V) are what the tiles
    show, as indices into ``forms.WORDS``. ``queries`` (Q) are the positions of the keys that end the questions, the
    same in all texts. For each of them, all (B, Q): ``firsts`` and ``seconds``, the tiles that the two hops read;
    ``middles``, the word that the first one finds; ``answers``, the token after the question. A line break follows.
    """

    ids: Tensor
    words: Tensor
    queries: list[int]
    firsts: Tensor
    seconds: Tensor
    middles: Tensor
    answers: Tensor

    @property
    def targets(self) -> list[int]:
        """Positions whose next token is learnt: first the ends of the questions, then the answers."""
        return [*self.queries, *(query + 1 for query in self.queries)]

    @property
    def next_ids(self) -> Tensor:
        """The tokens (B, 2 Q) behind ``targets``."""
        return self.ids[:, [target + 1 for target in self.targets]]


class PathTexts:
    """Draws `PathText`: the same pages as the pictures show, every tile being one word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator) -> None:
        self.rng, self.start = rng, tokenizer.bos_token_id
        self.word_ids = np.array([encode(tokenizer, f" {word}")[0] for word in forms.WORDS])
        (self.newline,) = encode(tokenizer, "\n")
        questions = (chains.TASK.question, chains.TASK.short_question)
        self.asking = [encode(tokenizer, question.format("K"))[:-1] for question in questions]

    def draw(self, texts: int, grid: int, pairs: int, clutter: float, turns: int, short: bool = True) -> PathText:
        """``turns`` questions about each of ``texts`` pages, in short or in full; clutter as in `chains.plan_page`."""
        rows, queries = [], []
        found: dict[str, list[np.ndarray]] = {"words": [], "firsts": [], "seconds": [], "middles": [], "answers": []}
        for _ in range(texts):
            page = chains.plan_page(self.rng, grid, pairs=pairs, clutter=clutter)
            asked = self.rng.permutation(pairs)[:turns]
            answers = self.word_ids[page.words[page.seconds[asked]]]
            ids, queries = [self.start, *self.word_ids[page.words], self.newline], []
            for key, answer in zip(page.keys[asked], answers, strict=True):
                ids += [*self.asking[short], self.word_ids[forms.FIRST_LETTER + key]]
                queries.append(len(ids) - 1)
                ids += [answer, self.newline]
            rows.append(ids)
            found["words"].append(page.words)
            found["firsts"].append(page.firsts[asked])
            found["seconds"].append(page.seconds[asked])
            found["middles"].append(page.words[page.firsts[asked]])
            found["answers"].append(answers)
        stacked = {name: torch.from_numpy(np.stack(values)) for name, values in found.items()}
        return PathText(ids=torch.tensor(np.array(rows)), queries=queries, **stacked)
