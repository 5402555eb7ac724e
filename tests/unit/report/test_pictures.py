"""Pictures: drawn whatever the surroundings want of matplotlib, and never at the price of the work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava_pdrop.config.load import load_config
from llava_pdrop.report import pictures
from llava_pdrop.report.pictures import save_picture, subplots
from llava_pdrop.train import report
from llava_pdrop.train.history import FINISHED_FILE
from llava_pdrop.train.report import TRAINING_FILE, TRAINING_PICTURE
from llava_pdrop.train.run import train
from tests.messages import says

ROOT = Path(__file__).resolve().parents[3]

DRAWING = """\
import os, sys
from pathlib import Path
from llava_pdrop.bench.train_report import step_bars
from llava_pdrop.compare import ablate, figures, runs
from llava_pdrop.doctor.report import length_histogram
from llava_pdrop.report.pictures import save_picture
from llava_pdrop.train.report import figure_of
import numpy as np
assert "matplotlib" not in sys.modules  # those who draw nothing do without
assert save_picture(Path(sys.argv[1]), lambda: length_histogram(np.arange(9), 5))
assert "matplotlib.pyplot" not in sys.modules
assert os.environ["MPLBACKEND"] == sys.argv[2]  # it is somebody else's, and stays
"""


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no such window", "gtk3agg"])
def test_a_picture_needs_no_window(tmp_path, backend):
    """The first is what every notebook sets; matplotlib refuses the import where it is not installed."""
    file = tmp_path / "lengths.png"
    environment = {**os.environ, "MPLBACKEND": backend, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", DRAWING, file, backend], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert Image.open(file).size[0] > 500


def test_a_picture_that_fails_is_one_line(tmp_path, caplog):
    file = tmp_path / "a.png"
    file.write_bytes(b"of an earlier run")

    def broken():
        subplots()
        raise LookupError("no glyph " + "x" * 500)

    assert not save_picture(file, broken)
    (record,) = caplog.records
    assert re.search(says(str(file), "LookupError", "no glyph"), record.getMessage())
    assert len(record.getMessage()) < len(str(file)) + 350 and not file.exists()
    assert not save_picture(tmp_path / "nowhere" / "a.png", lambda: subplots()[0])
    assert save_picture(file, lambda: subplots(figsize=(2, 1))[0]) and Image.open(file).size == (300, 150)


@pytest.mark.parametrize("broken", ["figure_of", "time_split", "matplotlib"])
def test_a_run_is_finished_before_anything_is_drawn(tiny_config, monkeypatch, caplog, capsys, broken):
    config = load_config(tiny_config())
    output = Path(config.output_dir)

    def fail(*args):
        assert (output / FINISHED_FILE).is_file()
        raise RuntimeError("no font")

    monkeypatch.setattr(*((pictures, "_imported") if broken == "matplotlib" else (report, broken)), fail)
    train(config)
    said = [record.getMessage() for record in caplog.records if "no font" in record.getMessage()]
    assert not (output / TRAINING_PICTURE).exists()
    if broken == "time_split":  # the text needs it too
        assert not said
        lines = [line for line in capsys.readouterr().out.splitlines() if "no font" in line]
        assert len(lines) == 1 and re.search(says(str(output / TRAINING_FILE), "complete"), lines[0])
        assert not (output / TRAINING_FILE).exists()
    else:
        assert len(said) == 1 and re.search(says(TRAINING_PICTURE, "RuntimeError"), said[0])
        assert TRAINING_PICTURE not in (output / TRAINING_FILE).read_text(encoding="utf-8")
    weights = (output / "model.safetensors").stat().st_mtime_ns
    monkeypatch.undo()
    (output / TRAINING_FILE).unlink(missing_ok=True)
    train(config)  # nothing is trained again; the report is written
    assert (output / "model.safetensors").stat().st_mtime_ns == weights
    assert (
        TRAINING_PICTURE in (output / TRAINING_FILE).read_text(encoding="utf-8")
        and (output / TRAINING_PICTURE).is_file()
    )
