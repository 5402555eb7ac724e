"""``train.recompute_layers``: checked before the run, and passed on to the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava_pdrop.config.schema import Config, DataSection, ModelSection, TrainSection
from llava_pdrop.errors import ConfigError
from llava_pdrop.train.checks import check_arguments
from tests.messages import says


def config(tmp_path, **arguments) -> Config:
    model = ModelSection(language_model="llm", vision_tower="tower")
    data = DataSection(train="train.json", samples_per_batch=1)
    train = TrainSection(recompute_layers=2, arguments={"use_cpu": True, **arguments})
    return Config("run", str(tmp_path), model, data, train=train, file="run.yaml")


def test_it_needs_activation_checkpointing(tmp_path):
    with pytest.raises(ConfigError, match=says("train.recompute_layers", "train.gradient_checkpointing=true")):
        check_arguments(config(tmp_path))
    check_arguments(config(tmp_path, gradient_checkpointing=True))


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="train.recompute_layers"):
        replace(TrainSection(), recompute_layers=-1)
