"""The meter, the metrics file, and the line that a run shows."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_pdrop.config.load import load_config
from llava_pdrop.model.vlm import Output
from llava_pdrop.runtime.clock import TIME_PARTS
from llava_pdrop.train import metrics, trainer
from llava_pdrop.train.checkpoints import what_is_torn
from llava_pdrop.train.history import FINISHED_FILE
from llava_pdrop.train.metrics import METRICS_FILE, MetricsFile, Progress, StepMeter, describe, read_metrics, steps_of
from llava_pdrop.train.report import TITLES, TRAINING_FILE, per_sample, time_split
from llava_pdrop.train.run import train
from tests.faults.processes import run_ranks
from tests.messages import says

CPU = torch.device("cpu")
FULL = Path("/dev/full")
needs_full_disk = pytest.mark.skipif(not FULL.is_char_device(), reason="the system has no /dev/full")
SAID = " " + says("No space left on device", "room", "checkpoint") + r"[^\n]*$"


def output(tokens: list[int], image_tokens: list[int]) -> Output:
    return Output(torch.zeros(()), 1, [[count] for count in tokens], image_tokens)


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, as a list of one number that a test moves."""
    value = [100.0]
    monkeypatch.setattr("llava_pdrop.train.metrics.time.perf_counter", lambda: value[0])
    monkeypatch.setattr("llava_pdrop.train.metrics.time.process_time", lambda: value[0] / 2)
    return value


def test_meter_averages_per_step_and_per_sample(now):
    meter = StepMeter(CPU)
    for _ in range(2):
        with meter.fetching():
            now[0] += 1.0
        meter.on_step_begin(None, None, None)
        meter.count(3, output([30, 20], [12, 6]))
        meter.count(1, output([10, 8], [4, 2]))
        now[0] += 4.0
        meter.on_step_end(None, None, None)
    metrics = meter.drain()
    assert (metrics["samples"], metrics["tokens_0"], metrics["tokens_1"]) == (4, 10, 7)
    assert (metrics["image_tokens_0"], metrics["image_tokens_1"]) == (4, 2)
    assert (metrics["step_seconds"], metrics["step_cpu_seconds"], metrics["data_seconds"]) == (4.0, 2.0, 1.0)
    assert metrics["tokens_per_second"] == 80 / 10 and metrics["data_wait_share"] == 2 / 10
    assert meter.drain()["samples"] == 0


def test_meter_adds_up_to_the_time_that_passed(now):
    """Of two ranks that are alike but for the data: the other one waited for them 3 seconds longer, this one for it."""
    measured = {"tower": 1.0, "decoder": 2.0, "backward": 3.0, "optimizer": 0.5}
    meter = StepMeter(CPU, SimpleNamespace(drain=lambda: measured))
    with meter.fetching():
        now[0] += 1.0
    meter.on_step_begin(None, None, None)
    meter.count(2, output([20], [8]))
    now[0] += 10.0
    meter.on_step_end(None, None, None)
    metrics = meter.drain(lambda mine: [2 * n + 3.0 * (place == 2) for place, n in enumerate(mine)], ranks=2)
    assert metrics["data_seconds"] == (1.0 + 4.0) / 2 and metrics["data_wait_share"] == 2.5 / 11.0
    assert {part: metrics[f"{part}_seconds"] for part in measured} == measured
    assert {f"{part}_seconds" for part in TIME_PARTS} & metrics.keys() == {f"{part}_seconds" for part in measured}
    assert metrics["rest_seconds"] == 11.0 - 2.5 - sum(measured.values())
    assert metrics["tokens_per_second"] == 40 / 11.0


def test_meter_sums_over_ranks():
    meter = StepMeter(CPU)
    meter.on_step_begin(None, None, None)
    meter.count(2, output([20], [8]))
    meter.on_step_end(None, None, None)
    metrics = meter.drain(lambda numbers: [2 * number for number in numbers])
    assert (metrics["samples"], metrics["tokens_0"], metrics["image_tokens_0"]) == (4, 10, 4)


