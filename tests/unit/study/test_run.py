"""A whole study in miniature: on a run of ours and on another family, stopped and started again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from llava_pdrop.__main__ import main
from llava_pdrop.config.load import load_config
from llava_pdrop.eval import answering
from llava_pdrop.study.grid import Grid
from llava_pdrop.train.run import train
from tests.benchmark_sets import write_pope
from tests.faults.processes import run_ranks
from tests.messages import says

GRID = ["--layers", "1", "3", "--shares", "0.5", "0"]
CELLS = len(Grid.of(4, [1, 3], [0.5, 0.0]).cells)


@pytest.fixture(scope="module")
def finished(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of four layers after one step."""
    home = tmp_path_factory.mktemp("finished")
    content = {
        "name": "tiny",
        "output_dir": str(home / "run"),
        "model": {
            "language_model": str(tiny_files / "llm"),
            "vision_tower": str(tiny_files / "tower"),
            "template": "qa",
        },
        "data": {
            "train": str(tiny_files / "data/train.json"),
            "eval": str(tiny_files / "data/eval.json"),
            "image_root": str(tiny_files / "data/images"),
            "max_length": 256,
            "samples_per_batch": 2,
        },
        "train": {"max_steps": 1, "learning_rate": 1e-3, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True},
        "eval": {"batch_size": 4, "max_new_tokens": 2},
    }
    (home / "run.yaml").write_text(json.dumps(content))
    return train(load_config(home / "run.yaml", []))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """Receives the questions of every batch that a model is given."""
    batches: list = []
    original = answering._batch

    def counting(respondent, batch, *rest):
        batches.extend([batch] * bool(batch))  # an empty one was answered before
        return original(respondent, batch, *rest)

    monkeypatch.setattr(answering, "_batch", counting)
    return batches


def numbers(out: Path, name: str = "data_eval") -> dict:
    return json.loads((out / f"{name}.json").read_text())


def test_a_run_is_studied_on_its_own_questions(run: Path, asked: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(run), *GRID, "--average-tokens", "12"]) == 0
    out = run / "study"
    found, text = numbers(out), (out / "data_eval.md").read_text()
    assert (found["questions"], found["image_tokens"], found["decoder_layers"]) == (6, 16, 4)
    assert [(cell["layer"], cell["share"]) for cell in found["grid"]] == [(1, 0.5)] * 2 + [(1, 0)] + [(3, 0.5)] * 2 + [
        (3, 0)
    ]
    assert [row["layer"] for row in found["attention"]] == [0, 1, 2, 3]
    assert all(0 < row["mass"] < 1 and 0 < row["entropy"] <= 1 for row in found["attention"])
    assert [row["layer"] for row in found["by_layer"]] == [1, 3]
    paper, budget = found["schedules"]
    assert paper["schedule"]["layers"] == [1, 2, 3] and paper["average_tokens"] == pytest.approx(16 * 1.875 / 4)
    assert budget["average_tokens"] <= 12 + 1e-6 and budget["loss"]["error"] >= 0
    assert "| layer | keep 50% | keep 0% | gain |" in text and "![" in text
    assert (out / "data_eval.png").stat().st_size > 10_000
    assert "gain" in capsys.readouterr().out
    first = (out / "data_eval-budget-12.yaml").read_text().splitlines()[0]
    assert first.endswith("layers 1, 3, shares 0.5, 0 by last_instruction, 6 questions of eval.json"), first
    config = load_config(run / "llava_pdrop.yaml", [f"pyramid_drop={out}/data_eval-budget-12.yaml"])
    assert list(config.schedule.layers) == budget["schedule"]["layers"]
    batches, before = len(asked), {**found, "environment": None}
    assert main(["study", str(run), *GRID, "--average-tokens", "12"]) == 0
    assert len(asked) == batches, "all answers and the attention are kept"
    assert {**numbers(out), "environment": None} == before
    assert main(["study", str(run), "--layers", "1", "2", "3", "--shares", "0.5", "0", "--average-tokens", "12"]) == 0
    assert 0 < len(asked) - batches <= 4 * 2, "only what is new is asked: three cells, and a schedule"


