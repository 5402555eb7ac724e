"""Synthetic batches: deterministic, of the shape's lengths, and distributed like the mixture's table."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llava_pdrop.bench.shapes import shape_named
from llava_pdrop.bench.workload import Workload
from llava_pdrop.cost.mixtures import LLAVA_15, OPEN_LLAVA_NEXT
from llava_pdrop.cost.nominal import FULL_TEXT_TOKENS, full_picture
from llava_pdrop.types import IGNORE_INDEX, PackedBatch
from tests.messages import says

CPU = torch.device("cpu")
MIXED = dataclasses.replace(shape_named("tiny"), picture=None, text_tokens=None, samples=12, max_length=4096)
"""Drawn from the mixture, with tiles that are small enough to be made in a test."""


def test_the_mixtures_have_their_published_sizes() -> None:
    assert sum(part.thousands for part in LLAVA_15) == pytest.approx(665, abs=2)
    assert sum(part.thousands for part in OPEN_LLAVA_NEXT) == pytest.approx(1000, rel=0.03)
    assert OPEN_LLAVA_NEXT[: len(LLAVA_15)] == LLAVA_15


def test_the_same_seed_and_step_give_the_same_batch() -> None:
    first, again = (Workload(MIXED, seed=3).batch(5, CPU) for _ in range(2))
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.pixels, again.pixels)
    assert first.seq_lens == again.seq_lens and first.image_sizes == again.image_sizes


@pytest.mark.parametrize("other", [(Workload(MIXED, seed=4), 5), (Workload(MIXED, seed=3), 6)])
def test_another_seed_or_step_gives_another(other: tuple[Workload, int]) -> None:
    first, second = Workload(MIXED, seed=3).batch(5, CPU), other[0].batch(other[1], CPU)
    assert first.seq_lens != second.seq_lens
    assert not torch.equal(first.pixels[:1], second.pixels[:1])


def test_a_larger_batch_begins_with_the_smaller_one() -> None:
    work = Workload(MIXED)
    assert work.outlines(2, 8)[:4] == work.outlines(2, 4)


@pytest.mark.parametrize("images", ["mixture", "full"])
def test_fixed_shapes_have_exactly_their_tokens(images: str) -> None:
    for name, image, text in (("tiny", 180, 40), ("small-cpu", 2880, 150)):
        shape = shape_named(name)
        batch = Workload(shape, images).batch(0, CPU)
        assert batch.seq_lens == [image + text] * shape.samples
        assert [stop - start for start, stop in batch.image_spans] == [image] * shape.samples


@pytest.mark.parametrize(
    ("name", "tiles", "tokens"),
    [("llava15-7b", 1, 576), ("llava-next-7b", 5, 2880 + 48), ("llava-next-7b-p9", 9, 5184 + 48)],
)
def test_full_pictures_use_every_tile(name: str, tiles: int, tokens: int) -> None:
    shape = shape_named(name)
    outline = Workload(shape, "full").outlines(0)[0]
    assert outline.picture == full_picture(shape.geometry)
    assert shape.geometry.num_tiles(outline.picture) == tiles
    assert shape.geometry.num_tokens(outline.picture) == tokens  # a newline token for each of the 48 rows
    assert outline.text_tokens == FULL_TEXT_TOKENS


def test_the_mixture_has_its_share_of_text_only_samples_and_of_turns() -> None:
    statistics = Workload(shape_named("llava15-7b")).statistics(4000)
    share = 40 / sum(part.thousands for part in LLAVA_15)
    assert statistics["text_only_share"] == pytest.approx(share, abs=0.015)
    turns = sum(part.thousands * sum(part.turns) / 2 for part in LLAVA_15) / sum(part.thousands for part in LLAVA_15)
    assert statistics["turns"] == pytest.approx(turns, rel=0.05)
    assert statistics["image_tokens"] == pytest.approx(576 * (1 - statistics["text_only_share"]))


def test_no_sample_is_longer_than_the_recipe_allows() -> None:
    for name in ("llava15-7b", "llava-next-7b"):
        shape = shape_named(name)
        for outline in Workload(shape).outlines(0, 3000):
            image = shape.geometry.num_tokens(outline.picture) if outline.picture else 0
            assert outline.text_tokens + image <= shape.max_length


def test_labels_stand_on_answers_behind_the_picture() -> None:
    work = Workload(MIXED, seed=1)
    batch, outlines = work.batch(0, CPU), work.outlines(0)
    answers = sum(answer for outline in outlines for _, answer in outline.turns)
    assert int((batch.labels != IGNORE_INDEX).sum()) == len(batch.label_positions) == answers
    assert [len(starts) for starts in batch.answer_starts] == [len(outline.turns) for outline in outlines]
    image = MIXED.text_config().vocab_size - 2
    for start, stop in batch.image_spans:
        assert (batch.input_ids[start:stop] == image).all()
    assert int((batch.input_ids == image).sum()) == sum(stop - start for start, stop in batch.image_spans)


def test_a_batch_of_text_has_no_pixels() -> None:
    work = Workload(MIXED)
    step = next(n for n in range(400) if all(o.picture is None for o in work.outlines(n, 1)))
    batch: PackedBatch = work.batch(step, CPU, samples=1)
    assert not batch.image_spans and len(batch.pixels) == 0


def test_an_unknown_kind_of_images_is_said() -> None:
    with pytest.raises(ValueError, match=says("images", "'all'")):
        Workload(MIXED, "all")


def test_samples_are_those_of_a_data_set() -> None:
    workload = Workload(shape_named("tiny"), seed=3)
    samples = workload.samples(3)
    (again, *_) = Workload(shape_named("tiny"), seed=3).samples(3)
    for sample in samples:
        ((start, stop),) = sample.image_spans
        assert stop - start == 180 and set(sample.input_ids[start:stop].tolist()) == {1022}
        assert sample.images[0].pixels.shape == (5, 3, 84, 84) and (sample.labels >= 0).any()
    torch.testing.assert_close(again.images[0].pixels, samples[0].images[0].pixels)
    assert not torch.equal(samples[0].input_ids, samples[1].input_ids)
