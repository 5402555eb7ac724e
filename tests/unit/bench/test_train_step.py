"""The training bench at the tiny shape: who steps on what, what is counted, and that no variant changes the loss."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch

from llava_pdrop.bench import train_step, variants
from llava_pdrop.bench.shapes import shape_named
from llava_pdrop.bench.train_step import BenchArm, BenchTrainer, measure_arms
from llava_pdrop.bench.workload import Workload
from llava_pdrop.cost.flops import ALL_LAYERS, CountedStep, Recomputed, predicted_reduction
from llava_pdrop.model import kernels, vlm
from llava_pdrop.report.units import MIB
from llava_pdrop.runtime import clock
from llava_pdrop.runtime.clock import REGIONS, parts_of
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch
from tests.messages import says

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    shape_named("tiny"),
    text={**shape_named("tiny").text, "hidden_size": 32, "head_dim": 8, "intermediate_size": 48, "vocab_size": 128},
    vision={**shape_named("tiny").vision, "hidden_size": 16, "intermediate_size": 24},
    samples=3,
)
"""The tiny shape, narrower."""
MIXED = dataclasses.replace(SMALL, picture=None, text_tokens=None, max_length=400)
DROPPING = BenchArm("PyramidDrop", SMALL.schedule)


def trainer_of(shape=SMALL, optimizer: str = "none", seed: int = 0) -> BenchTrainer:
    return BenchTrainer(shape, CPU, Workload(shape, seed=seed), optimizer)


def test_arms_take_turns_on_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    original = BenchTrainer.step

    def spy(self: BenchTrainer, arm: BenchArm, batch: PackedBatch):
        seen.append((arm.name, batch.sample_ids[0]))
        return original(self, arm, batch)

    monkeypatch.setattr(BenchTrainer, "step", spy)
    results = measure_arms(
        trainer_of(), [BenchArm("vanilla"), DROPPING, BenchArm("late", Schedule((6,), (0.5,)))], steps=4, warmup=2
    )
    assert [len(result.losses) for result in results] == [4, 4, 4]
    per_batch = [seen[place : place + 3] for place in range(0, len(seen), 3)]
    assert len(per_batch) == 6
    for turn in per_batch:
        assert len({batch for _, batch in turn}) == 1
        assert {name for name, _ in turn} == {"vanilla", "PyramidDrop", "late"}
    assert [turn[0][1] for turn in per_batch[2:]] == ["0.0", "1.0", "2.0", "3.0"]
    assert {turn[0][0] for turn in per_batch} == {"vanilla", "PyramidDrop", "late"}  # the first one changes


def test_the_schedule_of_every_arm_is_the_one_that_runs() -> None:
    vanilla, dropping = measure_arms(trainer_of(), [BenchArm("vanilla"), DROPPING], steps=2, warmup=0)
    assert vanilla.image_tokens == [[540]] * 2
    assert dropping.image_tokens == [[540, 270, 135, 66]] * 2  # 3 pictures of 180
    assert dropping.stage_tokens[0] == [660, 390, 255, 186]
    assert vanilla.losses != dropping.losses


def test_the_predicted_reduction_is_that_of_the_operation_count() -> None:
    trainer = trainer_of(MIXED)
    arms = [BenchArm("vanilla", recomputed=ALL_LAYERS), BenchArm("PyramidDrop", SMALL.schedule, recomputed=ALL_LAYERS)]
    vanilla, dropping = measure_arms(trainer, arms, steps=3, warmup=1)
    batches = [trainer.workload.batch(number, CPU) for number in range(3)]
    options = (SMALL.schedule, MIXED.geometry, MIXED.trainable, ALL_LAYERS)
    expected = predicted_reduction([CountedStep(trainer.model.hf.config, batch, *options) for batch in batches])
    assert 1 - sum(dropping.hardware_flops) / sum(vanilla.hardware_flops) == pytest.approx(expected)
    assert all(m < h for m, h in zip(vanilla.model_flops, vanilla.hardware_flops))


def test_every_region_is_measured_and_they_nest() -> None:
    trainer = trainer_of(optimizer="adamw")
    vanilla, dropping = measure_arms(trainer, [BenchArm("vanilla"), DROPPING], steps=2, warmup=1)
    assert vanilla.wall["ranking"] == [0.0, 0.0]
    for name in REGIONS:
        assert all(taken > 0 for taken in dropping.wall[name]), name
    for place in range(2):
        times = {name: dropping.wall[name][place] for name in REGIONS}
        assert times["tower"] + times["decoder"] + times["head"] <= times["forward"]
        assert times["ranking"] < times["decoder"] and times["tower_backward"] < times["backward"]
        assert sum(parts_of(times).values()) <= times["step"]


def test_the_stages_of_the_decoder_lie_in_it_between_the_rankings() -> None:
    vanilla, dropping = measure_arms(trainer_of(), [BenchArm("vanilla"), DROPPING], steps=2, warmup=1)
    assert [len(stages) for stages in vanilla.stage_seconds] == [1, 1]
    for step in range(2):
        stages = dropping.stage_seconds[step]
        assert len(stages) == len(dropping.stage_flops[step]) == len(SMALL.schedule.layers) + 1
        assert all(taken > 0 for taken in stages)
        assert sum(stages) + dropping.seconds["ranking"][step] <= dropping.seconds["decoder"][step]


def test_the_marks_are_taken_away_again() -> None:
    before, trainer = vlm.label_loss, trainer_of()
    measure_arms(trainer, [DROPPING, dataclasses.replace(DROPPING, full_logits=True)], steps=1, warmup=0)
    assert vlm.label_loss is before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in trainer.model.modules())


def test_what_is_recomputed_in_the_backward_is_no_stage_of_the_forward() -> None:
    """Of a stage of one layer both its hooks run again there."""
    trainer = trainer_of()
    arm = BenchArm("one layer", Schedule((1, 2), (0.5, 0.25)), recomputed=ALL_LAYERS)
    seen: list[str] = []
    start = trainer.watch.start
    trainer.watch.start = lambda name: (seen.append(name), start(name))[1]  # type: ignore[method-assign]
    trainer.step(arm, trainer.workload.batch(0, CPU))
    assert seen == [
        "step", "forward", "tower", "decoder", "stage 0", "ranking", "stage 1", "ranking", "stage 2", "head",
        "backward", "tower_backward", "optimizer",
    ]  # fmt: skip


def test_the_longest_batch_warms_up() -> None:
    work = Workload(MIXED)
    lengths = [sum(work.batch(number, CPU).seq_lens) for number in range(6)]
    assert work.longest(6) == lengths.index(max(lengths))


@pytest.mark.parametrize("schedule", [Schedule(), SMALL.schedule])
@pytest.mark.parametrize("change", [dict(prepare=variants.pad), dict(full_logits=True)])
def test_padding_and_full_logits_leave_the_loss_as_it_is(schedule: Schedule, change: dict) -> None:
    trainer = trainer_of(MIXED, seed=2)
    plain = BenchArm("plain", schedule)
    results = measure_arms(trainer, [plain, dataclasses.replace(plain, **change)], steps=3, warmup=0)
    assert results[1].losses == pytest.approx(results[0].losses, rel=1e-5)


def test_a_padded_batch_is_as_long_as_its_longest_sample() -> None:
    batch = Workload(MIXED, seed=2).batch(1, CPU)
    assert len(set(batch.seq_lens)) > 1
    padded = variants.pad(batch)
    assert padded.seq_lens == [max(batch.seq_lens)] * len(batch.seq_lens)
    assert padded.labels[padded.label_positions].tolist() == batch.labels[batch.label_positions].tolist()
    image = MIXED.text_config().vocab_size - 2
    assert all((padded.input_ids[start:stop] == image).all() for start, stop in padded.image_spans)


def test_padding_is_work_but_neither_tokens_nor_model_operations() -> None:
    trainer = trainer_of(MIXED, seed=2)
    plain = BenchArm("plain")
    packed, padded = measure_arms(trainer, [plain, dataclasses.replace(plain, prepare=variants.pad)], steps=2, warmup=0)
    assert padded.stage_tokens[1][0] > packed.stage_tokens[1][0]
    assert padded.tokens == packed.tokens and padded.model_flops == packed.model_flops
    assert sum(padded.hardware_flops) > sum(packed.hardware_flops)


def test_full_logits_are_counted_where_they_are_made() -> None:
    trainer, batch = trainer_of(MIXED), Workload(MIXED).batch(0, CPU)
    plain = BenchArm("plain", SMALL.schedule)
    full = dataclasses.replace(plain, full_logits=True)
    output, *_ = trainer.step(full, batch)
    more = output.tokens[-1] - len(batch.label_positions)
    text = MIXED.text_config()
    expected = 3 * 2 * more * text.hidden_size * text.vocab_size
    assert trainer.hardware_flops(full, batch) - trainer.hardware_flops(plain, batch) == pytest.approx(expected)
    assert trainer.model_flops(full, batch) == trainer.model_flops(plain, batch)
    assert trainer.model_flops(plain, batch).total == trainer.hardware_flops(plain, batch)


@pytest.mark.parametrize("recompute", [False, True])
def test_arms_with_eager_and_fused_kernels_take_turns(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    runs = []
    own = kernels.rms_norm
    kernels._kernels.cache_clear()
    monkeypatch.setattr(kernels, "rms_norm", lambda *values: (runs.append(1), own(*values))[1])
    trainer, batch = trainer_of(), Workload(SMALL).batch(0, CPU)
    losses, counted = [], []
    for name in ("auto", "torch", "eager", "torch"):
        runs.clear()
        losses.append(
            trainer.step(
                BenchArm("any", SMALL.schedule, ALL_LAYERS if recompute else Recomputed(), kernels=name), batch
            )[1]
        )
        counted.append(len(runs))
    kernels._kernels.cache_clear()
    layers, drops = SMALL.text["num_hidden_layers"], len(SMALL.schedule.layers)
    assert counted[0] == counted[2] == 0
    assert counted[1] == counted[3] == 2 * layers * (1 + recompute) + drops + 1
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_the_model_of_its_time_has_the_kernels_of_the_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batch = trainer_of(), Workload(SMALL).batch(0, CPU)

    def parts(name: str) -> list:
        time = trainer.modelled_time(BenchArm("any", SMALL.schedule, kernels=name), batch)
        assert time is not None
        return time.parts

    eager, fused = parts("eager"), parts("torch")
    moved = [sum(part.whole.bytes for part in arm if part.name.startswith("layers")) for arm in (eager, fused)]
    assert moved[1] < moved[0] / 3
    assert parts("auto") == eager, "what it comes to on a CPU"
    monkeypatch.setitem(kernels.AUTO, "cpu", ("torch",))
    assert parts("auto") == fused


@pytest.mark.parametrize("recompute", [False, True])
def test_no_step_leaves_tensors_that_only_the_collector_would_free(recompute: bool) -> None:
    """It is off while steps are measured: on a GPU such a rest would be activations."""
    trainer = trainer_of(optimizer="adamw")

    def tensors() -> int:
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    with clock.no_garbage_collection():
        counts = []
        for number in range(4):
            trainer.step(
                BenchArm("any", SMALL.schedule, ALL_LAYERS if recompute else Recomputed()),
                trainer.workload.batch(number, CPU),
            )
            counts.append(tensors())
    assert counts[1:] == [counts[1]] * 3


def test_the_predicted_peak_is_that_of_the_arm() -> None:
    trainer, batch = trainer_of(optimizer="adamw"), Workload(SMALL).batch(0, CPU)
    vanilla = trainer.predicted_peak_mib(BenchArm("vanilla"), batch)
    assert trainer.predicted_peak_mib(DROPPING, batch) < vanilla
    assert trainer.predicted_peak_mib(BenchArm("vanilla", recomputed=ALL_LAYERS), batch) < vanilla
    weights = sum(parameter.nbytes for parameter in trainer.model.parameters()) / MIB
    assert vanilla > 3 * weights
    assert vanilla < trainer.predicted_peak_mib(BenchArm("vanilla", kernels="eager"), batch), "auto: of a GPU"


def test_recomputation_is_taken_arm_by_arm() -> None:
    trainer = trainer_of()
    layers = trainer.model.hf.model.language_model.layers
    batch = trainer.workload.batch(0, CPU)
    for recomputed, expected in ((ALL_LAYERS, 8), (Recomputed(2, True), 2), (Recomputed(), 0), (ALL_LAYERS, 8)):
        trainer.step(BenchArm("any", recomputed=recomputed), batch)
        assert sum(layer.gradient_checkpointing for layer in layers) == expected


def test_every_variant_is_measured_or_says_why_not() -> None:
    trainer = trainer_of()
    arms = variants.arms_of({"PyramidDrop": SMALL.schedule}, BenchArm(""))
    compared = [entry for group in variants.compare(trainer, arms, steps=1, warmup=0) for entry in group]
    assert {entry.variant.group for entry in compared} == {
        "batch", "logits", "attention", "recomputation", "samples per micro-batch", "kernels",
    }  # fmt: skip
    for entry in compared:
        able = entry.variant.unavailable is None
        assert [result.arm.name for result in entry.results] == (["vanilla", "PyramidDrop"] if able else [])
        assert all(len(result.losses) == 1 for result in entry.results)
    tokens = {e.variant.name: e.results[0].tokens[0] for e in compared if e.variant.group == "samples per micro-batch"}
    assert tokens == {"1": 220, "3": 660, "6": 1320}
    assert {e.variant.name for e in compared if e.variant.unavailable} == {
        "varlen", "flash_attn", "liger",
    }  # fmt: skip


def test_out_of_memory_is_one_line_or_leaves_the_arm_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BenchTrainer.step

    def short_of_memory(self: BenchTrainer, arm: BenchArm, batch: PackedBatch):
        if arm.name == "large":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return original(self, arm, batch)

    monkeypatch.setattr(BenchTrainer, "step", short_of_memory)
    arms = [BenchArm("vanilla"), BenchArm("large", SMALL.schedule)]
    with pytest.raises(ValueError, match=says("out of memory", "cpu", "large", "--samples", "--recompute")):
        measure_arms(trainer_of(), arms, steps=1, warmup=0)
    named = [dataclasses.replace(arm, setting="0 recomputed") for arm in arms]
    with pytest.raises(ValueError, match=says("out of memory", "large", "--recompute-layers all")):
        measure_arms(trainer_of(), named, steps=1, warmup=0)  # --recompute would contradict what was asked for
    vanilla, large = measure_arms(trainer_of(), arms, steps=2, warmup=1, patient=(torch.OutOfMemoryError,))
    assert vanilla.error is None and len(vanilla.losses) == 2
    assert large.error == "out of memory" and not large.losses


def test_a_programming_error_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: BenchTrainer, arm: BenchArm, batch: PackedBatch):
        raise ValueError("broken")

    monkeypatch.setattr(BenchTrainer, "step", broken)
    with pytest.raises(ValueError, match="broken"):
        measure_arms(trainer_of(), [BenchArm("vanilla")], steps=1, warmup=0, patient=(torch.OutOfMemoryError,))


def test_typical_seconds_follow_the_operations_and_not_an_interruption() -> None:
    result = train_step.Measured(BenchArm("any"), hardware_flops=[10.0, 20.0, 40.0])
    assert result.typical([1.0, 2.0, 90.0]) == pytest.approx(7.0)
