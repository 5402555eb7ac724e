"""What the arms of a bench recompute: what is asked for, and by the memory formula no more than a card forces."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from llava_pdrop.bench import variants
from llava_pdrop.bench.recompute import arms_in, arms_with, read_setting
from llava_pdrop.bench.shapes import shape_named
from llava_pdrop.bench.train_step import BenchArm, BenchTrainer
from llava_pdrop.bench.workload import Workload
from llava_pdrop.checkpoint.hf_models import make_hf_model
from llava_pdrop.cost.flops import ALL_LAYERS, Recomputed
from llava_pdrop.cost.plan import RESERVE
from llava_pdrop.cost.step_time import CARDS
from llava_pdrop.report.units import GIB
from tests.messages import says

CPU = torch.device("cpu")


def planning(name: str, kind: str = "sharded", **changes) -> BenchTrainer:
    """A trainer of the shape that can say what a step needs, in bfloat16, and not do one: it has no weights."""
    trainer = object.__new__(BenchTrainer)
    shape = dataclasses.replace(shape_named(name), **changes)
    with torch.device("meta"):
        config = make_hf_model(shape.text_config(), shape.vision_config(), shape.geometry, image_token_id=5).config
    trainer.shape, trainer.device, trainer.workload = shape, CPU, Workload(shape, "full")
    trainer.dtype, trainer.kind = torch.bfloat16, kind
    trainer.model = SimpleNamespace(hf=SimpleNamespace(config=config))
    return trainer


def arms_of(trainer: BenchTrainer) -> list[BenchArm]:
    return variants.arms_of({"PyramidDrop": trainer.shape.schedule}, BenchArm("", recomputed=ALL_LAYERS))


def chosen(trainer: BenchTrainer, word: str, card: str | None = None) -> list[tuple[bool, int | None, bool]]:
    depth = trainer.shape.text["num_hidden_layers"]
    arms = arms_with(trainer, arms_of(trainer), read_setting(word, 2, depth), steps=1, card=card)
    return [(bool(arm.recomputed), arm.recomputed.layers, arm.recomputed.tower) for arm in arms]


def test_memory_forces_vanilla_to_recompute_more_than_dropping() -> None:
    """LLaVA-NeXT-7B on 80 GB: by hand, the first number of layers whose peak leaves a tenth free; without dropping the
    tower too, which costs less time than the layers it saves."""
    trainer = planning("llava-next-7b")
    vanilla, dropping = chosen(trainer, "auto", "H100")
    assert dropping == (False, 0, False)
    assert vanilla[0] and vanilla[2] and 0 < vanilla[1] < 16
    room, batch = 0.9 * 80 * GIB, trainer.workload.batch(0, CPU)

    def peak(layers: int, tower: bool) -> float:
        arm = BenchArm("", recomputed=Recomputed(layers, tower))
        return trainer.predicted_peak_mib(arm, batch) * 2**20

    assert peak(vanilla[1], True) <= room < peak(vanilla[1] - 1, True)
    least = next(layers for layers in range(33) if peak(layers, False) <= room)
    assert least > vanilla[1]
    flops = [
        trainer.hardware_flops(BenchArm("", recomputed=Recomputed(layers, tower)), batch)
        for layers, tower in ((vanilla[1], True), (least, False))
    ]
    assert flops[0] < flops[1], "what was taken is the faster one"


def test_more_memory_forces_less() -> None:
    trainer = planning("llava-next-7b")
    assert chosen(trainer, "auto", "H200") == [(False, 0, False)] * 2
    assert chosen(planning("llava-next-7b", "none"), "auto", "H100")[0] < chosen(trainer, "auto", "H100")[0]


def test_a_tower_that_does_not_learn_is_never_recomputed() -> None:
    (_, layers, tower), _ = chosen(planning("llava15-7b"), "auto", "H100")
    assert layers and not tower


def test_all_and_numbers_leave_the_tower_alone_unless_memory_forces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = planning("llava-next-7b")
    assert chosen(trainer, "all", "H100") == [(True, None, False)] * 2
    assert chosen(trainer, "24,0", "H100") == [(True, 24, False), (False, 0, False)]
    assert chosen(trainer, "4,0", "H100") == [(True, 4, True), (False, 0, False)]
    assert chosen(trainer, "4,0") == [(True, 4, False), (False, 0, False)], "on a CPU nothing says what fits"
    batch = trainer.workload.batch(0, CPU)
    whole, kept = (
        trainer.predicted_peak_mib(BenchArm("", recomputed=Recomputed(None, tower)), batch) / 1024
        for tower in (True, False)
    )
    assert whole < kept
    between = dataclasses.replace(CARDS["H100"], gib=(whole + kept) / 2 / (1 - RESERVE))
    monkeypatch.setitem(CARDS, "H100", between)
    assert chosen(trainer, "all", "H100")[0] == (True, None, True)
    assert chosen(trainer, "2", "H100")[0] == (True, 2, True), "it fits in no way: the most that was allowed"


def test_the_largest_of_the_batches_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = planning("llava15-7b")
    trainer.workload = Workload(trainer.shape, "mixture")
    setting = read_setting("auto", 2, 32)
    few, many = (arms_with(trainer, arms_of(trainer), setting, steps, "H100")[0] for steps in (1, 4))
    assert few.recomputed.layers is not None and many.recomputed.layers is not None
    assert few.recomputed.layers <= many.recomputed.layers
    batches = [trainer.workload.batch(step, CPU) for step in range(4)]
    peaks = [trainer.predicted_peak_mib(many, batch) / 1024 for batch in batches]
    assert max(peaks) <= 0.9 * 80
    fewer = dataclasses.replace(many, recomputed=Recomputed(many.recomputed.layers - 1, many.recomputed.tower))
    assert max(trainer.predicted_peak_mib(fewer, batch) / 1024 for batch in batches) > 0.9 * 80


def test_what_does_not_fit_at_all_says_how_much_is_missing() -> None:
    trainer = planning("llava15-13b", "adamw")
    with pytest.raises(ValueError, match=says("auto", "vanilla", "72.0 GiB", "GiB are missing", "--samples")):
        chosen(trainer, "auto", "H100")


def test_settings_take_turns_under_their_names() -> None:
    trainer = planning("llava-next-7b")
    arms = arms_of(trainer)
    assert arms_in(trainer, arms, [], steps=1) == arms
    one = arms_in(trainer, arms, [read_setting("all", 2, 32)], steps=1)
    assert [arm.name for arm in one] == ["vanilla", "PyramidDrop"]
    both = arms_in(trainer, arms, [read_setting(word, 2, 32) for word in ("all", "auto")], steps=1, card="H100")
    assert [(arm.name, arm.setting) for arm in both] == [
        (f"{name}, {setting}", setting)
        for setting in ("all recomputed", "as memory forces")
        for name in ("vanilla", "PyramidDrop")
    ]


def test_in_words() -> None:
    assert str(Recomputed()) == "nothing"
    assert str(ALL_LAYERS) == "all decoder layers and the tower"
    assert str(Recomputed(0, True)) == "the tower" and str(Recomputed(1)) == "1 decoder layer"
