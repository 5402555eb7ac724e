"""Stages ``next``, ``l15``, ``p9``, ``mixture`` and ``prefill``: the benches at the shapes of the README's tables."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

from llava_pdrop.bench.gpu.check import Check
from llava_pdrop.bench.run import run_prefill, run_train

MIB_IN_GIB = 1024


def train_next(check: Check) -> None:
    """LLaVA-NeXT-7B, full pictures of 5 tiles: the goal row."""
    _train(check, "llava-next-7b", "full", steps=6, warmup=2)


def train_l15(check: Check) -> None:
    """LLaVA-1.5-7B, a picture in every sample: the goal row."""
    _train(check, "llava15-7b", "full", steps=6, warmup=2)


def train_p9(check: Check) -> None:
    """LLaVA-NeXT-7B, full pictures of 9 tiles."""
    _train(check, "llava-next-7b-p9", "full", steps=4, warmup=1)


def train_mixture(check: Check) -> None:
    """LLaVA-1.5-7B on its training mixture, whose text-only samples and short questions save less: not the goal row."""
    _train(check, "llava15-7b", "mixture", steps=6, warmup=1)


def prefill(check: Check) -> None:
    """LLaVA-NeXT-7B, prompts of 2,880 image tokens, one at a time and eight at once."""
    shape, tokens, runs = ("tiny", 100, 1) if check.rehearsal else ("llava-next-7b", 2880, 6)
    counts = {"image_tokens": [tokens], "batch": [1, 8], "new_tokens": 8, "runs": runs}
    with _output(check):
        run_prefill(argparse.Namespace(**_common(check, shape), **counts, attention="sdpa"))
    report = _report(check.benchmarks, "prefill")
    for batch in (1, 8):
        found = {entry["method"]: entry for entry in report["results"] if entry["batch"] == batch}
        check.put(**{f"batch_{batch}": prefill_row(found["vanilla"], found["PyramidDrop"])})
        row = check.result[f"batch_{batch}"]
        check.note(
            f"batch {batch}: {row['vanilla_ms']:.1f} -> {row['dropping_ms']:.1f} ms, {row['speedup']:.2f}x "
            f"(operations {row['speedup_predicted']:.2f}x), ranking {row['ranking_share']:.1%}"
        )


def prefill_row(vanilla: dict[str, Any], dropping: dict[str, Any]) -> dict[str, Any]:
    """The figures of one batch size, of the two entries of a report."""
    return {
        "vanilla_ms": vanilla["prefill_ms"]["median"],
        "dropping_ms": dropping["prefill_ms"]["median"],
        "speedup": dropping["speedup"],
        "speedup_predicted": dropping["speedup_predicted"],
        "ranking_share": dropping["ranking_share"],
        "decode_tokens_per_s": {
            "vanilla": vanilla["decode_tokens_per_s"]["median"],
            "dropping": dropping["decode_tokens_per_s"]["median"],
        },
    }


def _train(check: Check, shape: str, images: str, steps: int, warmup: int) -> None:
    if check.rehearsal:
        shape, images, steps, warmup = "tiny", "mixture", 1, 1
    options: dict[str, Any] = {
        "schedule": [],
        "samples": None,
        "optimizer": "auto",
        "recompute": None,
        "compare": False,
    }
    with _output(check):
        run_train(
            argparse.Namespace(
                **_common(check, shape),
                **options,
                images=images,
                steps=steps,
                warmup=warmup,
                attention=None,
                kernels=None,
            )
        )
    check.put(shape=shape, images=images, **training_row(_report(check.benchmarks, "train")))
    found = check.result
    for arm in ("vanilla", "dropping"):
        row = found[arm]
        check.note(f"{arm}: {row['step_ms']:.0f} ms, MFU {row['mfu']:.1%}, peak {row['peak_gib']:.1f} GiB")
    check.note(
        f"{shape}, {images}, kernels {found['kernels']}: saved {found['realised']:.1%} of {found['predicted']:.1%} "
        f"({found['realised_over_predicted']:.3f}), ranking {found['dropping']['ranking_share']:.1%}"
    )


def training_row(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of a README row, of the report of ``bench train`` with one schedule beside vanilla."""
    vanilla, dropping = report["runs"]
    return {
        "samples": report["options"]["samples"] or report["shape"]["samples"],
        "optimizer": report["optimizer"]["kind"],
        "kernels": vanilla["kernels"],
        "image_tokens": [round(sum(stage) / len(stage)) for stage in zip(*dropping["steps"]["image_tokens"])],
        "vanilla": _arm(vanilla),
        "dropping": _arm(dropping),
        "predicted": dropping["predicted_reduction"],
        "realised": dropping["realised_reduction"],
        "realised_over_predicted": dropping["realised_over_predicted"],
        "realised_by_step": dropping["realised_by_step"],
    }


def _arm(run: dict[str, Any]) -> dict[str, Any]:
    low, middle, high = (1000 * seconds for seconds in run["quartiles"]["step"])
    predicted = run["predicted_peak_mib"]
    return {
        "step_ms": middle,
        "quartiles_ms": [low, high],
        "mfu": run["mfu"],
        "hfu": run["hfu"],
        "ranking_share": run["ranking_share"],
        "peak_gib": run["peak_mib"] / MIB_IN_GIB,
        "predicted_peak_gib": None if predicted is None else predicted / MIB_IN_GIB,
        "tokens_per_second": run["tokens_per_second"],
    }


def _common(check: Check, shape: str) -> dict[str, Any]:
    """Arguments of both benches."""
    return {"shape": shape, "overrides": [], "seed": 0, "device": check.device.type, "out": check.benchmarks}


def _output(check: Check) -> contextlib.redirect_stdout[Any]:
    """The bench's own tables go into a log."""
    return contextlib.redirect_stdout(check.log(".log").open("a", encoding="utf-8"))


def _report(directory: Path, bench: str) -> dict[str, Any]:
    (file,) = directory.glob(f"{bench}-*.json")
    return json.loads(file.read_text(encoding="utf-8"))
