"""The training bench at the tiny shape: who steps on what, what is counted, and that no variant changes the loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llava_pdrop.bench import training, variants
from llava_pdrop.bench.shapes import SHAPES
from llava_pdrop.bench.timing import PARTS, REGIONS, parts_of, quartiles
from llava_pdrop.bench.training import Arm, Trainer, measure
from llava_pdrop.bench.workload import Workload
from llava_pdrop.model import decoder, vlm
from llava_pdrop.model.flops import predicted_reduction
from llava_pdrop.model.schedule import Schedule
from llava_pdrop.types import PackedBatch

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    SHAPES["tiny"],
    text={**SHAPES["tiny"].text, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 128},
    vision={**SHAPES["tiny"].vision, "hidden_size": 16, "intermediate_size": 24},
    samples=3,
)
"""The tiny shape, narrower."""
MIXED = dataclasses.replace(SMALL, picture=None, text_tokens=None, max_length=400)
DROPPING = Arm("PyramidDrop", SMALL.schedule)


def trainer_of(shape=SMALL, optimizer: str = "none", seed: int = 0) -> Trainer:
    return Trainer(shape, CPU, Workload(shape, seed=seed), optimizer)


def test_arms_take_turns_on_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    original = Trainer.step

    def spy(self: Trainer, arm: Arm, batch: PackedBatch):
        seen.append((arm.name, batch.sample_ids[0]))
        return original(self, arm, batch)

    monkeypatch.setattr(Trainer, "step", spy)
    results = measure(trainer_of(), [Arm("vanilla"), DROPPING, Arm("late", Schedule((6,), (0.5,)))], steps=4, warmup=2)
    assert [len(result.losses) for result in results] == [4, 4, 4]
    per_batch = [seen[place : place + 3] for place in range(0, len(seen), 3)]
    assert len(per_batch) == 6
    for turn in per_batch:
        assert len({batch for _, batch in turn}) == 1
        assert {name for name, _ in turn} == {"vanilla", "PyramidDrop", "late"}
    assert [turn[0][1] for turn in per_batch[2:]] == ["0.0", "1.0", "2.0", "3.0"]
    assert {turn[0][0] for turn in per_batch} == {"vanilla", "PyramidDrop", "late"}  # the first one changes


def test_the_schedule_of_every_arm_is_the_one_that_runs() -> None:
    vanilla, dropping = measure(trainer_of(), [Arm("vanilla"), DROPPING], steps=2, warmup=0)
    assert vanilla.image_tokens == [[540]] * 2
    assert dropping.image_tokens == [[540, 270, 135, 66]] * 2  # 3 pictures of 180
    assert dropping.stage_tokens[0] == [660, 390, 255, 186]
    assert vanilla.losses != dropping.losses


def test_the_predicted_reduction_is_that_of_the_operation_count() -> None:
    trainer = trainer_of(MIXED)
    arms = [Arm("vanilla", recompute=True), Arm("PyramidDrop", SMALL.schedule, recompute=True)]
    vanilla, dropping = measure(trainer, arms, steps=3, warmup=1)
    batches = [trainer.workload.batch(number, CPU) for number in range(3)]
    expected = predicted_reduction(
        trainer.model.host.config, batches, SMALL.schedule, MIXED.geometry, MIXED.trainable, checkpointing=True
    )
    assert 1 - sum(dropping.hardware_flops) / sum(vanilla.hardware_flops) == pytest.approx(expected)
    assert all(m < h for m, h in zip(vanilla.model_flops, vanilla.hardware_flops))


def test_every_region_is_measured_and_they_nest() -> None:
    trainer = trainer_of(optimizer="adamw")
    vanilla, dropping = measure(trainer, [Arm("vanilla"), DROPPING], steps=2, warmup=1)
    assert vanilla.wall["ranking"] == [0.0, 0.0]
    for name in REGIONS:
        assert all(taken > 0 for taken in dropping.wall[name]), name
    for place in range(2):
        times = {name: dropping.wall[name][place] for name in REGIONS}
        assert times["tower"] + times["decoder"] + times["head"] <= times["forward"]
        assert times["ranking"] < times["decoder"] and times["tower_backward"] < times["backward"]
        assert list(parts_of(times)) == list(PARTS)
        assert sum(parts_of(times).values()) <= times["step"]


def test_the_marks_are_taken_away_again() -> None:
    before = (vlm.image_features, vlm.run_decoder, vlm.label_loss, decoder._rank)
    trainer = trainer_of()
    measure(trainer, [Arm("vanilla"), DROPPING], steps=1, warmup=0)
    assert (vlm.image_features, vlm.run_decoder, vlm.label_loss, decoder._rank) == before
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


def test_the_longest_batch_warms_up() -> None:
    work = Workload(MIXED)
    lengths = [sum(work.batch(number, CPU).seq_lens) for number in range(6)]
    assert training.longest_batch(work, 6) == lengths.index(max(lengths))


@pytest.mark.parametrize("schedule", [Schedule(), SMALL.schedule])
@pytest.mark.parametrize("change", [dict(prepare=variants.pad), dict(full_logits=True)])
def test_padding_and_full_logits_leave_the_loss_as_it_is(schedule: Schedule, change: dict) -> None:
    trainer = trainer_of(MIXED, seed=2)
    plain = Arm("plain", schedule)
    results = measure(trainer, [plain, dataclasses.replace(plain, **change)], steps=3, warmup=0)
    assert results[1].losses == pytest.approx(results[0].losses, rel=1e-5)


def test_a_padded_batch_is_as_long_as_its_longest_sample() -> None:
    batch = Workload(MIXED, seed=2).batch(1, CPU)
    assert len(set(batch.seq_lens)) > 1
    padded = variants.pad(batch)
    assert padded.seq_lens == [max(batch.seq_lens)] * len(batch.seq_lens)
    assert padded.labels[padded.label_positions].tolist() == batch.labels[batch.label_positions].tolist()
    image = MIXED.text_config().vocab_size - 2
    assert all((padded.input_ids[start:stop] == image).all() for start, stop in padded.image_spans)


def test_recomputation_is_taken_arm_by_arm() -> None:
    trainer = trainer_of()
    layers = trainer.model.host.model.language_model.layers
    batch = trainer.workload.batch(0, CPU)
    for recompute, first, expected in ((True, None, 8), (True, 2, 2), (False, None, 0), (True, None, 8)):
        trainer.step(Arm("any", recompute=recompute, recompute_layers=first), batch)
        assert sum(layer.gradient_checkpointing for layer in layers) == expected


def test_every_variant_is_measured_or_says_why_not() -> None:
    trainer = trainer_of()
    arms = variants.arms_of({"PyramidDrop": SMALL.schedule}, Arm(""))
    compared = [entry for group in variants.compare(trainer, arms, steps=1, warmup=0) for entry in group]
    assert {entry.variant.group for entry in compared} == {
        "batch", "logits", "attention", "recomputation", "samples per micro-batch", "norms and MLPs",
    }  # fmt: skip
    for entry in compared:
        able = entry.variant.unavailable is None
        assert [result.arm.name for result in entry.results] == (["vanilla", "PyramidDrop"] if able else [])
        assert all(len(result.losses) == 1 for result in entry.results)
    tokens = {e.variant.name: e.results[0].tokens[0] for e in compared if e.variant.group == "samples per micro-batch"}
    assert tokens == {"1": 220, "3": 660, "6": 1320}
    assert {e.variant.name for e in compared if e.variant.unavailable} == {
        "varlen", "flash_attn", "eager", "compiled",
    }  # fmt: skip


def test_out_of_memory_is_one_line_or_leaves_the_arm_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.step

    def short_of_memory(self: Trainer, arm: Arm, batch: PackedBatch):
        if arm.name == "large":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return original(self, arm, batch)

    monkeypatch.setattr(Trainer, "step", short_of_memory)
    arms = [Arm("vanilla"), Arm("large", SMALL.schedule)]
    with pytest.raises(ValueError, match="out of memory on cpu in large: try a smaller --samples or --recompute"):
        measure(trainer_of(), arms, steps=1, warmup=0)
    vanilla, large = measure(trainer_of(), arms, steps=2, warmup=1, patient=True)
    assert vanilla.error is None and len(vanilla.losses) == 2
    assert large.error == "out of memory" and not large.losses


def test_a_programming_error_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Trainer, arm: Arm, batch: PackedBatch):
        raise ValueError("broken")

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(ValueError, match="broken"):
        measure(trainer_of(), [Arm("vanilla")], steps=1, warmup=0, patient=True)


def test_typical_seconds_follow_the_operations_and_not_an_interruption() -> None:
    result = training.Measured(Arm("any"), hardware_flops=[10.0, 20.0, 40.0])
    result.seconds["step"] = [1.0, 2.0, 90.0]
    assert result.typical_seconds == pytest.approx(7.0)


def test_quartiles() -> None:
    assert quartiles([4.0]) == (4.0, 4.0, 4.0)
    assert quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)
