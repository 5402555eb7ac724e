"""Paths: written out when a config is read, absolute in what a run leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
import yaml
from transformers import TrainingArguments

from llava_pdrop.__main__ import main
from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.compare.variants import load_ablation
from llava_pdrop.config.load import RUN_FILE, load_config
from llava_pdrop.config.places import MODELS, PATHS, mapped
from llava_pdrop.config.schema import Config
from llava_pdrop.data.mixture import data_files
from llava_pdrop.errors import ConfigError
from llava_pdrop.train.history import FINISHED_FILE
from llava_pdrop.train.run import train
from tests.messages import says
from tests.unit.train.test_adapters import LORA

NO_PATHS = {
    "name", "pretrain", "model.template", "data.format", "eval.scorer", "paper.table",
    "train.lr_scheduler_type", "train.optim", "train.optim_args", "train.lr_scheduler_kwargs",
}  # fmt: skip
"""Text keys that are words, of the schema. (``pretrain`` holds words and paths: see below.)"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of our own, in which the program is started too."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def given(config: Config, key: str) -> str | None:
    section, _, name = key.rpartition(".")
    if section == "train" and name != "resume":
        return config.train.arguments.get(name)
    return getattr(getattr(config, section) if section else config, name)


@pytest.mark.parametrize("key", [key for key in PATHS if key not in ("model.path", "train.engine")])
@pytest.mark.parametrize(("written", "meant"), [
    ("~/runs/x", "home/runs/x"), ("$HOME/x", "home/x"), ("${oc.env:SCRATCH}/x.json", "scratch/x.json"),
    ("$SCRATCH/a b/$USED", "scratch/a b/used"),
])  # fmt: skip
def test_every_path_is_written_out(tiny_config, tmp_path, monkeypatch, key, written, meant):
    monkeypatch.setenv("USED", "used")
    config = load_config(tiny_config(), [f"{key}={json.dumps(written)}"])
    assert given(config, key) == str(tmp_path / meant)
    plain = tiny_config("b")
    content = json.loads(plain.read_text())
    *section, name = key.split(".")
    (content[section[0]] if section else content)[name] = written
    plain.write_text(json.dumps(content))
    assert given(load_config(plain), key) == str(tmp_path / meant)


def test_paths_among_other_words_too(tiny_config, tmp_path):
    words = [
        'pretrain="~/first.yaml output_dir=$SCRATCH/one seed=3"', "data.prepare=[~/make.py,--out,$SCRATCH/made,--n,few]"
    ]  # fmt: skip
    config = load_config(tiny_config(), words)
    assert config.pretrain == f"{tmp_path}/home/first.yaml output_dir={tmp_path}/scratch/one seed=3"
    assert config.data.prepare == (f"{tmp_path}/home/make.py", "--out", f"{tmp_path}/scratch/made", "--n", "few")
    config = load_config(tiny_config(), ["model.path=~/whole", "model.language_model=null", "model.vision_tower=null"])
    assert config.model.path == f"{tmp_path}/home/whole"
    assert load_config(tiny_config(), ["train.engine=~/ds.json"]).train.arguments["deepspeed"].startswith("/")


def test_what_names_configs_and_data_is_written_out_too(tiny_config, tmp_path, home):
    file = tiny_config("run")
    (home / "base.yaml").write_text(file.read_text())
    (tmp_path / "child.yaml").write_text("base: ~/base.yaml\nseed: 4\n")
    assert load_config("child.yaml").seed == 4 and load_config("~/base.yaml").name == "run"
    (tmp_path / "mix.yaml").write_text("parts: [{path: ~/a.json, image_root: $SCRATCH}, {path: b.json}]")
    assert data_files("mix.yaml")[1:] == [home / "a.json", Path("b.json")]
    (home / "abl.yaml").write_text("base: ~/base.yaml\noutput_dir: $SCRATCH/abl\nvariants: {a: {seed: 1}}")
    ablation = load_ablation("~/abl.yaml")
    assert str(ablation.output_dir) == f"{tmp_path}/scratch/abl"


