"""What is tried against the step as it is: which remedies there are here, and that one that fails costs itself only."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from llava_pdrop.bench.gpu.check import Check
from llava_pdrop.bench.gpu.remedies import remedies, try_remedies
from llava_pdrop.bench.shapes import shape_named
from llava_pdrop.bench.train_step import BenchArm, BenchTrainer
from llava_pdrop.bench.variants import arms_of
from llava_pdrop.bench.workload import Workload
from llava_pdrop.cost.flops import ALL_LAYERS, Recomputed

CPU = torch.device("cpu")


def test_which_there_are_on_a_cpu() -> None:
    found = {remedy.name: remedy for remedy in remedies({"vanilla": Recomputed(3)}, "eager", CPU)}
    assert next(iter(found)) == "as it is"
    assert {name for name, remedy in found.items() if remedy.unavailable} == {
        "kernels: eager", "kernels: liger", "kernels: liger, each recomputes what it must", "sdpa, cuDNN first",
    }  # fmt: skip
    arm = BenchArm("vanilla", recomputed=ALL_LAYERS)
    assert found["as it is"].change(arm) == arm
    assert found["each recomputes what it must"].change(arm).recomputed == Recomputed(3)
    assert found["kernels: torch"].change(arm).kernels == "torch"
    liger = {remedy.name: remedy.unavailable for remedy in remedies({"vanilla": Recomputed(3)}, "liger", CPU)}
    assert {liger[name] for name in liger if "liger" in name} == {"is the step as it is"}


def test_one_that_fails_is_reported_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises, in its first step, which is not counted."""
    (tmp_path / "stages").mkdir()
    shape, original = shape_named("tiny"), BenchTrainer.step

    def step(self: BenchTrainer, arm: BenchArm, batch: object) -> object:
        if arm.kernels == "torch" and arm.schedule.layers:
            raise NotImplementedError("no such\nkernel")
        return original(self, arm, batch)

    monkeypatch.setattr(BenchTrainer, "step", step)
    arms = arms_of({"PyramidDrop": shape.schedule}, BenchArm("", recomputed=ALL_LAYERS))
    check = Check("inside", tmp_path, CPU, time.time() + 60)
    try_remedies(check, BenchTrainer(shape, CPU, Workload(shape), "none"), arms, [BenchArm(arm.name) for arm in arms])
    found = check.result["remedies"]
    assert check.result["kernels"] == "eager"
    assert found["kernels: torch"] == {"unavailable": "NotImplementedError: no such kernel"}
    measured = {name for name, figures in found.items() if "unavailable" not in figures}
    assert measured == {"as it is", "each recomputes what it must", "sdpa"}
    assert all(found[name]["steps"] == 1 and 0 < found[name]["predicted"] < 1 for name in measured)
    assert found["each recomputes what it must"]["predicted"] != found["as it is"]["predicted"]
