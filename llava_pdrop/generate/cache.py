"""Key/value caches that know the prompt was pruned.

After a drop every decoder layer caches fewer tokens than the prompt had, and rows of a batch lose different numbers of
them. Later tokens need to know which cached entries are padding and how far positions have moved; `PromptStages` holds
both, inside the cache, so that it is reordered, repeated, cropped and reset together with the keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from llava_pdrop.errors import UserError
from llava_pdrop.schedule import Schedule


@dataclass(frozen=True)
class PromptStages:
    """The pruned prompt, one entry in every list per drop; two before these, where image tokens enter late: the text
    alone, and the whole prompt. (What pooling leaves out is a drop here.)

    Attributes:
        real_BN: (B, N_stage) bool, False at the padding on the left.
        shift_B: (B,) int64, what to subtract from a position id of the whole sequence to get the one of this stage.
        column_BN: (B, N_stage) int64, where the tokens stood before any drop, which is where a sliding window looks for
            them; None where positions were numbered anew: the window counts survivors.
        padded: False where no row has padding, so that no mask is needed.
        length: columns the prompt had before any drop (padding included).
        text_tail: how many of its last columns hold text in every row; only these may be cropped away again.
        schedule: what it was pruned by.
    """

    real_BN: list[Tensor]
    shift_B: list[Tensor]
    column_BN: list[Tensor] | None
    padded: list[bool]
    length: int
    text_tail: int
    schedule: Schedule

    @cached_property
    def shift_SB(self) -> Tensor:
        """(S, B) int64: ``shift_B`` of all stages."""
        return torch.stack(self.shift_B)

    def rows(self, index: Tensor) -> PromptStages:
        """The stages of the batch rows ``index`` (beams that survive, repeated samples)."""
        return replace(
            self,
            real_BN=[real[index.to(real.device)] for real in self.real_BN],
            shift_B=[shift[index.to(shift.device)] for shift in self.shift_B],
            column_BN=self.column_BN and [column[index.to(column.device)] for column in self.column_BN],
        )

    def without_last(self, columns: int) -> PromptStages:
        """The stages without the last ``columns`` columns of the prompt.

        Raises:
            UserError: image tokens lie among them.
        """
        if columns > self.text_tail:
            raise UserError(
                f"cannot crop {columns} tokens off a pruned prompt: only its last {self.text_tail} are text, and image "
                "tokens lie at different places in every layer"
            )
        return replace(
            self,
            real_BN=[real[:, : real.shape[1] - columns] for real in self.real_BN],
            column_BN=self.column_BN and [column[:, : column.shape[1] - columns] for column in self.column_BN],
            length=self.length - columns,
            text_tail=self.text_tail - columns,
        )


class PrunedCache(Cache):
    """Mixin over a transformers cache: what happens to the batch rows of the cache happens to its ``stages``."""

    stages: PromptStages | None = None

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """Tokens that layer number ``layer_idx`` holds; without one, those of the whole sequence, by which a model
        counts positions. (Models ask layer 0, which a drop before the decoder has pruned too.)"""
        held = super().get_seq_length(layer_idx or 0)
        if layer_idx is not None or self.stages is None or not self.layers or self.stages.schedule.stage_starts[0] > 0:
            return held
        return held + (self.stages.length - self.stages.real_BN[0].shape[1]) * (held > 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.stages is not None:
            rows = torch.arange(len(self.stages.shift_B[0]))
            self._select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes tokens from the end (negative), or down to an absolute length of the unpruned sequence (positive)."""
        before = int(self.get_seq_length())
        if tokens_to_remove > 0:  # an absolute length says nothing about layers that are shorter
            tokens_to_remove = min(0, tokens_to_remove - before)
        if self.stages is not None:
            into_prompt = self.stages.length - (before + tokens_to_remove)
            if into_prompt > 0:
                self.stages = self.stages.without_last(into_prompt)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.stages = None

    def _select(self, index: Tensor) -> None:
        if self.stages is not None:
            self.stages = self.stages.rows(index)


class PrunedDynamicCache(PrunedCache, DynamicCache):
    """A `DynamicCache` after a drop."""


class PrunedStaticCache(PrunedCache, StaticCache):
    """A `StaticCache` after a drop."""


PRUNED: dict[type, type] = {DynamicCache: PrunedDynamicCache, StaticCache: PrunedStaticCache}
"""The class that a cache takes on when its prompt is pruned."""


def remember(cache: Any, stages: PromptStages) -> None:
    """Gives a cache, whoever made it, the stages of its prompt.

    The object stays the same (``generate`` and the caller hold on to it), so its class is exchanged.

    Raises:
        UserError: a kind of cache that is not in `PRUNED`.
    """
    kind = type(cache)
    if kind not in PRUNED and kind not in PRUNED.values():
        raise UserError(
            f"PyramidDrop cannot prune the prompt of a {kind.__name__}: use one of "
            f"{', '.join(known.__name__ for known in PRUNED)}"
        )
    cache.__class__ = PRUNED.get(kind, kind)
    cache.stages = stages


