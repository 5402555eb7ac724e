"""The report that a run leaves: the split of its time, tables, picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from llava_pdrop.config.load import load_config
from llava_pdrop.runtime.clock import TIME_PARTS
from llava_pdrop.train import report
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from llava_pdrop.train.report import TITLES, TRAINING_FILE, TRAINING_PICTURE, time_split, write_report
from llava_pdrop.train.run import train

DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}


def test_a_run_leaves_a_report_of_what_it_measured(tiny_config):
    output = train(load_config(tiny_config(pyramid_drop=DROP)))
    rows = read_metrics(output / METRICS_FILE)[:3]
    split = time_split(rows)
    assert set(split) == {*TIME_PARTS, "data", "rest"} == set(TITLES) and all(value > 0 for value in split.values())
    parts = sum(split.values()) - split["data"] - split["rest"]
    assert parts <= 1.05 * sum(row["step_seconds"] for row in rows) / 3
    passed = [row["data_seconds"] / row["data_wait_share"] for row in rows]
    assert sum(split.values()) == pytest.approx(sum(passed) / 3, rel=1e-6)
    text = (output / TRAINING_FILE).read_text()
    assert "| steps | 3 |" in text and "| 3 | " in text and "ranking and dropping" in text
    assert "MFU" not in text  # a CPU has no published peak
    assert Image.open(output / TRAINING_PICTURE).width > 500


def test_what_was_not_measured_is_not_in_the_report(tmp_path):
    row = {
        "step": 1,
        "loss": 2.0,
        "tokens_per_second": 5.0,
        "step_seconds": 0.5,
        "tokens_0": 7.0,
        "image_tokens_0": 0.0,
    }
    assert write_report_of(tmp_path, []) is None
    text = write_report_of(tmp_path, [row, {**row, "step": 2, "loss": 1.0}]).read_text()
    assert "optimizer" not in text and "memory" not in text and "2.0000 and 1.0000" in text


ROW = {"loss": 2.0, "tokens_per_second": 5.0, "step_seconds": 0.5, "tokens_0": 7.0, "image_tokens_0": 0.0}


def test_samples_count_the_same_in_every_row(tmp_path):
    rows = [{**ROW, "step": 1, "samples": 1.0, "tokens_0": 100.0}, {**ROW, "step": 2, "samples": 3.0, "tokens_0": 20.0}]
    assert "| 0 | 40.0 | 0.0 |" in write_report_of(tmp_path, rows).read_text()


def test_a_run_of_one_step_has_a_picture(tmp_path):
    text = write_report_of(tmp_path, [{**ROW, "step": 1}]).read_text()
    assert "| steps | 1 |" in text and "2.0000 and 2.0000" in text
    loss = np.asarray(Image.open(tmp_path / TRAINING_PICTURE).convert("L"))[60:430, 100:700]
    assert (loss < 100).sum() > 20  # the dark dot of the only loss


def test_all_text_of_the_picture_is_in_it(tmp_path, monkeypatch):
    """Also that of the longest legend."""
    times = {f"{part}_seconds": 1.0 for part in TITLES}
    figures = []
    original = report.figure_of
    monkeypatch.setattr(report, "figure_of", lambda rows: figures.append(original(rows)) or figures[0])
    write_report_of(tmp_path, [{**ROW, **times, "step": step} for step in (1, 2)])
    (figure,) = figures
    for axes in figure.axes:
        for text in (axes.title, *(axes.get_legend().get_texts() if axes.get_legend() else ())):
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1, text


def test_the_report_of_a_resumed_run_is_of_all_of_it(tiny_config):
    run = {"learning_rate": 1e-3, "use_cpu": True, "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True}
    for steps in (2, 4):
        output = train(load_config(tiny_config(train={**run, "max_steps": steps})))
    rows = read_metrics(output / METRICS_FILE)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    text = (output / TRAINING_FILE).read_text()
    assert "| steps | 4 |" in text and f"{rows[0]['loss']:.4f} and" in text


def write_report_of(directory, rows):
    (directory / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_report(directory, "name")
