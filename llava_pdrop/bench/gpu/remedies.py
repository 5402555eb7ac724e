"""What could make a step faster, each switched on for single steps of one model, so that all take turns with the step
as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from llava_pdrop.bench.gpu.check import Check
from llava_pdrop.bench.train_step import BenchArm, Measured, Trainer, measure
from llava_pdrop.model.kernels import missing, resolve
from llava_pdrop.model.vlm import Output, PyramidLlava
from llava_pdrop.report.units import GIB, MIB, saved
from llava_pdrop.runtime.clock import Span
from llava_pdrop.runtime.device import peak_flops
from llava_pdrop.types import PackedBatch

Switch = Callable[[PyramidLlava], AbstractContextManager[Any]]

ROUNDS = 3
"""Counted steps of every arm."""


@dataclass(frozen=True)
class RemedyArm(BenchArm):
    """An arm with a ``switch``, a context in which its steps run; ``forced``: the same arm recomputing only what memory
    forces."""

    switch: Switch = lambda model: nullcontext()
    forced: RemedyArm | None = None


class RemedyTrainer(Trainer):
    """A `Trainer` that throws the switch of an arm for the time of a step."""

    def step(self, arm: BenchArm, batch: PackedBatch) -> tuple[Output, float, dict[str, Span], float]:
        """See `Trainer.step`."""
        with arm.switch(self.model) if isinstance(arm, RemedyArm) else nullcontext():
            return super().step(arm, batch)


@dataclass(frozen=True)
class Remedy:
    """A change of the arms (vanilla, dropping), and whether it needs a CUDA device. Kernels that are not here are found
    out, too."""

    change: Callable[[RemedyArm, int], RemedyArm]
    cuda: bool = True


def cudnn_first(model: PyramidLlava) -> AbstractContextManager[Any]:
    """cuDNN's attention where `F.scaled_dot_product_attention` has the choice."""
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)


def _as_memory_allows(arm: RemedyArm, depth: int) -> RemedyArm:
    """By the memory formula (`bench.recompute`), which has said so before."""
    assert arm.forced is not None
    return arm.forced


def _with(**changes: Any) -> Callable[[RemedyArm, int], RemedyArm]:
    return lambda arm, depth: replace(arm, **changes)


REMEDIES: dict[str, Remedy] = {
    "as it is": Remedy(lambda arm, depth: arm, cuda=False),
    "each recomputes what it must": Remedy(_as_memory_allows, cuda=False),
    "kernels: eager": Remedy(_with(kernels="eager"), cuda=False),
    "kernels: torch": Remedy(_with(kernels="torch"), cuda=False),
    "sdpa": Remedy(_with(backend="sdpa"), cuda=False),
    "sdpa, cuDNN first": Remedy(_with(backend="sdpa", switch=cudnn_first)),
    "kernels: liger": Remedy(_with(kernels="liger")),
    "kernels: liger, each recomputes what it must": Remedy(
        lambda arm, depth: replace(_as_memory_allows(arm, depth), kernels="liger")
    ),
}
"""By name. The first is the step as it is."""


def try_remedies(check: Check, trainer: RemedyTrainer, arms: Sequence[BenchArm]) -> None:
    """Measures all remedies that can run here, taking turns step by step, and reports after every round, so that a time
    limit costs precision and not the answer. One that fails in its first step is reported and left out."""
    depth = trainer.shape.text["num_hidden_layers"]
    arms = [replace(arm, kernels=resolve(arm.kernels, trainer.device)) for arm in arms]
    check.put(kernels=arms[0].kernels)
    check.note(f"kernels as they are: {arms[0].kernels}")
    changed: dict[str, list[BenchArm]] = {}
    found: dict[str, Any] = {}
    for name, remedy in REMEDIES.items():
        if remedy.cuda and check.rehearsal:
            found[name] = {"unavailable": "needs a CUDA device"}
            continue
        own = [remedy.change(arm, depth) for arm in arms if isinstance(arm, RemedyArm)]
        if name.startswith("kernels:") and own == list(arms):
            found[name] = {"unavailable": "is the step as it is"}
        elif reason := missing(own[0].kernels, trainer.device):
            found[name] = {"unavailable": reason}
        elif (error := _first_step(trainer, own)) is not None:
            found[name] = {"unavailable": error}
        else:
            changed[name] = list(own)
    check.put(remedies=found)
    flat = [arm for own in changed.values() for arm in own]
    totals: list[Measured] = []
    for _ in range(1 if check.rehearsal else ROUNDS):
        taken = measure(trainer, flat, 1, 0, patient=True)
        totals = [_added(total, more) for total, more in zip(totals, taken)] if totals else taken
        results = iter(totals)
        found |= {name: _figures(trainer, next(results), next(results)) for name in changed}
        check.put(remedies=found)
    for name, figures in found.items():
        check.note(f"{name}: " + ", ".join(f"{key} {_short(value)}" for key, value in figures.items()))


def _first_step(trainer: RemedyTrainer, arms: Sequence[RemedyArm]) -> str | None:
    """A step of every arm, not counted. Why it cannot be done, or None.

    Raises:
        RuntimeError: the device no longer works: no remedy can be tried after that.
    """
    reason = None
    try:
        measure(trainer, arms, 1, 0)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises that does not fit, the next one is tried
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    trainer.recover()  # where a broken context raises, and ends the stage
    return reason


def _added(total: Measured, more: Measured) -> Measured:
    """The steps of both."""
    for field in fields(Measured):
        own, new = getattr(total, field.name), getattr(more, field.name)
        if isinstance(own, list):
            own.extend(new)
        elif isinstance(own, dict):
            for key, values in new.items():
                own[key].extend(values)
    total.error = total.error or more.error
    return total


def _figures(trainer: Trainer, vanilla: Measured, dropping: Measured) -> dict[str, Any]:
    """Of one remedy."""
    if reason := vanilla.error or dropping.error:
        return {"unavailable": reason}
    rate, _ = peak_flops(trainer.device, trainer.dtype)
    before, after = (median(measured.seconds["step"]) for measured in (vanilla, dropping))
    compute = [median(measured.compute_seconds) for measured in (vanilla, dropping)]
    return {
        "vanilla_ms": 1000 * before,
        "dropping_ms": 1000 * after,
        "saved": saved(before, after),
        "saved_without_optimizer": saved(*compute),
        "predicted": saved(sum(vanilla.hardware_flops), sum(dropping.hardware_flops)),
        "vanilla_mfu": median(vanilla.model_flops) / before / rate,
        "dropping_mfu": median(dropping.model_flops) / after / rate,
        "vanilla_peak_gib": max(vanilla.peak_mib) * MIB / GIB,
        "dropping_peak_gib": max(dropping.peak_mib) * MIB / GIB,
        "steps": len(vanilla.losses),
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
