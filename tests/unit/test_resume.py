"""A run that is killed or told to stop, and started again, ends with the bits of the run that never stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_pdrop.config.load import load_config
from llava_pdrop.runtime.preemption import NOTE_FILE, PREEMPTED_EXIT
from llava_pdrop.runtime.watchdog import DIRECTORY
from llava_pdrop.train.checkpoints import step_of, what_is_torn
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from tests.engines import FSDP2, deepspeed_arguments, needs_deepspeed
from tests.faults.processes import Fault, run_ranks
from tests.messages import says

ROOT = Path(__file__).resolve().parents[2]
KILLED = -9
STEPS = 8
"""Of 4 optimizer steps an epoch with 1 process, so that runs are cut in the second epoch too."""


@pytest.fixture
def make_run(tiny_config):
    def make(name: str, ranks: int = 1, **train) -> Path:
        arguments = {
            "max_steps": STEPS, "save_steps": 2, "save_strategy": "steps", "save_total_limit": 2,
            "gradient_accumulation_steps": 2 // ranks, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True,
            "learning_rate": 1e-2, **train,
        }  # fmt: skip
        drop = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125], "ranker": "random"}  # draws random numbers
        file = tiny_config(name, train=arguments, pyramid_drop=drop)
        plain = json.loads(file.read_text())
        file.write_text(json.dumps({**plain, "data": {**plain["data"], "samples_per_batch": 2}}))
        return file

    return make


def output_of(config: Path) -> Path:
    return Path(load_config(config).output_dir)


def losses(config: Path) -> list[tuple[int, float, float]]:
    rows = read_metrics(output_of(config) / METRICS_FILE)
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def assert_same_end(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    a, b = (load_file(output_of(config) / "model.safetensors") for config in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(("ranks", "faults"), [
    (1, [Fault("kill_forward", 4), Fault("kill_writing", 6), Fault("kill_renaming", 8)]),
    (1, [Fault("kill_logging", 7)]),
    (2, [Fault("kill_forward", 5, rank=1), Fault("kill_writing", 6)]),
])  # fmt: skip
def test_killed_and_resumed_equals_never_stopped(make_run, ranks, faults):
    whole, cut = make_run("whole", ranks), make_run("cut", ranks)
    ended = run_ranks(whole, ranks=ranks)
    assert ended.codes == [0] * ranks, ended.texts
    for fault in faults:
        ended = run_ranks(cut, ranks=ranks, fault=fault)
        assert ended.codes[fault.rank] == KILLED, ended.texts
    ended = run_ranks(cut, ranks=ranks)
    assert ended.codes == [0] * ranks, ended.texts
    assert "resuming from" in ended.texts[0]
    assert_same_end(whole, cut)
    assert not (output_of(cut) / ".partial").exists()


def test_losses_between_two_log_lines_survive_an_interruption(make_run):
    """Step 4 is saved in the middle of the three steps whose mean is logged at 6."""
    whole, cut = make_run("whole", logging_steps=3), make_run("cut", logging_steps=3)
    run_ranks(whole)
    assert run_ranks(cut, fault=Fault("kill_forward", 5)).codes == [KILLED]
    assert run_ranks(cut).codes == [0]
    assert [row[0] for row in losses(whole)] == [3, 6, 8]
    assert_same_end(whole, cut)


@pytest.mark.parametrize(("kind", "ranks", "workers"), [("sigterm_all", 1, 2), ("sigusr1", 2, 0)])
def test_a_signal_saves_after_the_step_and_ends_with_its_own_code(make_run, kind, ranks, workers):
    whole, cut = make_run("whole", ranks), make_run("cut", ranks, save_strategy="no", dataloader_num_workers=workers)
    run_ranks(whole, ranks=ranks)
    ended = run_ranks(cut, ranks=ranks, fault=Fault(kind, 5, rank=ranks - 1))
    assert ended.codes == [PREEMPTED_EXIT] * ranks, ended.texts
    assert re.search(says("saved", "step 5"), ended.texts[0])
    output = output_of(cut)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-5"]
    assert json.loads((output / NOTE_FILE).read_text())["step"] == 5
    assert not (output / "model.safetensors").exists() and not (output / DIRECTORY).exists()
    assert run_ranks(cut, ranks=ranks).codes == [0] * ranks
    assert not (output / NOTE_FILE).exists()
    assert_same_end(whole, cut)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_a_signal_to_torchrun_reaches_all_and_leaves_time_to_save(make_run):
    """As Slurm or a pod ends a job: torchrun hears of it, nobody else."""
    config = make_run("run", ranks=2, max_steps=100_000, save_strategy="no")
    output, launcher = output_of(config), [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, "--nproc-per-node", "2", "-m", "llava_pdrop", "train", str(config)]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        while run.poll() is None and not ((output / METRICS_FILE).is_file() and losses(config)):
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        text = run.communicate(timeout=120)[0].decode()
    # Its workers saved; torchrun's own status says only that it was stopped: 1, or -6 where a thread of its store is
    # still running when its interpreter ends ("terminate called without an active exception", seen once in about 60).
    assert run.returncode != 0, text
    (checkpoint,) = output.glob("checkpoint-*")
    assert what_is_torn(checkpoint) is None
    assert json.loads((output / NOTE_FILE).read_text()) == {"step": step_of(checkpoint), "signal": "SIGTERM"}


def test_a_signal_in_the_last_step_changes_nothing(make_run):
    config = make_run("run", max_steps=2)
    assert run_ranks(config, fault=Fault("sigterm", 2)).codes == [0]
    assert (output_of(config) / "run.json").is_file() and not (output_of(config) / NOTE_FILE).exists()


def rates(config: Path) -> list[float]:
    return [row["learning_rate"] for row in read_metrics(output_of(config) / METRICS_FILE) if "loss" in row]


@pytest.mark.parametrize(("schedule", "before", "after", "done"), [
    ({}, "max_steps=4", "max_steps=8", 4),
    ({"lr_scheduler_type": "cosine", "warmup_steps": 0.25}, "max_steps=12", "max_steps=8", 4),
    ({"max_steps": -1}, "num_train_epochs=1", "num_train_epochs=2", 3),
])  # fmt: skip
def test_a_longer_run_has_its_own_learning_rates_from_the_first_step_on(make_run, schedule, before, after, done):
    """They were 0 in the first new step: those of the end of the shorter run. Or of a longer one."""
    whole, cut = make_run("whole", **schedule), make_run("cut", **schedule)
    assert run_ranks(whole, f"train.{after}").codes == [0]
    fault = Fault("kill_forward", 6) if before == "max_steps=12" else None
    assert run_ranks(cut, f"train.{before}", fault=fault).codes == [KILLED if fault else 0]
    ended = run_ranks(cut, f"train.{after}")
    assert ended.codes == [0] and "resuming from" in ended.texts[0], ended.texts
    assert len(rates(cut)) == len(rates(whole)) > done and rates(cut)[done:] == rates(whole)[done:]
    assert rates(cut)[done] > 0


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero2", marks=needs_deepspeed)])
def test_a_longer_sharded_run_has_them_too(make_run, tmp_path, engine):
    shards = FSDP2 if engine == "fsdp2" else deepspeed_arguments(engine, tmp_path)
    whole, cut = (make_run(name, ranks=2, lr_scheduler_type="cosine", **shards) for name in ("whole", "cut"))
    for file, words in ((whole, ()), (cut, ("train.max_steps=4",)), (cut, ())):
        ended = run_ranks(file, *words, ranks=2, limit=300)
        assert ended.codes == [0, 0], ended.texts
    assert rates(cut)[4:] == rates(whole)[4:] and rates(cut)[4] > 0


def test_a_run_shorter_than_its_checkpoint_is_refused(make_run):
    """It was called finished after 4 steps, with the weights of 8."""
    run = make_run("run")
    assert run_ranks(run).codes == [0]
    ended = run_ranks(run, "train.max_steps=3")
    assert ended.codes == [2], ended.texts
    assert re.search(says("run.yaml", "train.max_steps", "3 steps", "checkpoint-8", "train.resume"), ended.texts[0])


def test_a_run_killed_after_its_last_step_makes_no_further_one(make_run):
    whole, cut = make_run("whole", max_steps=2), make_run("cut", max_steps=2)
    run_ranks(whole)
    run_ranks(cut)
    for name in ("run.json", "model.safetensors"):
        (output_of(cut) / name).unlink()
    assert run_ranks(cut).codes == [0]
    assert_same_end(whole, cut)


def test_other_numbers_of_processes_are_refused_or_keep_the_data_order(make_run):
    whole, cut = make_run("whole"), make_run("cut")
    assert run_ranks(cut, fault=Fault("kill_forward", 4)).codes == [KILLED]
    ended = run_ranks(cut, ranks=2)
    assert ended.codes == [2, 2]
    for text in ended.texts:
        assert re.search(says("1 processes x 2", "2 x 2", "train.gradient_accumulation_steps=1"), text)
    ended = run_ranks(cut, "train.gradient_accumulation_steps=1", "pyramid_drop.ranker=random", ranks=2)
    assert ended.codes == [0, 0] and re.search(says("1 processes x 2", "2 x 1", "same samples"), ended.texts[0])
    run_ranks(whole)
    rows = [[row for row in read_metrics(output_of(c) / METRICS_FILE) if "loss" in row] for c in (whole, cut)]
    assert [row["tokens_0"] for row in rows[0]] == [row["tokens_0"] for row in rows[1]]


def test_a_checkpoint_over_other_data_is_refused(make_run, tmp_path):
    config = make_run("run")
    content = json.loads(config.read_text())
    records = json.loads(Path(content["data"]["train"]).read_text())
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    config.write_text(json.dumps({**content, "data": {**content["data"], "train": str(data)}}))
    assert run_ranks(config, fault=Fault("kill_forward", 4)).codes == [KILLED]
    data.write_text(json.dumps(records[:-1]))
    ended = run_ranks(config)
    assert ended.codes == [2]
    assert re.search(says("checkpoint-2", "order", "data", "train.resume=never"), ended.texts[0])


def test_a_disk_that_is_full_for_one_rank_stops_all_and_spares_the_checkpoint_before(make_run):
    config = make_run("run", ranks=2)
    ended = run_ranks(config, ranks=2, fault=Fault("full", 4, rank=1))
    assert ended.codes == [2, 2], ended.texts
    for rank, text in enumerate(ended.texts):
        said = says("checkpoint-4", "No space left on device", "GiB", "free", "checkpoint-2")
        assert re.search(rf"\[rank {rank}\] error: " + said, text)
    assert [path.name for path in output_of(config).glob("checkpoint-*")] == ["checkpoint-2"]
    assert run_ranks(config, ranks=2).codes == [0, 0]


def test_a_loss_that_is_no_number_on_one_rank_stops_all_by_name(make_run):
    config = make_run("run", ranks=2)
    ended = run_ranks(config, ranks=2, fault=Fault("nan", 3, rank=1))
    assert ended.codes == [2, 2], ended.texts
    for text in ended.texts:
        assert re.search(says("step 3", "rank 1", "micro-batch 1", "loss nan") + r".*\btrain\d", text)
    assert [row[0] for row in losses(config)] == [1, 2]
