"""The command: writes aside, never over anything by accident, one line per error."""

from __future__ import annotations

import pytest
import torch

from llava_pdrop.__main__ import main
from llava_pdrop.model.build import build_parts
from llava_pdrop.model.shards import open_tensors
from tests.unit.model.layout_files import TOWER, original, write


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source", *original())


def test_there_and_back_by_the_command(source, tmp_path, capsys):
    hf, back = str(tmp_path / "hf"), str(tmp_path / "back")
    assert main(["convert", str(source), hf, "--to", "llava-hf"]) == 0
    assert "134 tensors" in capsys.readouterr().out
    assert main(["convert", hf, back, "--to", "llava", "--vision-tower", str(TOWER)]) == 0
    ours = open_tensors(tmp_path / "back")
    assert all(torch.equal(ours[name].read(), tensor) for name, tensor in original()[1].items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "source"]


def test_precision_by_the_command(source, tmp_path):
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "llava-hf", "--dtype", "float16"]) == 0
    assert build_parts(str(tmp_path / "hf"), dtype=torch.float16).host.dtype == torch.float16
    assert {tensor.dtype for tensor in open_tensors(tmp_path / "hf").values()} == {torch.float16}


def test_what_is_there_stays_unless_asked(source, tmp_path, capsys):
    words = ["convert", str(source), str(tmp_path / "hf"), "--to", "llava-hf"]
    assert main(words) == 0
    (tmp_path / "hf" / "note").write_text("old")
    assert main(words) == 2
    assert "exists already: give another directory, or --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert not (tmp_path / "hf" / "note").exists()
    (tmp_path / "hf" / "config.json").unlink()
    assert main([*words, "--overwrite"]) == 2
    assert "is no checkpoint" in capsys.readouterr().err


def test_a_failed_conversion_leaves_the_old_one(source, tmp_path, monkeypatch, capsys):
    words = ["convert", str(source), str(tmp_path / "hf"), "--to", "llava-hf"]
    assert main(words) == 0
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("llava_pdrop.model.export.write_config", fail)
    with pytest.raises(OSError, match="disk full"):
        main([*words, "--overwrite"])
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "source"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOURCE", "SOURCE/inside", "--to", "llava-hf"], "source and target must not lie in each other"),
        (["SOURCE", "OUT", "--to", "llava-hf", "--base", "SOURCE"], "is whole, so that it takes no base model"),
        (["HF", "OUT", "--to", "llava-hf", "--vision-tower", "TOWER"], "has its own vision tower"),
        (["HF", "OUT", "--to", "llava", "--base", "SOURCE"], "is whole, so that it takes neither"),
        (["SOURCE", "FILE/out", "--to", "llava"], "is a file: give another directory"),
        (["FILE", "OUT", "--to", "llava"], "is a file; a checkpoint is a directory"),
        (["nobody/nothing", "OUT", "--to", "llava"], "nobody/nothing is no directory"),
    ],
)
def test_errors_are_one_line(source, tmp_path, capsys, words, message):
    places = {"SOURCE": source, "OUT": tmp_path / "out", "TOWER": TOWER, "HF": tmp_path / "hf"}
    if "HF" in words:
        main(["convert", str(source), str(tmp_path / "hf"), "--to", "llava-hf"])
    (tmp_path / "file").touch()
    places |= {"FILE": tmp_path / "file", "FILE/out": tmp_path / "file" / "out"}
    full = [str(source / "inside") if word == "SOURCE/inside" else str(places.get(word, word)) for word in words]
    assert main(["convert", *full]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "out").exists()
