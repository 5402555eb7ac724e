"""An answer as it is written: its text piece by piece, and when its tokens came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from llava_pdrop.eval.generation import answer_text, written_text

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for a character of which bytes are still to come."""


class AnswerStream(BaseStreamer):
    """Takes the tokens of one answer from ``generate`` and hands its text on as soon as it is certain.

    What may be the beginning of a stop text is held back, and so is a character whose bytes have not all come: the
    pieces put together are the answer, as `answer_text` reads it from all its tokens.
    """

    def __init__(
        self, tokenizer: Any, ends: Sequence[int], stops: Sequence[str], say: Callable[[str], None] | None
    ) -> None:
        """
        Args:
            ends: tokens that end an answer. stops: texts that do.
            say: is given every piece, in order.
        """
        self.tokenizer, self.ends, self.stops = tokenizer, ends, stops
        self.say = say or (lambda piece: None)
        self.ids = list[int]()
        self.text = ""
        self.stopped = False
        self.first: float | None = None
        self.last: float | None = None
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Takes a prompt, (1, N), then a token at a time, (1,)."""
        if self._prompt:
            self._prompt = False
            return
        self.last = time.perf_counter()
        self.first = self.last if self.first is None else self.first
        if self.stopped:
            return
        self.ids += value.flatten().tolist()
        whole = written_text(self.ids, self.tokenizer, self.ends).lstrip()
        self.stopped = any(stop in whole for stop in self.stops)
        self._hand_on(self.answer if self.stopped else self._certain(whole))

    def end(self) -> None:
        """Hands on what was held back."""
        self._hand_on(self.answer)

    @property
    def answer(self) -> str:
        """The answer so far, without white space at its ends."""
        return answer_text(self.ids, self.tokenizer, self.ends, self.stops)

    def _certain(self, whole: str) -> str:
        """What of ``whole`` no later token can change: neither white space at its end, nor half a character, nor what
        begins like a stop."""
        held = max((length for stop in self.stops for length in range(1, len(stop)) if whole.endswith(stop[:length])),
                   default=0)  # fmt: skip
        return whole[: len(whole) - held].rstrip(UNFINISHED).rstrip()

    def _hand_on(self, text: str) -> None:
        if len(text) > len(self.text):
            piece, self.text = text[len(self.text) :], text
            self.say(piece)


class AtStop(StoppingCriteria):
    """Ends ``generate`` once ``stream`` has met a stop text."""

    def __init__(self, stream: AnswerStream) -> None:
        self.stream = stream

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) bool."""
        return torch.full((len(input_ids),), self.stream.stopped, device=input_ids.device)
