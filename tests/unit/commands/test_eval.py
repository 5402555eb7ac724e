"""``llava-pdrop eval RUN benchmarks=...``: the embedded model on small sets in the official layouts, end to end."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_pdrop.__main__ import main
from llava_pdrop.config.load import RUN_FILE, load_config
from llava_pdrop.eval import answering
from llava_pdrop.train.run import train
from tests.faults.processes import run_ranks
from tests.messages import says

REPOSITORY = Path(__file__).parents[3]
PREPARE = REPOSITORY / "data" / "prepare"
QUESTIONS = {"pope": 6, "textvqa": 1, "mmbench": 4}  # of a page
NAMES, PAGES = tuple(QUESTIONS), 4
SCHEDULE = "pyramid_drop={layers: [1, 2, 3], ratios: [0.5, 0.25, 0.125]}"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """POPE, TextVQA and MMBench in small, of the embedded pages."""
    home = tmp_path_factory.mktemp("sets")
    counts = ["--pretrain", "0", "--train", "4", "--eval", str(PAGES), "--turns", "1"]
    for script, words in (
        ("forms.py", ["--out", str(home / "forms"), *counts]),
        ("benchmarks.py", ["--forms", str(home / "forms"), "--out", str(home / "eval"), "--pages", str(PAGES)]),
    ):
        subprocess.run([sys.executable, PREPARE / script, *words], check=True)
    return home


@pytest.fixture(scope="module")
def finished(sets, tmp_path_factory) -> Path:
    """The embedded model after one step."""
    output = tmp_path_factory.mktemp("run") / "run"
    forms = sets / "forms"
    words = [f"output_dir={output}", "data.prepare=null", f"data.train={forms}/train.json", f"data.image_root={forms}"]
    words += [f"data.eval={forms}/eval.json", "train.max_steps=1", "data.samples_per_batch=1", "eval.batch_size=3"]
    return train(load_config(REPOSITORY / "configs/tiny/base.yaml", [*words, SCHEDULE]))


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def scores(run: Path) -> dict[tuple[str, str], dict]:
    rows = json.loads((run / "benchmarks" / "scores.json").read_text())
    return {(row["benchmark"], row["column"]): row for row in rows}


def answers(run: Path, name: str) -> dict[str, list[dict]]:
    """Directory of the answers -> its lines, the time of each aside."""
    found = {}
    for file in (run / "benchmarks" / name).glob("*/answers.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            del line["metadata"]["seconds"]
        found[file.parent.name] = lines
    return found


def test_from_files_to_a_table(run, sets, capsys):
    words = [f"eval.root={sets / 'eval'}", "training_free=vanilla"]
    assert main(["eval", str(run), f"benchmarks={','.join(NAMES)}", *words]) == 0
    said = capsys.readouterr().out
    for name in NAMES:
        assert re.search(says(f"{name}: asks", "<image>", "rule"), said)
    found = scores(run)
    assert list(found) == [(name, column) for name in NAMES for column in ("pyramid_drop", "vanilla")]
    for (name, column), row in found.items():
        assert row["questions"] == QUESTIONS[name] * PAGES, "a rotation is a question of its own"
        assert row["image_tokens"] == ([256, 128, 64, 32] if column == "pyramid_drop" else [256])
        assert row["interval"][0] <= row["score"] <= row["interval"][1] and row["unread"] == 0
        assert (row["against"] is None) == (column == "pyramid_drop")
    table = (run / "benchmarks" / "scores.md").read_text()
    assert "| POPE | pyramid_drop |" in table and "eval_pope.py" in table
    assert all(len(answers(run, name)) == 2 for name in NAMES)


def test_goes_on_where_it_was_stopped_and_overwrites_nothing(run, sets, monkeypatch):
    words = ["benchmarks=mmbench", f"eval.root={sets / 'eval'}"]
    assert main(["eval", str(run), *words]) == 0
    whole = answers(run, "mmbench")
    (kept,) = (run / "benchmarks/mmbench").iterdir()
    lines = (kept / "answers.jsonl").read_text().splitlines(keepends=True)
    (kept / "answers.jsonl").unlink()
    (kept / "answers-00000.part.jsonl").write_text("".join(lines[3:9]) + lines[9][:40])
    asked, original = [], answering._batch
    monkeypatch.setattr(answering, "_batch", lambda r, batch, *rest: asked.extend(batch) or original(r, batch, *rest))
    assert main(["eval", str(run), *words]) == 0
    assert len(asked) == 4 * PAGES - 6 and answers(run, "mmbench") == whole
    asked.clear()
    assert main(["eval", str(run), *words, "pyramid_drop=null"]) == 0
    assert len(asked) == 4 * PAGES, "another schedule is another set of answers"
    assert len(answers(run, "mmbench")) == 2 and answers(run, "mmbench")[kept.name] == whole[kept.name]


def test_processes_share_the_questions(finished, sets, tmp_path):
    """Whatever their number, the answers are those of one."""
    for ranks, name in ((1, "one"), (2, "two")):
        shutil.copytree(finished, tmp_path / name)
        words = ["benchmarks=mmbench", f"eval.root={sets / 'eval'}"]
        ended = run_ranks(tmp_path / name / RUN_FILE, *words, ranks=ranks, command="eval")
        assert ended.codes == [0] * ranks, ended.texts
    one, two = ([*answers(tmp_path / name, "mmbench").values()] for name in ("one", "two"))
    for line in one[0] + two[0]:
        del line["model_id"]
    assert one == two and len(one[0]) == 4 * PAGES


def test_pictures_that_cannot_be_read_count_and_cost_the_exit_status(run, sets, tmp_path, capsys):
    shutil.copytree(sets / "eval", tmp_path / "eval")
    broken = sorted((tmp_path / "eval/pope/val2014").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:100])
    words = ["benchmarks=pope", f"eval.root={tmp_path / 'eval'}"]
    with pytest.raises(SystemExit) as exit:
        main(["eval", str(run), *words])
    assert exit.value.code == 1
    said = capsys.readouterr().out
    assert re.search(says("6 not read", broken.name), said) and "eval.max_unread=" in said
    row = scores(run)["pope", "pyramid_drop"]
    assert (row["questions"], row["unread"]) == (6 * PAGES, 6)
    assert main(["eval", str(run), *words, "eval.max_unread=0.5"]) == 0
    shutil.copyfile(sets / "eval/pope/val2014" / broken.name, broken)
    assert main(["eval", str(run), *words]) == 0
    assert scores(run)["pope", "pyramid_drop"]["unread"] == 0, "a picture that was mended is shown"


def test_what_is_not_there_is_one_line_before_anything_is_loaded(run, tmp_path, capsys):
    assert main(["eval", str(run), "benchmarks=pope", f"eval.root={tmp_path}"]) == 2
    assert re.search(says("pope", "llava_pope_test.jsonl", "llava-pdrop benchmarks"), capsys.readouterr().err)
    assert main(["eval", str(run), "benchmarks=mmee"]) == 2
    assert re.search(says("eval.benchmarks", "'mmee'"), capsys.readouterr().err)


def test_the_papers_number_stands_beside_the_runs_own_schedule_only(run, sets):
    """Not beside a training-free one, nor where the schedule of the run was changed."""
    file = run / RUN_FILE
    file.write_text(file.read_text().replace("paper: null", "paper: {table: Table 1, scores: {POPE: 86.0}}"))
    words = ["benchmarks=paper", f"eval.root={sets / 'eval'}", "training_free=vanilla"]
    assert main(["eval", str(run), *words]) == 0
    found = {key: row["paper"] for key, row in scores(run).items()}
    assert found == {("pope", "pyramid_drop"): 86.0, ("pope", "vanilla"): None}
    changed = ["benchmarks=pope", words[1], "pyramid_drop.ratios=[0.5, 0.5, 0.5]"]
    assert main(["eval", str(run), *changed]) == 0
    assert scores(run)["pope", "pyramid_drop"]["paper"] is None


def test_words_that_would_do_nothing_are_one_line(run, capsys):
    for words, told in (
        (["benchmarks="], "benchmarks=one,two"),
        (["benchmarks=pope,,mme"], "benchmarks=pope,,mme"),
        (["training_free=vanilla"], "eval.training_free"),
    ):
        assert main(["eval", str(run), *words]) == 2
        assert re.search(says(told), capsys.readouterr().err)


def test_answers_of_a_model_whose_ends_were_changed_are_not_its_own(run, sets):
    words = ["benchmarks=pope", f"eval.root={sets / 'eval'}"]
    assert main(["eval", str(run), *words]) == 0
    file = run / "generation_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"eos_token_id": [2, 5, 6]}))
    assert main(["eval", str(run), *words]) == 0
    assert len(answers(run, "pope")) == 2


def test_half_a_character_costs_no_answers(run, sets, tmp_path, capsys):
    records = json.loads((sets / "forms" / "eval.json").read_text())
    records[0]["id"] = "\ud800"
    (tmp_path / "eval.json").write_text(json.dumps(records))
    assert main(["eval", str(run), f"data.eval={tmp_path / 'eval.json'}"]) == 0
    assert json.loads((run / "predictions.jsonl").read_text().splitlines()[0])["id"] == "\ud800"
    records[1]["conversations"][0]["value"] += "\ud800"
    (tmp_path / "eval.json").write_text(json.dumps(records))
    assert main(["eval", str(run), f"data.eval={tmp_path / 'eval.json'}"]) == 2
    assert re.search(says("question", str(records[1]["id"]), "surrogate"), capsys.readouterr().err)


def test_a_second_data_set_does_not_overwrite_the_first(run, sets, capsys):
    assert main(["eval", str(run)]) == 0
    first = (run / "predictions.jsonl").read_text()
    assert main(["eval", str(run)]) == 0
    assert not list(run.glob("predictions-*")), "the same again is the same"
    assert main(["eval", str(run), "pyramid_drop=null"]) == 0
    (aside,) = run.glob("predictions-*.jsonl")
    assert aside.read_text() == first and len(list(run.glob("evaluation-*.json"))) == 1
    other = sets / "forms" / "other.json"
    shutil.copyfile(sets / "forms" / "eval.json", other)
    assert main(["eval", str(run), f"data.eval={other}"]) == 0
    assert len(list(run.glob("predictions-*.jsonl"))) == 2


def test_own_questions_beside_a_benchmark(run, sets, capsys):
    """Both are asked for, so both are answered."""
    words = [f"data.eval={sets / 'forms/eval.json'}", "benchmarks=pope", f"eval.root={sets / 'eval'}"]
    assert main(["eval", str(run), *words]) == 0
    assert (run / "evaluation.json").is_file() and (run / "benchmarks/scores.md").is_file()
