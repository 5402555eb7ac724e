"""What could make a step faster, each measured in turns with the step as it is: `bench.variants`, on whatever fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llava_pdrop.bench.gpu.check import Check
from llava_pdrop.bench.train_step import BenchArm, BenchTrainer
from llava_pdrop.bench.variants import Compared, StepVariant, changing, tried
from llava_pdrop.cost.flops import Recomputed
from llava_pdrop.model.kernels import CHOICES, missing, resolve
from llava_pdrop.report.units import GIB, MIB, saved
from llava_pdrop.runtime.device import peak_flops

ROUNDS = 3
"""Counted steps of every arm."""


def cudnn_first() -> AbstractContextManager[Any]:
    """cuDNN's attention where `F.scaled_dot_product_attention` has the choice."""
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)


def remedies(forced: Mapping[str, Recomputed], kernels: str, device: torch.device) -> list[StepVariant]:
    """All of them, for arms with ``kernels``. The first is the step as it is; ``forced``: what memory forces an arm to
    recompute, by its name."""

    def least(**changes: Any) -> Callable[[BenchArm], BenchArm]:
        return lambda arm: replace(arm, recomputed=forced[arm.name], **changes)

    def remedy(name: str, change: Callable[[BenchArm], BenchArm], unavailable: str | None = None) -> StepVariant:
        return StepVariant("remedies", name, change, unavailable)

    other = {name: "is the step as it is" if name == kernels else missing(name, device) for name in CHOICES[1:]}
    return [
        remedy("as it is", changing()),
        remedy("each recomputes what it must", least()),
        *(remedy(f"kernels: {name}", changing(kernels=name), why) for name, why in other.items()),
        remedy("kernels: liger, each recomputes what it must", least(kernels="liger"), other["liger"]),
        remedy("sdpa", changing(backend="sdpa")),
        remedy(
            "sdpa, cuDNN first",
            changing(backend="sdpa", context=cudnn_first),
            None if device.type == "cuda" else "needs a CUDA device",
        ),
    ]


def try_remedies(check: Check, trainer: BenchTrainer, arms: Sequence[BenchArm], forced: Sequence[BenchArm]) -> None:
    """Measures all remedies that can run here, and reports after every round, so that a time limit costs precision and
    not the answer. One that fails, whatever a kernel raises that does not fit, is reported and left out.

    Args:
        arms: vanilla and dropping; ``forced``: the same, recomputing only what memory forces.
    """
    kernels = resolve(arms[0].kernels, trainer.device)
    check.put(kernels=kernels)
    check.note(f"kernels as they are: {kernels}")
    arms = [replace(arm, kernels=kernels) for arm in arms]
    members = remedies({arm.name: arm.recomputed for arm in forced}, kernels, trainer.device)
    rate, _ = peak_flops(trainer.device, trainer.dtype)
    for compared in tried(trainer, arms, members, 1 if check.rehearsal else ROUNDS, 1, patient=(Exception,)):
        check.put(remedies={entry.variant.name: _figures(entry, rate) for entry in compared})
    for name, figures in check.result["remedies"].items():
        check.note(f"{name}: " + ", ".join(f"{key} {_short(value)}" for key, value in figures.items()))


def _figures(entry: Compared, rate: float) -> dict[str, Any]:
    """Of one remedy."""
    if reason := entry.variant.unavailable or next((found.error for found in entry.results if found.error), None):
        return {"unavailable": reason}
    vanilla, dropping = entry.results
    before, after = (median(measured.seconds["step"]) for measured in entry.results)
    compute = [median(measured.compute_seconds) for measured in entry.results]
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
