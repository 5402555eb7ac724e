"""The queries and keys that a decoder layer attends with, taken from the layer itself.

transformers' attention modules end in one call of an attention function, whose arguments are final: projected,
normalised, rotated, with the scaling, the cap and the sinks of the layer. So nothing has to be known about the family.
A probe runs the layer with that function exchanged for one that keeps its arguments and ends the layer there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache

from llava_pdrop.errors import UserError

RECORDER = "llava_pdrop_recorder"
"""The attention implementation of a layer while it is probed."""


@dataclass(frozen=True)
class Attended:
    """What a layer attends with: ``query_BHNE`` and ``key_BGNE`` (G divides H), the factor on their products, and where
    it has them the cap of the logits and one sink per head."""

    query_BHNE: Tensor
    key_BGNE: Tensor
    scaling: float
    softcap: float | None
    sink_H: Tensor | None


class _Recorded(Exception):
    """Ends a layer at its attention, and carries what that was given. No error: nobody outside of `probe` sees it."""


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    raise _Recorded(Attended(query, key, scale, softcap, s_aux))


@torch.no_grad()
def probe(layer: nn.Module, hidden_BND: Tensor, kwargs: dict[str, Any]) -> Attended:
    """What ``layer`` would attend with if it were called with ``hidden_BND`` and ``kwargs``; the cache is not touched.

    Args:
        layer: a decoder layer. Its ``forward`` runs, with whatever accelerate wrapped around it, not its hooks.

    Raises:
        UserError: its attention does not end in transformers' attention functions.
    """
    withheld = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    with _recording(layer):
        try:
            layer.forward(hidden_BND, **withheld)
        except _Recorded as recorded:
            attended: Attended = recorded.args[0]
            return attended
    raise UserError(
        f"attach() cannot rank: the attention of {type(layer).__name__} does not go through transformers' attention "
        "functions, where queries and keys are taken"
    )


@contextmanager
def _recording(layer: nn.Module) -> Iterator[None]:
    """As long as it lasts, ``layer`` alone has the attention implementation `RECORDER`: its modules are given a copy of
    their config, which all layers share."""
    AttentionInterface.register(RECORDER, _record)
    modules = [module for module in layer.modules() if hasattr(getattr(module, "config", None), "_attn_implementation")]
    configs = [module.config for module in modules]
    try:
        for module in modules:
            module.config = copy.copy(module.config)
            module.config._attn_implementation_internal = RECORDER  # the public setter would change nested configs too
        yield
    finally:
        for module, config in zip(modules, configs):
            module.config = config
