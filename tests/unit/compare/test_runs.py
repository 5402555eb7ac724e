"""Finished runs beside each other and beside the paper: from what runs leave in their directories."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llava_pdrop.__main__ import main
from llava_pdrop.compare.rows import VariantRow, finished_run, table
from llava_pdrop.compare.runs import compare_runs, planned
from llava_pdrop.compare.turns import with_savings
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


def rows_of(*runs: Path) -> list[VariantRow]:
    return with_savings([planned(finished_run(run)) for run in runs], in_turns=False)


def cells(runs: list[Path]) -> list[dict[str, str]]:
    shown = table(rows_of(*runs), "")
    return [dict(zip(shown.head, row)) for row in shown.rows]


def test_rows(runs: list[Path]) -> None:
    vanilla, dropping = cells(runs)
    paper = {"paper": "Tables 3 and 4", "paper: TFLOP": "20.8", "paper: saved": "", "paper: GPU hours": "366"}
    plan = {"after layers": "-", "image tokens per stage": "2928", "average": "2928", "TFLOP": "20.8"}
    measured = {"saved, realised": "", "wall time of a step, s": "2.00", "device hours": "8", "accuracy": ""}
    assert paper.items() | plan.items() | measured.items() <= vanilla.items()
    paper = {"paper: TFLOP": "9.46", "paper: saved": "40.4%", "paper: GPU hours": "218"}
    plan = {"after layers": "8, 16, 24", "image tokens per stage": "2928 → 1464 → 732 → 366", "TFLOP": "9.46"}
    measured = {"saved, realised": "45.0%", "wall time of a step, s": "1.10", "device hours": "8", "accuracy": "50.0%"}
    assert paper.items() | plan.items() | measured.items() <= dropping.items()


def test_ratios_stand_for_the_tokens_of_a_model_of_unknown_size(runs: list[Path]) -> None:
    file = runs[1] / RUN_FILE
    file.write_text(re.sub(r"  reference_shape:.*?(?=^\w)", "", file.read_text(), flags=re.DOTALL | re.MULTILINE))
    (row,) = cells(runs[1:])
    assert row["image tokens per stage"] == "50.0%, 25.0%, 12.5%" and "TFLOP" not in row


def test_stage_one_counts(runs: list[Path], tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", "configs/llava_next_7b/pretrain.yaml", seconds=1.0)
    file = runs[1] / RUN_FILE
    file.write_text(to_yaml(load_config(file, [f"model.projector={first}/projector.safetensors"])))
    assert finished_run(runs[1]).hours == 16


def test_only_runs_of_one_model_are_compared(runs: list[Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "configs/llava15_7b/finetune_pdrop.yaml", seconds=1.0)
    assert [row.realised for row in rows_of(runs[0], other)] == [None, None]


def test_no_hours_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = finished_run(make_run(tmp_path / "run", "configs/llava15_7b/finetune.yaml", seconds=1.0, cuda=False))
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
    _, dropping = cells(runs)
    assert dropping["TFLOP"] == "9.46" and "accuracy" not in dropping
    assert {dropping[name] for name in dropping if "step" in name or "hours" in name} == {"", "218"}
