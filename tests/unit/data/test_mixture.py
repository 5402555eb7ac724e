"""Mixtures: which records of which part, drawn by seed, and one line for every mistake in the file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from llava_pdrop.data.mixture import data_files, read_data
from llava_pdrop.errors import ConfigError
from tests.messages import meant, says


@pytest.fixture
def mix(tmp_path: Path):
    """Writes a mixture of parts a (10 records, ids a0, a1, ...), b (20) and c (5), and reads it."""
    for name, count in (("a", 10), ("b", 20), ("c", 5)):
        turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
        entries = [{"id": f"{name}{i}", "conversations": turns} for i in range(count)]
        if name == "b":
            (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, entries)))
        else:
            (tmp_path / f"{name}.json").write_text(json.dumps(entries))

    def read(content, seed: int = 0, **options):
        path = tmp_path / "mixture.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return read_data(path, seed=seed, **options)

    return read


def parts(*sections, **top):
    return {"parts": list(sections), **top}


def ids(records) -> list[str]:
    return [record.id for record in records]


A, B, C = {"path": "a.json"}, {"path": "b.jsonl"}, {"path": "c.json"}


def test_parts_follow_one_another(mix):
    assert ids(mix(parts(A, C))) == [f"a{i}" for i in range(10)] + [f"c{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("first:3", ["b0", "b1", "b2"]),
        ("first:10%", ["b0", "b1"]),
        ("last:12.5%", ["b18", "b19"]),
        ("last:1", ["b19"]),
        ("first:0.1%", ["b0"]),
        ("first:100%", [f"b{i}" for i in range(20)]),
    ],
)
def test_limits(mix, limit, expected):
    assert ids(mix(parts({**B, "limit": limit}))) == expected


def test_random_limits_are_drawn_by_seed(mix):
    draw = parts({**B, "limit": "random:25%"}, {**A, "limit": "random:4"})
    chosen = ids(mix(draw, seed=3))
    assert len(set(chosen)) == 9 and ids(mix(draw, seed=3)) == chosen != ids(mix(draw, seed=4))
    assert ids(mix(parts({**B, "limit": "random:25%"}), seed=3)) == chosen[:5]  # another part changes nothing


def test_repeats(mix):
    counts = Counter(
        ids(mix(parts({**A, "repeat": 2.5}, {**C, "limit": "first:2", "repeat": 3}, {**B, "repeat": 0.5})))
    )
    assert sorted(counts[f"a{i}"] for i in range(10)) == [2] * 5 + [3] * 5
    assert counts["c0"] == counts["c1"] == 3 and counts["c2"] == 0
    assert sorted(counts[f"b{i}"] for i in range(20)) == [0] * 10 + [1] * 10


def test_weights_are_shares_of_an_epoch(mix):
    counts = Counter(name[0] for name in ids(mix(parts({**A, "weight": 3}, {**C, "weight": 1}, size=40))))
    assert counts == {"a": 30, "c": 10}
    counts = Counter(name[0] for name in ids(mix(parts({**A, "weight": 1}, {**B, "weight": 1}, {**C, "weight": 1}))))
    assert counts == {"a": 12, "b": 12, "c": 11}  # the 35 records of all parts, dealt anew
    spread = Counter(ids(mix(parts({**A, "weight": 1}, {**B, "weight": 2}, size=60))))
    assert {spread[f"a{i}"] for i in range(10)} == {spread[f"b{i}"] for i in range(20)} == {2}


def test_templates_and_roots_belong_to_the_part(mix, tmp_path, picture):
    (tmp_path / "pictures").mkdir()
    path = picture(name="pictures/p.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "d.json").write_text(json.dumps([{"image": "p.png", "conversations": turns}]))
    records = mix(parts({"path": "d.json", "image_root": "pictures", "template": "plain"}, A))
    assert (records[0].template, records[0].images) == ("plain", (path,)) and records[1].template is None
    assert mix(parts({"path": "d.json"}), image_root=tmp_path / "pictures")[0].images == (path,)


def test_what_is_used_of_every_part_is_told(mix, tmp_path):
    records = mix(parts({**B, "limit": "first:5", "repeat": 2}, {**A, "template": "plain"}))
    assert records.summary() == [
        f"{tmp_path / 'b.jsonl'}: 10 of 20 records",
        f"{tmp_path / 'a.json'}: 10 of 10 records, template plain",
    ]


def test_a_plain_file_is_data_too(mix, tmp_path):
    mix(parts(A, C))
    mixture = tmp_path / "mixture.yaml"
    assert data_files(mixture) == [mixture, tmp_path / "a.json", tmp_path / "c.json"]
    assert data_files(tmp_path / "c.json") == [tmp_path / "c.json"]
    assert ids(read_data(tmp_path / "c.json")) == [f"c{i}" for i in range(5)]
    assert len(read_data(tmp_path / "b.jsonl", format="jsonl")) == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (parts({"pth": "a.json"}), says("'parts[0].pth'", meant("path'"))),
        (parts(A, {**C, "tempalte": "v1"}), says("'parts[1].tempalte'", meant("template'"))),
        (parts(A, part=[]), says("'part'", meant("parts'"))),
        ("path: a.json", says("'path'", "parts")),
        (parts({"limit": "first:3"}), says("parts[0].path", "missing")),
        (parts({**A, "template": "v9"}), says("parts[0].template", "'v9'", "plain", meant("v1"))),
        (parts({**A, "format": "jsonlines"}), says("parts[0].format", "'jsonlines'", meant("jsonl'"))),
        (parts({**A, "limit": "some:3"}), says("parts[0].limit", "'some:3'", "first:N")),
        (parts({**A, "limit": "first:11"}), says("parts[0].limit", "first:11", "10 records")),
        (parts({**A, "limit": "first:0"}), says("parts[0].limit", "first:0", "whole number", "1 to 10")),
        (parts({**A, "limit": "random:2.5"}), says("parts[0].limit", "random:2.5", "whole number", "1 to 10")),
        (parts({**A, "limit": "random:-3"}), says("parts[0].limit", "'random:-3'", "first:N")),
        (parts({**A, "limit": "first:120%"}), says("parts[0].limit", "first:120%", "10 records")),
        (parts({**A, "repeat": 0}), says("parts[0].repeat", "greater than 0", "got 0")),
        (parts({**A, "repeat": "two"}), says("parts[0].repeat", "number", "'two'")),
        (parts({**A, "weight": 1}, C), says("parts[1]", "no weight")),
        (parts({**A, "weight": 1, "repeat": 2}), says("weight", "repeat", "exclude")),
        (parts(A, size=3), says("size", "weight")),
        (parts(), says("parts", "empty")),
        ("parts: 5", says("parts", "list", "5")),
        ("parts: abc", says("parts", "list", "'abc'")),
        ("parts: {path: a.json}", says("parts", "list", "{")),
        (parts({**A, "limit": "first:0%"}), says("parts[0].limit", "first:0%", "10 records")),
        (parts({**A, "limit": "first:1", "repeat": 0.1}), says("parts[0].repeat", "small")),
        (parts({**A, "weight": 1}, {**C, "weight": 1e-6}), says("parts[1].weight", "small")),
        ("[1, 2]", says("'parts'")),
        ("parts: [", says("YAML")),
    ],
)
def test_mistakes_are_one_line(mix, tmp_path, content, message):
    with pytest.raises(ConfigError, match=message) as error:
        mix(content)
    assert str(error.value).startswith(f"{tmp_path / 'mixture.yaml'}: ") and "\n" not in str(error.value)


def test_missing_files(mix, tmp_path):
    with pytest.raises(FileNotFoundError, match=says("none.json", "data file")):
        mix(parts({"path": "none.json"}))
    with pytest.raises(FileNotFoundError, match=says("none", "image folder", "a.json")):
        mix(parts({**A, "image_root": "none"}))
    with pytest.raises(FileNotFoundError, match=says("mixture file")):
        read_data(tmp_path / "other.yaml")
    with pytest.raises(ConfigError, match=says("mixture", "data.format=null")):
        mix(parts(A), format="jsonl")
