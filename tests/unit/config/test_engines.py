"""`train.engine`: one word for what is cut up over the GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_pdrop.config.load import ENGINES, load_config, to_yaml
from llava_pdrop.errors import ConfigError
from tests.messages import meant, says

ROOT = Path(__file__).parents[3]


def engine_of(file: Path | str, *overrides: str) -> dict:
    arguments = load_config(file, overrides).train.arguments
    return {name: arguments[name] for name in ("deepspeed", "fsdp", "fsdp_config") if name in arguments}


@pytest.mark.parametrize("name", ENGINES)
def test_a_name_stands_for_training_arguments(tiny_config, name):
    assert engine_of(tiny_config(train={"engine": name})) == ENGINES[name]


def test_settings_of_every_engine_are_here():
    for name, arguments in ENGINES.items():
        for file in (value for value in arguments.values() if isinstance(value, str)):
            assert json.loads((ROOT / file).read_text()), name
    stages = {
        name: json.loads((ROOT / f"configs/deepspeed/{name}.json").read_text()) for name in ENGINES if "zero" in name
    }
    for name, content in stages.items():
        section = content["zero_optimization"]
        assert section["stage"] == int(name[4]) and ("offload_optimizer" in section) == name.endswith("offload")


def test_one_key_changes_the_engine_of_a_recipe():
    recipe = ROOT / "configs/llava15_7b/finetune_pdrop.yaml"
    assert engine_of(recipe) == ENGINES["zero3"]
    assert engine_of(recipe, "train.engine=fsdp2") == ENGINES["fsdp2"]
    assert engine_of(recipe, "train.engine=ddp") == {}
    assert engine_of(recipe, "train.engine=my/zero.json") == {"deepspeed": "my/zero.json"}
    assert engine_of(recipe, "train.engine=null", "train.deepspeed=my/zero.json") == {"deepspeed": "my/zero.json"}


def test_a_saved_run_says_it_once(tiny_config, tmp_path):
    config = load_config(tiny_config(train={"engine": "zero2"}))
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "saved.yaml").train == config.train
    assert engine_of(tmp_path / "saved.yaml") == ENGINES["zero2"]


REPLACED = [("zero3", ENGINES["zero3"]), ("fsdp2", ENGINES["fsdp2"]), ("ddp", {}), ("null", ENGINES["zero2"])]


@pytest.mark.parametrize(("engine", "found"), REPLACED)
def test_a_name_replaces_an_inherited_engine_however_that_was_said(tiny_config, tmp_path, engine, found):
    """In a config older than the key, and in a saved run, it stands as training arguments."""
    older = tiny_config(train=ENGINES["zero2"])
    assert engine_of(older, f"train.engine={engine}") == found
    (tmp_path / "child.yaml").write_text(f"base: {older}\ntrain: {{engine: {engine}}}\n")
    assert engine_of(tmp_path / "child.yaml") == found


def test_one_file_says_its_engine_once(tiny_config):
    with pytest.raises(ConfigError, match=r"run\.yaml: train\.deepspeed " + says("train.engine", "zero3")):
        engine_of(tiny_config(train={"engine": "zero3", **ENGINES["zero2"]}))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.engine=zero", says("train.engine", "'zero'", meant("zero2"))),
        ("train.engine=3", says("train.engine", "3", "'ddp'")),
        ("train.engine=[zero2]", says("train.engine", "['zero2']")),
        ("train.deepspeed=null", says("train.deepspeed", "train.engine", "zero2")),
        ("train.fsdp=true", says("train.fsdp", "train.engine", "zero2")),
    ],
)
def test_mistakes(tiny_config, override, line):
    with pytest.raises(ConfigError, match=f"^command line: {line}"):
        load_config(tiny_config(train={"engine": "zero2"}), [override])
