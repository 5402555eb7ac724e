"""The pass over a data set that training and the doctor share: what it hands on of each block."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llava_pdrop.data import survey
from llava_pdrop.data.mixture import read_data
from llava_pdrop.data.survey import Block, Blocks, ImageSizes, tried
from llava_pdrop.errors import RecordError, Unfit, UserError
from llava_pdrop.types import Record


def as_seen(block: Block) -> Block:
    return block


@pytest.fixture
def records(tmp_path: Path):
    """Four, two of which show one picture; the second is no record and has a key that nobody reads."""
    talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "no"}]
    entries = [{"id": str(i), "image": f"{i % 2}.png", "conversations": talk} for i in range(4)]
    entries[1] = {"id": "1", "note": "x", "conversations": []}
    (tmp_path / "d.json").write_text(json.dumps(entries))
    return read_data(tmp_path / "d.json")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.process)])
def test_every_record_is_handed_on_or_why_it_is_none(records, monkeypatch, workers):
    monkeypatch.setattr(survey, "RECORDS_AT_A_TIME", 3)
    first, second = Blocks(records, len_of_name, as_seen).spread(workers)
    assert (first.numbers, second.numbers) == ([0, 1, 2], [3])
    assert [type(record) for record in first.records] == [Record, RecordError, Record]
    assert first.records[1].kind == "empty_conversation" and first.unread == [[], ["note"], []]
    assert first.seen == [[5], [], [5]] and second.seen == [[5]]


def len_of_name(image: Path) -> int:
    return len(image.name)


def test_a_picture_is_looked_at_once_a_block_and_not_at_all_where_its_size_is_known(records):
    looked: list[str] = []

    def look(image: Path) -> tuple[int, int]:
        looked.append(image.name)
        return 1, 1

    (block,) = Blocks(records, look, as_seen).spread(0)
    assert sorted(looked) == ["0.png", "1.png"]
    looked.clear()
    known = ImageSizes(np.array([1, 1, 2, 2]), np.array([[30, 20], [40, 20]]))  # of the last one nothing is known
    (block,) = Blocks(records, look, as_seen, known=known).spread(0)
    assert block.seen == [[(30, 20)], [], [(40, 20)], [(1, 1)]] and looked == ["1.png"]
    (block,) = Blocks(records, look, as_seen, np.array([2, 3])).spread(0)
    assert block.numbers == [2, 3]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("gone"), "missing_image"),
        (UserError("no picture"), "corrupt_image"),
        (PermissionError("locked"), "corrupt_image"),
    ],
)
def test_a_picture_that_cannot_be_looked_at_says_of_what_kind(error, kind):
    def look(image: Path) -> None:
        raise error

    unfit = tried(look, Path("a.png"))
    assert isinstance(unfit, Unfit) and (unfit.kind, str(unfit)) == (kind, str(error))
