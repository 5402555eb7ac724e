"""The Trainer: how the loss is normalised, and that a step does not depend on how it is cut up."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from llava_pdrop.config.load import load_config
from llava_pdrop.cost import flops
from llava_pdrop.data.packing import BatchPlan
from llava_pdrop.model import stream
from llava_pdrop.model.stream import layouts_of
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.train.optim import freeze
from llava_pdrop.train.run import build_dataset, load_parts
from llava_pdrop.train.trainer import PyramidTrainer

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
    assert len(planned) == 3 * 2 and {schedule for _, schedule in planned} == {trainer.model.schedule}
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
