"""Stage ``learn``: the embedded task at a GPU's size, trained with every way of dropping (`compare.learn`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_pdrop.bench.gpu.check import Check
from llava_pdrop.compare.learn import learn

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "gpu"

RESERVE = 10.0
"""Seconds that are left for what comes after the last arm."""


def run(check: Check) -> None:
    """Accuracy of vanilla, PyramidDrop, random and FastV-style dropping, each trained and evaluated.

    Raises:
        RuntimeError: an arm failed; why stands beside it in the result.
    """
    scratch = check.work / "scratch"
    config = CONFIGS / ("learn_cpu.yaml" if check.rehearsal else "learn.yaml")
    changes = few_pages(scratch / "pages") if check.rehearsal else ()
    with check.printed():
        found = learn(scratch / "learn", check.device.type, config, check.left - RESERVE, changes)
    arms = found["arms"]
    evaluated = [arm for arm in arms.values() if "error" not in arm]
    check.put(
        arms=arms,
        chance=evaluated[0]["chance"] if evaluated else None,
        questions=evaluated[0]["questions"] if evaluated else None,
        decoder_parameters=found["decoder_parameters"],
        config=config.name,
    )
    for name, arm in arms.items():
        if "error" in arm:
            check.note(f"{name}: {arm['error']}")
            continue
        check.note(
            f"{name}: {arm['accuracy']:.1%} +- {arm['standard_error']:.1%} after {arm['steps']} steps "
            f"(before: {arm['start_accuracy']:.1%}, chance {arm['chance']:.1%}), {arm['seconds_per_step']:.3f} s a step"
        )
    if failed := [name for name, arm in arms.items() if "error" in arm]:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def few_pages(place: Path) -> Sequence[str]:
    """Changes of the CPU's config that only try the way: two steps, on pages of their own. (That it learns is another
    test, ``python -m pytest -k it_learns``.)"""
    counts = '--pretrain,"0",--train,"32",--eval,"20",--turns,"4"'
    return (
        f"data.prepare=[data/prepare/forms.py,--out,{place},{counts}]",
        f"data.image_root={place}",
        f"data.train={place}/train.json",
        f"data.eval={place}/eval.json",
        "train.max_steps=2",
        "train.warmup_steps=1",
    )
