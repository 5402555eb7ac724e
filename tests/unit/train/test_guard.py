"""A loss that is no number stops the run before the optimizer step, and says whose fault it is."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_pdrop.config.load import load_config
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.runtime.preemption import Preemption
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.checkpoints import CheckpointError, all_checkpoints
from llava_pdrop.train.run import train
from llava_pdrop.train.trainer import NotFiniteError, PyramidTrainer, StepGuard
from tests.messages import says
from tests.parity.test_training import CountSyncs
from tests.sync import make_trainer, train_forbidding_reads
from tests.tiny import ANYRES, PYRAMID, make_tiny_hf

CPU = torch.device("cpu")
STEPS = {"max_steps": 3, "save_steps": 1, "save_strategy": "steps", "use_cpu": True, "disable_tqdm": True,
         "gradient_accumulation_steps": 2}  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_samples_are_named(tmp_path, value):
    guard = StepGuard(CPU, 0, Preemption(tmp_path))
    guard.watch(torch.tensor(1.0), ["a", "b"])
    guard.check(1)
    guard.watch(torch.tensor(2.0), ["c"])
    guard.watch(torch.tensor(value), ["d", "e"])
    with pytest.raises(NotFiniteError, match=r"step 2\b.*rank 0, micro-batch 2\b.*loss -?(nan|inf)\b.*"
                       r"samples d, e\b"):  # fmt: skip
        guard.check(2)


def test_watching_waits_for_nothing_and_checking_once(tmp_path):
    guard = StepGuard(CPU, 0, Preemption(tmp_path))
    losses = [torch.tensor(1.0) for _ in range(3)]
    with CountSyncs() as counter:
        for loss in losses:
            guard.watch(loss, ["a"])
    assert counter.found == []
    with CountSyncs() as counter:
        guard.check(1)
    assert counter.found.count("tolist") == 1 and set(counter.found) <= {"tolist", "aten._local_scalar_dense.default"}


class CountOutside(CountSyncs):
    """Counts apart what happens while it is `allowing` it."""

    def __init__(self):
        super().__init__()
        self.allowed: list[list[str]] = []

    @contextmanager
    def allowing(self):
        before = len(self.found)
        yield
        self.allowed.append(self.found[before:])
        del self.found[before:]


@pytest.mark.parametrize("schedule", [Schedule(), PYRAMID], ids=["vanilla", "dropping"])
def test_a_training_step_waits_for_the_device_in_the_guard_alone(tmp_path, schedule):
    """What tests/gpu/test_sync.py asks a GPU, asked of operators and methods of tensors."""
    counter = CountOutside()
    model = PyramidLlava(make_tiny_hf("llama_gqa", ANYRES), schedule).train()
    train_forbidding_reads(make_trainer(model, tmp_path, use_cpu=True), lambda: counter, counter.allowing)
    assert counter.found == []
    assert [found.count("tolist") for found in counter.allowed] == [1, 1]
    assert {name for found in counter.allowed for name in found} <= {"tolist", "aten._local_scalar_dense.default"}


def test_the_step_is_not_made(tiny_config, monkeypatch):
    config = load_config(tiny_config(train=STEPS))
    calls = []

    def forward(self, batch, *args):
        calls.append(batch.sample_ids)
        output = original(self, batch, *args)
        if len(calls) == 4:  # second micro-batch of step 2
            output.loss.data.fill_(float("nan"))
        return output

    original = PyramidLlava.forward
    monkeypatch.setattr(PyramidLlava, "forward", forward)
    seen = {}

    def step_end(self, args, state, control, model=None, **kwargs):
        seen[state.global_step] = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}

    monkeypatch.setattr(Preemption, "on_step_end", step_end)
    with pytest.raises(NotFiniteError) as error:
        train(config)

    found = says("step 2", "rank 0", "micro-batch 2", "loss nan", f"samples {calls[3][0]}")
    assert re.search(found, str(error.value))
    assert list(seen) == [1]
    (kept,) = all_checkpoints(Path(config.output_dir))
    assert kept.name == "checkpoint-1" and len(load_file(kept / "model.safetensors")) > 0


def test_weights_after_a_gradient_that_is_no_number_are_not_saved(tiny_config, monkeypatch):
    config = load_config(tiny_config(train=STEPS))
    original = PyramidTrainer._clip_grad_norm

    def clip(self, model):
        norm = original(self, model)
        return norm * float("nan") if self.state.global_step == 1 else norm

    monkeypatch.setattr(PyramidTrainer, "_clip_grad_norm", clip)
    with pytest.raises(CheckpointError, match=says("checkpoint-2", "not written", "gradient norm", "nan")):
        train(config)
    assert [path.name for path in all_checkpoints(Path(config.output_dir))] == ["checkpoint-1"]
