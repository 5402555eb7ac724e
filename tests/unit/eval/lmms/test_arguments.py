"""``--model_args`` of lmms-eval as a config."""

from __future__ import annotations

import json

import pytest

from llava_pdrop.config.load import load_config
from llava_pdrop.errors import UserError
from llava_pdrop.eval.lmms.arguments import config_for, open_subject, words_of
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.run import train
from tests.messages import meant, says

OWN = Schedule(layers=(2,), ratios=(0.5,), ranker="fastv", positions="keep", merge="nearest")


@pytest.fixture(scope="module")
def run(tiny_files, tmp_path_factory):
    """A run of four layers whose schedule has a value of its own in every key that could be inherited."""
    home = tmp_path_factory.mktemp("lmms")
    content = {
        "output_dir": str(home / "run"),
        "model": {"language_model": str(tiny_files / "llm"), "vision_tower": str(tiny_files / "tower")},
        "data": {"train": str(tiny_files / "data/train.json"), "image_root": str(tiny_files / "data/images")},
        "pyramid_drop": OWN.to_dict(),
        "train": {"max_steps": 1, "use_cpu": True, "disable_tqdm": True},
    }
    content["model"]["template"], content["data"]["samples_per_batch"] = "qa", 2
    (home / "run.yaml").write_text(json.dumps(content))  # JSON is YAML
    return str(train(load_config(home / "run.yaml")))


def test_words_stay_as_they_are_written():
    line = "pretrained=a/b=c, layers=8-16,ratios=[0.5,0.25],keep=1.0,bf16=true,"
    assert words_of(line) == {
        "pretrained": "a/b=c",
        "layers": "8-16",
        "ratios": "[0.5,0.25]",
        "keep": "1.0",
        "bf16": "true",
    }
    assert words_of("") == {}


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("pretrained=a,layers", ("'layers'", "key=value", "layers=8-16-24")),
        ("pretrained=", ("'pretrained='", "key=value")),
        ("layers=8,16,24", ("'16'", "layers=8-16-24")),
        ("layers=8,pretrained=a,layers=9", ("layers", "twice", "8", "9")),
    ],
)
def test_words_that_are_none(line, parts):
    with pytest.raises(UserError, match=says("model_args", *parts)):
        words_of(line)


@pytest.mark.parametrize(
    ("words", "schedule"),
    [
        ({}, Schedule()),
        ({"schedule": "own"}, OWN),
        ({"layers": "1-3", "ratios": "0.5-0.25"}, Schedule((1, 3), (0.5, 0.25), positions="renumber")),
        ({"layers": "1", "keep": "3"}, Schedule((1,), keep=(3,), positions="renumber")),
        ({"layers": "1", "keep": "1.0"}, Schedule((1,), keep=(1.0,), positions="renumber")),
        (
            {"layers": "1-3", "ratios": "0.5-0.25", "ranker": "random-fastv", "positions": "keep"},
            Schedule((1, 3), (0.5, 0.25), ("random", "fastv"), "keep"),
        ),
        ({"downsample": "4"}, Schedule(downsample=4, positions="renumber")),
        ({"schedule": "uniform"}, Schedule((1, 2, 3), (0.5, 0.25, 0.125), "uniform", "renumber")),
        (
            {"schedule": "uniform", "ranker": "random"},
            Schedule((1, 2, 3), (0.5, 0.25, 0.125), "random", "renumber"),
        ),
    ],
    ids=["vanilla", "own", "layers", "count", "share", "rankers", "downsample", "preset", "preset, another ranker"],
)
def test_nothing_of_the_schedule_is_inherited_unless_it_is_asked_for(run, words, schedule):
    assert config_for({"pretrained": run, **words}).schedule == schedule


def test_a_family_whose_positions_have_several_axes_keeps_them(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "num_hidden_layers": 4}))
    (tmp_path / "chat_template.jinja").write_text("<image>")
    words = {"pretrained": str(tmp_path), "layers": "1", "ratios": "0.5"}
    assert config_for(words).schedule == Schedule((1,), (0.5,), positions="keep")
    assert config_for({**words, "positions": "renumber"}).schedule.positions == "renumber"  # which attach refuses


def test_words_with_a_dot_are_the_configs(run):
    words = {"train.bf16": "true", "model.template": "v1", "eval.max_unread": "0.5"}
    config = config_for({"pretrained": run, **words})
    assert config.train.arguments["bf16"] is True and config.model.template == "v1" and config.eval.max_unread == 0.5


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ({"layer": "1"}, ("'layer'", meant("layers"))),
        ({"pyramid_drop.layers": "[1]"}, ("pyramid_drop.layers", "layers=VALUE")),
        ({"eval.max_new_tokens": "3"}, ("eval.max_new_tokens", "--gen_kwargs")),
        ({"data.eval": "x.json"}, ("data.eval", "--tasks")),
        ({"schedule": "hydrop"}, ("schedule", "'hydrop'", meant("hidrop"))),
        ({"schedule": "none.yaml"}, ("none.yaml",)),
        ({"schedule": "own", "layers": "1"}, ("schedule=own", "layers")),
        ({"ratios": "0.5"}, ("ratios", "layers", "nothing")),
        ({"ranker": "fastv"}, ("ranker", "layers", "nothing")),
        ({"layers": "1-2", "ratios": "0.5"}, ("pyramid_drop.layers", "2", "1")),
        ({"layers": "1-a", "ratios": "0.5-0.25"}, ("pyramid_drop.layers", "'a'")),
        ({"layers": "4", "ratios": "0.5"}, ("pyramid_drop.layers", "4", "3")),
        ({"layers": "1", "ratios": "0.5", "ranker": "foo"}, ("ranker", "'foo'")),
        ({"schedule": "hidrop"}, ("hidrop.yaml", "layers", "32")),
        ({"train.bf17": "true"}, ("train.bf17", meant("train.bf16"))),
    ],
    ids=lambda value: ",".join(f"{key}={entry}" for key, entry in value.items()) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_one_line(run, words, parts):
    with pytest.raises(UserError, match=says(*parts)):
        config_for({"pretrained": run, **words})


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ({}, ("pretrained", "missing")),
        ({"pretrained": "/nowhere"}, ("pretrained=/nowhere", "directory")),
        ({"pretrained": "llava-hf/llava-1.5-7b-hf"}, ("llava-hf/llava-1.5-7b-hf", "hf download")),
        ({"batch_size": "auto"}, ("--batch_size", "auto")),
        ({"batch_size": "0"}, ("--batch_size", "0")),
        ({"max_batch_size": 4}, ("--max_batch_size", "--batch_size")),
        ({"device": "gpu"}, ("--device", "gpu", "cuda:N")),
    ],
    ids=["nothing", "no directory", "a name of the hub", "auto", "0", "most", "device"],
)
def test_what_is_wrong_before_a_model_is_looked_at(words, parts):
    with pytest.raises(UserError, match=says(*parts)):
        open_subject(words)


def test_devices_that_are_not_there_or_not_for_all(run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=says("--device cuda:1", "CUDA")):
        open_subject({"pretrained": run, "device": "cuda:1"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=says("--device cuda:1", "2")):
        open_subject({"pretrained": run, "device": "cuda:1"})


def test_a_subject_is_ready_to_be_asked(run):
    subject = open_subject({"pretrained": run, "batch_size": "3", "device": "cpu", "schedule": "own"})
    assert subject.settings.batch_size == 3 and subject.settings.device.type == "cpu"
    assert subject.respondent.schedule == subject.config.schedule == OWN
    assert subject.config.paper is None
