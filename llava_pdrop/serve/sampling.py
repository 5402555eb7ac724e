"""The next token of one row, drawn with numbers of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava_pdrop.errors import UserError


@dataclass
class Sampler:
    """Picks the tokens of one answer. What it draws depends on the row's logits and its ``seed`` alone, never on the
    other rows of a batch.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: of the likeliest tokens as many are drawn from as reach this probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        self.generator.manual_seed(self.seed)

    def pick(self, logits_V: Tensor) -> int:
        """The next token, given its logits (vocabulary,) on the host."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        probability_V = (logits_V.double() / max(self.temperature, 1e-6)).softmax(0)
        token_V = None
        if self.top_p < 1:
            probability_V, token_V = probability_V.sort(descending=True, stable=True)
            before_V = probability_V.cumsum(0) - probability_V
            probability_V = probability_V * (before_V < self.top_p)  # the likeliest one always stays
        upto_V = probability_V.cumsum(0)
        drawn = torch.rand(1, generator=self.generator, dtype=torch.float64) * upto_V[-1]
        place = int(torch.searchsorted(upto_V, drawn, right=True))
        place = min(place, int(probability_V.nonzero()[-1]))  # a draw that rounding has put behind the last one
        return place if token_V is None else int(token_V[place])
