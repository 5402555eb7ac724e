"""Finished runs beside each other and beside the paper: from what runs leave in their directories."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llava_pdrop.__main__ import main
from llava_pdrop.compare.runs import compare_runs, read_run, table_rows, with_savings
from llava_pdrop.config.load import RUN_FILE, load_config, to_yaml
from tests.messages import says

ROOT = Path(__file__).parents[3]


def make_run(directory: Path, config: str, seconds: float, cuda: bool = True, accuracy: float | None = None) -> Path:
    """What a finished run of ``config`` leaves, with steps of ``seconds``, 3,600 s of training on 8 processes."""
    directory.mkdir(parents=True)
    (directory / RUN_FILE).write_text(to_yaml(load_config(config)))
    (directory / "run.json").write_text(json.dumps({"steps": 10, "seconds": 3600, "processes": 8}))
    memory = "peak_cuda_mib" if cuda else "peak_rss_mib"
    rows = [{"step": n, "loss": 1.0, "step_seconds": seconds, "step_cpu_seconds": 9, memory: 5} for n in range(10)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if accuracy is not None:
        (directory / "evaluation.json").write_text(json.dumps({"accuracy": accuracy, "scorer": "exact_match"}))
    return directory


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(ROOT)
    return [
        make_run(tmp_path / "vanilla", "configs/llava_next_7b/finetune.yaml", seconds=2.0),
        make_run(tmp_path / "pdrop", "configs/llava_next_7b/finetune_pdrop.yaml", seconds=1.1, accuracy=0.5),
    ]


def test_rows(runs: list[Path]) -> None:
    _, vanilla, dropping = table_rows(with_savings([read_run(run) for run in runs]))
    assert vanilla[1:] == ["vanilla", "", "20.8", "2.000", "", "8", "", "Tables 3 and 4", "20.8", "", "366"]
    assert dropping[1:] == [
        "8, 16, 24", "0.5, 0.25, 0.125", "9.46", "1.100", "45.0%", "8", "50.0% (exact_match)",
        "Tables 3 and 4", "9.46", "40.4%", "218",
    ]  # fmt: skip


def test_stage_one_counts(runs: list[Path], tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", "configs/llava_next_7b/pretrain.yaml", seconds=1.0)
    file = runs[1] / RUN_FILE
    file.write_text(to_yaml(load_config(file, [f"model.projector={first}/projector.safetensors"])))
    assert read_run(runs[1]).hours == 16


def test_only_runs_of_one_model_are_compared(runs: list[Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "configs/llava15_7b/finetune_pdrop.yaml", seconds=1.0)
    assert [run.saved for run in with_savings([read_run(runs[0]), read_run(other)])] == [None, None]


def test_no_hours_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = read_run(make_run(tmp_path / "run", "configs/llava15_7b/finetune.yaml", seconds=1.0, cuda=False))
    assert run.hours is None and run.timing is not None and run.timing.seconds == 9


def test_command(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *map(str, runs)]) == 0
    assert "45.0%" in capsys.readouterr().out
    report = (tmp_path / "checkpoints" / "runs.md").read_text()
    assert "| 45.0% |" in report and "MME 1540.8" in report
    assert (tmp_path / "checkpoints" / "runs.png").stat().st_size > 5000


def test_no_picture_without_anything_saved(runs: list[Path], tmp_path: Path) -> None:
    compare_runs(runs[:1], tmp_path / "out")
    assert not (tmp_path / "out" / "runs.png").exists() and "runs.png" not in (tmp_path / "out" / "runs.md").read_text()


def test_not_a_finished_run(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(says(str(tmp_path), RUN_FILE, f"{tmp_path}/pdrop"), error)


def test_a_run_named_twice_and_files_that_are_no_json(runs: list[Path], tmp_path: Path, capsys) -> None:
    assert main(["compare", str(runs[0]), str(tmp_path / "." / runs[0].name)]) == 2
    assert re.search(says("vanilla", "twice"), capsys.readouterr().err)
    (runs[1] / "evaluation.json").write_text("{")
    assert main(["compare", *map(str, runs)]) == 2
    assert re.search(says("evaluation.json", "JSON"), capsys.readouterr().err)


def test_a_run_without_results_is_shown_with_what_it_has(runs: list[Path], tmp_path: Path) -> None:
    (runs[1] / "evaluation.json").unlink()
    (runs[1] / "metrics.jsonl").unlink()
    file = compare_runs(runs, tmp_path / "out")
    assert "| 218 |" in file.read_text() and (tmp_path / "out" / "runs.png").is_file()
    *_, dropping = table_rows(with_savings([read_run(run) for run in runs]))
    assert dropping[3:8] == ["9.46", "", "", "", ""]
