"""The algorithm file on its own."""

from __future__ import annotations

import pytest
import torch

from llava_pdrop.model import pyramid_drop
from llava_pdrop.model.pyramid_drop import Candidates, Projections, Rows, attention_score, keep_index, merged


def candidates(rows: list[list[int]], keeps: list[int], tokens: int, samples: list[int] | None = None) -> Candidates:
    """``rows``: stream positions of each image's tokens."""
    first, columns = 0, []
    for image, (own, keep) in enumerate(zip(rows, keeps)):
        columns += [(row, image, first, len(own), keep) for row in own]
        first += len(own)
    tensors = torch.tensor(columns, dtype=torch.int64).reshape(-1, 5).unbind(1)
    survivors, samples = tokens - first + sum(keeps), samples or [0] * len(rows)
    return Candidates(*tensors, survivors, [len(own) for own in rows], keeps, samples)


def test_keeps_the_best_of_each_image_in_their_first_order():
    two = candidates([[1, 2, 3, 4], [6, 7, 8]], [2, 1], tokens=10)
    score_V = torch.tensor([0.1, 0.9, 0.3, 0.8, 5.0, 7.0, 6.0])
    assert keep_index(score_V, two, 10).tolist() == [0, 2, 4, 5, 7, 9]


def test_equal_scores_keep_the_earlier_token():
    one = candidates([[0, 1, 2, 3]], [2], tokens=5)
    assert keep_index(torch.zeros(4), one, 5).tolist() == [0, 1, 4]


@pytest.mark.parametrize("keep", [0, 4])
def test_all_or_nothing(keep):
    one = candidates([[1, 2, 3, 4]], [keep], tokens=6)
    expected = [0, 5] if keep == 0 else [0, 1, 2, 3, 4, 5]
    assert keep_index(torch.rand(4), one, 6).tolist() == expected


def test_no_candidates_keep_everything():
    assert keep_index(torch.empty(0), candidates([], [], 4), 4).tolist() == [0, 1, 2, 3]


def test_random_keep_index_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(0, 9, (4,), generator=generator).tolist()
        rows, keeps, position = [], [], 1
        for size in sizes:
            rows.append(list(range(position, position + size)))
            keeps.append(int(torch.randint(0, size + 1, (1,), generator=generator)))
            position += size + 2
        score_V = torch.rand(sum(sizes), generator=generator)
        expected = set(range(position)) - {row for own in rows for row in own}
        for own, keep, score in zip(rows, keeps, score_V.split(sizes)):
            expected |= {own[i] for i in score.topk(keep).indices.tolist()}
        assert keep_index(score_V, candidates(rows, keeps, position), position).tolist() == sorted(expected)


def test_score_is_the_causal_softmax_averaged_over_heads_and_queries():
    torch.manual_seed(0)
    query_QHE, key_TGE = torch.randn(3, 4, 8), torch.randn(12, 2, 8)
    asking = Rows(torch.tensor([2, 4, 10]), [2, 0, 1])
    score_T = attention_score(Projections(query_QHE, key_TGE, asking, [5, 3, 4], scaling=0.3))
    expected = torch.zeros(12)
    for own, first in (([0, 1], 0), ([2], 8)):
        for query in own:
            for head in range(4):
                stop = int(asking.row_Q[query]) + 1
                weight = (key_TGE[first:stop, head // 2] @ query_QHE[query, head] * 0.3).softmax(0)
                expected[first:stop] += weight / (4 * len(own))
    torch.testing.assert_close(score_T, expected)
    assert score_T[5:8].sum() == 0 and score_T[11] == 0


def test_score_is_float32_and_has_no_gradient():
    query = torch.randn(1, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    key = torch.randn(4, 2, 8).bfloat16()
    score = attention_score(Projections(query, key, Rows(torch.tensor([3]), [1]), [4], 1.0))
    assert score.dtype == torch.float32 and not score.requires_grad


def test_autocast_does_not_touch_the_score():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 8, generator=generator), torch.randn(20, 2, 8, generator=generator)
    projections = Projections(query, key, Rows(torch.tensor([12, 18]), [2]), [20], 8**-0.5)
    plain = attention_score(projections)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_score(projections), plain)


@pytest.mark.parametrize("most", [1, 100, 1000])
def test_many_queries_are_scored_in_parts(monkeypatch, most):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(30, 4, 8, generator=generator), torch.randn(40, 2, 8, generator=generator)
    asking = Rows(torch.tensor([*range(5, 20), *range(25, 40)]), [15, 15])
    projections = Projections(query, key, asking, [20, 20], 8**-0.5)
    whole = attention_score(projections)
    monkeypatch.setattr(pyramid_drop, "MOST_WEIGHTS", most)
    torch.testing.assert_close(attention_score(projections), whole)  # other matrices: other sums


@pytest.mark.parametrize("most", [1, 2**26])
def test_a_dropped_token_is_averaged_into_its_nearest_survivor(monkeypatch, most):
    monkeypatch.setattr(pyramid_drop, "MOST_WEIGHTS", most)
    x_TD = torch.tensor(
        [[9.0, 9.0], [1.0, 0.0], [0.0, 2.0], [4.0, 0.1], [0.1, 6.0], [3.0, 0.0], [7.0, 7.0], [1.0, 1.0]],
        requires_grad=True,
    )
    own = candidates([[1, 2, 3, 4, 5], [7]], [2, 0], 8)
    score_V = torch.tensor([5.0, 4.0, 1.0, 2.0, 3.0, 1.0])
    merged_TD = merged(x_TD, score_V, own)
    expected = x_TD.detach().clone()
    expected[1], expected[2] = x_TD[[1, 3, 5]].mean(0), x_TD[[2, 4]].mean(0)
    torch.testing.assert_close(merged_TD, expected)
    merged_TD[keep_index(score_V, own, 8)].sum().backward()
    assert x_TD.grad[:, 0].tolist() == pytest.approx([1, 1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 3, 1, 0])


def test_merging_keeps_the_precision_of_the_stream():
    x_TD, own = torch.randn(6, 8).bfloat16(), candidates([[1, 2, 3, 4]], [2], 6)
    assert merged(x_TD, torch.rand(4), own).dtype == torch.bfloat16
