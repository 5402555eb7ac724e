"""`compare` end to end on a miniature: the table, the report, and that both say what was measured."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
from PIL import Image

from llava_pdrop.compare.compare import compare
from llava_pdrop.config.load import load_config
from llava_pdrop.errors import ConfigError
from llava_pdrop.train.metrics import timing_of
from tests.benchmark_sets import write_pope
from tests.messages import meant, says

DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
FREE = {
    "pyramid_drop": "same",
    "fastv": {"ranker": "fastv", "single_drop": 1},
    "random": {"ranker": "random"},
}


@pytest.fixture
def finished(tiny_config, tiny_files, tmp_path, capsys):
    pictures = sorted((tiny_files / "data/images").glob("*.png"))[:2]
    words = ["benchmarks=paper", f"eval.root={write_pope(tmp_path / 'sets', pictures)}"]
    paper = {"table": "Table 1", "scores": {"POPE": 80.0}}  # of PyramidDrop, and the only one for both runs to measure
    config = load_config(tiny_config("job", pyramid_drop=DROP, compare={"training_free": FREE}, paper=paper), words)
    file = compare(config)
    return file, capsys.readouterr().out


def test_the_whole_job(finished):
    file, printed = finished
    text = file.read_text()
    results = json.loads((file.parent / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    names = ["vanilla", "pyramid_drop", "vanilla + pyramid_drop", "vanilla + fastv", "vanilla + random"]
    assert [row["name"] for row in results["rows"]] == names

    for name, row in rows.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"{row['accuracy']:.1%}" in line and f"{row['chance']:.1%}" in line
        predictions = (file.parent / "predictions" / f"{name.replace(' + ', '_on_')}.jsonl").read_text().splitlines()
        scores = [json.loads(entry)["score"] for entry in predictions]
        assert row["accuracy"] == pytest.approx(sum(scores) / 6) and len(scores) == 6
    assert rows["vanilla"]["chance"] == pytest.approx(1 / 3)
    assert rows["pyramid_drop"]["image_tokens"] == [16, 8, 4, 2]
    assert "16 → 8 → 4 → 2" in text and "16 → 8 → 4 → 2" in printed

    measured = results["benchmarks"]
    assert {row["column"] for row in measured} == set(names) | {"pyramid_drop"} and len(measured) == 5
    assert [row["against"] is None for row in measured] == [True, False, False, False, False]
    assert [row["paper"] for row in measured if row["column"] != "pyramid_drop"] == [None] * 4
    assert "## Benchmarks" in text and "| POPE | vanilla + fastv |" in text and "POPE" in printed

    saving = rows["pyramid_drop"]["saving"]
    assert rows["pyramid_drop"]["realised"] == saving["realised"] == statistics.median(saving["pairs"])
    assert len(saving["pairs"]) == 3 and saving["steps"] == [0, 1, 2] and saving["on_cpu"]
    assert "took turns" in text and "3 pairs" in text
    assert rows["vanilla"]["saving"] is None
    assert 0 < rows["pyramid_drop"]["predicted"] < 1
    assert f"{rows['pyramid_drop']['predicted']:.1%}" in text
    ratio = rows["pyramid_drop"]["realised"] / rows["pyramid_drop"]["predicted"]
    low, high = (f"{100 * share:.1f}" for share in saving["quartiles"])
    assert f"| {saving['realised']:.1%} ({low} to {high}; {ratio:.2f}x) |" in text
    assert rows["vanilla + random"]["timing"] is None
    schedules = [rows[name]["schedule"] for name in names[1:]]
    assert [schedule["layers"] for schedule in schedules] == [[1, 2, 3], [1, 2, 3], [1], [1, 2, 3]]
    assert schedules[0] == schedules[1] and [schedule["ranker"] for schedule in schedules[2:]] == ["fastv", "random"]

    for name in ("vanilla", "pyramid_drop"):  # as an evaluation of each would leave it
        evaluation = json.loads((file.parent / name / "evaluation.json").read_text())
        assert evaluation.items() <= rows[name].items() and (file.parent / name / "predictions.jsonl").is_file()
    for picture in ("loss.png", "step_time.png", "tokens.png"):
        assert f"({picture})" in text
        with Image.open(file.parent / picture) as image:
            assert min(image.size) > 200


def logged(directory, seconds: list[float], every: int):
    """The ``metrics.jsonl`` of a run with these times of its steps, and a line for every so many."""
    lines = []
    for first in range(0, len(seconds), every):
        part = seconds[first : first + every]
        mean = sum(part) / len(part)
        row = {"step": first + len(part), "loss": 1.0, "step_seconds": 2 * mean, "step_cpu_seconds": mean}
        lines.append(json.dumps({**row, "peak_rss_mib": 100.0}))
    file = directory / "metrics.jsonl"
    file.write_text("\n".join([*lines, json.dumps({"step": len(seconds), "train_runtime": 9.0})]))
    return file


@pytest.mark.parametrize("every", [1, 5, 10])
@pytest.mark.parametrize(("steps", "warmup"), [(20, 4), (38, 7), (100, 10), (25, 5)])
def test_times_are_those_of_steps_however_many_share_a_log_line(tmp_path, steps, warmup, every):
    timing = timing_of(logged(tmp_path, [9.0] * warmup + [1.0] * (steps - warmup), every))
    assert (timing.cpu, timing.wall, timing.steps) == (1.0, 2.0, steps)


def test_times_of_a_run_with_a_single_log_line(tmp_path):
    timing = timing_of(logged(tmp_path, [3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 10))
    assert (timing.cpu, timing.steps) == (1.25, 8)


def test_a_run_of_several_processes_is_compared_by_its_own_steps(finished, tiny_config, capsys):
    """Which of the two figures it is stands in the report and is said."""
    file, _ = finished
    (before,) = (row for row in json.loads((file.parent / "results.json").read_text())["rows"] if row["saving"])
    for name in ("vanilla", "pyramid_drop"):
        facts = json.loads((file.parent / name / "run.json").read_text())
        (file.parent / name / "run.json").write_text(json.dumps({**facts, "processes": "2"}))
    text = compare(load_config(tiny_config("job", pyramid_drop=DROP, compare={"training_free": FREE}))).read_text()
    rows = {row["name"]: row for row in json.loads((file.parent / "results.json").read_text())["rows"]}
    seconds = [rows[name]["timing"]["cpu"] for name in ("vanilla", "pyramid_drop")]
    saving = rows["pyramid_drop"]["saving"]
    assert saving["realised"] == pytest.approx(1 - seconds[1] / seconds[0])
    assert saving["quartiles"] is None and not saving["pairs"]
    assert rows["pyramid_drop"]["predicted"] == before["predicted"], "counted on the same three steps"
    assert re.search(says("one process", "had 2", "now 1"), saving["reason"])
    assert f"({saving['reason']})" in text and saving["reason"] in capsys.readouterr().out
    assert "took turns" not in text


def test_the_schedules_are_those_of_the_config(tiny_config):
    config = load_config(tiny_config(pyramid_drop=DROP), ["training_free=vanilla"])
    with pytest.raises(ConfigError, match=says("eval.training_free", "compare.training_free")):
        compare(config)


def test_needs_something_to_compare(tiny_config):
    with pytest.raises(ConfigError, match=says("pyramid_drop", "nothing")):
        compare(load_config(tiny_config()))


def test_without_vanilla_and_without_questions(tiny_config, tiny_files, capsys):
    """What is not there is left out, not made up."""
    data = {"train": str(tiny_files / "data/train.json"), "image_root": str(tiny_files / "data/images")}
    sections = {"pyramid_drop": DROP, "compare": {"vanilla": False}, "data": {**data, "samples_per_batch": 4}}
    file = compare(load_config(tiny_config("half", **sections)))
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(says("compare.vanilla", "false", "data.eval", "null", "no accuracy"), printed)
    text = file.read_text()
    head = next(line for line in text.splitlines() if line.startswith("| variant |"))
    assert not any(word in head for word in ("accuracy", "chance", "realised", "answer"))
    assert "| pyramid_drop | 1, 2, 3 |" in text and "tokens.png" not in text and "| vanilla |" not in text
    (row,) = json.loads((file.parent / "results.json").read_text())["rows"]
    assert 0 < row["predicted"] < 1 and row["realised"] is None and row["timing"]["steps"] == 3


def test_where_a_run_cannot_lie_is_said_before_the_other_one_is_trained(tiny_config):
    config = load_config(tiny_config("job", pyramid_drop=DROP))
    out = Path(config.output_dir)
    out.mkdir(parents=True)
    (out / "pyramid_drop").write_text("in the way")
    with pytest.raises(ConfigError, match=says("job.yaml", "output_dir", str(out / "pyramid_drop"))):
        compare(config)
    assert not (out / "vanilla").exists()


def test_what_is_wrong_is_said_before_training(tiny_config, tmp_path):
    file = tiny_config("wrong", pyramid_drop=DROP)
    with pytest.raises(ConfigError, match=says("wrong.yaml", "eval.scorer", "'exact'", meant("exact_match'"))):
        compare(load_config(file, ["eval.scorer=exact"]))
    with pytest.raises(ConfigError, match=says("wrong.yaml", "model.template", "'v2'")):
        compare(load_config(file, ["model.template=v2"]))
    questions = tmp_path / "broken.json"
    questions.write_text(json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "Why"}]}]))
    with pytest.raises(ValueError, match=says("answer")):
        compare(load_config(file, [f"data.eval={questions}"]))
    assert not (tmp_path / "out" / "wrong").exists()
