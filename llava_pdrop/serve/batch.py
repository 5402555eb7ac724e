"""Rows that join and leave between tokens: caches that were pruned to different lengths, decoded as one batch.

A row is prefilled alone, as `attach` does it. To join others its cache is laid beside theirs, layer by layer, with
padding on the left, and all that was fed so far becomes the prompt of the batch: this is the state in which a padded
batch of prompts leaves a prefill, so the attached model decodes it as it does any other (``generate/cache.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from llava_pdrop.generate.cache import PromptStages, cached_tokens, remember, sliding_window
from llava_pdrop.generate.families import ATTACHABLE
from llava_pdrop.model.decoder import COVERED
from llava_pdrop.schedule import Schedule

ROOM = 64
"""Tokens that a joined cache can grow by before it is copied."""

PENALTIES = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "sequence_bias": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None, "min_length": 0, "min_new_tokens": 0,
}  # fmt: skip
"""What a ``generation_config.json`` may change in every answer -> the value that changes nothing."""


class GrowingLayer(DynamicLayer):
    """A cache layer with room behind its tokens, so that a token more does not copy those before it."""

    def __init__(self, keys_BGNE: Tensor, values_BGNE: Tensor, tokens: int) -> None:
        """
        Args:
            keys_BGNE, values_BGNE: the room, filled up to ``tokens``.
        """
        super().__init__()
        self.lazy_initialization(keys_BGNE, values_BGNE)
        self.room = (keys_BGNE, values_BGNE)
        self.keys, self.values = (part[:, :, :tokens] for part in self.room)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes the keys and values (B, G, fed, E) of tokens that are fed; returns those of all."""
        held = self.keys.shape[-2]
        after = held + key_states.shape[-2]
        if after > self.room[0].shape[-2]:
            more = (0, 0, 0, after + ROOM - held)
            self.room = (F.pad(self.keys, more), F.pad(self.values, more))
        for part, new in zip(self.room, (key_states, value_states)):
            part[:, :, held:after] = new
        self.keys, self.values = (part[:, :, :after] for part in self.room)
        return self.keys, self.values


@dataclass
class BatchRow:
    """One sequence of a batch.

    Attributes:
        whole: tokens that were fed, before any drop. held: those in the cache of every decoder layer.
        shift: what to subtract from a position of the whole sequence, per entry of `PromptStages`; empty: no drop.
    """

    whole: int
    held: list[int]
    shift: list[int]


