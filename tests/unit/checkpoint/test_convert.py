"""The command: writes aside, never over anything by accident, one line per error."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from llava_pdrop.__main__ import main
from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.layouts import EMBEDDINGS, MEMORY_TO_HF, rename_one
from llava_pdrop.checkpoint.shards import open_tensors
from llava_pdrop.data.chat import jinja_of
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.types import Turn
from tests.messages import says
from tests.unit.checkpoint.layout_files import TOWER, original, with_tokenizer, write, write_file


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
    assert build_parts(str(tmp_path / "hf"), dtype=torch.float16).hf.dtype == torch.float16
    assert {tensor.dtype for tensor in open_tensors(tmp_path / "hf").values()} == {torch.float16}


def test_what_is_there_stays_unless_asked(source, tmp_path, capsys):
    words = ["convert", str(source), str(tmp_path / "hf"), "--to", "llava-hf"]
    assert main(words) == 0
    (tmp_path / "hf" / "note").write_text("old")
    assert main(words) == 2
    assert re.search(says("exists", "--overwrite"), capsys.readouterr().err)
    assert main([*words, "--overwrite"]) == 0
    assert not (tmp_path / "hf" / "note").exists()
    (tmp_path / "hf" / "config.json").unlink()
    assert main([*words, "--overwrite"]) == 2
    assert re.search(says("no checkpoint"), capsys.readouterr().err)


def test_a_failed_conversion_leaves_the_old_one(source, tmp_path, monkeypatch, capsys):
    words = ["convert", str(source), str(tmp_path / "hf"), "--to", "llava-hf"]
    assert main(words) == 0
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("llava_pdrop.checkpoint.export.write_config", fail)
    with pytest.raises(OSError, match="disk full"):
        main([*words, "--overwrite"])
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "source"]


@pytest.mark.parametrize("words", [["eval"], ["convert", "OUT", "--to", "llava"]])
def test_a_directory_of_runs_is_no_run_and_names_them(tmp_path, capsys, words):
    """What ``compare`` leaves."""
    run = tmp_path / "compared" / "pyramid_drop"
    run.mkdir(parents=True)
    (run / "llava_pdrop.yaml").touch()
    command, *more = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    assert main([command, str(run.parent), *more]) == 2
    assert re.search(says("config.json", str(run)), capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOURCE", "SOURCE/inside", "--to", "llava-hf"], says("source", "target", "in each other")),
        (["SOURCE", "OUT", "--to", "llava-hf", "--base", "SOURCE"], says("whole", "base model")),
        (["HF", "OUT", "--to", "llava-hf", "--vision-tower", "TOWER"], says("own", "vision tower")),
        (["HF", "OUT", "--to", "llava", "--base", "SOURCE"], says("whole", "neither")),
        (["SOURCE", "FILE/out", "--to", "llava"], says("file", "another directory")),
        (["FILE", "OUT", "--to", "llava"], says("file", "checkpoint is a directory")),
        (["nobody/nothing", "OUT", "--to", "llava"], says("nobody/nothing", "directory")),
        (["SOURCE", "OUT", "--to", "llava", "--template", "v1"], says("--template", "chat template")),
        (["SOURCE", "OUT", "--to", "llava-hf", "--template", "v1"], says("--template v1", "no tokenizer")),
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
    assert re.search(message, error) and "\n" not in error
    assert not (tmp_path / "out").exists()


def complaint(words: list[object], capsys) -> str:
    """The one line that the command ends with."""
    capsys.readouterr()
    assert main(["convert", *map(str, words)]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def edited(directory: Path, file: str = "config.json", **fields) -> Path:
    """``directory`` with other ``fields`` in one of its JSON files; None takes one away."""
    old = json.loads((directory / file).read_text()) | fields
    (directory / file).write_text(json.dumps({name: value for name, value in old.items() if value is not None}))
    return directory


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": None}, says("hidden_size", "whole number", "None")),
        ({"vocab_size": "320"}, says("vocab_size", "whole number", "'320'")),
        ({"num_attention_heads": 7}, says("64", "attention heads", "7")),
        ({"mm_vision_tower": ""}, says("mm_vision_tower", "''")),
        ({"mm_vision_tower": "no/tower"}, says("mm_vision_tower", "no/tower")),
        ({"image_aspect_ratio": "square"}, says("image_aspect_ratio 'square'")),
        ({"layer_list": [2]}, says("image_token_ratio_list", "missing")),
        ({"pyramid_drop": {"layers": [99], "ratios": [0.5]}}, says("pyramid_drop.layers", "99", "8")),
        ({"pyramid_drop": {"layers": [2], "ratios": ["a"]}}, says("pyramid_drop.ratios", "numbers", "'a'")),
    ],
)
def test_a_config_that_says_nonsense_is_named(source, tmp_path, capsys, fields, message):
    error = complaint([edited(source, **fields), tmp_path / "out", "--to", "llava-hf"], capsys)
    assert re.match(re.escape(f"error: {source / 'config.json'}: ") + message, error)


def test_a_feature_layer_that_the_tower_lacks(source, tmp_path, capsys):
    error = complaint([edited(source, mm_vision_select_layer=-9), tmp_path / "out", "--to", "llava-hf"], capsys)
    assert re.search(says("mm_vision_select_layer", "-9", "3 layers"), error)


def test_a_llava_hf_that_is_not_whole_is_one_line(source, tmp_path, capsys):
    hf, out = tmp_path / "hf", tmp_path / "out"
    main(["convert", str(source), str(hf), "--to", "llava-hf"])
    words = [hf, out, "--to", "llava"]
    (hf / "preprocessor_config.json").write_text("{")
    assert f"{hf / 'preprocessor_config.json'}: OSError" in complaint(words, capsys)
    (hf / "preprocessor_config.json").unlink()
    assert re.search(says(str(hf / "preprocessor_config.json"), "no such file"), complaint(words, capsys))
    shutil.copy(TOWER / "preprocessor_config.json", hf)
    edited(hf, text_config={"hidden_size": "x"})
    assert re.search(says(str(hf / "config.json"), "'hidden_size'"), complaint(words, capsys))


def test_an_index_with_other_things_than_names(tmp_path, capsys):
    source = write(tmp_path / "source", *original(), "bin-shards")
    edited(source, "pytorch_model.bin.index.json", weight_map={"lm_head.weight": 3})
    error = complaint([source, tmp_path / "out", "--to", "llava"], capsys)
    assert re.search(says("pytorch_model.bin.index.json", "weight_map"), error)


def test_code_in_a_pickle_is_not_run_and_nobody_is_told_to_run_it(tmp_path, capsys):
    source = write(tmp_path / "source", *original(), "bin")
    torch.save(Trap(tmp_path / "sprung"), source / "pytorch_model.bin")
    error = complaint([source, tmp_path / "out", "--to", "llava"], capsys)
    assert re.search(says("whole file", "tensors"), error) and "weights_only" not in error
    assert not (tmp_path / "sprung").exists()


class Trap:
    """A pickle of it makes a file where it is opened without ``weights_only=True``."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_spare_rows_of_the_hub_come_back_as_the_mean(source, tmp_path):
    hf, back, again = tmp_path / "hf", tmp_path / "back", tmp_path / "again"
    main(["convert", str(source), str(hf), "--to", "llava-hf"])
    tensors = {name: tensor.read() for name, tensor in open_tensors(hf).items()}
    rows = original()[0]["vocab_size"]
    spare = [rename_one(name, MEMORY_TO_HF) for name in EMBEDDINGS]
    for name in spare:
        tensors[name] = torch.cat([tensors[name][:rows], torch.randn_like(tensors[name][rows:])])
    write_file(hf / "model.safetensors", tensors)
    main(["convert", str(hf), str(back), "--to", "llava"])
    main(["convert", str(back), str(again), "--to", "llava-hf"])
    assert all(torch.equal(open_tensors(back)[name].read(), tensor) for name, tensor in original()[1].items())
    for name, tensor in open_tensors(again).items():
        kept = rows if name in spare else len(tensors[name])
        assert torch.equal(tensor.read()[:kept], tensors[name][:kept]), name
        assert torch.equal(tensor.read()[kept:], tensors[name][:kept].mean(0).expand_as(tensors[name][kept:])), name


