"""What scores image tokens: PyramidDrop's attention and its published counterparts, one entry of `RANKERS` each.

A ranker maps a `Ranking` to a score (V,) of the candidates; higher survives. None of them waits for the device: how
many tokens a picture has and keeps is known to the host. Those that choose token by token (DivPrune, CDPruner, DART)
say so by their score: earlier choices are higher. What is our reading of a paper, or differs from its code, is marked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from llava_pdrop.errors import Problem, check_name
from llava_pdrop.model.pyramid_drop import (
    Candidates,
    Ranking,
    Rows,
    alike,
    attention,
    attention_weights,
    by_attention,
    cosines,
    mean_of_queries,
)
from llava_pdrop.schedule import Schedule

SALIENT = 5
"""Text tokens that ask in `_salient_text`, besides the last one."""

PIVOTS = 4
"""Image tokens, and text tokens, that the others are compared with in `_dart`."""


def _random(ranking: Ranking) -> Tensor:
    return torch.rand(ranking.candidates.row_V.shape, device=ranking.candidates.row_V.device)


def _uniform(ranking: Ranking) -> Tensor:
    own = ranking.candidates
    place_V = torch.arange(len(own.row_V), device=own.row_V.device) - own.first_V
    before_V = place_V * own.keep_V // own.count_V
    after_V = (place_V + 1) * own.keep_V // own.count_V
    return (after_V - before_V).float()  # 1 for exactly keep_V tokens, evenly spread


def _salient_text(ranking: Ranking) -> Tensor:
    """The attention of those text tokens that the text itself attends to most, and of the last one. (In DUET's code,
    modeling_llama_pdrop.py, this stands commented out; that the last one always asks is theirs too.)"""
    scores = []
    for weight_SQN, column_SQ in attention(ranking.attended):
        queries = column_SQ.shape[1]
        among_SQQ = weight_SQN.gather(2, column_SQ[:, None].expand(-1, queries, -1))
        most_SK = among_SQQ.sum(1).topk(min(SALIENT, queries)).indices
        asks_SQ = torch.zeros_like(column_SQ, dtype=torch.bool).scatter(1, most_SK, True)
        asks_SQ[:, -1:] = True
        asking_SQ1 = asks_SQ[..., None].float()
        scores.append(((weight_SQN * asking_SQ1).sum(1) / asking_SQ1.sum(1).clamp(min=1)).flatten())
    return torch.cat(scores)[ranking.candidates.row_V]


def _visual_attention(ranking: Ranking) -> Tensor:
    """The attention that a picture's own tokens pay each other (VisionDrop, arXiv 2506.22283). Our reading: the weights
    are those of the layer, causal and over all tokens of the sample, and every token of the picture asks."""
    own, projections = ranking.candidates, ranking.attended
    starts = [0, *accumulate(projections.seq_lens)]
    place_T = torch.arange(len(projections.key_TGE), device=own.row_V.device)
    scores = [own.row_V.new_zeros(0, dtype=torch.float32)]
    by_picture = zip(projections.query_QHE.split(own.counts), own.row_V.split(own.counts), own.samples)
    for query_QHE, rows, sample in by_picture:
        here = slice(starts[sample], starts[sample + 1])
        weight_1QN = attention_weights(
            projections, query_QHE[None], rows[None], projections.key_TGE[None, here], place_T[None, here]
        )
        scores.append(mean_of_queries(weight_1QN).index_select(0, rows - here.start))
    return torch.cat(scores)


def _change(ranking: Ranking) -> Tensor:
    """How far the last layer has moved a token: the L2 norm (V2Drop, V2Drop.py)."""
    assert ranking.before_TD is not None, "refused before layer 0"
    now_VD, before_VD = (x.index_select(0, ranking.candidates.row_V) for x in (ranking.hidden_TD, ranking.before_TD))
    return (now_VD.float() - before_VD.float()).norm(dim=-1)


def _small_key(ranking: Ranking) -> Tensor:
    """Minus the L2 norm of the mean of a token's rotated keys over the heads (ViTCoP, vitcop_modeling_llama.py)."""
    key_VGE = ranking.attended.key_TGE.index_select(0, ranking.candidates.row_V)
    return -key_VGE.float().mean(1).norm(dim=-1)


def _divprune(ranking: Ranking) -> Tensor:
    """The token whose nearest neighbour is farthest, by 1 - cosine; then always the one that is farthest from all
    chosen ones (DivPrune, llava_arch.py of vbdi/divprune, which drops what leaves the projector: layer 0 here)."""

    def choose(_: slice, similar_INN: Tensor, keep: int) -> Iterator[Tensor]:
        own = torch.eye(similar_INN.shape[1], dtype=torch.bool, device=similar_INN.device)
        near_IN = similar_INN.masked_fill(own, -torch.inf).amax(-1)
        similar_INN = similar_INN.masked_fill(own, torch.inf)  # a chosen token is not chosen again
        for number in range(keep):
            chosen_I1 = near_IN.argmin(-1, keepdim=True)
            yield chosen_I1
            row_IN = _row(similar_INN, chosen_I1)
            near_IN = torch.maximum(near_IN, row_IN) if number else row_IN

    return _chosen(ranking, choose)


