"""A sample that cannot be loaded is named; or another takes its place, the same one every time."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from llava_pdrop.config.load import load_config
from llava_pdrop.train import run
from llava_pdrop.train.bad_samples import BAD_SAMPLES_FILE, BadSample, CheckedSamples, collate_checked
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from tests.messages import says


@pytest.fixture
def losing(tiny_config, tmp_path, monkeypatch):
    """A config and its data set, whose pictures disappear between the survey and the training."""
    config = load_config(tiny_config())
    images = tmp_path / "images"
    build = run.build_dataset

    def make(*lost: int, **changes):
        shutil.copytree(config.data.image_root, images, dirs_exist_ok=True)
        data = {"train": config.data.train, "image_root": str(images), "samples_per_batch": 2}
        loaded = load_config(tiny_config(data=data, **changes))

        def build_then_lose(*args):
            dataset = build(*args)
            for index in lost:
                (images / f"train{index}.png").unlink(missing_ok=True)
            return dataset

        monkeypatch.setattr(run, "build_dataset", build_then_lose)
        return loaded

    return make


def checked(config, skip: bool, limit: int = 10) -> CheckedSamples:
    dataset = run.build_dataset(config, run.load_parts(config))
    return CheckedSamples(dataset, skip, limit, Path(config.output_dir) / BAD_SAMPLES_FILE)


def test_stop_names_record_and_file(losing):
    samples = checked(losing(4), skip=False)
    assert samples[3].id == "train3"
    found = samples[4]
    assert isinstance(found, BadSample)
    assert re.search(says("train.json[4]", "train4", "train4.png"), found.message)
    assert isinstance(collate_checked([samples[3], found]), BadSample)
    assert not samples.report.exists()


def test_a_sample_too_large_for_the_memory_is_one(losing, monkeypatch):
    """Wherever it gives out: here behind the pictures, where the sample is put together."""
    samples = checked(losing(), skip=False)

    def full(*args):
        raise MemoryError

    monkeypatch.setattr(type(samples.dataset.encoder), "train", full)
    found = samples[4]
    assert isinstance(found, BadSample) and re.search(says("train.json[4]", "train4", "memory"), found.message)


def test_half_a_picture_is_advised_on_once(losing, tmp_path):
    """Its header is whole, so that the survey takes it."""
    config = losing()
    picture = tmp_path / "images" / "train4.png"
    Image.effect_noise((48, 48), 50).convert("RGB").save(picture, "JPEG")
    picture.write_bytes(picture.read_bytes()[:700])
    samples = checked(config, skip=False)
    assert len(samples.dataset.lengths()) == 12
    found = samples[4]
    assert isinstance(found, BadSample)
    assert re.search(says("train.json[4]", "train4.png", "truncated", "train.on_bad_sample=skip"), found.message)
    assert len(re.findall(r"\b(replace|remove|mend|repair)\b", found.message)) == 2  # "replace or remove it"


def test_skip_takes_the_longest_that_is_no_longer(losing):
    samples = checked(losing(4, 7), skip=True)
    lengths = samples.dataset.lengths()
    usable = [(n, i) for i, n in enumerate(lengths) if i not in (4, 7)]
    for index in (4, 7):
        expected = max(place for place in usable if place < (lengths[index], index))[1]
        assert samples[index].id == f"train{expected}" == samples[index].id
    lines = [json.loads(line) for line in samples.report.read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == [4, 7]
    assert all(re.search(says(f"train{line['index']}.png"), line["reason"]) for line in lines)
    assert all(line["id"] == f"train{line['index']}" for line in lines)
    assert len(collate_checked([samples[4], samples[0]]).seq_lens) == 2


def test_too_many_end_the_run_with_the_list(losing):
    samples = checked(losing(4, 7, 8), skip=True, limit=2)
    found = [samples[index] for index in (4, 7, 8)]
    assert not isinstance(found[0], BadSample) and isinstance(found[2], BadSample)
    assert re.search(says("3 samples", "train.max_bad_samples=2"), found[2].message)


def test_nothing_short_enough(losing):
    samples = checked(losing(*range(12)), skip=True, limit=100)
    assert "no sample of at most" in samples[5].message


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_run_it_is_one_line_or_nothing_lost(losing, workers):
    arguments = {"num_train_epochs": 2, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
                 "dataloader_num_workers": workers}  # fmt: skip
    with pytest.raises(ValueError, match=says("train.json[4]", "train4", "train4.png")) as error:
        run.train(losing(4, train=arguments))
    assert "\n" not in str(error.value)
    output = run.train(losing(4, train={**arguments, "on_bad_sample": "skip"}))
    rows = [row for row in read_metrics(output / METRICS_FILE) if "loss" in row]
    assert len(rows) == 12 and all(row["samples"] == 2 for row in rows)
    (line,) = (output / BAD_SAMPLES_FILE).read_text().splitlines()
    assert json.loads(line)["id"] == "train4"