def test_an_original_adapter_without_a_rank_is_named(source, tmp_path, capsys):
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8}))
    error = complaint([source, tmp_path / "out", "--to", "llava-hf", "--base", source], capsys)
    assert re.search(says("adapter_config.json", "r", "above 0", "None"), error)


def test_a_whole_original_checkpoint_is_read_without_warnings(tmp_path, capfd, recwarn):
    source = with_tokenizer(write(tmp_path / "source", *original("e2e_l15")))
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "llava-hf"]) == 0
    assert not capfd.readouterr().err and not list(recwarn)


# ---- ready to serve ----


def chat_of(directory: Path) -> str | None:
    return AutoProcessor.from_pretrained(directory).chat_template


def test_the_chat_template_is_the_one_asked_for_or_said_to_be_missing(tmp_path, capsys):
    source = with_tokenizer(write(tmp_path / "source", *original("e2e_l15")))
    words = ["convert", str(source), str(tmp_path / "hf"), "--to", "llava-hf", "--overwrite"]
    assert main(words) == 0
    assert re.search(says("chat template: none", "--template"), capsys.readouterr().out)
    assert chat_of(tmp_path / "hf") is None
    assert main([*words, "--template", "v1"]) == 0
    assert re.search(says("chat template: v1", "--template"), capsys.readouterr().out)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Where?"}, {"type": "image"}]}]
    text = AutoProcessor.from_pretrained(tmp_path / "hf").apply_chat_template(messages, add_generation_prompt=True)
    pieces = TEMPLATES["v1"].generation_prompt(TEMPLATES["v1"].rounds([Turn("human", "<image>\nWhere?")]))
    assert text == "".join(piece.text for piece in pieces)
    assert main([*words, "--template", "mpt"]) == 2
    assert re.search(says("mpt", "<|im_end|>", "v1"), capsys.readouterr().err)
    assert chat_of(tmp_path / "hf") == jinja_of("v1")