SPANNED = 1e-5
"""Of the squared relevance of a token: what is left of it by rounding when the chosen tokens span it."""


def _cdpruner(ranking: Ranking) -> Tensor:
    """The greedy maximum of det(diag(r) S diag(r)) over the subsets that stay, S being cosines and r the relevance of a
    token, by updates of its Cholesky factor (CDPruner, arXiv 2506.10967, llava_arch.py). Ours: r is the attention of
    the instruction, where theirs is CLIP's similarity to the question; scaled to its range as theirs is. Ours too: once
    the chosen tokens span the others, as they do when they are as many as the states are wide, the earlier of these
    comes first; theirs goes by what rounding has left of them."""
    relevance_V = by_attention(ranking)

    def choose(here: slice, similar_INN: Tensor, keep: int) -> Iterator[Tensor]:
        r_IN = relevance_V[here].reshape(similar_INN.shape[:2])
        least_I1, most_I1 = r_IN.amin(-1, keepdim=True), r_IN.amax(-1, keepdim=True)
        r_IN = (r_IN - least_I1 + 1e-6) / (most_I1 - least_I1).clamp(min=1e-6)
        kernel_INN = r_IN[:, :, None] * similar_INN * r_IN[:, None]
        left_IN = kernel_INN.diagonal(dim1=1, dim2=2)
        noise_IN, gone_IN = SPANNED * left_IN, torch.zeros_like(left_IN, dtype=torch.bool)
        factor_IKN = kernel_INN.new_zeros(len(r_IN), keep, r_IN.shape[1])
        for number in range(keep):
            chosen_I1 = left_IN.argmax(-1, keepdim=True)
            yield chosen_I1
            made_IKN = factor_IKN[:, :number]
            at_IK1 = made_IKN.gather(2, chosen_I1[:, None].expand(-1, number, -1))
            new_IN = _row(kernel_INN, chosen_I1) - (at_IK1 * made_IKN).sum(1)
            new_IN = new_IN / left_IN.gather(1, chosen_I1).clamp(min=1e-8).sqrt()
            factor_IKN[:, number] = new_IN
            gone_IN = gone_IN.scatter(1, chosen_I1, True)
            left_IN = left_IN - new_IN.square()
            left_IN = left_IN.masked_fill(left_IN < noise_IN, 0.0).masked_fill(gone_IN, -torch.inf)

    return _chosen(ranking, choose)


def _dart(ranking: Ranking) -> Tensor:
    """Pivots are the image tokens and the text tokens behind the pictures with the largest keys (L1 norm, all heads
    together); each in turn adds those image tokens that are least similar to it, by the cosine of the normalised hidden
    states (DART, arXiv 2502.11494). Ours: exactly as many survive as the schedule says, shared out evenly (theirs: 4 +
    8 int(n keep / 8)), and image pivots come before text pivots (theirs: in the order of a Python set)."""
    own, text = ranking.candidates, ranking.text
    size_T = ranking.attended.key_TGE.float().abs().sum((1, 2))
    text_by_sample = text.row_Q.split(text.counts)
    scores = [size_T.new_zeros(0)]
    for rows, keep, sample in zip(own.row_V.split(own.counts), own.keeps, own.samples):
        ours = size_T.index_select(0, rows).topk(min(PIVOTS, keep)).indices
        asking = text_by_sample[sample]
        theirs = size_T.index_select(0, asking).topk(min(PIVOTS, len(asking))).indices
        pivots = torch.cat([rows.index_select(0, ours), asking.index_select(0, theirs)])
        pivot_PD, image_ND = (ranking.hidden_TD.index_select(0, index) for index in (pivots, rows))
        chosen_N = torch.zeros_like(rows, dtype=torch.float32).index_fill(0, ours, 1.0)
        left, turns = keep - len(ours), len(pivots)
        for turn, similar_N in enumerate(cosines(pivot_PD, image_ND)):
            share = left * (turn + 1) // turns - left * turn // turns
            added = similar_N.masked_fill(chosen_N > 0, torch.inf).topk(share, largest=False).indices
            chosen_N = chosen_N.index_fill(0, added, 1.0)
        scores.append(chosen_N)
    return torch.cat(scores)


def _row(x_INN: Tensor, row_I1: Tensor) -> Tensor:
    """(I, N): row ``row_I1`` of every matrix."""
    return x_INN.gather(1, row_I1[..., None].expand(-1, 1, x_INN.shape[2])).squeeze(1)


