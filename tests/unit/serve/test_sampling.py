"""What is drawn is distributed as the logits say, and depends on the seed alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from llava_pdrop.errors import UserError
from llava_pdrop.serve.sampling import Sampler
from tests.messages import says

LOGITS = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).log()
DRAWS = 4000


def shares(**settings: float) -> list[float]:
    sampler = Sampler(seed=3, **settings)
    drawn = Counter(sampler.pick(LOGITS) for _ in range(DRAWS))
    return [drawn[token] / DRAWS for token in range(len(LOGITS))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"temperature": 0.5}, [0.037, 0.593, 0.009, 0.231, 0.148]),
        ({"temperature": 1.0, "top_p": 0.65}, [0, 0.615, 0, 0.385, 0]),
        ({"temperature": 1.0, "top_p": 0.66}, [0, 0.471, 0, 0.294, 0.235]),
        ({"temperature": 1.0, "top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-9}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
    ],
)
def test_shares_are_those_of_the_logits(settings: dict[str, float], expected: list[float]) -> None:
    assert shares(**settings) == pytest.approx(expected, abs=0.03)
    assert [share == 0 for share in shares(**settings)] == [share == 0 for share in expected]


def test_draws_are_those_of_the_seed_whoever_draws_beside_it() -> None:
    def drawn(seed: int, others: int) -> list[int]:
        sampler, beside = Sampler(1.0, seed=seed), [Sampler(1.0, seed=other) for other in range(others)]
        tokens = []
        for _ in range(50):
            tokens.append(sampler.pick(LOGITS))
            for other in beside:
                other.pick(LOGITS)
            torch.rand(3)
        return tokens

    assert drawn(1, 0) == drawn(1, 5) != drawn(2, 0)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, float], name: str) -> None:
    with pytest.raises(UserError, match=says(name)):
        Sampler(**settings)