class RowBatch:
    """Sequences that the model ``hf`` decodes together under one schedule, which has to be attached whenever `step` is
    called. Every method runs in inference mode."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.rows = list[BatchRow]()
        self._schedule: Schedule | None = None
        self._cache: Any = None
        self._mask_BN: Tensor | None = None

    def join(self, cache: Cache, whole: int) -> None:
        """Adds a row at the end.

        Args:
            cache: of a prompt of one row, without padding, that was prefilled under this schedule.
            whole: tokens of that prompt, before any drop.
        """
        stages: PromptStages | None = getattr(cache, "stages", None)
        if stages is not None:
            assert self._schedule in (None, stages.schedule), "a batch has one schedule"
            self._schedule = stages.schedule
        shift = [] if stages is None else [int(shift_B[0]) for shift_B in stages.shift_B]
        blocks = [(self._cache, list(range(len(self.rows))))] if self.rows else []
        self.rows.append(BatchRow(whole, cached_tokens(cache), shift))
        self._lay([*blocks, (cache, [0])])

    def leave(self, places: Collection[int]) -> None:
        """Takes the rows at ``places`` out; those behind them move up."""
        left = [place for place in range(len(self.rows)) if place not in places]
        self.rows = [self.rows[place] for place in left]
        if self.rows:
            self._lay([(self._cache, left)])
        else:
            self._cache = self._mask_BN = self._schedule = None

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feeds one token of every row; returns the logits (B, vocabulary) of the next ones, float32 on the host."""
        device = self._cache.layers[0].device
        ids_B1 = torch.tensor(tokens, device=device)[:, None]
        position_B1 = torch.tensor([row.whole for row in self.rows], device=device)[:, None]
        if self._mask_BN is not None:
            self._mask_BN = F.pad(self._mask_BN, (0, 1), value=1)
        output = self.hf(
            input_ids=ids_B1,
            attention_mask=self._mask_BN,
            position_ids=position_B1,
            past_key_values=self._cache,
            use_cache=True,
        )
        for row in self.rows:
            row.whole += 1
            row.held = [held + 1 for held in row.held]
        return output.logits[:, -1].float().cpu()

    def _lay(self, blocks: Sequence[tuple[Any, list[int]]]) -> None:
        """Makes one cache of the rows that are listed for every cache in ``blocks``; together they are `rows`."""
        cache = DynamicCache()
        for layer in range(len(self.rows[0].held)):
            width = max(row.held[layer] for row in self.rows)
            parts = [(own.layers[layer].keys, own.layers[layer].values, rows) for own, rows in blocks]
            cache.layers.append(GrowingLayer(*_side_by_side(parts, width), width))
        device = cache.layers[0].device
        whole = [row.whole for row in self.rows]
        real_BN = _on_the_right(whole)
        self._mask_BN = None if bool(real_BN.all()) else real_BN.long().to(device)
        if any(row.shift for row in self.rows):
            remember(cache, self._stages(max(whole), device))
        self._cache = cache

    def _stages(self, length: int, device: torch.device) -> PromptStages:
        """All that was fed so far, ``length`` columns of it, as a prompt that was pruned."""
        assert self._schedule is not None, "a row was pruned"
        firsts = self._schedule.stage_starts
        real_BN = [_on_the_right([row.held[layer] for row in self.rows]) for layer in firsts]
        shift_B = [[row.shift[entry] if row.shift else 0 for row in self.rows] for entry in range(len(firsts))]
        return PromptStages(
            [real.to(device) for real in real_BN],
            [torch.tensor(shift, device=device) for shift in shift_B],
            None,  # only a sliding window asks where tokens stood, and models with one are not joined
            [not bool(real.all()) for real in real_BN],
            length,
            0,
            self._schedule,
        )


def why_alone(hf: Any) -> str | None:
    """Why the sequences of this model cannot be joined, and are decoded one after the other; None: they can.

    Joining is for what the tests prove it for: decoders whose layers keep keys and values of all tokens, and a family
    whose positions have one axis and that keeps nothing of a prompt outside of its cache.
    """
    config = hf.config.get_text_config()
    family = ATTACHABLE.get(hf.config.model_type)
    windows = [sliding_window(config, layer) for layer in range(config.num_hidden_layers)]
    if family is not None and family.positions == "keep":
        return f"{type(hf).__name__} keeps how far positions have moved outside of the cache"
    if family is not None and not family.causal:
        return f"{type(hf).__name__} masks prompts in its own way"
    if family is None or config.model_type not in COVERED:
        return f"joining is not proved for {type(hf).__name__} with a decoder of type {config.model_type}"
    if any(window is not None for window in windows):
        return f"the decoder has a sliding window of {max(window or 0 for window in windows)} tokens"
    own = hf.generation_config
    for name, neutral in PENALTIES.items():
        if getattr(own, name, None) not in (None, neutral):
            return f"its generation_config.json sets {name}, which only generate() applies"
    return None


def _on_the_right(lengths: Sequence[int]) -> Tensor:
    """(B, longest) bool, True at the last ``lengths[b]`` columns of row b."""
    width = max(lengths)
    return torch.arange(width) >= width - torch.tensor(lengths)[:, None]


def _side_by_side(parts: Sequence[tuple[Tensor, Tensor, list[int]]], width: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, width + `ROOM`, E) of the rows listed for each of the ``parts`` (keys, values, rows), each
    ending at column ``width``. What stands left of a row is padding, whatever it holds."""

    def joined(blocks: Sequence[Tensor]) -> Tensor:
        _, groups, _, size = blocks[0].shape
        room = blocks[0].new_zeros(sum(map(len, chosen)), groups, width + ROOM, size)
        start = 0
        for block, rows in zip(blocks, chosen):
            own = block if len(rows) == len(block) else block[torch.tensor(rows, device=block.device)]
            taken = min(own.shape[2], width)
            room[start : start + len(rows), :, width - taken : width] = own[:, :, own.shape[2] - taken :]
            start += len(rows)
        return room

    chosen = [rows for *_, rows in parts]
    return joined([keys for keys, *_ in parts]), joined([values for _, values, _ in parts])
