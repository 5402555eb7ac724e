"""The check of a data set: every kind of problem, duplicates, containers, mixtures, and the index it leaves."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava_pdrop.data import survey
from llava_pdrop.data.clean_index import CleanIndex, data_digest
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.dataset import ConversationDataset
from llava_pdrop.data.mixture import read_data
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.doctor import checks as doctor_checks
from llava_pdrop.doctor import images as doctor_images
from llava_pdrop.doctor.checks import PROBLEM_KINDS, TAKEN, RecordChecks
from llava_pdrop.doctor.examine import Findings, examine
from llava_pdrop.doctor.images import SAMPLE, look, same_content
from llava_pdrop.doctor.report import describe
from llava_pdrop.errors import RecordError, clip
from llava_pdrop.geometry import ImageGeometry
from tests.messages import says

SQUARE = ImageGeometry(56, 14)
IMAGE_TOKENS = 16
LIMIT = 60


def talk(*texts: str, first: str = "human") -> list[dict[str, str]]:
    other = {"human": "gpt", "gpt": "human"}
    return [{"from": first if i % 2 == 0 else other[first], "value": text} for i, text in enumerate(texts)]


def noise(width: int, height: int, seed: int = 0, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A picture file."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


GOOD = {"id": "good", "image": "a.png", "conversations": talk("<image>\nWhat?", "a cat")}
BAD: dict[str, dict[str, Any] | list[Any]] = {
    "format": ["no", "object"],
    "empty_conversation": {"id": "e", "conversations": []},
    "image_markers": {"id": "m", "image": "a.png", "conversations": talk("What?", "a cat")},
    "role_order": {"id": "o", "conversations": [*talk("What?"), *talk("And?", "a cat")]},
    "missing_image": {"id": "x", "image": "none.png", "conversations": talk("<image>What?", "a cat")},
    "corrupt_image": {"id": "c", "image": "broken.png", "conversations": talk("<image>What?", "a cat")},
    "media": {"id": "v", "video": "a.mp4", "conversations": talk("What?", "a cat")},
    "control_token": {"id": "k", "conversations": talk("What?", "a </s> cat")},
    "no_supervised_token": {"id": "s", "conversations": talk("What?", "")},
    "not_tokenised": {"id": "u", "conversations": talk("What\ud800?", "a cat")},
    "image_token": {"id": "i", "conversations": talk("<|picture|> what?", "a cat")},
    "too_long": {"id": "l", "image": "a.png", "conversations": talk("<image>" + "x" * LIMIT, "a cat")},
    "shortened": {"id": "h", "image": "a.png", "conversations": talk("<image>What?", "a cat", "x" * LIMIT, "no")},
    "duplicate_id": {"id": "good", "conversations": talk("What?", "a dog")},
    "duplicate_image": {"id": "d", "image": "copy.png", "conversations": talk("<image>What?", "a cat")},
    "non_rgb_image": {"id": "n", "image": "grey.png", "conversations": talk("<image>What?", "a cat")},
}
"""Kind -> a record that has this problem and no other."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(noise(30, 20))
    (tmp_path / "copy.png").write_bytes(noise(30, 20))
    (tmp_path / "grey.png").write_bytes(noise(30, 20, seed=1, mode="L"))
    (tmp_path / "broken.png").write_text("no picture")
    return tmp_path


@pytest.fixture
def write(images: Path) -> Callable[..., Path]:
    def write(*entries: Any, name: str = "data.json") -> Path:
        path = images / name
        path.write_text(json.dumps(entries))
        return path

    return write


@pytest.fixture
def encoder(tokenizer, image_token_id) -> Encoder:
    return Encoder(TEMPLATES["v1"], tokenizer, image_token_id, SQUARE, LIMIT + len(TEMPLATES["v1"].system))


@pytest.fixture
def check(encoder: Encoder) -> Callable[..., Findings]:
    def check(path: Path, workers: int = 0, listed: int = 1000, **options: Any) -> Findings:
        checks = RecordChecks(encoder.template, **{"encoder": encoder, **options})
        return examine(read_data(path), checks, workers, listed)

    return check


@pytest.mark.parametrize("kind", BAD)
def test_every_kind_of_problem(write, check, kind):
    path = write(GOOD, BAD[kind])
    found = check(path)
    assert {k: found.count(k) for k in PROBLEM_KINDS if found.count(k)} == {kind: 1}
    (problem,) = found.problems[kind]
    assert problem.index == 1 and problem.origin == f"{path}[1]" and problem.kind == kind and problem.reason
    assert found.clean.tolist() == ([0, 1] if kind in TAKEN else [0])
    with_file = {"missing_image": "none.png", "corrupt_image": "broken.png", "duplicate_image": "copy.png"}
    with_file["non_rgb_image"] = "grey.png"
    assert problem.file == (str(path.parent / with_file[kind]) if kind in with_file else None)


