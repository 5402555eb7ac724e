"""``llava-pdrop benchmarks``: what is wanted and there, by which rules, and what answers of any tool are worth."""

from __future__ import annotations

import json
import re

import pytest

from llava_pdrop.__main__ import main
from llava_pdrop.commands.benchmarks import files
from llava_pdrop.eval.benchmarks import BENCHMARKS
from tests.benchmark_sets import write_pope
from tests.messages import says


@pytest.fixture
def root(tmp_path):
    return write_pope(tmp_path / "sets", [], questions=12)


@pytest.fixture
def answered(tmp_path):
    """Writes LLaVA's answer file: question -> answer."""

    def write(answers):
        file = tmp_path / "answers.jsonl"
        file.write_text("".join(json.dumps({"question_id": i, "text": text}) + "\n" for i, text in answers))
        return str(file)

    return write


def test_the_files_of_benchmarks_are_listed(root, capsys):
    assert main(["benchmarks", "pope", "--root", str(root)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["pope", "pope/llava_pope_test.jsonl", "yes"] in [row[:3] for row in rows]
    assert main(["benchmarks", "--root", str(root)]) == 0
    assert "scienceqa" in capsys.readouterr().out
    assert main(["benchmarks", "--rules"]) == 0
    assert "eval_pope.py" in capsys.readouterr().out
    assert main(["benchmarks", "popo"]) == 2
    assert re.search(says("'popo'", "did you mean 'pope'"), capsys.readouterr().err)


def test_answers_of_any_tool_are_scored(root, answered, capsys):
    """The first half is to be answered with yes."""
    file = answered([(i, "Yes" if i < 6 else "no, it is not") for i in range(12)])
    assert main(["benchmarks", "pope", "--root", str(root), "--score", file]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["not", "answered", "0"] in lines
    (headline,) = [line for line in printed.splitlines() if "mean_of_three/f1" in line]
    assert re.search(r" 1 +100\.0 \[\d+\.\d, 100\.0\]", headline)
    assert any(line[:2] == ["pooled/accuracy", "lmms_eval"] for line in lines)


@pytest.mark.parametrize(
    ("answers", "parts"),
    [
        ([(i, "yes") for i in range(6)], ("6 of 12", "half")),
        ([(i % 11, "yes") for i in range(12)], ("question_id 0", "2 times")),
        ([(i + 1, "yes") for i in range(12)], ("question_id 12", "no question")),
        ([(0, None)], ("question_id 0", "not text")),
    ],
)
def test_wrong_answers_are_one_line_and_nothing_is_scored(root, answered, answers, parts, capsys):
    assert main(["benchmarks", "pope", "--root", str(root), "--score", answered(answers)]) == 2
    said = capsys.readouterr()
    assert re.search(says("answers.jsonl", *parts), said.err) and "f1" not in said.out


def test_one_benchmark_is_scored_at_a_time(root, capsys):
    assert main(["benchmarks", "pope", "mme", "--root", str(root), "--score", "x"]) == 2
    assert re.search(says("--score x", "one benchmark"), capsys.readouterr().err)


def listed(capsys, *words: str) -> str:
    assert main(["benchmarks", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["pope", "POPE", "Pope"])
def test_names_are_those_that_eval_takes(capsys, name) -> None:
    shown = listed(capsys, name)
    assert "pope/llava_pope_test.jsonl" in shown and "gqa" not in shown


def test_several_names(capsys) -> None:
    shown = {line.split(" ")[0] for line in listed(capsys, "sqa-i,gqa", "MMBench-CN", "--rules").splitlines()}
    assert [row.name for row in BENCHMARKS.values() if row.name in shown] == ["mmbench_cn", "scienceqa", "gqa"]


def test_paper_stands_for_the_papers_tables(capsys) -> None:
    shown = {line.split(" ")[0] for line in listed(capsys, "paper", "--rules").splitlines()}
    assert {"mme", "pope", "docvqa"} <= shown and shown & set(BENCHMARKS) < set(BENCHMARKS)


def test_an_unknown_name(capsys) -> None:
    assert main(["benchmarks", "pope,mmbnch"]) == 2
    assert re.search(says("'mmbnch'", "did you mean 'mmbench'"), capsys.readouterr().err)


def test_no_name_of_a_file_is_cut(capsys) -> None:
    shown = listed(capsys)
    assert "…" not in shown
    for row in BENCHMARKS.values():
        for wanted in row.wanted:
            assert wanted.path[:20] in shown


def test_a_table_is_seen_wherever_it_is_read(tmp_path) -> None:
    row = BENCHMARKS["mmbench_cn"]
    for place in ("mmbench_cn", "mmbench", "."):
        assert [line[2] for line in files([row], tmp_path)] == ["no", "no"]
        file = tmp_path / place / row.wanted[0].path
        file.parent.mkdir(exist_ok=True)
        file.touch()
        assert [line[2] for line in files([row], tmp_path)] == ["yes", "no"]
        file.unlink()
    (tmp_path / "DocVQA_VAL.tsv").touch()
    assert [line[2] for line in files([BENCHMARKS["docvqa"]], tmp_path)] == ["yes"]
