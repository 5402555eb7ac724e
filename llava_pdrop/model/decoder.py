"""The decoder loop with its drops: the only place that calls a Hugging Face decoder layer.

Works for the decoders in `COVERED`; any other may scale, cap or mask where this file does not. All modules are called
as modules, on every rank in the same order whatever the data, so that the hooks of ZeRO-3 and FSDP fire and never
disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from llava_pdrop.errors import UserError
from llava_pdrop.model.kernels import FAMILIES, carry, in_force
from llava_pdrop.model.pyramid_drop import Projections, Ranking, Rows, keep_index, merged
from llava_pdrop.model.rankers import RANKERS, Ranker
from llava_pdrop.model.stream import StreamPlan, StreamStage
from llava_pdrop.schedule import Schedule

COVERED = tuple(FAMILIES)
"""Decoders (``model_type``) that tests/parity proves this forward on: logits, gradients, rankings."""


def check_decoder(config: Any, schedule: Schedule = Schedule()) -> None:
    """Refuses what this forward would compute wrongly.

    Args:
        config: of the text decoder.

    Raises:
        UserError: a decoder that is not in `COVERED`, or one with a sliding window that would have to look at positions
            with gaps.
    """
    kind, window = config.model_type, getattr(config, "sliding_window", None)
    if kind not in COVERED:
        raise UserError(f"a decoder of type {kind} cannot be trained here: the tests cover {', '.join(COVERED)}")
    if not schedule.vanilla and schedule.positions == "keep" and window and window < config.max_position_embeddings:
        raise UserError(
            f"pyramid_drop.positions: keep cannot be trained with a sliding window ({window} of "
            f"{config.max_position_embeddings} positions), which counts surviving tokens: set 'renumber'"
        )


Rope = tuple[Tensor, Tensor]
"""cos and sin, each (1, T, E)."""


@dataclass(frozen=True)
class Drop:
    """What one drop did, for tests and pictures: the hidden states before it (T, D), their scores (V,) and the
    surviving positions (K,)."""

    layer: int
    stage: StreamStage
    hidden_TD: Tensor
    score_V: Tensor
    index_K: Tensor


def run_decoder(
    decoder: nn.Module,
    x_TD: Tensor,
    plan: StreamPlan,
    schedule: Schedule,
    trace: list[Drop] | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Hidden states (T, D) -> normalised hidden states (T', D) of the tokens that survive all drops.

    Args:
        trace: where given, receives one `Drop` per stage.
        kernels: of norms, rotary embedding and gated product, one of `kernels.CHOICES`.

    Raises:
        UserError: kernels that cannot run on the device of ``x_TD``.
    """
    with in_force(kernels, x_TD.device, decoder.config.model_type):
        return _run_layers(decoder, x_TD, plan, schedule, trace)


def _run_layers(
    decoder: nn.Module, x_TD: Tensor, plan: StreamPlan, schedule: Schedule, trace: list[Drop] | None
) -> Tensor:
    stage, number = plan.stages[0], 0
    whole_TD, alone, segments, position_T = x_TD, plan.alone, stage.segments, stage.position_T
    if alone is not None:  # image tokens wait
        x_TD, segments = x_TD.index_select(0, alone.row_X), alone.segments
        position_T = position_T.index_select(0, alone.row_X) if schedule.positions == "keep" else alone.position_X
    rope = decoder.rotary_emb(x_TD[None], position_T[None])
    rankers = {layer: RANKERS[name] for layer, name in zip(schedule.layers, schedule.rankers)}
    before_TD = None  # what the previous layer was given; kept only for rankers that want it
    for index, layer in enumerate(decoder.layers):
        if alone is not None and index == schedule.inject:
            x_TD = whole_TD.index_copy(0, alone.row_X, x_TD)
            segments, position_T = stage.segments, stage.position_T
            rope = decoder.rotary_emb(x_TD[None], position_T[None])
        if index in rankers:
            score_V, index_K = _rank(decoder, index, x_TD, before_TD, rope, stage, rankers[index])
            if trace is not None:
                trace.append(Drop(index, stage, x_TD.detach(), score_V, index_K))
            if schedule.merge == "nearest" and stage.candidates is not None:
                x_TD = merged(x_TD, score_V, stage.candidates)
            x_TD = x_TD.index_select(0, index_K)
            number += 1
            stage = plan.stages[number]
            segments = stage.segments
            position_T = position_T.index_select(0, index_K) if schedule.positions == "keep" else stage.position_T
            rope = decoder.rotary_emb(x_TD[None], position_T[None])
        before_TD = x_TD.detach() if index + 1 in rankers and rankers[index + 1].looks_back else None
        carry(layer)
        x_TD = layer(
            x_TD[None],
            attention_mask=None,
            position_ids=position_T[None],
            past_key_values=None,
            use_cache=False,
            position_embeddings=rope,
            segments=segments,
        ).squeeze(0)  # a view backward too, where [0] fills a tensor of zeros
    return decoder.norm(x_TD)