def test_every_kind_is_tested_here_or_below():
    assert set(PROBLEM_KINDS) - set(BAD) == {"template", "over_budget", "no_last_answer"}


def test_a_conversation_the_template_cannot_write(write, check):
    found = check(write(GOOD, {"id": "t", "conversations": talk("What?", "a cat")}), encoder=None)
    assert found.clean.tolist() == [0, 1]
    plain = examine(found.records, RecordChecks(TEMPLATES["plain"]))
    assert plain.count("template") == 1 and plain.clean.tolist() == [0]


def test_evaluation_needs_the_answer_to_the_last_question(write, check):
    path = write(GOOD, {"id": "q", "conversations": talk("What?", "a cat", "And now?")})
    assert check(path).clean.tolist() == [0, 1]
    found = check(path, scored=True)
    assert found.clean.tolist() == [0] and found.count("no_last_answer") == 1


def test_a_record_larger_than_a_micro_batch(write, check):
    path = write(GOOD, {**GOOD, "id": "b", "conversations": talk("<image>What?", "a cats")})
    short = int(check(path).lengths[0, 1])
    found = check(path, budget=short)
    assert found.clean.tolist() == [0] and f"micro-batch holds {short}" in found.problems["over_budget"][0].reason


@pytest.mark.parametrize(
    ("reason", "given", "kind"),
    [
        ("its tokens do not spell it", None, "not_tokenised"),
        ("its tokens do not spell 'nothing to learn'", None, "not_tokenised"),
        ("no token is supervised", "no_supervised_token", "no_supervised_token"),
    ],
)
def test_what_the_encoder_refuses_is_of_the_kind_it_says(write, check, monkeypatch, reason, given, kind):
    def lengths(self, records, sizes):
        return [RecordError(record.origin, record.id, reason, given) for record in records]

    monkeypatch.setattr(Encoder, "lengths", lengths)
    found = check(write(GOOD))
    assert [problem.reason for problem in found.problems[kind]] == [reason] and not len(found.clean)


@pytest.mark.parametrize(
    "turns",
    [
        "text",
        [{"value": "What?"}],
        [{"from": ["human"], "value": "What?"}],
        [{"from": "human", "value": 7}],
        ["What?"],
        None,
    ],
)
def test_turns_of_the_wrong_form(write, check, turns):
    found = check(write(GOOD, {"id": "f", "conversations": turns}))
    assert found.count("format") == 1 and found.problems["format"][0].id == "f"


def test_without_tokens_the_structure_is_checked(write, check):
    found = check(write(GOOD, *BAD.values()), encoder=None)
    by_tokens = {"image_token", "control_token", "too_long", "shortened"}
    assert {kind for kind in PROBLEM_KINDS if found.count(kind)} == set(BAD) - by_tokens
    assert (found.lengths == doctor_checks.UNKNOWN).all()


def test_headers_do_not_show_a_file_cut_short_but_decoding_does(write, check, images):
    whole = noise(60, 60)
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    path = write(GOOD, {"id": "c", "image": "cut.png", "conversations": talk("<image>What?", "a cat")})
    assert check(path).clean.tolist() == [0, 1]
    found = check(path, decode=True)
    assert found.clean.tolist() == [0] and found.problems["corrupt_image"][0].file == str(images / "cut.png")


@pytest.mark.parametrize("truncation", ["turns", "tokens"])
def test_the_doctor_and_training_agree_on_every_record(write, check, encoder, truncation):
    """On which can be used, what is wrong with the others, and how long the first ones get."""
    path = write(GOOD, *BAD.values(), {**GOOD, "id": "last"})
    encoder = replace(encoder, truncation=truncation)
    found = check(path, encoder=encoder, truncation=truncation)
    taken = ConversationDataset(read_data(path), encoder, CLIPImageProcessorPil()).survey
    refused = {
        problem.index: (kind, problem.reason)
        for kind in found.checks.refused()
        for problem in found.problems.get(kind, ())
    }
    assert {index: (error.kind, error.reason) for index, error in taken.problems.items()} == refused
    assert len(refused) == {"turns": 12, "tokens": 10}[truncation]
    assert found.clean.tolist() == np.setdiff1d(np.arange(len(BAD) + 2), list(refused)).tolist()
    assert found.lengths[found.clean, 1].tolist() == taken.lengths[found.clean].tolist()
    long = found.problems["shortened"][0].index
    assert found.lengths[long, 0] > encoder.max_length >= found.lengths[long, 1] > 0


