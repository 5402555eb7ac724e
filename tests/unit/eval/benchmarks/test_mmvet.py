"""MM-Vet: asked, and written for its judge."""

from __future__ import annotations

import json

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.mmvet import MMVET
from llava_pdrop.eval.rules.grades import known
from tests.messages import says
from tests.unit.eval.benchmarks.made import write_lines


def test_what_the_judge_takes(tmp_path) -> None:
    rows = [{"question_id": id, "image": f"v1_{id}.png", "text": "What is\nx?"} for id in (0, 1)]
    write_lines(tmp_path / "llava-mm-vet.jsonl", rows)
    questions = MMVET.read(tmp_path, True)
    assert questions[0].text == "What is\nx?" and not known(questions)
    assert questions[1].record.images == (tmp_path / "images" / "v1_1.png",)
    file = MMVET.upload(questions, ["x = -1", ""], tmp_path, "own")
    assert file == tmp_path / "results" / "own.json"
    assert json.loads(file.read_text(encoding="utf-8")) == {"v1_0": "x = -1", "v1_1": ""}
    write_lines(tmp_path / "llava-mm-vet.jsonl", rows[:1] * 2)
    with pytest.raises(UserError, match=says("llava-mm-vet.jsonl", "question_id 0", "2 times")):
        MMVET.read(tmp_path, True)
