"""Of two keys that cancel each other the one nearer to the user wins, and one line says so."""

from __future__ import annotations

import json
import re

import pytest

from llava_pdrop.config import nearer
from llava_pdrop.config.load import load_config
from llava_pdrop.train.arguments import endless_warmup, training_arguments
from tests.messages import says


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(nearer, "_said", set())


@pytest.fixture
def files(tiny_config, tmp_path):
    """(base, child) writer: a config that inherits another."""

    def write(base: dict, child: dict):
        common = {"use_cpu": True, "disable_tqdm": True}
        file = tiny_config("base", train={**common, **base})
        (tmp_path / "child.yaml").write_text(json.dumps({"base": file.name, "train": child}))
        return tmp_path / "child.yaml"

    return write


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(("base", "child", "words", "found", "said"), [
    ({"max_steps": 60}, {}, ["train.num_train_epochs=3"], {"max_steps": -1, "num_train_epochs": 3},
     says("train.num_train_epochs=3", "command line", "train.max_steps=60", "base.yaml")),
    ({"max_steps": 60}, {"num_train_epochs": 2}, [], {"max_steps": -1, "num_train_epochs": 2},
     says("train.num_train_epochs=2", "child.yaml", "train.max_steps=60", "base.yaml")),
    ({"num_train_epochs": 1}, {}, ["train.max_steps=20"], {"max_steps": 20, "num_train_epochs": 1},
     says("train.max_steps=20", "command line", "train.num_train_epochs=1", "base.yaml")),
    ({"max_steps": 5, "num_train_epochs": 1}, {}, [], {"max_steps": 5}, says("train.max_steps=5", "base.yaml")),
    ({"save_strategy": "no"}, {}, ["train.save_steps=2"], {"save_strategy": "steps", "save_steps": 2},
     says("train.save_steps=2", "command line", "train.save_strategy=no", "base.yaml")),
    ({"lr_scheduler_type": "constant"}, {}, ["train.warmup_steps=3"], {"lr_scheduler_type": "constant_with_warmup"},
     says("train.warmup_steps=3", "command line", "train.lr_scheduler_type=constant", "base.yaml")),
    ({"logging_strategy": "epoch"}, {"logging_steps": 5}, [], {"logging_strategy": "steps"},
     says("train.logging_steps=5", "child.yaml", "train.logging_strategy=epoch")),
])  # fmt: skip
def test_the_nearer_key_wins_and_that_is_said(files, caplog, base, child, words, found, said):
    file = files(base, child)
    for _ in range(2):  # once, however often it is read
        config = load_config(file, words)
    assert found.items() <= config.train.arguments.items()
    assert len(lines(caplog)) == 1 and re.search(said, lines(caplog)[0])


@pytest.mark.parametrize(("base", "child", "words"), [
    ({"max_steps": 60}, {"max_steps": 7}, []),
    ({"max_steps": -1}, {"num_train_epochs": 2}, []),
    ({"save_steps": 5}, {"save_strategy": "no"}, []),
    ({"max_steps": 60}, {}, ["train.max_steps=-1", "train.num_train_epochs=1"]),
])  # fmt: skip
def test_what_does_not_cancel_is_not_mentioned(files, caplog, base, child, words):
    load_config(files(base, child), words)
    assert lines(caplog) == []


@pytest.mark.parametrize(("train", "steps", "said"), [
    ({"max_steps": 4, "warmup_steps": 10}, 100, says("train.warmup_steps=10", "4 steps", "0.001")),
    ({"num_train_epochs": 2, "warmup_steps": 6}, 3, says("train.warmup_steps=6", "6 steps")),
    ({"max_steps": 11, "warmup_steps": 10}, 3, None),
    ({"max_steps": 4, "warmup_steps": 0.5}, 3, None),
    ({"max_steps": 1, "warmup_steps": 0.03}, 3, None),
    ({"max_steps": 4, "warmup_steps": 10, "lr_scheduler_type": "constant"}, 100, None),
])  # fmt: skip
def test_a_learning_rate_that_never_arrives_is_said(tiny_config, train, steps, said):
    common = {"learning_rate": 1e-3, "use_cpu": True, "save_strategy": "no"}
    args = training_arguments(load_config(tiny_config(train={**common, **train})))
    line = endless_warmup(args, steps)
    assert line is None if said is None else re.search(said, line)