def test_cutting_to_the_token_refuses_no_record(write, check, encoder):
    cutting = replace(encoder, truncation="tokens")
    found = check(write(GOOD, *BAD.values()), encoder=cutting, truncation="tokens")
    assert found.count("too_long") == 0 and found.count("shortened") == 2
    assert found.count("no_supervised_token") == 2  # one has no answer, of the other it lies behind the cut
    assert {"l", "s"} == {problem.id for problem in found.problems["no_supervised_token"]}
    refused = {"format", "empty_conversation", "image_markers", "role_order", "missing_image", "corrupt_image"}
    assert len(found.clean) == 1 + len(BAD) - len(refused | {"image_token", "not_tokenised", "media", "control_token"})


@pytest.mark.process
def test_workers_and_blocks_change_nothing(write, check, monkeypatch):
    path = write(*[{**GOOD, "id": f"g{i}"} for i in range(5)], *BAD.values(), GOOD)
    alone = describe(check(path), "data", LIMIT)
    monkeypatch.setattr(survey, "RECORDS_AT_A_TIME", 3)
    for workers in (1, 2):
        assert describe(check(path, workers), "data", LIMIT) == alone


def test_lists_are_capped_and_counts_are_not(write, check):
    missing = [{**BAD["missing_image"], "id": str(i)} for i in range(9)]  # type: ignore[dict-item]
    found = check(write(*missing, GOOD, *[{**GOOD, "image": "copy.png"}] * 4), listed=2)
    assert found.count("missing_image") == 9 and len(found.problems["missing_image"]) == 2
    assert found.count("duplicate_id") == 4 and len(found.problems["duplicate_id"]) == 2


def test_duplicates_are_compared_in_full_only_where_samples_agree(tmp_path, monkeypatch):
    size = 5 * SAMPLE
    first, tail = bytes(size), bytes(size - 1) + b"x"
    hidden = bytearray(first)
    hidden[10] = 1  # neither in the middle nor at the end
    contents = [first, tail, bytes(hidden), first, bytes(size + 1)]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.png").write_bytes(content)
    entries = [{"id": i, "image": f"{i}.png", "conversations": talk("<image>", "a")} for i in range(5)]
    (tmp_path / "d.json").write_text(json.dumps(entries))
    read: list[tuple[str, bool]] = []
    digest = doctor_images._digest
    monkeypatch.setattr(
        doctor_images, "_digest", lambda source, whole: read.append((source.name, whole)) or digest(source, whole)
    )
    places = np.array([(i, 0) for i in range(5)])
    groups = same_content(read_data(tmp_path / "d.json"), places, np.array([len(c) for c in contents]))
    assert groups == [[0, 3]]
    assert sorted(name for name, whole in read if not whole) == ["0.png", "1.png", "2.png", "3.png"]
    assert sorted(name for name, whole in read if whole) == ["0.png", "2.png", "3.png"]


