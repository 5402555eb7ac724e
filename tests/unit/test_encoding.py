"""Letters of every script, on a machine whose locale has none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_pdrop.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONIOENCODING": "gbk"}])
def test_a_run_is_written_and_read_in_utf_8(tiny_config, tiny_files, tmp_path, locale):
    """Its name, its records and its answers; what the screen cannot show is escaped there, and whole in the files."""
    records = json.loads((tiny_files / "data/train.json").read_text(encoding="utf-8"))
    records[0]["conversations"][1]["value"] = "😀 训练 é"
    data = tmp_path / "records.json"
    data.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    file = tiny_config("run")
    content = json.loads(file.read_text(encoding="utf-8")) | {
        "name": "训练 😀",
        "output_dir": str(tmp_path / "out/utf8"),
    }
    content["data"] |= {"train": str(data), "eval": str(data)}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    python = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning:llava_pdrop", "-m"]
    for command in (["train", str(file)], ["eval", str(tmp_path / "out/utf8"), "eval.limit=3"]):
        whole = [*python, "llava_pdrop", *command]
        done = subprocess.run(whole, env={**os.environ, **plain, **locale}, cwd=ROOT, capture_output=True, timeout=200)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert load_config(tmp_path / "out/utf8/llava_pdrop.yaml").name == "训练 😀"
    answers = (tmp_path / "out/utf8/predictions.jsonl").read_text(encoding="utf-8")
    assert "😀 训练 é" in answers and "训练 😀" in (tmp_path / "out/utf8/training.md").read_text(encoding="utf-8")
