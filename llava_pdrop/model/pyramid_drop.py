"""PyramidDrop: which image tokens go on to the next stage. The whole algorithm; it needs torch only.

After some decoder layers the image tokens of every picture are ranked by the attention they receive from the
instruction, and the best ``int(n * ratio)`` of them survive, in their first order (arXiv 2410.17247, section 3.2).
Two steps, both free of device synchronisation because the host knows every count beforehand:

1. a *ranker* scores the image tokens: `by_attention` here, its counterparts in `rankers.py`;
2. `keep_index` turns the scores into the stream positions that survive. `merged` may first average the others into
   them.

The training loop (`decoder.py`) and the plug-in for Hugging Face's ``generate`` (`generate/plugin.py`) both call this
file. Shape letters: see `llava_pdrop/types.py`. What the official code does in every corner: golden/README section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_WEIGHTS = 2**26
"""Attention weights that are there at once, in float32: 256 MiB."""


@dataclass(frozen=True)
class Candidates:
    """The image tokens of a stream that may be dropped, image after image.

    On the device, all (V,) int64: ``row_V`` stream position, ``image_V`` number of the image (ascending), ``first_V``
    index in V of that image's first token, ``count_V`` how many tokens the image has now, ``keep_V`` how many it keeps.
    On the host: ``survivors``, the length of the stream after the drop (the text and all kept tokens), and of every
    image its ``counts`` and ``keeps`` once more, and which of the ``samples`` shows it.
    """

    row_V: Tensor
    image_V: Tensor
    first_V: Tensor
    count_V: Tensor
    keep_V: Tensor
    survivors: int
    counts: list[int]
    keeps: list[int]
    samples: list[int]


@dataclass(frozen=True)
class Rows:
    """Tokens of a stream: positions ``row_Q`` (Q,), ascending, and ``counts`` (S), how many each sample has."""

    row_Q: Tensor
    counts: list[int]


@dataclass(frozen=True)
class Projections:
    """Queries of the tokens ``asking`` and keys of all, as a layer attends with them.

    ``query_QHE`` and ``key_TGE`` are rotated (RoPE); ``seq_lens`` (S) the tokens of each sample. ``softcap`` and
    ``sink_H`` are those of the layer's attention, where it has some: logits are squashed into (-softcap, softcap), and
    every head has one more logit, of a token that nobody sees.
    """

    query_QHE: Tensor
    key_TGE: Tensor
    asking: Rows
    seq_lens: list[int]
    scaling: float
    softcap: float | None = None
    sink_H: Tensor | None = None


@dataclass(frozen=True)
class Ranking:
    """What a ranker may look at before a drop.

    Attributes:
        candidates: the tokens to be scored.
        hidden_TD: what the layer about to run would be given, normalised where the ranker asks for that.
        before_TD: what the layer that has just run was given; None before layer 0 and where no ranker asks.
        text: the text that asks about the pictures: of every sample what stands behind its last picture, up to the last
            token of its last instruction. Answers to be learned are not in it. At least that last token is.
        projections: None where the ranker needs none.
    """

    candidates: Candidates
    hidden_TD: Tensor
    before_TD: Tensor | None
    text: Rows
    projections: Projections | None

    @property
    def attended(self) -> Projections:
        """The projections, for rankers that are always given them."""
        assert self.projections is not None, "this ranker asks for projections"
        return self.projections


def by_attention(ranking: Ranking) -> Tensor:
    """Score (V,) of the candidates: the attention they receive from the tokens that ask (PyramidDrop)."""
    return attention_score(ranking.attended)[ranking.candidates.row_V]


@torch.no_grad()
def attention_score(projections: Projections) -> Tensor:
    """Score (T,) float32 of every token: its weight in the causal softmax over the sample's tokens, averaged over
    heads, then over the tokens of the sample that ask. Tokens of a sample in which none asks score 0.

    Source: `pdrop_rank_drop` in the official `modeling_llama_pdrop.py` (softmax in float32 over all keys).
    """
    return torch.cat([mean_of_queries(weight_SQN) for weight_SQN, _ in attention(projections)])


def mean_of_queries(weight_SQN: Tensor) -> Tensor:
    """(S * N,) mean over Q; 0 where there are no queries."""
    return (weight_SQN.mean(1) if weight_SQN.shape[1] else weight_SQN.sum(1)).flatten()


def attention(projections: Projections) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights (S, Q, N) of the queries of S samples in their N tokens, averaged over heads, and in which of these
    tokens (S, Q) the queries stand. Samples come in their order, those of one shape together."""
    lengths, queries = projections.seq_lens, projections.asking.counts
    if len(set(zip(lengths, queries))) == 1:
        runs = [(len(lengths), lengths[0], queries[0])]
    else:
        runs = [(1, length, count) for length, count in zip(lengths, queries)]
    place_T = torch.arange(len(projections.key_TGE), device=projections.key_TGE.device)
    token = query = 0
    for samples, length, count in runs:
        own, asking = slice(token, token + samples * length), slice(query, query + samples * count)
        key_SNGE, place_SN = (tensor[own].unflatten(0, (samples, length)) for tensor in (projections.key_TGE, place_T))
        query_SQHE, row_SQ = (
            tensor[asking].reshape(samples, count, *tensor.shape[1:])
            for tensor in (projections.query_QHE, projections.asking.row_Q)
        )
        yield attention_weights(projections, query_SQHE, row_SQ, key_SNGE, place_SN), row_SQ - place_SN[:, :1]
        token, query = own.stop, asking.stop


