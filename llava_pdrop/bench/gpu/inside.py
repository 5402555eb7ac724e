"""Stage ``inside``: what a step of LLaVA-NeXT-7B waits for, where its time goes, and what each remedy is worth."""

from __future__ import annotations

import gzip
import shutil
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from llava_pdrop.bench import variants
from llava_pdrop.bench.gpu.check import Check
from llava_pdrop.bench.gpu.remedies import try_remedies
from llava_pdrop.bench.gpu.runner import TRACES
from llava_pdrop.bench.recompute import ALL, AUTO, arms_with, read_setting
from llava_pdrop.bench.shapes import shape_named
from llava_pdrop.bench.train_step import BenchArm, BenchTrainer
from llava_pdrop.bench.workload import Workload
from llava_pdrop.types import PackedBatch

KEYS = {"vanilla": "vanilla", "PyramidDrop": "dropping"}
"""Name of an arm -> its key in the result."""

KERNEL_KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "::mm", "::addmm", "::bmm", "splitk"),
    "norms": ("norm", "gammabeta"),
    "compiled": ("triton_",),
    "reductions": ("reduce", "softmax", "::sum", "::mean"),
    "elementwise and copies": (
        "elementwise", "catarray", "copy", "memcpy", "memset", "fill", "index", "gather", "scatter", "::mul", "::add",
        "::cat", "::silu", "::neg", "::div", "::pow", "::rsqrt", "::sigmoid", "::sub", "foreach", "multi_tensor",
    ),
}  # fmt: skip
"""Kind of kernel -> parts of the names of its kernels, in lower case; the first kind that fits. (On a CPU the names are
those of operators.)"""


WAITS = "called a synchronizing"
"""In PyTorch's warning of an operation that waits, and not in the one that the mode itself is a prototype."""


def run(check: Check) -> None:
    """Synchronisations, profile and remedies, on one model."""
    shape = shape_named("tiny" if check.rehearsal else "llava-next-7b")
    trainer = BenchTrainer(shape, check.device, Workload(shape, "mixture" if check.rehearsal else "full"), "auto")
    arms, depth = variants.arms_of({"PyramidDrop": shape.schedule}, BenchArm("")), shape.text["num_hidden_layers"]
    arms = arms_with(trainer, arms, read_setting(ALL, len(arms), depth), steps=1)
    batch = trainer.workload.batch(0, check.device)
    for arm in arms:  # handles, workspaces and the allocator's blocks: their first use waits for the device
        trainer.step(arm, batch)
    found = {KEYS[arm.name]: synchronisations(trainer, arm, batch) for arm in arms}
    check.put(synchronisations=found, counted_by=None if check.rehearsal else "torch.cuda.set_sync_debug_mode('warn')")
    for name, places in found.items():
        check.note(f"{name}: {len(places)} synchronisations in forward and backward {places[:5]}")
    check.put(profile={KEYS[arm.name]: profiled(check, trainer, arm, batch) for arm in arms})
    for name, shares in check.result["profile"].items():
        kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in shares["kinds_ms"].items())
        check.note(f"{name}: busy {shares['busy_share']} of {shares['wall_ms']} ms; ms: {kinds}")
    forced = arms_with(trainer, arms, read_setting(AUTO, len(arms), depth), steps=1, card=check.card)
    for arm in forced:
        check.note(f"{KEYS[arm.name]}: memory forces to recompute {arm.recomputed}")
    try_remedies(check, trainer, arms, forced)


def synchronisations(trainer: BenchTrainer, arm: BenchArm, batch: PackedBatch) -> list[str]:
    """Where a forward and backward pass of ``arm`` makes the host wait for the device: ``file:line message`` of each.
    Empty on a CPU, which has nothing to wait for."""
    trainer.take(arm)
    cuda = trainer.device.type == "cuda"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
        try:
            output = trainer.model(batch)
            (output.loss / max(1, output.labels)).backward()
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
    trainer.model.zero_grad(set_to_none=True)
    waits = [warning for warning in seen if WAITS in str(warning.message).lower()]
    return [f"{Path(w.filename).name}:{w.lineno} {str(w.message).splitlines()[0][:100]}" for w in waits]


def profiled(check: Check, trainer: BenchTrainer, arm: BenchArm, batch: PackedBatch) -> dict[str, Any]:
    """One step under the profiler: milliseconds by kind of kernel, the share of the time in which the device was busy,
    and the longest gaps between kernels with what came after them. The whole table goes into the logs."""
    cuda = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as taken:
        trainer.step(arm, batch)
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = taken.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
    check.log(f"-{KEYS[arm.name]}.txt").write_text(table, encoding="utf-8")
    if not cuda:
        total = [(entry.key, entry.self_cpu_time_total / 1e3) for entry in taken.key_averages()]
        return {"kinds_ms": by_kind(total), "busy_share": None, "wall_ms": None, "gaps_us": [], "kernels": len(total)}
    _keep_trace(check, taken, arm)
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in taken.events()
        if event.device_type == DeviceType.CUDA
    ]
    return {"kinds_ms": by_kind((name, (end - start) / 1e3) for start, end, name in spans), **busy(spans)}


def _keep_trace(check: Check, taken: profile, arm: BenchArm) -> None:
    """The whole trace, for a viewer."""
    plain = check.log(f"-{KEYS[arm.name]}.trace.partial")
    taken.export_chrome_trace(str(plain))
    with (
        plain.open("rb") as source,
        gzip.open(check.log(f"-{KEYS[arm.name]}{TRACES}"), "wb", compresslevel=6) as target,
    ):
        shutil.copyfileobj(source, target)
    plain.unlink()


def by_kind(taken: Iterable[tuple[str, float]]) -> dict[str, float]:
    """(name, milliseconds) of kernels -> milliseconds of each of `KERNEL_KINDS`, and of all others, most first."""
    sums: dict[str, float] = {}
    for name, ms in taken:
        lower = name.lower()
        kind = next((kind for kind, words in KERNEL_KINDS.items() if any(word in lower for word in words)), "other")
        sums[kind] = sums.get(kind, 0.0) + ms
    return {kind: round(ms, 2) for kind, ms in sorted(sums.items(), key=lambda entry: -entry[1])}


def busy(spans: Sequence[tuple[float, float, str]]) -> dict[str, Any]:
    """(start, end, name) of kernels in microseconds -> the share of the time from the first to the last in which at
    least one ran, that time, their number, and the longest gaps with the kernel that ended each."""
    if not spans:
        return {"busy_share": 0.0, "wall_ms": 0.0, "kernels": 0, "gaps_us": []}
    ordered = sorted(spans)
    taken, reached, gaps = 0.0, ordered[0][0], []
    for start, end, name in ordered:
        if start > reached:
            gaps.append((start - reached, name))
        taken += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    wall = reached - ordered[0][0]
    return {
        "busy_share": round(taken / wall, 4) if wall else 0.0,
        "wall_ms": round(wall / 1e3, 1),
        "kernels": len(ordered),
        "gaps_us": [[round(gap), name[:60]] for gap, name in sorted(gaps, reverse=True)[:6]],
    }