def test_file_forgets_what_a_resumed_run_does_again(tmp_path):
    file = MetricsFile(tmp_path)

    def state(step: int) -> SimpleNamespace:
        return SimpleNamespace(global_step=step, is_world_process_zero=True)

    file.on_train_begin(None, state(0), None)
    for step in (1, 2, 3):
        file.on_log(None, state(step), None, logs={"loss": float(step)})
    file.on_train_begin(None, state(2), None)
    file.on_log(None, state(3), None, logs={"loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(file.file)] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    with file.file.open("a") as lines:
        lines.write('{"step": 4, "lo')
    assert len(read_metrics(file.file)) == 3
    file.on_train_begin(None, state(0), None)
    assert read_metrics(file.file) == []


@needs_full_disk
def test_a_line_that_has_no_room_ends_the_run(tiny_config, monkeypatch):
    """The disk is full at the third of four steps; the checkpoint of the second is whole, and goes on to the end."""
    section = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "use_cpu": True, "disable_tqdm": True}
    config = load_config(tiny_config(train=section))
    output = Path(config.output_dir)
    original = MetricsFile.on_log

    def full(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.file.rename(self.file.with_suffix(".before"))
            self.file.symlink_to(FULL)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(MetricsFile, "on_log", full)
    with pytest.raises(ValueError, match=f"^{output / METRICS_FILE}{SAID}"):
        train(config)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert what_is_torn(output / "checkpoint-2") is None
    monkeypatch.undo()
    (output / METRICS_FILE).with_suffix(".before").replace(output / METRICS_FILE)
    train(config)
    assert [row["step"] for row in read_metrics(output / METRICS_FILE) if "loss" in row] == [1, 2, 3, 4]


@needs_full_disk
def test_a_mark_that_has_no_room_is_named(tiny_config):
    section = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "use_cpu": True, "disable_tqdm": True}
    config = load_config(tiny_config(train=section))
    output = Path(config.output_dir)
    output.mkdir(parents=True)
    written = output / f"{FINISHED_FILE}.{os.getpid()}.partial"
    written.symlink_to(FULL)
    with pytest.raises(ValueError, match=f"^{output / FINISHED_FILE}{SAID}"):
        train(config)
    assert what_is_torn(output / "checkpoint-2") is None
    assert not written.is_symlink(), "nothing is left of it"
    train(config)
    assert json.loads((output / FINISHED_FILE).read_text())["resumed_from"].endswith("checkpoint-2")


def test_the_last_step_is_logged_in_any_case(tmp_path):
    file = MetricsFile(tmp_path)
    logged = []
    for step in (1, 2, 3):
        control = SimpleNamespace(should_log=False)
        file.on_step_end(None, SimpleNamespace(global_step=step, max_steps=3), control)
        logged.append(control.should_log)
    assert logged == [False, False, True]


def test_a_log_line_counts_for_as_many_steps_as_it_is_of(now):
    """The report of a run that logs every 3rd of its 7 steps is that of one that logs every step."""

    def rows_of(every: int) -> list[dict]:
        meter, rows = StepMeter(CPU, SimpleNamespace(drain=lambda: {"backward": seconds["backward"]})), []
        seconds = {"backward": 0.0}
        for step in range(1, 8):
            meter.on_step_begin(None, None, None)
            meter.count(step, output([10 * step * step, 5 * step], [4 * step, step]))
            now[0] += step
            seconds["backward"] += step / 2
            meter.on_step_end(None, None, None)
            if step % every == 0 or step == 7:
                rows.append({"step": step, **meter.drain()})
                seconds["backward"] = 0.0
        return rows

    single, several = rows_of(1), rows_of(3)
    assert steps_of(single) == [1] * 7 and steps_of(several) == [3, 3, 1]
    for key in ("tokens_0", "tokens_1", "image_tokens_0"):
        assert per_sample(several, key) == pytest.approx(per_sample(single, key))
    assert time_split(several) == pytest.approx(time_split(single))
    assert time_split(single) == pytest.approx({"backward": 2.0, "data": 0.0, "rest": 2.0})


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


def test_mfu_is_work_by_time_and_peak(monkeypatch):
    meter = StepMeter(CPU, peak_flops=1e12)
    meter.steps, meter.flops = 2, 3e12
    monkeypatch.setattr("llava_pdrop.train.metrics.time.perf_counter", lambda: meter._drained + 4.0)
    assert meter.drain(lambda numbers: [2 * number for number in numbers], ranks=2)["mfu"] == pytest.approx(0.75)
    assert "mfu" not in StepMeter(CPU).drain()


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
