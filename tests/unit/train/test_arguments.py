"""From the config to the Trainer's arguments: where metrics are reported to, and a warning of locks."""

from __future__ import annotations

import json
import logging
import re
import sys
from types import SimpleNamespace

import pytest
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from llava_pdrop.__main__ import main
from llava_pdrop.config.load import load_config
from llava_pdrop.train import arguments, checks
from llava_pdrop.train.arguments import prepare_reporting, warn_of_locks
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from llava_pdrop.train.run import train
from tests.engines import deepspeed_arguments
from tests.messages import says


@pytest.fixture
def settings_of(tmp_path):
    """The part of the training arguments that ``train.deepspeed`` makes, of a file of ``configs/deepspeed``."""

    def read(name: str, **zero) -> SimpleNamespace:
        file = deepspeed_arguments(name, tmp_path)["deepspeed"]
        content = json.loads((tmp_path / f"{name}.json").read_text())
        content["zero_optimization"].update(zero)
        return SimpleNamespace(deepspeed=file, hf_deepspeed_config=HfDeepSpeedConfig(content))

    return read


def test_a_compilation_that_nobody_finishes_is_named(settings_of, tmp_path, monkeypatch, caplog):
    """PyTorch waits for its end without a word."""
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    warn_of_locks(settings_of("zero2_offload"))
    lock.touch()
    warn_of_locks(settings_of("zero2"))
    assert not caplog.messages
    warn_of_locks(settings_of("zero2_offload"))
    assert re.search(says(str(lock), "compiling"), caplog.text)


DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}


@pytest.fixture
def reporting(tiny_config, monkeypatch, tmp_path):
    """Calls `prepare_reporting` with W&B there and no key, and returns the environment it leaves."""
    for name in (
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_PROJECT",
        "WANDB_DIR",
        "TENSORBOARD_LOGGING_DIR",
        "WANDB_BASE_URL",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: object())
    config = load_config(tiny_config())

    def prepare(*services: str) -> dict[str, str]:
        prepare_reporting(SimpleNamespace(report_to=list(services), output_dir=config.output_dir, run_name=config.name))
        return {name: value for name, value in arguments.os.environ.items() if name.startswith(("WANDB", "TENSORB"))}

    prepare.config = config
    return prepare


def test_wandb_without_a_key_is_offline_and_nobodys(reporting, caplog):
    with caplog.at_level(logging.WARNING):
        found = reporting("wandb")
    output = reporting.config.output_dir
    assert found == {"WANDB_MODE": "offline", "WANDB_PROJECT": "llava_pdrop", "WANDB_DIR": output}
    assert "W&B has no key" in caplog.text


def test_wandb_with_a_key_or_a_mode_is_left_alone(reporting, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert "WANDB_MODE" not in reporting("wandb") and reporting("wandb")["WANDB_PROJECT"] == "mine"
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    assert "WANDB_MODE" not in reporting("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert reporting("wandb")["WANDB_MODE"] == "disabled"


def test_tensorboard_writes_beside_the_run_and_nothing_else_is_touched(reporting):
    assert reporting() == {}
    assert reporting("tensorboard") == {"TENSORBOARD_LOGGING_DIR": f"{reporting.config.output_dir}/tensorboard"}


SERVICES = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR", "WANDB_ENTITY", "TENSORBOARD_LOGGING_DIR")


@pytest.fixture
def nobodys_services(monkeypatch, tmp_path):
    """A machine on which nobody has set up anything; what a run sets is taken back."""
    for name in SERVICES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail(f"asked {question}"))


def test_tensorboard_gets_all_metrics(tiny_config, nobodys_services):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = train(load_config(tiny_config(pyramid_drop=DROP), ["train.report_to=[tensorboard]"]))
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    rows = [row for row in read_metrics(output / METRICS_FILE) if "loss" in row]
    names = set(rows[0]) - {"step", "time", "epoch"}
    assert {"tokens_per_second", "image_tokens_3", "ranking_seconds", "data_wait_share"} <= names
    for name in names:
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows], name


def test_wandb_gets_all_metrics_on_the_disk(tiny_config, nobodys_services):
    pytest.importorskip("wandb", reason="W&B is not installed")
    import wandb

    output = train(load_config(tiny_config(pyramid_drop=DROP), ["train.report_to=[wandb]"]))
    wandb.finish()
    wandb.teardown()
    (run,) = (output / "wandb").glob("offline-run-*/run-*.wandb")
    content = run.read_bytes()
    rows = [row for row in read_metrics(output / METRICS_FILE) if "loss" in row]
    for name in set(rows[0]) - {"step", "time", "epoch"}:
        assert f"train/{name}".encode() in content, name
    for row in rows:
        assert str(row["loss"]).encode() in content
    assert b"llava_pdrop" in content


@pytest.mark.parametrize("service", ["tensorboard", "wandb"])
def test_every_training_of_a_process_has_its_own_place(tiny_config, nobodys_services, service):
    """As stage 1 and stage 2 of one command have."""
    pytest.importorskip(service, reason=f"{service} is not installed")
    for name in ("first", "second"):
        output = train(load_config(tiny_config(name), [f"train.report_to=[{service}]"]))
        assert len(list((output / service).glob("*tfevents*" if service == "tensorboard" else "offline-run-*"))) == 1
    if service == "wandb":
        sys.modules["wandb"].finish()
        sys.modules["wandb"].teardown()


@pytest.mark.parametrize("place", ["file", "command line"])
def test_a_secret_is_refused_and_not_repeated(tiny_config, tmp_path, place, capsys):
    """It would be saved in clear with every checkpoint."""
    file, words = tiny_config(), ["train.hub_token=hf_mysecret"]
    if place == "file":
        content = json.loads(file.read_text())
        content["train"]["hub_token"] = "hf_mysecret"
        file.write_text(json.dumps(content))
        words = []
    assert main(["train", str(file), *words]) == 2
    said = capsys.readouterr().err
    assert re.search(says("train.hub_token", "secret", "HF_TOKEN"), said) and "hf_mysecret" not in said
    assert load_config(tiny_config(), ["train.hub_token=null"]).train.arguments["hub_token"] is None


@pytest.mark.parametrize(("word", "key"), [
    ("train.deepspeed={comet: {api_key: hf_mysecret}}", "train.deepspeed.comet.api_key"),
    ("train.lr_scheduler_kwargs={token: hf_mysecret}", "train.lr_scheduler_kwargs.token"),
    ("train.optim_args='lr=1,token=hf_mysecret'", "train.optim_args.token"),
    ('train.accelerator_config=\'{"hub_token": "hf_mysecret"}\'', "train.accelerator_config.hub_token"),
    ("train.deepspeed={comet:{api_key: hf_mysecret}}", "train.deepspeed"),
])  # fmt: skip
def test_a_secret_within_an_argument_is_one_too(tiny_config, capsys, word, key):
    assert main(["train", str(tiny_config()), word]) == 2
    said = capsys.readouterr().err
    assert re.search(says(key), said) and "hf_mysecret" not in said
    assert load_config(tiny_config(), ["train.optim_args='a=1,tokens=2'"]).train.arguments["optim_args"]


def test_a_secret_in_a_line_that_cannot_be_read_is_not_repeated(tiny_config, capsys):
    assert main(["train", str(tiny_config()), "train.hub_token=hf_mysecret", "train.max_steps={"]) == 2
    said = capsys.readouterr().err
    assert re.search(says("train.max_steps={"), said) and "hf_mysecret" not in said
