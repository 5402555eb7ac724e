"""What the ``train:`` section cannot ask for is one line, before the model is read."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from llava_pdrop.config import ConfigError, load_config
from llava_pdrop.train.arguments import check_deepspeed, training_arguments
from tests.engines import deepspeed_arguments
from tests.faults.processes import run_ranks


def test_a_run_does_not_evaluate_itself(tiny_config):
    config = load_config(tiny_config(), ["train.eval_strategy=epoch"])
    with pytest.raises(ConfigError, match=r"run\.yaml: train\.eval_strategy: .*: llava-pdrop eval does$"):
        training_arguments(config)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="several processes make one run on GPUs without use_cpu")
def test_processes_that_would_each_train_alone_are_refused(tiny_config):
    ended = run_ranks(tiny_config(), "train.use_cpu=false", ranks=2)
    assert ended.codes == [2, 2]
    line = "2 processes were started, but without GPUs each of them would train alone: train.use_cpu=true makes one run"
    assert all(line in text for text in ended.texts)


@pytest.fixture
def settings_of(tmp_path):
    """The part of the training arguments that ``train.deepspeed`` makes, of a file of ``configs/deepspeed``."""

    def read(name: str, **zero) -> SimpleNamespace:
        file = deepspeed_arguments(name, tmp_path)["deepspeed"]
        content = json.loads((tmp_path / f"{name}.json").read_text())
        content["zero_optimization"].update(zero)
        return SimpleNamespace(deepspeed=file, hf_deepspeed_config=HfDeepSpeedConfig(content))

    return read


def test_zero3_must_gather_what_it_saves(tiny_config, settings_of):
    config = load_config(tiny_config())
    check_deepspeed(config, settings_of("zero3"))
    key = "stage3_gather_16bit_weights_on_model_save"
    with pytest.raises(ConfigError, match=rf"run\.yaml: .*zero3\.json needs zero_optimization\.{key}: true$"):
        check_deepspeed(config, settings_of("zero3", **{key: False}))


def test_a_compilation_that_nobody_finishes_is_named(tiny_config, settings_of, tmp_path, monkeypatch, caplog):
    """PyTorch waits for its end without a word."""
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    config = load_config(tiny_config())
    check_deepspeed(config, settings_of("zero2_offload"))
    lock.touch()
    check_deepspeed(config, settings_of("zero2"))
    assert not caplog.messages
    check_deepspeed(config, settings_of("zero2_offload"))
    assert f"this run waits for {lock}: if no other one is compiling" in caplog.text
