"""Answers on disk: found again, cut lines asked again, nothing overwritten."""

from __future__ import annotations

import json
import re

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.answering import Answer
from llava_pdrop.eval.kept import ANSWERS, Kept, model_facts, questions_digest
from llava_pdrop.eval.questions import ask

QUESTIONS = [ask(str(i), f"Which {i}?", [], f"q[{i}]", "x", question_id=i) for i in range(4)]
ANSWERS_OF = [Answer(str(i), f"answer {i} \udc80 训", (4, 2), 0.5) for i in range(3)]


def test_what_is_kept_is_read_again(tmp_path):
    kept = Kept(tmp_path, "vanilla", {"a": 1})
    assert kept.read() == {}
    kept.writer(0, QUESTIONS)(ANSWERS_OF[:2])
    kept.writer(1, QUESTIONS)([Answer("3", "", problem="no picture")])
    found = kept.read()
    assert list(found) == ["0", "1"], "what could not be asked is asked again"
    assert found["0"] == ANSWERS_OF[0] and found["0"].image_tokens == (4, 2)
    kept.finish(QUESTIONS, [*ANSWERS_OF, Answer("3", "")], "run")
    assert [entry.name for entry in sorted(kept.directory.iterdir())] == [ANSWERS, "facts.json"]
    rows = [json.loads(line) for line in (kept.directory / ANSWERS).read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [0, 1, 2, 3]
    assert rows[1].keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert list(kept.read()) == ["0", "1", "2", "3"]


def test_a_line_that_a_kill_has_cut_is_asked_again(tmp_path):
    kept = Kept(tmp_path, "vanilla", {})
    kept.writer(0, QUESTIONS)(ANSWERS_OF[:2])
    (file,) = kept.directory.glob("*.part.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    assert list(kept.read()) == ["0"]
    kept.writer(0, QUESTIONS)(ANSWERS_OF[1:])
    assert list(kept.read()) == ["0", "1", "2"]


def test_a_whole_line_that_is_none_of_ours_is_said(tmp_path):
    kept = Kept(tmp_path, "vanilla", {})
    kept.directory.mkdir(parents=True)
    (kept.directory / ANSWERS).write_text('{"question_id": 1, "text": "yes"}\n')
    with pytest.raises(UserError, match=re.escape(f"{kept.directory / ANSWERS}:1")):
        kept.read()
    kept.finish(QUESTIONS[:1], ANSWERS_OF[:1], "run")
    whole = json.loads((kept.directory / ANSWERS).read_text())
    for changed in (
        {"text": None},
        *({"metadata": whole["metadata"] | own} for own in ({"id": 0}, {"seconds": "1"}, {"image_tokens": ["4"]})),
    ):
        (kept.directory / ANSWERS).write_text(json.dumps(whole | changed) + "\n")
        with pytest.raises(UserError, match=re.escape(f"{kept.directory / ANSWERS}:1")):
            kept.read()


def test_other_facts_are_another_directory(tmp_path):
    one, other = (Kept(tmp_path, "vanilla", {"schedule": layers}).directory for layers in ([1], [2]))
    assert one != other and one.name.startswith("vanilla-")
    assert Kept(tmp_path, "vanilla", {"schedule": [1]}).directory == one


def test_the_digest_knows_words_pictures_and_order(tmp_path):
    first = questions_digest(QUESTIONS)
    assert first == questions_digest(list(QUESTIONS)) != questions_digest(QUESTIONS[::-1])
    assert first != questions_digest([ask("0", "Other?", [], "q", "x"), *QUESTIONS[1:]])
    assert first != questions_digest([ask("0", "Which 0?", [tmp_path / "a.png"], "q", "x"), *QUESTIONS[1:]])


def test_new_weights_are_another_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = model_facts(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert model_facts(tmp_path) != first


@pytest.mark.parametrize(
    "name",
    ["generation_config.json", "config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"],
)
def test_a_file_that_changes_answers_is_another_model(tmp_path, name):
    (tmp_path / name).write_text("{}")
    first = model_facts(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("says nothing about answers")
    assert model_facts(tmp_path) == first
    (tmp_path / name).write_text("{ }")
    assert model_facts(tmp_path) != first


def test_another_base_under_adapters_is_another_model(tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    run.mkdir()
    (base / "config.json").write_text("{}")
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    first = model_facts(run)
    (base / "model.safetensors").write_bytes(b"1")
    assert model_facts(run) != first