def _chosen(ranking: Ranking, choose: Callable[[slice, Tensor, int], Iterator[Tensor]]) -> Tensor:
    """The score (V,) of tokens that are chosen one after the other: how many are chosen from each on; 0 for the others.

    Args:
        choose: given which candidates, the cosines (I, N, N) of the hidden states of I pictures and how many tokens
            each keeps, yields the next choice (I, 1) of each.
    """
    own, scores = ranking.candidates, [ranking.hidden_TD.new_zeros(0, dtype=torch.float32)]
    for here, pictures, count, keep in alike(own):
        x_IND = ranking.hidden_TD.index_select(0, own.row_V[here]).unflatten(0, (pictures, count))
        score_IN = x_IND.new_zeros(pictures, count, dtype=torch.float32)
        for number, chosen_I1 in enumerate(choose(here, cosines(x_IND, x_IND), keep)):
            score_IN = score_IN.scatter(1, chosen_I1, float(keep - number))
        scores.append(score_IN.flatten())
    return torch.cat(scores)


@dataclass(frozen=True)
class Ranker:
    """How tokens are scored, and what for.

    Attributes:
        score: higher survives.
        projections: whose norm, q and k are wanted: those of the layer about to run (``next``), of the layer that has
            just run, on that layer's own input (``previous``), or none.
        queries: whose queries: the last token of each ``instruction``, all of `Ranking.text`, every candidate
            (``image``), or nobody's: keys only.
        text: whether it looks at `Ranking.text`, which is else empty.
        before: whether it looks at what the previous layer was given.
        normalised: whether hidden states go through the model's final norm first.
        products: dot products of hidden states, given how many tokens a picture has and keeps and how many text tokens
            its sample asks with. (Products of queries and keys follow from the above.)
    """

    score: Callable[[Ranking], Tensor]
    projections: Literal["next", "previous"] | None = None
    queries: Literal["instruction", "text", "image"] | None = "instruction"
    text: bool = False
    before: bool = False
    normalised: bool = False
    products: Callable[[int, int, int], int] = lambda count, keep, text: 0

    @property
    def looks_back(self) -> bool:
        """Whether a layer must have run before."""
        return self.before or self.projections == "previous"

    def asking(self, instruction: Rows, text: Rows, candidates: Candidates) -> Rows:
        """The tokens whose queries it wants. (Of candidates the counts are in `Candidates`.)"""
        nobody = [0] * len(instruction.counts)
        return {
            "instruction": instruction,
            "text": text,
            "image": Rows(candidates.row_V, nobody),
            None: Rows(instruction.row_Q[:0], nobody),
        }[self.queries]


def _all_pairs(count: int, keep: int, text: int) -> int:
    return count * count


def _with_pivots(count: int, keep: int, text: int) -> int:
    return count * (min(PIVOTS, keep) + min(PIVOTS, text))


RANKERS: dict[str, Ranker] = {
    "last_instruction": Ranker(by_attention, "next"),  # PyramidDrop
    "fastv": Ranker(by_attention, "previous"),  # FastV (arXiv 2403.06764): the attention a layer has really paid
    "random": Ranker(_random),
    "uniform": Ranker(_uniform),
    "all_text": Ranker(by_attention, "next", "text", True),  # DUET's default (modeling_llama_pdrop.py)
    "salient_text": Ranker(_salient_text, "next", "text", True),
    "visual_attention": Ranker(_visual_attention, "next", "image"),
    "v2drop": Ranker(_change, before=True),
    "key_norm": Ranker(_small_key, "previous", None),
    "divprune": Ranker(_divprune, products=_all_pairs),
    "cdpruner": Ranker(_cdpruner, "next", products=_all_pairs),
    "dart": Ranker(_dart, "previous", None, True, normalised=True, products=_with_pivots),
}
"""Score functions by name (``pyramid_drop.ranker``)."""


def check_rankers(schedule: Schedule, key: str = "pyramid_drop") -> None:
    """Refuses a schedule, the value of the config's ``key``, whose rankers are unknown or have nothing to look at.

    Raises:
        Problem: an unknown ranker, or one that looks back where image tokens enter.
    """
    for name in schedule.rankers or (str(schedule.ranker),):
        check_name(f"{key}.ranker", name, RANKERS)
    if schedule.layers[:1] == (schedule.inject,) and RANKERS[schedule.rankers[0]].looks_back:
        fitting = sorted(name for name, ranker in RANKERS.items() if not ranker.looks_back)
        raise Problem(
            f"{key}.ranker",
            f"{key}.ranker {schedule.rankers[0]} looks at the layer that has run, and image tokens have been in none "
            f"before layer {schedule.inject}: choose one of {', '.join(fitting)}, or a later layer "
            f"({key}.depth scales the layers of a preset; null leaves them as they stand)",
        )
