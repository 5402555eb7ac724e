"""From the ``data:`` section to a data set: mixtures, formats, and what happens to records that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llava_pdrop.config.load import load_config
from llava_pdrop.errors import ConfigError
from llava_pdrop.train.history import digest
from llava_pdrop.train.run import build_dataset, load_parts
from tests.messages import meant, says


@pytest.fixture
def load(tiny_config, tmp_path: Path):
    """The config of a tiny run whose data is a mixture of all its records and of two text-only ones, one unusable."""
    file = tiny_config()
    config = load_config(file)
    turns = [{"from": "human", "value": "Yes?"}, {"from": "gpt", "value": "Yes"}]
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps([{"id": "good", "conversations": turns}, {"id": "bad", "conversations": turns[:1]}]))
    parts = [{"path": str(Path(config.data.train).resolve())}, {"path": str(extra)}]
    if config.data.image_root is not None:
        parts[0]["image_root"] = str(Path(config.data.image_root).resolve())
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(yaml.safe_dump({"parts": parts}))

    def read(*overrides: str):
        return load_config(file, [f"data.train={mixture}", *overrides])

    return read


def test_an_unusable_record_stops_the_run(load):
    config = load()
    with pytest.raises(ValueError, match=says("extra.json[1]", "bad", "no answer", "data.on_invalid=skip")):
        build_dataset(config, load_parts(config))


def test_skipping_lists_what_is_left_out(load):
    config = load("data.on_invalid=skip", "data.max_invalid=0.5")
    parts = load_parts(config)
    dataset = build_dataset(config, parts)
    (line,) = (Path(config.output_dir) / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "bad" and dataset.records[len(dataset) - 1].id == "good"
    with pytest.raises(ValueError, match=says("1 of", "records", "skipped.jsonl", "data.max_invalid")):
        build_dataset(load("data.on_invalid=skip", "data.max_invalid=0"), parts)


def test_formats_are_checked(load):
    config = load("data.format=josn")
    with pytest.raises(ConfigError, match=says("data.format", "'josn'", meant("jsonl"))):
        build_dataset(config, load_parts(config))


def test_a_changed_part_is_another_run(load, tmp_path):
    before = digest(load())
    assert digest(load()) == before == digest(load("data.cache=null"))
    (tmp_path / "extra.json").write_text("[]")
    assert digest(load()) != before
