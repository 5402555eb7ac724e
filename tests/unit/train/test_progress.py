"""What a run shows: its line while it runs, the split of its time, the report it leaves, and who else is told."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava_pdrop.config import ConfigError, load_config
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.train import arguments, progress
from llava_pdrop.train.arguments import prepare_reporting, training_arguments
from llava_pdrop.train.clock import PARTS, StepClock
from llava_pdrop.train.metrics import METRICS_FILE, StepMeter, read_metrics
from llava_pdrop.train.progress import Progress, describe
from llava_pdrop.train.report import PICTURE_FILE, REPORT_FILE, time_split, write_report
from llava_pdrop.train.run import train
from llava_pdrop.types import PackedBatch
from tests.tiny import PYRAMID, make_tiny_host, mixed_samples

CPU = torch.device("cpu")
DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
LOGS = {
    "loss": 1.23456, "learning_rate": 2e-5, "tokens_per_second": 41234.5, "image_tokens_0": 576.0,
    "image_tokens_1": 288.0, "mfu": 0.412, "peak_cuda_mib": 62771.0, "peak_rss_mib": 9.0, "data_wait_share": 0.0123,
}  # fmt: skip


def test_the_line_says_what_is_known():
    assert describe(LOGS) == (
        "loss 1.2346, lr 2.0e-05, 41,234 tokens/s, image tokens 576>288, MFU 41.2%, GPU memory 61.3 GiB, data wait 1.2%"
    )
    assert describe({"loss": 2.0, "peak_rss_mib": 512}) == "loss 2.0000, memory 0.5 GiB"


def test_into_a_file_go_few_lines_with_the_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    shown = Progress()
    state = SimpleNamespace(global_step=10, max_steps=50, is_world_process_zero=True)  # resumed at 10
    shown.on_train_begin(None, state, None)
    for step in range(11, 51):
        state.global_step = step
        now[0] += 4.0
        shown.on_log(None, state, None, logs={"loss": 1.0})
    shown.on_log(None, state, None, logs={"train_runtime": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 11/50, 02:36 left, loss 1.0000"
    assert [line.split(",")[0] for line in lines] == [
        "step 11/50",
        "step 19/50",
        "step 27/50",
        "step 35/50",
        "step 43/50",
        "step 50/50",
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_part_of_a_step_is_measured_once(checkpointing, monkeypatch):
    """A clock that ticks at every look at it: a part that is entered n times has n ticks or more; recomputed layers in
    the backward pass are not taken for another forward."""
    model = PyramidLlava(make_tiny_host(), PYRAMID).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    clock = StepClock(model, CPU)
    clock.forward_begins()
    output = model(PackedBatch.pack(mixed_samples()))
    clock.forward_ends()
    entered = [name for name, _, _ in clock._closed]
    assert entered == ["tower", "ranking", "ranking", "ranking", "decoder", "forward"]
    clock.begins("backward")
    output.loss.backward()
    clock.ends("backward")
    assert [name for name, _, _ in clock._closed][len(entered):] == ["backward"]  # fmt: skip
    whole = sum(stop - start for name, start, stop in clock._closed if name in ("forward", "backward"))
    seconds = clock.drain()
    assert sum(seconds.values()) == pytest.approx(whole) and all(value > 0 for value in seconds.values())
    assert set(seconds) == set(PARTS) - {"optimizer"}
    assert clock.drain() == {}


def test_mfu_is_work_by_time_and_peak(monkeypatch):
    meter = StepMeter(CPU, peak_flops=1e12)
    meter.steps, meter.flops = 2, 3e12
    monkeypatch.setattr("llava_pdrop.train.metrics.time.perf_counter", lambda: meter._drained + 4.0)
    assert meter.drain(lambda numbers: [2 * number for number in numbers], ranks=2)["mfu"] == pytest.approx(0.75)
    assert "mfu" not in StepMeter(CPU).drain()


def test_a_run_leaves_a_report_of_what_it_measured(tiny_config):
    output = train(load_config(tiny_config(pyramid_drop=DROP)))
    rows = read_metrics(output / METRICS_FILE)[:3]
    split = time_split(rows)
    assert set(split) == {*PARTS, "data"} and all(value > 0 for value in split.values())
    assert sum(split.values()) - split["data"] <= 1.05 * sum(row["step_seconds"] for row in rows) / 3
    text = (output / REPORT_FILE).read_text()
    assert "| steps | 3 |" in text and "| 3 | " in text and "ranking and dropping" in text
    assert "MFU" not in text  # a CPU has no published peak
    assert Image.open(output / PICTURE_FILE).width > 500


def test_what_was_not_measured_is_not_in_the_report(tmp_path):
    row = {
        "step": 1,
        "loss": 2.0,
        "tokens_per_second": 5.0,
        "step_seconds": 0.5,
        "tokens_0": 7.0,
        "image_tokens_0": 0.0,
    }
    assert write_report_of(tmp_path, []) is None
    text = write_report_of(tmp_path, [row, {**row, "step": 2, "loss": 1.0}]).read_text()
    assert "optimizer" not in text and "memory" not in text and "2.0000 and 1.0000" in text


def write_report_of(directory, rows):
    (directory / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_report(directory, "name")


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
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: object())
    config = load_config(tiny_config())

    def prepare(*services: str) -> dict[str, str]:
        prepare_reporting(config, SimpleNamespace(report_to=list(services)))
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


def test_a_service_that_is_not_installed_is_one_line(tiny_config, monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    config = load_config(tiny_config(), ["train.report_to=wandb"])
    with pytest.raises(ConfigError, match=r"run\.yaml: train\.report_to: wandb is not installed: pip install wandb"):
        training_arguments(config)
