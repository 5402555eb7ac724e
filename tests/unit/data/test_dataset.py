"""The data set: lengths without pixels equal to the real ones, errors that name the record, packed batches."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil

from llava_pdrop.data import survey
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.dataset import ConversationDataset
from llava_pdrop.data.images import image_size
from llava_pdrop.data.mixture import read_data
from llava_pdrop.data.packing import BatchPlan, PlanSampler
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.types import PackedBatch, Record, Turn
from tests.messages import says

ANYRES = ImageGeometry(56, 14, "anyres", "spatial_unpad", ((56, 112), (112, 56), (112, 112)))


def make_record(*texts: str, images: tuple[Path, ...] = (), id: str = "r1") -> Record:
    """A record whose texts are a human's and the assistant's in turn."""
    turns = tuple(Turn("gpt" if i % 2 else "human", text) for i, text in enumerate(texts))
    return Record(id=id, turns=turns, images=images, origin="made.json[0]")


@pytest.fixture
def make_dataset(tokenizer, image_token_id):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})

    def make(records, **options):
        rules = {name: options.pop(name) for name in ("max_length", "truncation") if name in options}
        encoder = Encoder(TEMPLATES["qa"], tokenizer, image_token_id, ANYRES, **rules)
        return ConversationDataset(records, encoder, processor, **options)

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
    batches = list(DataLoader(dataset, batch_sampler=PlanSampler(plan), collate_fn=PackedBatch.pack))
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
    with pytest.raises(ValueError, match=says("made.json[0]", "id 0", "broken.png", "read")):
        dataset[0]
    with pytest.raises(FileNotFoundError, match=says("made.json[0]", "id 0", "none.png", "no such")):
        dataset[1]
    with pytest.raises(ValueError, match=says("made.json[0]", "id 9", "no answer")):
        dataset[2]
    with pytest.raises(ValueError, match=says("id 0", "broken.png", "3 of 3")):
        dataset.lengths()


def test_records_keep_the_template_of_their_part(make_dataset, records):
    own = [dataclasses.replace(record, template="v1") for record in records]
    ours, other = make_dataset(records), make_dataset(own)
    assert min(b - a for a, b in zip(ours.lengths(), other.lengths())) > 50  # v1 has a long system prompt
    assert other.lengths() == [len(other[i].input_ids) for i in range(len(own))]


@pytest.fixture
def data_file(tmp_path, picture):
    """Seven records with pictures of seven sizes; number 2 without an answer, the picture of number 5 missing."""
    entries = []
    for i in range(7):
        if i != 5:
            picture(30 + 20 * i, 60, f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "" if i == 2 else "a" * i}]
        entries.append({"id": f"r{i}", "image": f"{i}.png", "conversations": turns[: 1 if i == 2 else 2]})
    entries[0]["conversations"][1]["value"] = "no"
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_unusable_records_are_left_out_and_listed(make_dataset, data_file, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(survey, "RECORDS_AT_A_TIME", 2)
    monkeypatch.setattr(survey, "LARGE", 1)
    dataset = make_dataset(read_data(data_file), workers=workers)
    report = tmp_path / "out" / "skipped.jsonl"
    usable = dataset.without_unusable(0.5, report)
    assert [usable[i].id for i in range(len(usable))] == ["r0", "r1", "r3", "r4", "r6"]
    assert usable.lengths() == [len(usable[i].input_ids) for i in range(len(usable))]
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(line["index"], line["id"], line["origin"]) for line in lines] == [
        (2, "r2", f"{data_file}[2]"),
        (5, "r5", f"{data_file}[5]"),
    ]
    assert lines[0]["reason"].startswith("it has no answer") and "5.png: no such image" in lines[1]["reason"]
    with pytest.raises(ValueError, match=says("2 of 7", "0.01", "r2")):
        dataset.without_unusable(0.01, report)
    with pytest.raises(ValueError, match=says("[2] (id r2)", "no answer", "2 of 7")):
        dataset.lengths()


def test_a_second_run_reads_the_cache(make_dataset, data_file, tmp_path, picture, monkeypatch):
    """Lengths and sizes come from the cache; only what could not be used is looked at again."""
    monkeypatch.setattr(survey, "LARGE", 1)
    looked_at = []
    monkeypatch.setattr(survey, "image_size", lambda source: looked_at.append(source.name) or image_size(source))
    cache = tmp_path / "cache"

    def run(**options):
        looked_at.clear()
        made = make_dataset(read_data(data_file), cache=cache, **options).survey
        return made.lengths.tolist(), sorted(made.problems), sorted(looked_at)

    first, problems, seen = run()
    assert problems == [2, 5] and len(seen) == 7
    assert run() == (first, [2, 5], ["5.png"])

    picture(130, 60, "5.png")
    mended, problems, _ = run()
    assert problems == [2] and mended[5] > 0 and [*mended[:5], mended[6]] == [*first[:5], first[6]]

    shorter, problems, seen = run(max_length=70)  # other lengths, but the sizes are known
    assert shorter != mended and len(problems) > 1 and seen == []
    assert len(list(cache.iterdir())) == 3  # sizes, and lengths under two limits

    data_file.write_text(data_file.read_text() + " ")  # another file: everything anew
    assert len(run()[2]) == 7


@pytest.mark.parametrize("cached", [False, True])
def test_keys_that_nobody_reads_and_records_without_a_label(make_dataset, tmp_path, picture, monkeypatch, cached):
    monkeypatch.setattr(survey, "LARGE", 1)
    picture(60, 60, "a.png")
    talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "no", "score": 1}]
    long = [{"from": "human", "value": "x" * 200}, {"from": "gpt", "value": "no"}]
    entries = [{"model": "x", "image": "a.png", "conversations": talk}] * 3 + [{"model": "y", "conversations": long}]
    entries.append({"model": "z", "tags": [], "conversations": []})  # unusable: not counted
    (tmp_path / "d.json").write_text(json.dumps(entries))
    for _ in range(2 if cached else 1):
        made = make_dataset(
            read_data(tmp_path / "d.json"),
            max_length=100,
            truncation="tokens",
            cache=tmp_path / "cache" if cached else None,
        )
        found = made.survey
        assert found.unknown_keys == {"model": 4, "conversations[].score": 3}
        assert found.images.tolist() == [1, 1, 1, 0, 0] and found.unlabelled.tolist() == [3]
        assert re.search(says("'model' (4 records)", "'conversations[].score' (3 records)"), found.unread())
        rest = found.of(np.array([0, 3]))
        assert rest.images.tolist() == [1, 0] and rest.unlabelled.tolist() == [1] and not rest.problems
    assert make_dataset([make_record("Hi?", "a")]).survey.unread() is None


def test_a_cache_that_cannot_be_written_costs_nothing(make_dataset, data_file, tmp_path, monkeypatch, caplog):
    """Millions of records were counted by then."""
    monkeypatch.setattr(survey, "LARGE", 1)
    (tmp_path / "file").write_text("no directory")
    cache = tmp_path / "file" / "cache"
    found = make_dataset(read_data(data_file), workers=0, cache=cache).survey
    assert len(found.lengths) and re.search(says(str(cache), "data.cache", "Not a directory"), caplog.text)


def test_the_cache_belongs_to_template_geometry_and_tokenizer(make_dataset, records, tokenizer):
    rules = make_dataset(records)._rules()
    encoder = make_dataset(records).encoder
    assert make_dataset(records)._rules() == rules
    taught = copy.deepcopy(tokenizer)
    taught.add_tokens(["What"])
    changes = {
        "template": TEMPLATES["v1"],
        "geometry": dataclasses.replace(ANYRES, rounding="hf"),
        "tokenizer": taught,
        "max_length": 9,
        "truncation": "tokens",
    }
    others = set()
    for name, value in changes.items():
        dataset = make_dataset(records)
        dataset.encoder = dataclasses.replace(encoder, **{name: value})
        others.add(dataset._rules())
    assert len(others) == len(changes) and rules not in others
