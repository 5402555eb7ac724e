"""PyramidDrop: which image tokens go on to the next stage. The whole algorithm; it needs torch only.

After some decoder layers the image tokens of every picture are ranked by the attention they receive from the
instruction, and the best ``int(n * ratio)`` of them survive, in their first order (arXiv 2410.17247, section 3.2).
Two steps, both free of device synchronisation because the host knows every count beforehand:

1. a *ranker* gives each token of the stream a score (`RANKERS`; adding one is one entry);
2. `keep_index` turns the scores into the stream positions that survive.

The training loop (`decoder.py`) and the plug-in for Hugging Face's ``generate`` (`generate/plugin.py`) both call this
file. Shape letters: see `llava_pdrop/types.py`. What the official code does in every corner: golden/README section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """The image tokens of a stream that may be dropped, image after image.

    All are (V,) int64: ``row_V`` stream position, ``image_V`` number of the image (ascending), ``first_V`` index in V
    of that image's first token, ``count_V`` how many tokens the image has now, ``keep_V`` how many it keeps.
    ``survivors`` is the length of the stream after the drop: the text and all kept tokens.
    """

    row_V: Tensor
    image_V: Tensor
    first_V: Tensor
    count_V: Tensor
    keep_V: Tensor
    survivors: int


@dataclass(frozen=True)
class Instruction:
    """What ranks: the query tokens (the last token of each instruction) against the keys of their own sample.

    ``query_QHE`` and ``key_TGE`` are rotated (RoPE) projections; ``row_Q`` the stream positions of the queries, sorted;
    ``seq_lens`` (S) and ``queries`` (S) the number of tokens and of queries of each sample. ``softcap`` and ``sink_H``
    are those of the layer's attention, where it has some: logits are squashed into (-softcap, softcap), and every head
    has one more logit, of a token that nobody sees.
    """

    query_QHE: Tensor
    key_TGE: Tensor
    row_Q: Tensor
    seq_lens: list[int]
    queries: list[int]
    scaling: float
    softcap: float | None = None
    sink_H: Tensor | None = None


@torch.no_grad()
def attention_score(instruction: Instruction) -> Tensor:
    """Score (T,) float32 of every token: its weight in the causal softmax over the sample's tokens, averaged over
    heads, then over the query tokens of the sample. Tokens of a sample without query score 0.

    Source: `pdrop_rank_drop` in the official `modeling_llama_pdrop.py` (softmax in float32 over all keys).
    """
    lengths, queries = instruction.seq_lens, instruction.queries
    if len(set(zip(lengths, queries))) == 1:  # samples of one shape are scored together
        runs = [(len(lengths), lengths[0], queries[0])]
    else:
        runs = [(1, length, count) for length, count in zip(lengths, queries)]
    query_QHE = instruction.query_QHE.float() * instruction.scaling
    place_T = torch.arange(len(instruction.key_TGE), device=query_QHE.device)
    scores, token, query = [], 0, 0
    for samples, length, count in runs:
        key_SNGE, place_SN = (
            tensor[token : token + samples * length].unflatten(0, (samples, length))
            for tensor in (instruction.key_TGE, place_T)
        )
        if count:
            query_SQHE, row_SQ = (
                tensor[query : query + samples * count].unflatten(0, (samples, count))
                for tensor in (query_QHE, instruction.row_Q)
            )
            scores.append(
                _score_samples(query_SQHE, row_SQ, key_SNGE, place_SN, instruction.softcap, instruction.sink_H)
            )
        else:
            scores.append(key_SNGE.new_zeros(samples * length, dtype=torch.float32))
        token, query = token + samples * length, query + samples * count
    return torch.cat(scores)


def _score_samples(
    query_SQHE: Tensor,
    row_SQ: Tensor,
    key_SNGE: Tensor,
    place_SN: Tensor,
    softcap: float | None,
    sink_H: Tensor | None,
) -> Tensor:
    """Scores (S * N,) of S samples of N tokens: scaled queries at stream positions ``row_SQ``, keys at ``place_SN``."""
    groups = key_SNGE.shape[2]
    query_SQGRE = query_SQHE.unflatten(2, (groups, query_SQHE.shape[2] // groups))
    with torch.autocast(key_SNGE.device.type, enabled=False):  # half precision would round many scores to one value
        weight_SQGRN = torch.einsum("sqgre,snge->sqgrn", query_SQGRE, key_SNGE.float())
    if softcap is not None:
        weight_SQGRN = softcap * torch.tanh(weight_SQGRN / softcap)
    future_SQN = place_SN[:, None] > row_SQ[:, :, None]
    weight_SQGRN = weight_SQGRN.masked_fill(future_SQN[:, :, None, None], float("-inf"))
    if sink_H is None:
        weight_SQGRN = weight_SQGRN.softmax(-1)
    else:
        sink_SQGR1 = sink_H.float().unflatten(0, (groups, -1))[..., None].expand(*weight_SQGRN.shape[:-1], 1)
        weight_SQGRN = torch.cat([weight_SQGRN, sink_SQGR1], dim=-1).softmax(-1)[..., :-1]
    return weight_SQGRN.mean((2, 3)).mean(1).flatten()


@torch.no_grad()
def keep_index(score_V: Tensor, candidates: Candidates, tokens: int) -> Tensor:
    """Stream positions (K,) that survive, ascending: all ``tokens`` but the lowest scored candidates of each image.

    Equal scores keep the earlier token. The number of survivors is known, so neither top-k nor the compaction reads
    anything back from the device.
    """
    order_V = score_V.argsort(descending=True, stable=True)
    order_V = order_V[candidates.image_V[order_V].argsort(stable=True)]  # best first within each image
    place_V = torch.arange(len(order_V), device=order_V.device) - candidates.first_V
    rank_V = torch.empty_like(order_V).scatter_(0, order_V, place_V)
    stays_T = torch.ones(tokens, dtype=torch.bool, device=order_V.device)
    stays_T = stays_T.scatter(0, candidates.row_V, rank_V < candidates.keep_V)
    # Compaction without nonzero(): every survivor knows its slot; the dropped share one slot that is cut off.
    slot_T = torch.where(stays_T, stays_T.cumsum(0) - 1, candidates.survivors)
    index_K = torch.empty(candidates.survivors + 1, dtype=torch.int64, device=order_V.device)
    return index_K.scatter_(0, slot_T, torch.arange(tokens, device=order_V.device))[:-1]


def _attention(instruction: Instruction | None, candidates: Candidates) -> Tensor:
    assert instruction is not None, "attention rankers are always given their projections"
    return attention_score(instruction)[candidates.row_V]


def _random(instruction: Instruction | None, candidates: Candidates) -> Tensor:
    return torch.rand(candidates.row_V.shape, device=candidates.row_V.device)


def _uniform(instruction: Instruction | None, candidates: Candidates) -> Tensor:
    place_V = torch.arange(len(candidates.row_V), device=candidates.row_V.device) - candidates.first_V
    before_V = place_V * candidates.keep_V // candidates.count_V
    after_V = (place_V + 1) * candidates.keep_V // candidates.count_V
    return (after_V - before_V).float()  # 1 for exactly keep_V tokens, evenly spread


@dataclass(frozen=True)
class Ranker:
    """How tokens are scored. ``projections`` says which layer's norm, q and k it needs: those of the layer about to
    run (``next``), of the layer that has just run, on that layer's own input (``previous``), or none."""

    score: Callable[[Instruction | None, Candidates], Tensor]
    projections: Literal["next", "previous"] | None = None


RANKERS: dict[str, Ranker] = {
    "last_instruction": Ranker(_attention, "next"),  # PyramidDrop
    "fastv": Ranker(_attention, "previous"),  # FastV (arXiv 2403.06764): the attention a layer has really paid
    "random": Ranker(_random),
    "uniform": Ranker(_uniform),
}
"""Score functions by name (``pyramid_drop.ranker``). Higher survives."""