@pytest.mark.parametrize(("word", "said"), [
    ("output_dir=$NOWHERE/x", says("output_dir", "$NOWHERE/x", "NOWHERE", "not set")),
    ("data.train=~nobody_here/x.json", says("data.train", "~nobody_here", "home")),
    ('model.projector=""', says("model.projector", "empty")),
    ("output_dir=${HOME}/x", says("output_dir", "HOME", "$HOME")),
    ('pretrain="$NOWHERE/first.yaml"', says("pretrain", "NOWHERE", "not set")),
])  # fmt: skip
def test_a_path_that_cannot_be_written_out_is_refused(tiny_config, word, said):
    with pytest.raises(ConfigError, match=said):
        load_config(tiny_config(), [word])


def test_no_text_key_of_the_schema_is_forgotten():
    """A new key that holds text is a path or is not; somebody must say which."""

    def text_keys(schema: type, prefix: str = "") -> set[str]:
        found = set()
        for name, hint in get_type_hints(schema).items():
            kinds = [hint, *get_args(hint)]
            if str in kinds and get_origin(hint) not in (dict, tuple) and name != "file":
                found.add(prefix + name)
            for kind in kinds:
                if is_dataclass(kind) and isinstance(kind, type):
                    found |= text_keys(kind, f"{prefix}{name}.")
        return found

    keys = {key for key in text_keys(Config) if not key.startswith(("pyramid_drop.", "model.reference_shape."))}
    assert keys <= set(PATHS) | NO_PATHS
    names = {field.name for field in fields(TrainingArguments)}
    wanted = {
        name for name in names if re.search(r"(_dir|_path|_file|^deepspeed|^fsdp_config|accelerator_config)$", name)
    }
    assert wanted - {"output_dir"} <= {key.removeprefix("train.") for key in PATHS}


def test_a_hub_id_stays_one(tiny_config):
    config = load_config(tiny_config(), ["model.vision_tower=openai/clip-vit-large-patch14-336"])
    assert config.model.vision_tower == "openai/clip-vit-large-patch14-336"
    assert mapped({"model": {key.split(".")[1]: 3 for key in MODELS}}, lambda key, path: "x")["model"]["path"] == 3


@pytest.mark.process
def test_an_option_on_the_command_line_too(tiny_config, tmp_path, capsys):
    assert main(["doctor", str(tiny_config()), "--no-tokens", "--out=~/report"]) == 0
    assert (tmp_path / "home/report/doctor.md").is_file() and not Path("~").exists()
    with pytest.raises(SystemExit):
        main(["doctor", str(tiny_config()), "--out=$NOWHERE/report"])
    assert re.search(says("--out", "NOWHERE", "not set"), capsys.readouterr().err)


@pytest.mark.parametrize("word", ["output_dir=~/runs/x", "output_dir=$HOME/runs/x", "output_dir=home/runs/x"])
def test_a_run_resumes_from_where_it_wrote(tiny_config, home, capsys, word):
    """It trained into one place, read another, and started again from step 1 over whole checkpoints."""
    steps = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "use_cpu": True, "disable_tqdm": True}
    file = tiny_config(train=steps)
    train(load_config(file, [word]))
    output = home / "runs/x"
    assert (output / "checkpoint-2").is_dir() and not Path("~").exists() and not Path("$HOME").exists()
    (output / FINISHED_FILE).unlink()
    train(load_config(file, [word]))
    assert "resuming from" in capsys.readouterr().out
    assert json.loads((output / FINISHED_FILE).read_text())["resumed_from"].endswith("checkpoint-2")