def test_a_chat_template_of_the_source_stays_if_it_shows_images(tmp_path, capsys):
    source = with_tokenizer(write(tmp_path / "source", *original("e2e_l15")))
    own = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] or '<image>' }}{% endfor %}{% endfor %}"
    for chat, kept in ((own, True), ("{% for m in messages %}{{ m['content'] }}{% endfor %}", False)):
        (source / "chat_template.jinja").write_text(chat)
        words = ["convert", str(source), str(tmp_path / "hf"), "--to", "llava-hf", "--overwrite"]
        assert main(words) == 0
        said = says("chat template", "own") if kept else says("chat template: none", "no images")
        assert re.search(said, capsys.readouterr().out)
        assert chat_of(tmp_path / "hf") == (own if kept else None)


def test_a_run_is_converted_with_the_template_it_was_trained_in(tmp_path, capsys):
    """Also one saved before chat templates were."""
    run = with_tokenizer(write(tmp_path / "run", *original("e2e_l15")))
    (run / "llava_pdrop.yaml").write_text("model: {template: llava_v1}\n")
    assert main(["convert", str(run), str(tmp_path / "hf"), "--to", "llava-hf"]) == 0
    assert re.search(says("chat template: llava_v1", "trained"), capsys.readouterr().out)
    assert chat_of(tmp_path / "hf") == jinja_of("llava_v1")


def test_what_the_files_contradict_each_other_in_is_said(tmp_path, capsys):
    config, tensors = original("e2e_l15")
    source = with_tokenizer(write(tmp_path / "source", config | {"eos_token_id": 300}, tensors))
    assert main(["convert", str(source), str(tmp_path / "hf"), "--to", "llava-hf"]) == 0
    assert re.search(says("config.json", "300", "tokenizer_config.json"), capsys.readouterr().out)
