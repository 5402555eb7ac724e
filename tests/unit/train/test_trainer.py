"""The Trainer: how the loss is normalised, that a step does not depend on how it is cut up, and the guard: a loss that
is no number stops the run before the optimizer step, and says whose fault it is."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from llava_pdrop.config.load import load_config
from llava_pdrop.cost import flops
from llava_pdrop.data.packing import BatchPlan
from llava_pdrop.model import stream
from llava_pdrop.model.stream import layouts_of
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.runtime.preemption import Preemption
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.checkpoints import CheckpointError, all_checkpoints
from llava_pdrop.train.optim import freeze
from llava_pdrop.train.run import build_dataset, load_parts, train
from llava_pdrop.train.trainer import NotFiniteError, PyramidTrainer, StepGuard
from tests import sync
from tests.messages import says
from tests.parity.test_training import CountSyncs
from tests.tiny import ANYRES, PYRAMID, make_tiny_hf

DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
RATES = {"language_model": 0.1, "projector": 0.1, "vision_tower": 0.1}


@pytest.fixture
def make_trainer(tiny_config, tmp_path):
    config = load_config(tiny_config(pyramid_drop=DROP))

    def make(samples: int, accumulation: int, **arguments) -> PyramidTrainer:
        torch.manual_seed(0)
        parts = load_parts(config)
        model = PyramidLlava(parts.hf, config.schedule, parts.geometry)
        freeze(model, config.model.trainable)
        dataset = build_dataset(config, parts)
        settings = dict(
            seed=0,
            output_dir=str(tmp_path / "trainer"),
            gradient_accumulation_steps=accumulation,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            max_grad_norm=0.0,
            optim="sgd",
            lr_scheduler_type="constant",
        )
        args = TrainingArguments(**{**settings, **arguments})
        plan = BatchPlan(
            dataset.lengths(), gradient_accumulation=accumulation, samples_per_batch=samples, shuffle=False
        )
        return PyramidTrainer(model, args, dataset, plan, RATES)

    return make


def losses(trainer: PyramidTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(("samples", "accumulation"), [(1, 4), (2, 2), (1, 12)])
def test_accumulation_equals_one_big_batch(make_trainer, samples, accumulation):
    """SGD shows the gradient itself; records differ in their number of answers, so a mean of means would differ."""
    whole, cut = make_trainer(samples * accumulation, 1), make_trainer(samples, accumulation)
    for trainer in (whole, cut):
        trainer.args.num_train_epochs = 1
        trainer.train()
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    for (name, one), two in zip(whole.model.named_parameters(), cut.model.parameters()):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6), name


def test_the_logged_loss_is_the_mean_over_the_label_tokens_of_the_step(make_trainer):
    trainer = make_trainer(2, 2, max_steps=1)
    batches = list(trainer.get_train_dataloader())[:2]
    with torch.no_grad():
        outputs = [trainer.model(batch) for batch in batches]
    assert outputs[0].labels != outputs[1].labels
    expected = sum(output.loss.item() for output in outputs) / sum(output.labels for output in outputs)
    trainer.train()
    assert losses(trainer) == pytest.approx([expected], rel=1e-5)
    assert trainer.state.log_history[0]["samples"] == 4


def test_label_count_of_a_step_and_of_a_step_without_labels(make_trainer):
    trainer = make_trainer(2, 2)
    loader = trainer.get_train_dataloader()
    batches, count = trainer.get_batch_samples(iter(loader), 2, torch.device("cpu"))
    assert count == sum((batch.labels != -100).sum().item() for batch in batches)
    assert trainer.get_batch_samples(iter([]), 2, torch.device("cpu")) == ([], 1)


def test_batches_are_those_of_the_plan_in_every_epoch(make_trainer):
    trainer = make_trainer(2, 1)
    loader = trainer.get_train_dataloader()
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        seen = [batch.sample_ids for batch in loader]
        assert seen == [[f"train{i}" for i in batch] for batch in trainer.plan.micro_batches(epoch)]


def test_total_flos_are_the_counted_operations(make_trainer):
    trainer = make_trainer(4, 1, num_train_epochs=1)
    expected = sum(trainer.floating_point_ops(batch) for batch in trainer.get_train_dataloader())
    trainer.train()
    assert trainer.state.total_flos == pytest.approx(expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_layouts_of_a_micro_batch_are_worked_out_once(make_trainer, monkeypatch, checkpointing):
    """For its forward, its operations and those of the MFU; and the operations are those of a batch planned anew."""
    trainer = make_trainer(2, 2, max_steps=3, gradient_checkpointing=checkpointing, logging_steps=3)
    planned, sums = [], []
    for module in (stream, flops):
        monkeypatch.setattr(module, "layouts_of", lambda *given: planned.append(given) or layouts_of(*given))
    training_step, drain = trainer.training_step, trainer.meter.drain

    def counted_step(model, inputs, *rest):
        result = training_step(model, inputs, *rest)
        sums.append(trainer._operations(inputs, False, None))
        planned.pop()
        return result

    monkeypatch.setattr(trainer, "training_step", counted_step)
    monkeypatch.setattr(trainer.meter, "drain", lambda *given: sums.append(trainer.meter.flops) or drain(*given))
    trainer.train()
    assert len(planned) == 3 * 2 and {schedule for _, schedule, _ in planned} == {trainer.model.schedule}
    *micro_batches, counted = sums
    assert len(micro_batches) == 3 * 2 and counted == pytest.approx(sum(micro_batches))
    assert trainer.state.total_flos == pytest.approx(counted) or checkpointing
    assert trainer.state.total_flos > 1.2 * counted or not checkpointing


def test_operations_of_another_micro_batch_are_not_those_of_the_last_one(make_trainer):
    trainer = make_trainer(2, 1, max_steps=1)
    batches = list(trainer.get_train_dataloader())
    expected = [trainer.floating_point_ops(batch) for batch in batches]
    trainer.train()
    assert len(set(expected)) > 1
    assert [trainer.floating_point_ops(batch) for batch in batches] == expected


def test_a_plan_for_another_number_of_ranks_is_refused(make_trainer):
    trainer = make_trainer(2, 1)
    plan = BatchPlan(trainer.train_dataset.lengths(), world_size=2, samples_per_batch=2)
    with pytest.raises(ValueError, match="2 ranks x 1"):
        PyramidTrainer(trainer.model, trainer.args, trainer.train_dataset, plan, RATES)


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
    sync.train_forbidding_reads(sync.make_trainer(model, tmp_path, use_cpu=True), lambda: counter, counter.allowing)
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