def attention_weights(
    projections: Projections, query_SQHE: Tensor, row_SQ: Tensor, key_SNGE: Tensor, place_SN: Tensor
) -> Tensor:
    """Weights (S, Q, N) float32, averaged over heads: queries at stream positions ``row_SQ``, keys at ``place_SN``.
    At most `MOST_WEIGHTS` are there at once before the heads are averaged."""
    samples, queries, heads, _ = query_SQHE.shape
    step = max(1, MOST_WEIGHTS // max(1, samples * heads * key_SNGE.shape[1]))
    parts = [
        _weights(projections, query_SQHE[:, first : first + step], row_SQ[:, first : first + step], key_SNGE, place_SN)
        for first in range(0, queries, step)
    ]
    return torch.cat(parts, 1) if parts else key_SNGE.new_zeros(samples, 0, key_SNGE.shape[1], dtype=torch.float32)


def _weights(
    projections: Projections, query_SQHE: Tensor, row_SQ: Tensor, key_SNGE: Tensor, place_SN: Tensor
) -> Tensor:
    groups = key_SNGE.shape[2]
    query_SQGRE = (query_SQHE.float() * projections.scaling).unflatten(2, (groups, query_SQHE.shape[2] // groups))
    with torch.autocast(key_SNGE.device.type, enabled=False):  # half precision would round many scores to one value
        weight_SQGRN = torch.einsum("sqgre,snge->sqgrn", query_SQGRE, key_SNGE.float())
    if projections.softcap is not None:
        weight_SQGRN = projections.softcap * torch.tanh(weight_SQGRN / projections.softcap)
    future_SQN = place_SN[:, None] > row_SQ[:, :, None]
    weight_SQGRN = weight_SQGRN.masked_fill(future_SQN[:, :, None, None], float("-inf"))
    if projections.sink_H is None:
        weight_SQGRN = weight_SQGRN.softmax(-1)
    else:
        sink_GR1 = projections.sink_H.float().unflatten(0, (groups, -1))[..., None]
        sink_SQGR1 = sink_GR1.expand(*weight_SQGRN.shape[:-1], 1)
        weight_SQGRN = torch.cat([weight_SQGRN, sink_SQGR1], dim=-1).softmax(-1)[..., :-1]
    return weight_SQGRN.mean((2, 3))


@torch.no_grad()
def keep_index(score_V: Tensor, candidates: Candidates, tokens: int) -> Tensor:
    """Stream positions (K,) that survive, ascending: all ``tokens`` but the lowest scored candidates of each image.

    Equal scores keep the earlier token. The number of survivors is known, so neither top-k nor the compaction reads
    anything back from the device.
    """
    order_V = best_first(score_V, candidates)
    place_V = torch.arange(len(order_V), device=order_V.device) - candidates.first_V
    rank_V = torch.empty_like(order_V).scatter_(0, order_V, place_V)
    stays_T = torch.ones(tokens, dtype=torch.bool, device=order_V.device)
    stays_T = stays_T.scatter(0, candidates.row_V, rank_V < candidates.keep_V)
    # Compaction without nonzero(): every survivor knows its slot; the dropped share one slot that is cut off.
    slot_T = torch.where(stays_T, stays_T.cumsum(0) - 1, candidates.survivors)
    index_K = torch.empty(candidates.survivors + 1, dtype=torch.int64, device=order_V.device)
    return index_K.scatter_(0, slot_T, torch.arange(tokens, device=order_V.device))[:-1]


def best_first(score_V: Tensor, candidates: Candidates) -> Tensor:
    """Indices (V,) into the candidates, image after image, in each the best first."""
    order_V = score_V.argsort(descending=True, stable=True)
    return order_V[candidates.image_V[order_V].argsort(stable=True)]


def merged(x_TD: Tensor, score_V: Tensor, candidates: Candidates) -> Tensor:
    """The stream (T, D) in which every survivor of a drop is the mean of itself and of those tokens of its image that
    are about to go and are nearer to it than to any other survivor, by the cosine. Gradients flow to all of them. An
    image that keeps nothing leaves nothing."""
    order_V = best_first(score_V, candidates)
    for here, images, count, keep in alike(candidates):
        if not 0 < keep < count:
            continue
        row_IN = candidates.row_V.index_select(0, order_V[here]).unflatten(0, (images, count))
        rows = row_IN[:, :keep].flatten(), row_IN[:, keep:].flatten()
        stay_IKD, go_IMD = (x_TD.index_select(0, row).unflatten(0, (images, -1)).float() for row in rows)
        with torch.no_grad():
            nearest_IM = cosines(go_IMD, stay_IKD).argmax(-1)
            joins_IKM = x_TD.new_zeros(images, keep, count - keep, dtype=torch.float32)
            joins_IKM = joins_IKM.scatter(1, nearest_IM[:, None], 1.0)
        with torch.autocast(x_TD.device.type, enabled=False):
            mean_IKD = (stay_IKD + joins_IKM @ go_IMD) / (1 + joins_IKM.sum(-1, keepdim=True))
        x_TD = x_TD.index_copy(0, rows[0], mean_IKD.flatten(0, 1).to(x_TD.dtype))
    return x_TD


def alike(candidates: Candidates) -> Iterator[tuple[slice, int, int, int]]:
    """Neighbouring images that have and keep as many tokens: their candidates, how many images, tokens and survivors of
    each. Never so many that their pairs of tokens are more than `MOST_WEIGHTS`."""
    first = 0
    for (count, keep), same in groupby(zip(candidates.counts, candidates.keeps)):
        left, most = len(list(same)), max(1, MOST_WEIGHTS // max(1, count * count))
        while left:
            images = min(left, most)
            yield slice(first, first + images * count), images, count, keep
            left, first = left - images, first + images * count


def cosines(first_PD: Tensor, second_ND: Tensor) -> Tensor:
    """(..., P, N) cosines of vectors, in float32 under autocast too."""
    first_PD, second_ND = (F.normalize(x.float(), dim=-1) for x in (first_PD, second_ND))
    with torch.autocast(first_PD.device.type, enabled=False):
        return first_PD @ second_ND.mT
