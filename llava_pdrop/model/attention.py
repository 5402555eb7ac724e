"""One attention entry for everything: packed streams in training, padded batches and caches in generation.

`register` makes it known to transformers under `NAME`. A decoder layer called with ``segments=`` attends causally
within each segment of a packed stream; called without, it is transformers' own sdpa (vision tower, ``generate``).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llava_pdrop.errors import UserError, check_name

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


def check_backend(backend: str, key: str = "model.attention") -> None:
    """Says before the first step what would fail in it. ``key``: where it was given.

    Raises:
        UserError: an unknown backend, or one whose package or device is not there.
    """
    check_name(key, backend, BACKENDS)
    if backend in ("auto", "sdpa"):
        return
    if backend == "flash_attn" and find_spec("flash_attn") is None:
        raise UserError(f"{key}: flash_attn needs the package flash-attn: install it, or set 'auto'")
    if not torch.cuda.is_available():
        raise UserError(f"{key}: {backend} needs a CUDA device, and there is none: set 'auto' or 'sdpa'")


def packed_attention(
    query_HTE: Tensor, key_GTE: Tensor, value_GTE: Tensor, segments: Segments, scaling: float, window: int | None = None
) -> Tensor:
    """Causal attention within each segment: (H, T, E), (G, T, E), (G, T, E) -> (T, H, E).

    Under autocast it runs in autocast's precision, as torch's own sdpa does.

    Args:
        window: a token sees itself and the ``window - 1`` tokens before it (Mistral's sliding window).

    Raises:
        UserError: ``varlen`` or ``flash_attn`` on the CPU or in float32.
    """
    device = query_HTE.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # rotary embedding has made queries and keys float32
        half = torch.get_autocast_dtype(device)
        query_HTE, key_GTE, value_GTE = query_HTE.to(half), key_GTE.to(half), value_GTE.to(half)
    is_half = query_HTE.dtype in (torch.float16, torch.bfloat16)
    backend = segments.backend
    if backend == "auto":
        backend = "varlen" if query_HTE.is_cuda and is_half else "sdpa"
    if backend == "sdpa":
        return _segmentwise_sdpa(query_HTE, key_GTE, value_GTE, segments.lengths, scaling, window)
    if device == "cpu" or not is_half:
        raise UserError(
            f"model.attention: {backend} works on CUDA in float16 or bfloat16, not on {device} in {query_HTE.dtype}: "
            "set 'auto' or 'sdpa'"
        )
    return _fused(backend, query_HTE, key_GTE, value_GTE, segments, scaling, window)


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


def _fused(
    backend: str,
    query_HTE: Tensor,
    key_GTE: Tensor,
    value_GTE: Tensor,
    segments: Segments,
    scaling: float,
    window: int | None,
) -> Tensor:
    """All segments in one kernel: torch's own (``varlen``) or the package's (``flash_attn``)."""
    options: dict[str, Any] = {"window_size": (window - 1 if window else -1, 0)}  # tokens before and after a token
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func as kernel

        options |= {"softmax_scale": scaling, "causal": True}
    else:
        from torch.nn.attention.varlen import varlen_attn as kernel

        options |= {"scale": scaling}
        if query_HTE.shape[0] != key_GTE.shape[0] and _takes_groups(kernel):
            options["enable_gqa"] = True
        elif query_HTE.shape[0] != key_GTE.shape[0]:
            repeat = query_HTE.shape[0] // key_GTE.shape[0]
            key_GTE, value_GTE = (t.repeat_interleave(repeat, dim=0) for t in (key_GTE, value_GTE))
    query_THE, key_TGE, value_TGE = (t.transpose(0, 1) for t in (query_HTE, key_GTE, value_GTE))
    offsets, longest = segments.offsets, max(segments.lengths)
    return kernel(query_THE, key_TGE, value_TGE, offsets, offsets, longest, longest, **options)


@cache
def _takes_groups(varlen_attn: Callable) -> bool:
    """Whether it takes fewer keys than queries: from torch 2.12 on."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


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
        raise UserError("packed attention has no dropout: set attention_dropout to 0 in the decoder's config.json")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (tensor.squeeze(0) for tensor in (query, key, value))  # [0] would zero-fill a gradient backward
    return packed_attention(query, key, value, segments, scale, sliding_window)[None], None


def register() -> None:
    """Makes `NAME` an attention implementation of transformers, with sdpa's masks for padded batches."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


OLDEST, NEWEST = "5.17", "5.24"
"""Releases of transformers that the tests run on, and those between them; the same range stands in ``setup.py``."""


def check_transformers() -> None:
    """Refuses a transformers that nobody has tried: its layers may be called otherwise, and be silently wrong.

    Raises:
        UserError: a release before `OLDEST` or behind `NEWEST`.
    """
    newest = tuple(map(int, NEWEST.split(".")))
    if is_older(OLDEST) or _release() > newest:
        raise UserError(
            f"transformers {transformers.__version__} has not been tested with llava_pdrop, only {OLDEST} to {NEWEST}: "
            f"pip install 'transformers=={NEWEST}.*'"
        )


def is_older(release: str) -> bool:
    """Whether the installed transformers comes before ``release``, e.g. "5.21"."""
    return _release() < tuple(map(int, release.split(".")))


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
