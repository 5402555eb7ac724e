"""What the data ask of the model, before the first step."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from llava_pdrop.config.load import load_config
from llava_pdrop.errors import ConfigError
from llava_pdrop.train.fit import check_positions, positions_of, warn_of_rates
from llava_pdrop.train.run import train
from tests.messages import says

RECORD = SimpleNamespace(origin="train.json[1]", id="b", images=[])
PICTURE = SimpleNamespace(origin="train.json[0]", id="a", images=["a.png"])


def data(*lengths):
    records = [SimpleNamespace(origin=f"train.json[{i}]", id=f"r{i}") for i in range(len(lengths))]
    return SimpleNamespace(lengths=lambda: list(lengths), records=records)


@pytest.mark.parametrize(("settings", "limit"), [
    ({}, 128),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 128),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 512),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                          "rope_theta": 1e4}}, 256),
])  # fmt: skip
def test_positions_of_a_decoder(settings, limit):
    assert positions_of(LlamaConfig(max_position_embeddings=128, **settings)) == limit


def test_a_sample_beyond_the_positions_is_refused_or_said(tiny_config, caplog):
    decoder = LlamaConfig(max_position_embeddings=128)
    config = load_config(tiny_config())
    check_positions(config, decoder, data(3, 128))
    with pytest.raises(ConfigError, match=says("data.max_length", "2 of 3", "128", "train.json[2]", "r2", "200")):
        check_positions(config, decoder, data(3, 129, 200))
    check_positions(load_config(tiny_config(), ["model.beyond_positions=allow"]), decoder, data(3, 129, 200))
    assert re.search(says("model.beyond_positions", "r2"), caplog.text)


def test_training_compares_them(tiny_config, tiny_files, tmp_path):
    llm = tmp_path / "llm"
    llm.mkdir()
    for file in (tiny_files / "llm").iterdir():
        (llm / file.name).write_bytes(file.read_bytes())
    settings = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 50}))
    with pytest.raises(ConfigError, match=says("data.max_length", "50", "train.json")):
        train(load_config(tiny_config(), [f"model.language_model={llm}"]))


def test_learning_rates_of_zero_are_said(tiny_config, caplog):
    warn_of_rates(load_config(tiny_config(), ["train.learning_rate=0", "train.projector_lr=1e-3"]))
    assert not caplog.records
    warn_of_rates(load_config(tiny_config(), ["train.learning_rate=0"]))
    assert re.search(says("train.learning_rate", "0", "projector", "nothing"), caplog.text)


def test_training_refuses_text_for_the_projector(tiny_config, tiny_files, tmp_path):
    records = json.loads((tiny_files / "data/train.json").read_text())
    for record in records:
        del record["image"]
        record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>\n", "")
    (tmp_path / "text.json").write_text(json.dumps(records))
    words = [f"data.train={tmp_path / 'text.json'}", "model.trainable=[projector]"]
    with pytest.raises(ConfigError, match=says("model.trainable", "text.json")):
        train(load_config(tiny_config(), words))