@pytest.fixture
def checkout(tiny_files, tiny_config, tmp_path):
    """A run whose paths are relative, as in the shipped configs; it has checkpoints."""
    root = tmp_path / "checkout"
    shutil.copytree(tiny_files, root / "made")
    steps = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "use_cpu": True, "disable_tqdm": True}
    file = tiny_config(train=steps)
    file.write_text(file.read_text().replace(f"{tiny_files}", "made").replace(str(tmp_path / "out"), "out"))
    file.rename(root / "run.yaml")
    return root


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_run_is_found_from_anywhere(checkout, monkeypatch, capsys, lora):
    monkeypatch.chdir(checkout)
    if lora is not None:
        content = json.loads(Path("run.yaml").read_text())
        Path("run.yaml").write_text(json.dumps({**content, "lora": lora}))
    output = checkout / train(load_config("run.yaml"))
    saved = yaml.safe_load((output / RUN_FILE).read_text())
    assert saved["output_dir"] == str(output) and saved["data"]["train"] == str(checkout / "made/data/train.json")
    before = (output / "projector.safetensors").stat().st_mtime_ns
    monkeypatch.chdir("/")
    assert main(["eval", str(output)]) == 0
    assert main(["train", str(output / RUN_FILE)]) == 0  # the same run: nothing is trained again
    assert "finished before" in capsys.readouterr().out
    assert (output / "projector.safetensors").stat().st_mtime_ns == before
    (output / FINISHED_FILE).unlink()
    assert main(["train", str(output / RUN_FILE)]) == 0
    assert "resuming from" in capsys.readouterr().out
    assert [path.name for path in Path("/").glob("checkpoint*")] == []


def test_a_checkout_may_move(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    train(load_config("run.yaml"))
    moved = checkout.rename(checkout.with_name("elsewhere"))
    monkeypatch.chdir(moved)
    train(load_config("run.yaml"))
    assert "finished before" in capsys.readouterr().out
    (moved / "out/run" / FINISHED_FILE).unlink()
    train(load_config("run.yaml"))
    assert "resuming from" in capsys.readouterr().out


def test_other_pictures_under_the_same_records_are_another_run(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    train(load_config("run.yaml"))
    shutil.copytree("made/data/images", "others")
    with pytest.raises(ConfigError, match=says("finished", "data.image_root", "never")):
        train(load_config("run.yaml", ["data.image_root=others"]))


def test_a_finished_run_of_an_older_version_is_one(checkout, monkeypatch, capsys):
    """It says its files by the names in the config, relative ones too."""
    from llava_pdrop.config.load import to_yaml
    from llava_pdrop.train.history import digest

    monkeypatch.chdir(checkout)
    config = load_config("run.yaml")
    output = train(config)
    (output / RUN_FILE).write_text(to_yaml(config))
    facts = json.loads((output / FINISHED_FILE).read_text())
    del facts["paths"]
    (output / FINISHED_FILE).write_text(json.dumps({**facts, "digest": digest(config, by_name=True)}))
    train(config)
    assert "finished before" in capsys.readouterr().out


def test_adapters_of_an_older_version_find_their_base_beside_them(checkout, monkeypatch, tmp_path):
    monkeypatch.chdir(checkout)
    content = json.loads(Path("run.yaml").read_text())
    Path("run.yaml").write_text(json.dumps({**content, "lora": LORA}))
    output = checkout / train(load_config("run.yaml"))
    settings = output / "adapter_config.json"
    adapters, config = json.loads(settings.read_text()), json.loads((output / "config.json").read_text())
    assert os.path.isabs(adapters["base_model_name_or_path"])
    settings.write_text(json.dumps({**adapters, "base_model_name_or_path": "made/llm"}))
    section = next(name for name, value in config.items() if isinstance(value, dict) and "mm_vision_tower" in value)
    config[section]["mm_vision_tower"] = "made/tower"
    (output / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir("/")
    build_parts(path=str(output))
    settings.write_text(json.dumps({**adapters, "base_model_name_or_path": "gone/llm"}))
    with pytest.raises(FileNotFoundError, match=says("adapter_config.json", "gone/llm", "--base")):
        build_parts(path=str(output))
    settings.write_text(json.dumps(adapters))
    config[section]["mm_vision_tower"] = "gone/tower"
    (output / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=says("config.json", "gone/tower", "--vision-tower")):
        build_parts(path=str(output))
