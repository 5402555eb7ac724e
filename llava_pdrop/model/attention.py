"""One attention entry for everything: packed streams in training, padded batches and caches in generation.

`register` makes it known to transformers under `NAME`. A decoder layer called with ``segments=`` attends causally
within each segment of a packed stream; called without, it is transformers' own sdpa (vision tower, ``generate``).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "llava_pdrop"
"""Value of ``attn_implementation`` that selects this entry."""

BACKENDS = ("auto", "sdpa", "varlen", "flash_attn")
"""Kernels for packed streams: ``auto`` takes ``varlen`` on CUDA in half precision and ``sdpa`` elsewhere."""


@dataclass(frozen=True)
class Segments:
    """Samples of a packed stream: ``lengths`` (S) on the host, ``offsets`` (S + 1,) int32 on the device."""

    lengths: list[int]
    offsets: Tensor
    backend: str = "auto"


def packed_attention(
    query_HTE: Tensor, key_GTE: Tensor, value_GTE: Tensor, segments: Segments, scaling: float, window: int | None = None
) -> Tensor:
    """Causal attention within each segment: (H, T, E), (G, T, E), (G, T, E) -> (T, H, E).

    Args:
        window: a token sees itself and the ``window - 1`` tokens before it (Mistral's sliding window).
    """
    backend = segments.backend
    if backend == "auto":
        half = query_HTE.dtype in (torch.float16, torch.bfloat16)
        backend = "varlen" if query_HTE.is_cuda and half else "sdpa"
    if backend == "sdpa":
        return _segmentwise_sdpa(query_HTE, key_GTE, value_GTE, segments.lengths, scaling, window)
    kernel = _varlen if backend == "varlen" else _flash_attn
    query_THE, key_TGE, value_TGE = (tensor.transpose(0, 1) for tensor in (query_HTE, key_GTE, value_GTE))
    return kernel(query_THE, key_TGE, value_TGE, segments.offsets, max(segments.lengths), scaling, window)


def _segmentwise_sdpa(
    query_HTE: Tensor, key_GTE: Tensor, value_GTE: Tensor, lengths: list[int], scaling: float, window: int | None
) -> Tensor:
    gqa = query_HTE.shape[0] != key_GTE.shape[0]
    if len(set(lengths)) == 1:  # equal lengths are an ordinary batch
        chunks = [
            tuple(t.unflatten(1, (len(lengths), lengths[0])).transpose(0, 1) for t in (query_HTE, key_GTE, value_GTE))
        ]
    else:
        chunks = list(zip(*(t[None].split(lengths, dim=2) for t in (query_HTE, key_GTE, value_GTE))))
    outputs = []
    for query_BHNE, key_BGNE, value_BGNE in chunks:
        length = query_BHNE.shape[2]
        mask = _window_mask(length, window, query_BHNE.device) if window and length > window else None
        out_BHNE = F.scaled_dot_product_attention(
            query_BHNE, key_BGNE, value_BGNE, mask, is_causal=mask is None, scale=scaling, enable_gqa=gqa
        )
        outputs.append(out_BHNE.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


@cache
def _varlen_keywords() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(
    query_THE: Tensor,
    key_TGE: Tensor,
    value_TGE: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_keywords()
    options: dict[str, Any] = {"scale": scale}
    if "window_size" in known:
        options["window_size"] = (window - 1 if window else -1, 0)
    elif window and longest > window:
        raise ValueError("this torch's varlen_attn has no sliding window: set model.attention to 'sdpa'")
    else:
        options["is_causal"] = True
    if query_THE.shape[1] != key_TGE.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            repeat = query_THE.shape[1] // key_TGE.shape[1]
            key_TGE, value_TGE = (t.repeat_interleave(repeat, dim=1) for t in (key_TGE, value_TGE))
    return varlen_attn(query_THE, key_TGE, value_TGE, offsets, offsets, longest, longest, **options)


def _flash_attn(
    query_THE: Tensor,
    key_TGE: Tensor,
    value_TGE: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query_THE, key_TGE, value_TGE, offsets, offsets, longest, longest,
        softmax_scale=scale, causal=True, window_size=(window - 1 if window else -1, 0),
    )  # fmt: skip


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers' attention modules call: (1, H, T, E) in, (1, T, H, E) out with ``segments``."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("dropout"):
        raise ValueError("packed attention has no dropout: set attention_dropout to 0 in the decoder's config.json")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_attention(query[0], key[0], value[0], segments, scale, sliding_window)[None], None


def register() -> None:
    """Makes `NAME` an attention implementation of transformers, with sdpa's masks for padded batches."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