def test_look_gives_the_upright_size(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGBA", (30, 20)).convert("RGB").save(tmp_path / "t.jpg", exif=turned)
    seen = look(tmp_path / "t.jpg")
    assert seen.size == (20, 30) and seen.mode == "RGB" and seen.bytes == (tmp_path / "t.jpg").stat().st_size


@pytest.mark.parametrize("name", ["half\0name.png", "x" * 300, "a.png/b.png", "a_directory"])
def test_names_that_no_picture_can_have(images, name):
    (images / "a_directory").mkdir()
    seen = look(images / name)
    assert (seen.kind, seen.size, seen.bytes) == ("corrupt_image", None, -1)
    assert re.match(re.escape(f"{clip(images / name)}: ") + says("read", "image"), seen.problem)


def test_a_picture_shown_twice_is_no_duplicate(write, check):
    found = check(write(GOOD, {**GOOD, "id": "again"}))
    assert found.duplicates == 0 and found.pictures.shown.tolist() == [2]


def test_unknown_keys_are_counted(write, check):
    turns = [{**turn, "note": 1} for turn in talk("<image>What?", "a cat")]
    odd = {**GOOD, "id": "odd", "model": "x", "conversations": turns}
    found = check(write(GOOD, odd, {**odd, "id": "more"}))
    assert found.unknown_keys == {"model": 2, "conversations[].note": 2} and found.clean.tolist() == [0, 1, 2]


def test_report(write, check, encoder):
    report = describe(check(write(GOOD, *BAD.values())), "d.json", encoder.max_length)
    assert json.loads(json.dumps(report)) == report
    assert report["records"] == 1 + len(BAD) and report["usable"] == 1 + len(BAD) - sum(k not in TAKEN for k in BAD)
    assert list(report["problems"]) == [kind for kind in PROBLEM_KINDS if kind in BAD]
    assert set(report["problems"]["too_long"]["listed"][0]) == {"index", "origin", "id", "reason", "file"}
    images = report["images"]
    assert images["distinct"] == 5 and images["readable"] == 3 and images["modes"] == {"RGB": 2, "L": 1}
    assert images["duplicate_files"] == 1 and images["width"]["max"] == 30
    tokens = report["tokens"]
    assert tokens["longer_than_max_length"] == 2 and tokens["counted_records"] == 6  # all but the other refused ones
    assert tokens["after_truncation"]["max"] <= encoder.max_length < tokens["before_truncation"]["max"]


def test_a_broken_line_is_one_problem(write, check):
    path = write(GOOD).with_name("lines.jsonl")
    path.write_text("\n".join([json.dumps(GOOD), "{broken", json.dumps({**GOOD, "id": "last"})]))
    found = check(path)
    (problem,) = found.problems["format"]
    assert found.clean.tolist() == [0, 2] and problem.reason.startswith("not valid JSON")
    assert (problem.index, problem.origin) == (1, f"{path}:2")


def test_a_mixture_counts_repeats_and_keeps_templates(write, check, images):
    write(GOOD, BAD["missing_image"], name="one.json")
    write({"id": "p", "image": "a.png", "conversations": talk("<image>What?", "a cat")}, name="two.json")
    mixture = images / "mix.yaml"
    mixture.write_text("parts: [{path: one.json, repeat: 2}, {path: two.json, template: plain}]")
    found = check(mixture)
    assert len(found.which) == 5 and len(found.records) == 3
    assert found.clean.tolist() == [0, 2, 4] and found.count("missing_image") == 1
    assert found.problems["missing_image"][0].index == 1
    assert found.lengths[2, 0] < found.lengths[0, 0] - 100  # plain has no system prompt
    report = describe(found, "mix", LIMIT)
    assert (report["records"], report["distinct_records"], report["usable"]) == (5, 3, 3)
    assert [part["distinct_records"] for part in report["parts"]] == [2, 1]


@pytest.mark.process
def test_pictures_inside_containers(tmp_path, check, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    files = [noise(30, 20), noise(40, 20, seed=1), noise(30, 20), b"no picture"]
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for i, content in enumerate(files):
            text = json.dumps({"conversations": talk("<image>What?", "a cat")}).encode()
            for name, data in ((f"r{i}.json", text), (f"r{i}.png", content)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    cells = [{"bytes": content, "path": None} for content in files]
    rows = {"id": [f"r{i}" for i in range(4)], "conversations": [talk("<image>What?", "a cat")] * 4, "image": cells}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    table.to_parquet(tmp_path / "table.parquet")
    for name in ("shard.tar", "table.parquet"):
        found = check(tmp_path / name)
        assert found.clean.tolist() == [0, 1, 2] and found.problems["corrupt_image"][0].id == "r3"
        assert found.problems["duplicate_image"][0].id == "r2" and found.duplicates == 1
        assert found.pictures.sizes.tolist()[:3] == [[30, 20], [40, 20], [30, 20]]
        assert describe(check(tmp_path / name, workers=2), name, LIMIT) == describe(found, name, LIMIT)


def test_index_round_trip_and_what_it_refuses(write, check, images):
    path = write(GOOD, BAD["missing_image"], {**GOOD, "id": "last"})
    records = read_data(path)
    CleanIndex.of(str(path), records, check(path).clean).write(images / "out" / "index.json")
    index = CleanIndex.read(images / "out" / "index.json")
    assert [record.id for record in index.choose(records, "index.json")] == ["good", "last"]
    assert data_digest(read_data(path, images / "out")) == index.digest  # another image folder, the same data

    path.write_text(path.read_text().replace("a cat", "a car"))
    with pytest.raises(ValueError, match=says("index.json", "other data", "3 records")):
        index.choose(read_data(path), "index.json")
    empty = CleanIndex(index.data, data_digest(read_data(path)), 3, np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match=says("none", "3 records")):
        empty.choose(read_data(path), "index.json")


def test_an_index_goes_with_its_data(write, check, images, tmp_path):
    path = write(GOOD)
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "data.json").write_bytes(path.read_bytes())
    assert data_digest(read_data(other / "data.json")) == data_digest(read_data(path))


@pytest.mark.parametrize("content", ["[]", "no", '{"data": "d", "digest": "x", "records": 2, "indices": [1, 0]}',
                                     '{"data": "d", "digest": "x", "records": 2, "indices": [0, 2]}'])  # fmt: skip
def test_a_file_that_is_no_index(tmp_path, content):
    (tmp_path / "i.json").write_text(content)
    with pytest.raises(ValueError, match=r"i\.json: .*(clean index|grow)"):
        CleanIndex.read(tmp_path / "i.json")
    with pytest.raises(FileNotFoundError, match=says("no.json", "index")):
        CleanIndex.read(tmp_path / "no.json")
