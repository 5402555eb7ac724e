"""What says that a run is finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_pdrop import files
from llava_pdrop.config.load import load_config, to_yaml
from llava_pdrop.train import history
from llava_pdrop.train.history import FINISHED_FILE, digest, is_finished, mark_finished, why_outdated


def test_a_mark_that_was_cut_off_is_none(tiny_config):
    """It is the last thing a run writes: without it the run goes on from its newest checkpoint, and is done at once."""
    config = load_config(tiny_config())
    output = Path(config.output_dir)
    output.mkdir(parents=True)
    stamp = digest(config)
    assert not is_finished(config, stamp) and why_outdated(config) is None
    mark_finished(config, stamp, {"steps": 3})
    assert is_finished(config, stamp) and not is_finished(config, "another")
    assert json.loads((output / FINISHED_FILE).read_text())["steps"] == 3
    (output / FINISHED_FILE).write_text('{"digest": "')
    assert not is_finished(config, stamp) and why_outdated(config) is None


def test_a_mark_is_there_whole_or_not_at_all(tiny_config, monkeypatch):
    config = load_config(tiny_config())
    output = Path(config.output_dir)
    output.mkdir(parents=True)
    monkeypatch.setattr(files.os, "replace", lambda *names: pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception):
        mark_finished(config, digest(config), {})
    assert not (output / FINISHED_FILE).exists()


def test_runs_of_before_a_key_are_the_same_runs(tiny_config):
    """``model.kernels: auto`` is what they did; another choice computes other numbers."""
    config, other = (load_config(tiny_config(), [f"model.kernels={name}"]) for name in ("auto", "torch"))
    assert "kernels" not in history.identity(config)["model"]
    assert history.identity(other)["model"]["kernels"] == "torch" and digest(other) != digest(config)
    output = Path(config.output_dir)
    output.mkdir(parents=True)
    mark_finished(config, digest(config), {})
    saved = output / history.RUN_FILE
    saved.write_text(to_yaml(config).replace("  kernels: auto\n", ""))
    assert is_finished(config, digest(config)) and not history._differences(saved, config)
    assert history._differences(saved, other) == ["model.kernels"]
