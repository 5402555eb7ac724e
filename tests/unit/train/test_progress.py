"""What a run shows: its line while it runs, the split of its time, the report it leaves, and who else is told."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import struct
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_pdrop.config.load import load_config
from llava_pdrop.errors import ConfigError
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.runtime.clock import TIME_PARTS, StepClock
from llava_pdrop.train import arguments, checks, metrics, report, trainer
from llava_pdrop.train.arguments import prepare_reporting
from llava_pdrop.train.metrics import METRICS_FILE, Progress, StepMeter, describe, read_metrics
from llava_pdrop.train.report import PICTURE_FILE, TITLES, TRAINING_FILE, time_split, write_report
from llava_pdrop.train.run import train
from llava_pdrop.types import PackedBatch
from tests.faults.processes import run_ranks
from tests.messages import says
from tests.tiny import PYRAMID, make_tiny_hf, mixed_samples

CPU = torch.device("cpu")
DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
LOGS = {
    "loss": 1.23456, "learning_rate": 2e-5, "tokens_per_second": 41234.5, "image_tokens_0": 576.0,
    "image_tokens_1": 288.0, "mfu": 0.412, "peak_cuda_mib": 62771.0, "peak_rss_mib": 9.0, "data_wait_share": 0.0123,
}  # fmt: skip


def test_the_line_says_what_is_known():
    assert describe(LOGS) == (
        "loss 1.2346, lr 2.0e-05, 41,234 tokens/s, MFU 41.2%, data wait 1.2%, GPU memory 61.3 GiB, image tokens 576>288"
    )
    assert describe({"loss": 2.0, "peak_rss_mib": 512}) == "loss 2.0000, memory 0.5 GiB"


def test_into_a_file_go_few_lines_with_the_time_left(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
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
    model = PyramidLlava(make_tiny_hf(), PYRAMID).train()
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
    assert set(seconds) == set(TIME_PARTS) - {"optimizer"}
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
    assert set(split) == {*TIME_PARTS, "data", "rest"} == set(TITLES) and all(value > 0 for value in split.values())
    parts = sum(split.values()) - split["data"] - split["rest"]
    assert parts <= 1.05 * sum(row["step_seconds"] for row in rows) / 3
    passed = [row["data_seconds"] / row["data_wait_share"] for row in rows]
    assert sum(split.values()) == pytest.approx(sum(passed) / 3, rel=1e-6)
    text = (output / TRAINING_FILE).read_text()
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


ROW = {"loss": 2.0, "tokens_per_second": 5.0, "step_seconds": 0.5, "tokens_0": 7.0, "image_tokens_0": 0.0}


def test_samples_count_the_same_in_every_row(tmp_path):
    rows = [{**ROW, "step": 1, "samples": 1.0, "tokens_0": 100.0}, {**ROW, "step": 2, "samples": 3.0, "tokens_0": 20.0}]
    assert "| 0 | 40.0 | 0.0 |" in write_report_of(tmp_path, rows).read_text()


def test_a_run_of_one_step_has_a_picture(tmp_path):
    text = write_report_of(tmp_path, [{**ROW, "step": 1}]).read_text()
    assert "| steps | 1 |" in text and "2.0000 and 2.0000" in text
    loss = np.asarray(Image.open(tmp_path / PICTURE_FILE).convert("L"))[60:430, 100:700]
    assert (loss < 100).sum() > 20  # the dark dot of the only loss


def test_all_text_of_the_picture_is_in_it(tmp_path, monkeypatch):
    """Also that of the longest legend."""
    times = {f"{part}_seconds": 1.0 for part in TITLES}
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    write_report_of(tmp_path, [{**ROW, **times, "step": step} for step in (1, 2)])
    (figure,) = figures
    for axes in figure.axes:
        for text in (axes.title, *(axes.get_legend().get_texts() if axes.get_legend() else ())):
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1, text


def test_metrics_of_a_run_that_logs_seldom_are_whole(tiny_config, capsys):
    """Five steps, a line every two: the fifth has one too. And both are on the screen of somebody who redirects it."""
    run = {"max_steps": 5, "logging_steps": 2, "learning_rate": 1e-3, "use_cpu": True, "save_strategy": "no"}
    output = train(load_config(tiny_config(train=run, pyramid_drop=DROP)))
    rows = [row for row in read_metrics(output / METRICS_FILE) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(shown) == 2 and shown[0].startswith("step 2/5, ") and shown[1].startswith("step 5/5, 00:00 left, loss ")
    assert "image tokens 16>8>4>2" in shown[1] and "data wait" in shown[1]


ON_SCREEN = {**LOGS, **{f"image_tokens_{i}": tokens for i, tokens in enumerate((2880.0, 1440.0, 720.0, 360.0))}}


@pytest.mark.parametrize(
    ("columns", "last"),
    [
        (30, ", 00:00 left"),
        (60, ", lr 2.0e-05"),
        (80, ", 41,234 tokens/s"),
        (100, ", data wait 1.2%"),
        (130, ", GPU memory 61.3 GiB"),
        (160, ", image tokens 2880>1440>720>360"),
    ],
)
def test_on_a_terminal_it_is_one_line_with_what_matters_first(monkeypatch, columns, last):
    """Without a bar. What does not fit falls away in whole numbers, the least important ones first."""
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        shown = Progress()
        state = SimpleNamespace(global_step=5195, max_steps=5197, is_world_process_zero=True)
        shown.on_train_begin(None, state, None)
        for state.global_step in (5196, 5197):
            shown.on_step_end(None, state, None)
            shown.on_log(None, state, None, logs=ON_SCREEN)
        shown.on_train_end(None, state, None)
        written = ""
        while not written.endswith("\n"):  # a terminal hands on what it gets in pieces; the end of a run is a new line
            written += os.read(screen, 65536).decode()
    os.close(screen)
    lines = written.rstrip("\r\n").split("\r")
    assert max(len(line) for line in lines) < columns and "\n" not in written.rstrip("\r\n")
    whole = f"step 5197/5197, 00:00 left, {describe(ON_SCREEN)}"
    assert lines[-1].rstrip() == whole[: whole.index(last) + len(last)]


def test_only_the_first_rank_shows_it(tiny_config):
    run = {"max_steps": 2, "learning_rate": 1e-3, "use_cpu": True, "save_strategy": "no"}
    config = tiny_config(train=run, pyramid_drop=DROP)
    ended = run_ranks(config, ranks=2, limit=300)
    assert ended.codes == [0, 0], ended.texts
    assert "step 2/2" in ended.texts[0] and "step 2/2" not in ended.texts[1]
    row = read_metrics(Path(load_config(config).output_dir) / METRICS_FILE)[1]
    assert row["samples"] == 4 and row["image_tokens_1"] == 8  # of both ranks
    passed = row["data_seconds"] / row["data_wait_share"]
    assert row["tokens_per_second"] == pytest.approx(row["samples"] * row["tokens_0"] / passed)
    assert sum(row[f"{part}_seconds"] for part in TITLES) == pytest.approx(passed)


def test_mfu_counts_every_micro_batch_of_the_run(tiny_config, monkeypatch):
    """Micro-batches of one step, and what is not logged in every step; dropped tokens are no work."""
    monkeypatch.setattr(trainer, "peak_of", lambda args: 1e9)
    total = {}
    run = {"max_steps": 3, "logging_steps": 2, "learning_rate": 1e-3, "use_cpu": True, "save_strategy": "no"}
    run |= {"gradient_accumulation_steps": 2, "disable_tqdm": True}
    for name, sections in (("whole", {}), ("dropped", {"pyramid_drop": DROP})):
        output = train(load_config(tiny_config(name, train=run, **sections)))
        *rows, last = read_metrics(output / METRICS_FILE)
        assert [row["step"] for row in rows] == [2, 3]
        seconds = [row["data_seconds"] / row["data_wait_share"] * steps for row, steps in zip(rows, (2, 1))]
        work = sum(row["mfu"] * passed * 1e9 for row, passed in zip(rows, seconds))
        assert work == pytest.approx(last["total_flos"], rel=1e-6)
        total[name] = work
        assert "| MFU, median |" in (output / TRAINING_FILE).read_text()
    assert total["dropped"] < 0.95 * total["whole"]


def test_the_report_of_a_resumed_run_is_of_all_of_it(tiny_config):
    run = {"learning_rate": 1e-3, "use_cpu": True, "save_strategy": "steps", "save_steps": 1, "disable_tqdm": True}
    for steps in (2, 4):
        output = train(load_config(tiny_config(train={**run, "max_steps": steps})))
    rows = read_metrics(output / METRICS_FILE)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    text = (output / TRAINING_FILE).read_text()
    assert "| steps | 4 |" in text and f"{rows[0]['loss']:.4f} and" in text


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
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: object())
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


def test_a_service_that_is_unknown_or_not_installed_is_one_line(tiny_config, monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    config = load_config(tiny_config(), ["train.report_to=wandb"])
    with pytest.raises(ConfigError, match=says("run.yaml", "train.report_to", "wandb", "installed")):
        checks.check_reporting(config)
    for service, line in (("wanbd", "'wanbd'.*wandb"), ("mlflow", "mlflow.*installed")):
        with pytest.raises(ConfigError, match=rf"run\.yaml: train\.report_to: .*{line}"):
            checks.check_reporting(load_config(tiny_config(), [f"train.report_to=[{service}]"]))
