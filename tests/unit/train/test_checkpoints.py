"""Checkpoints are whole or recognised as torn; the last whole one survives rotation and a full disk."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from llava_pdrop.config.load import load_config
from llava_pdrop.train import checkpoints, saving
from llava_pdrop.train.checkpoints import (
    MANIFEST,
    STAGING,
    CheckpointError,
    all_checkpoints,
    check_space,
    commit,
    newest_whole,
    read_manifest,
    rotate,
    size_of,
    what_is_torn,
)
from llava_pdrop.train.history import checkpoint_to_resume
from llava_pdrop.train.run import train
from llava_pdrop.train.trainer import PyramidTrainer
from tests.messages import says


def write(output: Path, step: int, content: bytes = b"weights") -> Path:
    staged, target = output / STAGING / f"checkpoint-{step}", output / f"checkpoint-{step}"
    (staged / "global_step").mkdir(parents=True)
    (staged / "model.bin").write_bytes(content)
    (staged / "global_step" / "shard.bin").write_bytes(b"shard")
    commit(staged, target, {"step": step})
    return target


def test_a_whole_one_has_every_file_in_its_manifest(tmp_path):
    target = write(tmp_path, 3)
    assert what_is_torn(target) is None and size_of(target) == len(b"weightsshard")
    manifest = read_manifest(target)
    assert manifest["step"] == 3 and set(manifest["files"]) == {"model.bin", "global_step/shard.bin"}
    assert not (tmp_path / STAGING / "checkpoint-3").exists()


@pytest.mark.parametrize(("tear", "reason"), [
    (lambda path: (path / "model.bin").unlink(), says("model.bin", "missing")),
    (lambda path: (path / "model.bin").write_bytes(b"weig"), says("model.bin", "4 bytes", "7")),
    (lambda path: (path / "global_step/shard.bin").write_bytes(b"shart"), says("global_step/shard.bin", "changed")),
    (lambda path: (path / MANIFEST).unlink(), says("readable", "manifest.json")),
    (lambda path: (path / MANIFEST).write_text('{"files"'), says("readable", "manifest.json")),
])  # fmt: skip
def test_a_torn_one_is_named_and_passed_over(tmp_path, tear, reason):
    whole, torn = write(tmp_path, 9), write(tmp_path, 10)
    tear(torn)
    said = []
    assert newest_whole(tmp_path, said.append) == whole
    assert len(said) == 1 and re.search(says(str(torn), "torn") + reason, said[0])


def test_one_that_is_written_again_replaces_the_other(tmp_path):
    write(tmp_path, 1, b"old")
    target = write(tmp_path, 1, b"newer")
    assert (target / "model.bin").read_bytes() == b"newer" and what_is_torn(target) is None
    assert [path.name for path in (tmp_path / STAGING).iterdir()] == []


@pytest.mark.parametrize(("torn", "left"), [((), [3, 4]), ((4,), [2, 3, 4]), ((3, 4), [1, 2, 3, 4]), ((2,), [3, 4])])
def test_rotation_counts_whole_ones_only(tmp_path, torn, left):
    for step in (1, 2, 3, 4):
        path = write(tmp_path, step)
        if step in torn:
            (path / "model.bin").unlink()
    rotate(tmp_path, 2)
    assert [checkpoints.step_of(path) for path in all_checkpoints(tmp_path)] == left


def test_no_limit_removes_nothing_and_nothing_whole_removes_nothing(tmp_path):
    for step in (1, 2):
        (write(tmp_path, step) / MANIFEST).unlink()
    rotate(tmp_path, 1)
    rotate(tmp_path, None)
    assert len(all_checkpoints(tmp_path)) == 2


def test_too_little_space_is_said_before_writing(tmp_path, monkeypatch):
    write(tmp_path, 5)
    monkeypatch.setattr(checkpoints, "free_bytes", lambda directory: 2**29)
    check_space(tmp_path, 2**29, "checkpoint-6")
    message = says("checkpoint-6", "not written", "1.000 GiB", "0.500 GiB", "checkpoint-5")
    with pytest.raises(CheckpointError, match=message):
        check_space(tmp_path, 2**30, "checkpoint-6")


STEPS = {"max_steps": 4, "save_steps": 1, "save_strategy": "steps", "save_total_limit": 1, "use_cpu": True,
         "disable_tqdm": True}  # fmt: skip


@pytest.mark.parametrize("hidden", [False, True])
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tiny_config, monkeypatch, hidden):
    """The writer dies in the middle of a file, as the disk would have it: torch hides the OSError in a RuntimeError."""
    config = load_config(tiny_config(train=STEPS))

    def full(content, file, *args, **kwargs):
        if "checkpoint-3" in str(file):
            Path(file).write_bytes(b"half")
            monkeypatch.setattr(checkpoints, "free_bytes", lambda directory: 0)
            raise RuntimeError("unexpected pos 4 vs 8") if hidden else OSError(errno.ENOSPC, "No space left")
        return torch_save(content, file, *args, **kwargs)

    torch_save = torch.save
    monkeypatch.setattr(saving.torch, "save", full)
    message = r"0\.00\d GiB" + says("checkpoint-2")
    with pytest.raises(CheckpointError, match=message):
        train(config)
    output = Path(config.output_dir)
    assert [path.name for path in all_checkpoints(output)] == ["checkpoint-2"] and not (output / STAGING).exists()
    assert checkpoint_to_resume(config) == str(output / "checkpoint-2")
    monkeypatch.undo()
    assert (train(config) / "run.json").is_file()


def test_a_disk_that_is_full_at_the_end_is_one_line_and_loses_nothing(tiny_config, monkeypatch):
    config = load_config(tiny_config(train=STEPS))
    output = Path(config.output_dir)

    def full(self, directory, *args):
        if Path(directory) == output:
            monkeypatch.setattr(checkpoints, "free_bytes", lambda directory: 0)
            raise SafetensorError("No space left on device")
        return original(self, directory, *args)

    original = PyramidTrainer._save
    monkeypatch.setattr(PyramidTrainer, "_save", full)
    message = says("out/run", "No space left on device", "0.000 GiB", "checkpoint-4")
    with pytest.raises(CheckpointError, match=message):
        train(config)
    assert not (output / "run.json").exists()
    monkeypatch.undo()
    assert json.loads((train(config) / "run.json").read_text())["resumed_from"] == str(output / "checkpoint-4")


def test_a_checkpoint_without_room_is_not_begun(tiny_config, monkeypatch):
    config = load_config(tiny_config(train=STEPS))
    monkeypatch.setattr(checkpoints, "free_bytes", lambda directory: 1000)
    with pytest.raises(CheckpointError, match=says("checkpoint-1", "not written", "no checkpoint")):
        train(config)
    assert all_checkpoints(Path(config.output_dir)) == []


def test_a_given_checkpoint_must_be_whole(tiny_config):
    file = tiny_config(train={**STEPS, "save_total_limit": 2})
    output = train(load_config(file))
    (output / "run.json").unlink()
    (output / "checkpoint-4" / "optimizer.pt").unlink()
    said: list[str] = []
    assert checkpoint_to_resume(load_config(file), said.append) == str(output / "checkpoint-3")
    assert re.search(says("checkpoint-4", "torn", "optimizer.pt"), said[0])
    with pytest.raises(ValueError, match=says("run.yaml", "train.resume", "checkpoint-4", "torn", "optimizer.pt")):
        checkpoint_to_resume(load_config(file, [f"train.resume={output}/checkpoint-4"]))


@pytest.mark.parametrize(("processes", "accumulation", "sharded", "message"), [
    (2, 2, False, None),
    (2, 4, False, says("train.gradient_accumulation_steps=2")),
    (3, 1, False, says("1 processes")),
    (2, 2, True, says("optimizer", "sharded", "1")),
])  # fmt: skip
def test_another_number_of_processes(tiny_config, monkeypatch, processes, accumulation, sharded, message):
    file = tiny_config(train={**STEPS, "gradient_accumulation_steps": 4})
    output = train(load_config(file, ["train.max_steps=1"]))
    manifest = output / "checkpoint-1" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "sharded": sharded}))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = load_config(file, [f"train.gradient_accumulation_steps={accumulation}"])
    said: list[str] = []
    if message is None:
        assert checkpoint_to_resume(config, said.append) is not None
        assert re.search(says("1 processes x 4", "2 x 2"), said[0])
    else:
        with pytest.raises(ValueError, match=message):
            checkpoint_to_resume(config, said.append)


def test_weights_alone_are_not_continued(tiny_config):
    file = tiny_config(train={**STEPS, "save_only_model": True})
    (train(load_config(file)) / "run.json").unlink()
    with pytest.raises(ValueError, match=says("checkpoint-4", "train.save_only_model")):
        train(load_config(file))