@torch.no_grad()
def _rank(
    decoder: nn.Module,
    index: int,
    x_TD: Tensor,
    before_TD: Tensor | None,
    rope: Rope,
    stage: StreamStage,
    ranker: Ranker,
) -> tuple[Tensor, Tensor]:
    """Scores (V,) and surviving positions (K,) of the drop before layer ``index``."""
    assert stage.candidates is not None, "every stage but the last has a drop"
    projections = None
    if ranker.projections is not None:
        layer, given_TD = (index, x_TD) if ranker.projections == "next" else (index - 1, before_TD)
        asking = ranker.asking(stage.instruction, stage.text, stage.candidates)
        projections = _projecting(decoder.layers[layer])(given_TD.detach(), rope, asking, stage.layout.seq_lens)
    hidden_TD = decoder.norm(x_TD) if ranker.normalised else x_TD
    ranking = Ranking(stage.candidates, hidden_TD.detach(), before_TD, stage.text, projections)
    score_V = ranker.score(ranking)
    return score_V, keep_index(score_V, stage.candidates, len(x_TD))


def _projecting(layer: nn.Module) -> Callable[..., Projections]:
    """`project` of ``layer``. FSDP2 gathers the weights of a layer when its forward begins; it must learn
    that this is another way into it."""
    if isinstance(layer, FSDPModule) and not hasattr(layer, "project"):
        layer.project = MethodType(project, layer)
        register_fsdp_forward_method(layer, "project")
    return getattr(layer, "project", MethodType(project, layer))


def project(layer: nn.Module, x_TD: Tensor, rope: Rope, asking: Rows, seq_lens: list[int]) -> Projections:
    """What ``layer`` would attend with: queries of the tokens ``asking`` only, keys of every token.

    A stream in which none asks still projects one row: all ranks must run the same modules.
    """
    attention, row_Q = layer.self_attn, asking.row_Q
    probe_Q = row_Q if len(row_Q) else torch.zeros(1, dtype=torch.int64, device=x_TD.device)
    normed_TD = layer.input_layernorm(x_TD)
    with _without_dropout(attention.q_proj, attention.k_proj):
        query_QHE = attention.q_proj(normed_TD.index_select(0, probe_Q)).unflatten(-1, (-1, attention.head_dim))
        key_TGE = attention.k_proj(normed_TD).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):
        query_QHE, key_TGE = attention.q_norm(query_QHE), attention.k_norm(key_TGE)
    cos_TE, sin_TE = rope[0][0], rope[1][0]
    query_QHE = rotate(query_QHE, cos_TE.index_select(0, probe_Q), sin_TE.index_select(0, probe_Q))
    return Projections(query_QHE[: len(row_Q)], rotate(key_TGE, cos_TE, sin_TE), asking, seq_lens, attention.scaling)


@contextmanager
def _without_dropout(*modules: nn.Module) -> Iterator[None]:
    """LoRA drops out inputs while training. A ranking must not: noise in its scores would drop other tokens."""
    active = [part for module in modules for part in module.modules() if isinstance(part, nn.Dropout) and part.training]
    for dropout in active:
        dropout.eval()
    try:
        yield
    finally:
        for dropout in active:
            dropout.train()


def rotate(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary position embedding of (T, H, E), the halves of E being the two axes (LLaMA's layout)."""
    low, high = x_THE.chunk(2, dim=-1)
    return x_THE * cos_TE[:, None] + torch.cat((-high, low), dim=-1) * sin_TE[:, None]
