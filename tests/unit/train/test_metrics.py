"""The meter and the metrics file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_pdrop.config.load import load_config
from llava_pdrop.model.vlm import Output
from llava_pdrop.runtime.clock import TIME_PARTS
from llava_pdrop.runtime.device import peak_memory, reset_peak_memory
from llava_pdrop.train.checkpoints import what_is_torn
from llava_pdrop.train.history import FINISHED_FILE
from llava_pdrop.train.metrics import METRICS_FILE, MetricsFile, StepMeter, read_metrics, steps_of
from llava_pdrop.train.report import PICTURE_FILE, TRAINING_FILE, per_sample, time_split
from llava_pdrop.train.run import train
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
    metrics = meter.drain(lambda mine: [2 * n + 3.0 * (place == 3) for place, n in enumerate(mine)], ranks=2)
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
@pytest.mark.parametrize("name", [TRAINING_FILE, PICTURE_FILE, FINISHED_FILE])
def test_a_file_of_a_run_that_has_no_room_is_named(tiny_config, name):
    section = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "use_cpu": True, "disable_tqdm": True}
    config = load_config(tiny_config(train=section))
    output = Path(config.output_dir)
    output.mkdir(parents=True)
    written = (output / name).with_suffix(".partial") if name == FINISHED_FILE else output / name
    written.symlink_to(FULL)
    with pytest.raises(ValueError, match=f"^{output / name}{SAID}"):
        train(config)
    assert what_is_torn(output / "checkpoint-2") is None
    written.unlink()
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


def test_peak_memory_sees_a_large_tensor():
    reset_peak_memory()
    before = peak_memory(CPU)["peak_rss_mib"]
    tensor = torch.ones(64 * 2**20 // 4)
    assert peak_memory(CPU)["peak_rss_mib"] >= before + 40 or before > 2000
    assert tensor.sum() > 0
    assert peak_memory(CPU)["peak_rss_mib"] == pytest.approx(peak_memory(CPU)["peak_rss_mib"], rel=0.1)
