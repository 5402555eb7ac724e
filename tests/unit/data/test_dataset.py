"""The data set: lengths without pixels equal to the real ones, errors that name the record, packed batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil

from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.dataset import ConversationDataset, collate
from llava_pdrop.data.packing import BatchPlan, PlanSampler
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.types import Record, Turn

ANYRES = ImageGeometry(56, 14, "anyres", "spatial_unpad", ((56, 112), (112, 56), (112, 112)))


def make_record(*texts: str, images: tuple[Path, ...] = (), id: str = "r1") -> Record:
    """A record whose texts are a human's and the assistant's in turn."""
    turns = tuple(Turn("gpt" if i % 2 else "human", text) for i, text in enumerate(texts))
    return Record(id=id, turns=turns, images=images, origin="made.json[0]")


@pytest.fixture
def make_dataset(tokenizer, image_token_id):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})

    def make(records, **options):
        return ConversationDataset(records, TEMPLATES["qa"], tokenizer, image_token_id, ANYRES, processor, **options)

    return make


@pytest.fixture
def records(picture):
    turned = Image.Exif()
    turned[0x0112] = 6
    wide, tall = picture(90, 40, "wide.png"), picture(90, 41, "tall.jpg", exif=turned)
    return [
        make_record("<image>\nWhat?", "a", images=(wide,), id="0"),
        make_record("Nothing?", "b", id="1"),
        make_record("<image> or <image>", "c", "Sure?", "d", images=(tall, wide), id="2"),
        make_record("<image>\nWhat is it?", "e", images=(tall,), id="3"),
    ]


@pytest.mark.parametrize("options", [{}, {"max_length": 150}, {"max_length": 60, "truncation": "tokens"}])
def test_lengths_from_headers_equal_the_real_ones(make_dataset, records, options):
    dataset = make_dataset(records, **options)
    assert dataset.lengths() == [len(dataset[i].input_ids) for i in range(len(dataset))]


def test_loader(make_dataset, records):
    dataset = make_dataset(records)
    plan = BatchPlan(dataset.lengths(), seed=1, tokens_per_batch=200)
    batches = list(DataLoader(dataset, batch_sampler=PlanSampler(plan), collate_fn=collate))
    assert sorted(name for batch in batches for name in batch.sample_ids) == ["0", "1", "2", "3"]
    for batch, indices in zip(batches, plan.micro_batches(0), strict=True):
        assert batch.seq_lens == [dataset.lengths()[i] for i in indices] and sum(batch.seq_lens) <= 200
        assert len(batch.input_ids) == len(batch.labels) == sum(batch.seq_lens)
        image_tokens = [stop - start for start, stop in batch.image_spans]
        assert image_tokens == [ANYRES.num_tokens(size) for size in batch.image_sizes]
        assert batch.pixels.shape[0] == sum(map(ANYRES.num_tiles, batch.image_sizes))
        assert torch.equal(batch.input_ids[batch.label_positions], batch.labels[batch.label_positions])


def test_errors_name_the_record(make_dataset, records, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    broken = dataclasses.replace(records[0], images=(tmp_path / "broken.png",))
    missing = dataclasses.replace(records[0], images=(tmp_path / "none.png",))
    silent = make_record("Hello?", id="9")
    dataset = make_dataset([broken, missing, silent])
    with pytest.raises(ValueError, match=r"made.json\[0\] \(id 0\): .*broken.png: cannot be read as an image"):
        dataset[0]
    with pytest.raises(FileNotFoundError, match=r"made.json\[0\] \(id 0\): .*none.png: no such image"):
        dataset[1]
    with pytest.raises(ValueError, match=r"made.json\[0\] \(id 9\): it has no answer"):
        dataset[2]
    with pytest.raises(ValueError, match=r"\(id 0\): .*broken.png"):
        dataset.lengths()
