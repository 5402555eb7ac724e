"""Every ranker against its published formula, written out slowly in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llava_pdrop.model import pyramid_drop
from llava_pdrop.model.pyramid_drop import Candidates, Projections, Ranking, Rows, keep_index
from llava_pdrop.model.rankers import RANKERS, check_rankers
from llava_pdrop.schedule import Schedule
from tests.messages import says
from tests.unit.model.test_pyramid_drop import candidates

LENGTHS = [26, 31, 14]
IMAGES = [list(range(2, 18)), list(range(29, 40)), list(range(42, 49)), list(range(58, 65))]
SAMPLES = [0, 1, 1, 2]
KEEPS = [8, 5, 3, 0]
TEXT = [[18, 19, 20, 23, 24, 25], [49, 50, 51, 52, 53, 54, 56], [65]]
INSTRUCTION = [[25], [54, 56], [65]]
SIZE, HEADS, GROUPS = 24, 4, 2


def rows(of_samples: list[list[int]]) -> Rows:
    return Rows(torch.tensor([row for own in of_samples for row in own]), [len(own) for own in of_samples])


def ranking(name: str, seed: int = 0, keeps: list[int] = KEEPS) -> Ranking:
    """A stream of three samples with four pictures, as ranker ``name`` would see it, of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    tokens, ranker = sum(LENGTHS), RANKERS[name]
    own = candidates(IMAGES, keeps, tokens, SAMPLES)
    hidden, before = torch.randn(2, tokens, SIZE, generator=generator)
    query, key = torch.randn(tokens, HEADS, 8, generator=generator), torch.randn(tokens, GROUPS, 8, generator=generator)
    asking = ranker.asking(rows(INSTRUCTION), rows(TEXT), own)
    projections = Projections(query[asking.row_Q], key, asking, LENGTHS, 8**-0.5)
    return Ranking(own, hidden, before, rows(TEXT), projections if ranker.projections else None)


def chosen(name: str, given: Ranking) -> list[set[int]]:
    """Stream positions that survive, picture by picture."""
    kept = set(keep_index(RANKERS[name].score(given), given.candidates, sum(LENGTHS)).tolist())
    return [kept & set(image) for image in IMAGES]