def test_what_a_study_leaves_out_of_a_schedule_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pyramid_drop.downsample=4", "--layers", "1", "--shares", "0"]
    assert main(["study", str(run), *words]) == 0
    assert re.search(says("pyramid_drop.downsample", "left out"), capsys.readouterr().out)
    assert numbers(run / "study")["image_tokens"] == 16


def test_a_study_goes_on_where_it_was_stopped(run: Path, asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["study", str(run), *GRID]) == 0
    whole, batches = {**numbers(run / "study"), "environment": None}, len(asked)
    shutil.rmtree(run / "study")
    counting = answering._batch

    def until_interrupted(*words):
        if len(asked) == batches + 5:
            raise KeyboardInterrupt
        return counting(*words)

    with monkeypatch.context() as patch:
        patch.setattr(answering, "_batch", until_interrupted)
        assert main(["study", str(run), *GRID]) == 130
    assert not (run / "study/data_eval.json").exists()
    assert main(["study", str(run), *GRID]) == 0
    assert {**numbers(run / "study"), "environment": None} == whole
    assert len(asked) <= 2 * batches + 1, "a batch of random choice may be asked whole again"


def test_another_family_is_studied_on_a_benchmark(vip: Path, tiny_files: Path, tmp_path: Path) -> None:
    """One that is asked by its own processor, and whose directory stays as it was."""
    before = sorted(vip.iterdir())
    root = write_pope(tmp_path / "sets", sorted((tiny_files / "data/images").glob("*.png"))[:2])
    words = ["benchmarks=pope", f"eval.root={root}", "eval.max_new_tokens=2", *GRID, "--out", str(tmp_path / "out")]
    assert main(["study", str(vip), *words, "--ranker", "uniform"]) == 0
    found = numbers(tmp_path / "out", "pope")
    assert len(found["grid"]) == CELLS and found["grid"][0]["ranker"] == "uniform"
    assert found["benchmark"] == "pope" and sorted(vip.iterdir()) == before


def test_processes_share_a_study(run: Path, tmp_path: Path) -> None:
    """Whatever their number, the numbers are those of one."""
    shutil.copytree(run, tmp_path / "two")
    assert main(["study", str(run), *GRID]) == 0
    ended = run_ranks(tmp_path / "two" / "llava_pdrop.yaml", *GRID, ranks=2, command="study")
    assert ended.codes == [0, 0], ended.texts
    one, two = (numbers(home / "study") for home in (run, tmp_path / "two"))
    for row in (*one["attention"], *two["attention"]):
        row.update({name: None for name in ("mass", "entropy", "top", "errors")} | {"mass": round(row["mass"], 6)})
    assert {**one, "environment": None} == {**two, "environment": None}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["benchmarks=pope,mme"], says("eval.benchmarks", "one")),
        (["data.eval=null"], says("data.eval", "benchmarks=NAME")),
        (["--layers", "4"], says("--layers", "4", "3")),
        (["--ranker", "fast"], says("--ranker", "'fast'", "fastv")),
        (["--average-tokens", "0"], says("--average-tokens", "0", "above 0")),
        (["--average-tokens", "nan"], says("--average-tokens", "nan", "above 0")),
        (["--average-tokens", "16"], says("--average-tokens", "16")),
        (["--average-tokens", "1"], says("--average-tokens", "1", "4")),
        (["eval.limit=1"], says("eval.limit", "one question")),
        (["eval.scorer=bleu"], says("eval.scorer", "'bleu'")),
        (["--out", "FILE"], says("--out", "file")),
    ],
)
def test_what_cannot_be_studied_is_one_line(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    words = [str(tmp_path / "file") if word == "FILE" else word for word in words]
    assert main(["study", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_questions_without_a_picture_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"id": "a", "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]}
    (tmp_path / "text.json").write_text(json.dumps([record, {**record, "id": "b"}]))
    assert main(["study", str(run), f"data.eval={tmp_path / 'text.json'}"]) == 2
    assert re.search(says("text.json", "picture"), capsys.readouterr().err)