def sliding_window(config: Any, layer: int) -> int | None:
    """Tokens that layer number ``layer`` of a decoder with this config sees at most, itself included; None: all."""
    types = getattr(config, "layer_types", None)
    slides = types is None or types[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


def stage_mask(
    implementation: str,
    stages: PromptStages,
    drop: int,
    attention_mask: Tensor | None,
    cache: Cache | None,
    layer: int,
    hidden_BND: Tensor,
    window: int | None,
) -> Tensor | None:
    """The causal attention mask of a layer behind drop number ``drop``, for the tokens about to enter it.

    Args:
        implementation: name of the attention implementation, which decides the form.
        attention_mask: (B, N) of the whole unpruned sequence up to these tokens; None where nothing is padding.
        cache: its state before these tokens, None without one.
        window: sliding window of the layer.

    Returns:
        None where plain causal attention does it; (B, keys) for flash attention; else (B, 1, tokens, keys), bool, for
        ``eager`` as numbers to add.

    Raises:
        UserError: flex attention; flash attention, where the window has to look at positions with gaps.
    """
    check_implementation(implementation)
    batch, fed = hidden_BND.shape[:2]
    keys, first, past = mask_sizes(cache, layer, fed)
    # Rows of a later turn may be padded as well: reading the mask to find out would stall the device.
    padded = stages.padded[drop] or (batch > 1 and keys > fed and attention_mask is not None)
    grows = isinstance(past, int) and first + keys == past + fed  # a static cache has room that is not filled yet
    gaps = stages.column_BN is not None and window is not None
    reach = stages.length + keys if gaps else keys
    fits = window is None or reach <= window
    if grows and fits and not padded and implementation != "eager" and (fed == 1 or keys == fed):
        return None

    device = hidden_BND.device
    real_BK = stages.real_BN[drop].to(device)
    if attention_mask is not None:
        real_BK = torch.cat([real_BK, attention_mask[:, stages.length :].to(real_BK)], dim=1)
    real_BK = F.pad(real_BK, (0, max(0, first + keys - real_BK.shape[1])), value=True)[:, first : first + keys]
    if implementation.startswith("flash"):
        if gaps and not fits:
            raise UserError(
                "attach() cannot tell flash attention's sliding window that tokens are missing: set "
                "pyramid_drop.positions to 'renumber', or attn_implementation to 'sdpa'"
            )
        return real_BK if padded else None
    query_Q1 = past + torch.arange(fed, device=device)[:, None]
    key_K = first + torch.arange(keys, device=device)
    visible_BQK = (key_K <= query_Q1)[None]
    if window is not None:
        place_BK, place_BQ1 = key_K[None], query_Q1[None]
        if stages.column_BN is not None:  # survivors stand where they stood, later tokens behind the whole prompt
            column_BN = stages.column_BN[drop].to(device)
            place_BK = torch.where(
                key_K < column_BN.shape[1],
                column_BN[:, key_K.clamp(max=column_BN.shape[1] - 1)],
                key_K - column_BN.shape[1] + stages.length,
            )
            place_BQ1 = place_BK.gather(1, (query_Q1.T - first).expand(batch, -1)).unsqueeze(-1)
        visible_BQK = visible_BQK & (place_BK[:, None] > place_BQ1 - window)
    # Padding sees itself: a row that sees nothing would turn into NaN, and its values into everybody's.
    allowed_B1QK = (visible_BQK[:, None] & real_BK[:, None, None]) | (key_K == query_Q1)
    return as_added(allowed_B1QK, hidden_BND.dtype) if implementation == "eager" else allowed_B1QK


def sliced_mask(
    own_BHQK: Tensor, stages: PromptStages, drop: int, column_BN: Tensor, keys: int, window: int | None
) -> Tensor:
    """The mask that the model made for a whole prompt, for the tokens of it that survive drop number ``drop``.

    Args:
        own_BHQK: (B or 1, heads or 1, N, keys of the cache), bool or numbers to add.
        column_BN: (B, N') columns of the survivors, any number at the padding.
        keys: places in the cache of the layer, which may be more than N'.
        window: sliding window of the layer, where it is to count survivors.
    """
    (batch, fed), heads = column_BN.shape, own_BHQK.shape[1]
    real_BK = stages.real_BN[drop].to(column_BN.device)
    row_B = torch.arange(batch, device=column_BN.device)[:, None, None, None]
    head_H = torch.arange(heads, device=column_BN.device)[None, :, None, None]
    own_BHQK = own_BHQK.expand(batch, -1, -1, -1)
    kept_BHQK = own_BHQK[row_B, head_H, column_BN[:, None, :, None], column_BN[:, None, None, :]]
    added = kept_BHQK.dtype != torch.bool
    allowed_BHQK = kept_BHQK >= 0 if added else kept_BHQK
    place_N = torch.arange(fed, device=column_BN.device)
    if window is not None:
        near_QK = (place_N <= place_N[:, None]) & (place_N > place_N[:, None] - window)
        allowed_BHQK = allowed_BHQK | near_QK
    allowed_BHQK = (allowed_BHQK & real_BK[:, None, None]) | (place_N == place_N[:, None])
    allowed_BHQK = F.pad(allowed_BHQK, (0, keys - fed), value=False)
    return as_added(allowed_BHQK, kept_BHQK.dtype) if added else allowed_BHQK


def mask_sizes(cache: Cache | None, layer: int, fed: int) -> tuple[int, int, int]:
    """Keys that ``fed`` tokens meet in a layer, the place of the first of them, and how many tokens came before."""
    if cache is None:
        return fed, 0, 0
    return *cache.get_mask_sizes(fed, layer), cache.get_seq_length(layer)


def check_implementation(implementation: str) -> None:
    """Refuses what takes no mask that could be sliced.

    Raises:
        UserError: flex attention.
    """
    if implementation == "flex_attention":
        raise UserError("attach() supports eager, sdpa, llava_pdrop and flash attention, not flex_attention")


def as_added(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to the logits: 0 where ``allowed``."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def cache_in(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a model or layer, whatever this version of transformers calls it."""
    return next((value for value in arguments.values() if isinstance(value, Cache)), None)


def cached_tokens(cache: Cache) -> list[int]:
    """Tokens that every layer of a cache holds, padding included."""
    return [int(cache.get_seq_length(layer)) for layer in range(len(cache.layers))]


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds, padding included."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