def weights(given: Ranking, query: int, row: int) -> torch.Tensor:
    """(T,) what query number ``query``, which stands at ``row``, pays the tokens of its sample up to itself."""
    projections, first = given.projections, 0
    for length in LENGTHS:
        if row < first + length:
            break
        first += length
    paid = torch.zeros(sum(LENGTHS), dtype=torch.float64)
    for head in range(HEADS):
        key_NE = projections.key_TGE[first : row + 1, head // (HEADS // GROUPS)].double()
        paid[first : row + 1] += (key_NE @ projections.query_QHE[query, head].double() * 8**-0.5).softmax(0) / HEADS
    return paid


def scored(score_T: torch.Tensor) -> torch.Tensor:
    return score_T[[row for image in IMAGES for row in image]].float()


def test_all_text_is_the_mean_over_the_text():
    given, expected, query = ranking("all_text"), torch.zeros(sum(LENGTHS), dtype=torch.float64), 0
    for own in TEXT:
        for row in own:
            expected += weights(given, query, row) / len(own)
            query += 1
    torch.testing.assert_close(RANKERS["all_text"].score(given), scored(expected))


def test_salient_text_asks_with_what_the_text_attends_to():
    given, expected, query = ranking("salient_text"), torch.zeros(sum(LENGTHS), dtype=torch.float64), 0
    for own in TEXT:
        paid = torch.stack([weights(given, query + k, row) for k, row in enumerate(own)])
        received = paid[:, own].sum(0)
        asks = {*received.argsort(descending=True)[:5].tolist(), len(own) - 1}
        expected += paid[sorted(asks)].mean(0)
        query += len(own)
    assert len(asks) == 1  # a single text token is both
    torch.testing.assert_close(RANKERS["salient_text"].score(given), scored(expected))


def test_visual_attention_is_what_a_pictures_tokens_pay_each_other():
    given, expected, query = ranking("visual_attention"), torch.zeros(sum(LENGTHS), dtype=torch.float64), 0
    for image in IMAGES:
        for row in image:
            expected[image] += weights(given, query, row)[image] / len(image)
            query += 1
    torch.testing.assert_close(RANKERS["visual_attention"].score(given), scored(expected))


def test_v2drop_keeps_what_moved_most():
    given = ranking("v2drop")
    moved = torch.tensor([math.dist(a, b) for a, b in zip(given.hidden_TD.tolist(), given.before_TD.tolist())])
    torch.testing.assert_close(RANKERS["v2drop"].score(given), scored(moved))


def test_key_norm_keeps_the_smallest_mean_keys():
    given = ranking("key_norm")
    mean = [[(a + b) / 2 for a, b in zip(*token)] for token in given.projections.key_TGE.tolist()]
    expected = torch.tensor([-math.hypot(*key) for key in mean])
    torch.testing.assert_close(RANKERS["key_norm"].score(given), scored(expected))


def cosine(given: Ranking, first: int, second: int) -> float:
    return F.cosine_similarity(given.hidden_TD[first].double(), given.hidden_TD[second].double(), dim=0).item()


@pytest.mark.parametrize("seed", range(5))
def test_divprune_spreads_the_survivors(seed):
    given, expected = ranking("divprune", seed), []
    for image, keep in zip(IMAGES, KEEPS):
        left, own = set(image), []
        for _ in range(keep):
            distance = {i: min(1 - cosine(given, i, j) for j in (own or image) if j != i) for i in left}
            own.append(max(left, key=distance.__getitem__))
            left.remove(own[-1])
        expected.append(set(own))
    assert chosen("divprune", given) == expected


@pytest.mark.parametrize("seed", range(5))
def test_cdpruner_takes_the_largest_determinant(seed):
    given, expected = ranking("cdpruner", seed), []
    attention_V = RANKERS["last_instruction"].score(given).double().split([len(image) for image in IMAGES])
    for image, keep, score in zip(IMAGES, KEEPS, attention_V):
        relevance = (score - score.min() + 1e-6) / (score.max() - score.min())
        cosines = torch.tensor([[cosine(given, i, j) for j in image] for i in image], dtype=torch.float64)
        kernel, own = relevance[:, None] * cosines * relevance, []
        for _ in range(keep):
            left = [i for i in range(len(image)) if i not in own]
            own.append(max(left, key=lambda i: torch.det(kernel[[*own, i]][:, [*own, i]]).item()))
        expected.append({image[i] for i in own})
    assert chosen("cdpruner", given) == expected


@pytest.mark.parametrize("seed", range(5))
def test_cdpruner_takes_the_earlier_of_the_tokens_that_the_chosen_ones_span(seed):
    """Four of 16 states span all; what rounding leaves of the others differs between processors and batches."""
    generator, rank = torch.Generator().manual_seed(seed), 4
    mixed = torch.randn(SIZE, rank, generator=generator) @ torch.randn(rank, SIZE, generator=generator)

    def of_first_picture(keep: int) -> set[int]:
        given = ranking("cdpruner", seed, [keep, 0, 0, 0])
        return chosen("cdpruner", replace(given, hidden_TD=given.hidden_TD @ mixed))[0]

    spanning = of_first_picture(rank)
    assert len(spanning) == rank
    left = [token for token in IMAGES[0] if token not in spanning]
    assert of_first_picture(8) == {*spanning, *left[:4]}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keeps", [KEEPS, [16, 10, 2, 7]], ids=str)
def test_dart_adds_to_every_pivot_what_is_least_like_it(seed, keeps):
    given, expected = ranking("dart", seed, keeps), []
    size = given.projections.key_TGE.double().abs().sum((1, 2)).tolist()
    for image, keep, sample in zip(IMAGES, keeps, SAMPLES):
        ours = sorted(image, key=size.__getitem__, reverse=True)[: min(4, keep)]
        theirs = sorted(TEXT[sample], key=size.__getitem__, reverse=True)[:4]
        own, pivots = list(ours), [*ours, *theirs]
        for turn, pivot in enumerate(pivots):
            wanted = len(ours) + (keep - len(ours)) * (turn + 1) // len(pivots)
            left = sorted(set(image) - set(own), key=lambda token, pivot=pivot: cosine(given, pivot, token))
            own += left[: wanted - len(own)]
        assert len(own) == keep
        expected.append(set(own))
    assert chosen("dart", given) == expected


@pytest.mark.parametrize("name", RANKERS)
def test_exactly_so_many_survive_also_where_all_tokens_are_alike(name):
    given = ranking(name)
    alike = replace(given, hidden_TD=torch.ones_like(given.hidden_TD), before_TD=torch.ones_like(given.hidden_TD))
    for each in (given, alike):
        assert [len(own) for own in chosen(name, each)] == KEEPS
    score_V = RANKERS[name].score(alike)
    assert torch.isfinite(score_V).all() and score_V.dtype == torch.float32


@pytest.mark.parametrize("name", RANKERS)
def test_without_pictures_there_is_nothing_to_score(name):
    own, nobody, tokens = candidates([], [], 6), rows([[], []]), torch.randn(6, SIZE)
    key_TGE = torch.randn(6, GROUPS, 8)
    projections = Projections(torch.empty(0, HEADS, 8), key_TGE, nobody, [4, 2], 1.0)
    given = Ranking(own, tokens, tokens, nobody, projections if RANKERS[name].projections else None)
    assert RANKERS[name].score(given).shape == (0,)


@pytest.mark.parametrize("name", ["divprune", "cdpruner"])
def test_pictures_are_compared_a_few_at_a_time(name, monkeypatch):
    given = ranking(name)
    whole = RANKERS[name].score(given)
    monkeypatch.setattr(pyramid_drop, "MOST_WEIGHTS", 1)
    assert torch.equal(RANKERS[name].score(given), whole)


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "dart", "visual_attention"])
def test_autocast_does_not_touch_the_score(name):
    given = ranking(name)
    plain = RANKERS[name].score(given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(RANKERS[name].score(given), plain)


def score(name: str, own: Candidates) -> torch.Tensor:
    nothing = torch.empty(sum(own.counts), 0)
    return RANKERS[name].score(Ranking(own, nothing, None, rows([]), None))


@pytest.mark.parametrize(("count", "keep"), [(16, 8), (16, 5), (7, 3), (5, 0), (5, 5), (100, 29)])
def test_uniform_spreads_evenly(count, keep):
    one = candidates([list(range(count))], [keep], count)
    score_V = score("uniform", one)
    kept = keep_index(score_V, one, count)
    assert len(kept) == keep == int(score_V.sum())
    if keep > 1:
        gaps = kept.diff()
        assert gaps.max() - gaps.min() <= 1


def test_random_differs_from_call_to_call_and_follows_the_seed():
    one = candidates([list(range(64))], [32], 64)

    def draw():
        return keep_index(score("random", one), one, 64).tolist()

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert first != second and draw() == first


def test_rankers_are_checked_by_name_and_by_what_they_look_at():
    with pytest.raises(ValueError, match=says("pyramid_drop.ranker", "'divprun'", "divprune")):
        check_rankers(Schedule((2,), (0.5,), "divprun"))
    with pytest.raises(ValueError, match=says("compare.x.ranker", "'best'")):
        check_rankers(Schedule((2, 4), (0.5, 0.2), ("random", "best")), "compare.x")
    for name in ("v2drop", "fastv", "key_norm", "dart"):
        with pytest.raises(ValueError, match=says("pyramid_drop.ranker", name, "layer 0")):
            check_rankers(Schedule((0, 2), (0.5, 0.2), name))
        check_rankers(Schedule((0, 2), (0.5, 0.2), ("divprune", name)))
