"""Stages ``next``, ``l15``, ``p9``, ``mixture`` and ``prefill``: the benches at the shapes of the README's tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from llava_pdrop.bench.gpu.check import Check
from llava_pdrop.bench.recompute import ALL, AUTO, from_json
from llava_pdrop.bench.run import PrefillSettings, TrainSettings, run_prefill, run_train
from llava_pdrop.bench.train_report import modelled_stages
from llava_pdrop.report.units import GIB, MIB, time_unit


def train_next(check: Check) -> None:
    """LLaVA-NeXT-7B, full pictures of 5 tiles: the goal row; each side also recomputing only what memory forces."""
    _train(check, "llava-next-7b", "full", steps=6, warmup=2, settings=(ALL, AUTO))


def train_l15(check: Check) -> None:
    """LLaVA-1.5-7B, a picture in every sample: the goal row; each side also recomputing only what memory forces."""
    _train(check, "llava15-7b", "full", steps=5, warmup=1, settings=(ALL, AUTO))


def train_p9(check: Check) -> None:
    """LLaVA-NeXT-7B, full pictures of 9 tiles."""
    _train(check, "llava-next-7b-p9", "full", steps=4, warmup=1)


def train_mixture(check: Check) -> None:
    """LLaVA-1.5-7B on its training mixture, whose text-only samples and short questions save less: not the goal row."""
    _train(check, "llava15-7b", "mixture", steps=6, warmup=1)


def prefill(check: Check) -> None:
    """LLaVA-NeXT-7B, prompts of 2,880 image tokens, one at a time and eight at once."""
    shape, tokens, runs = ("tiny", 100, 1) if check.rehearsal else ("llava-next-7b", 2880, 6)
    asked = PrefillSettings(
        shape=shape, device=check.device.type, out=check.benchmarks, image_tokens=(tokens,), new_tokens=8, runs=runs
    )
    with _output(check):
        report = run_prefill(asked)
    for batch in (1, 8):
        found = {entry["method"]: entry for entry in report["results"] if entry["batch"] == batch}
        check.put(**{f"batch_{batch}": prefill_row(found["vanilla"], found["PyramidDrop"])})
        row = check.result[f"batch_{batch}"]
        check.note(
            f"batch {batch}: {_time(row['vanilla_ms'])} -> {_time(row['dropping_ms'])}, {row['speedup']:.2f}x "
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


def _train(check: Check, shape: str, images: str, steps: int, warmup: int, settings: Sequence[str] = (ALL,)) -> None:
    if check.rehearsal:
        shape, images, steps, warmup = "tiny", "mixture", 1, 0
    asked = TrainSettings(
        shape=shape, device=check.device.type, out=check.benchmarks, images=(images,), steps=steps, warmup=warmup,
        recompute_layers=settings, card=check.card,
    )  # fmt: skip
    with _output(check):
        (report,) = run_train(asked)
    check.put(shape=shape, images=images, **training_row(report))
    rows = {"": check.result, **{f"{AUTO}, ": check.result["forced"] for _ in settings[1:]}}
    for setting, row in rows.items():
        for line in _lines(row) if "error" not in row else [row["error"]]:
            check.note(f"{setting}{line}")
    if report["model"]:
        check.note(f"modelled for {report['model']['card']}: {report['model']['note']}")


def _lines(row: dict[str, Any]) -> Iterator[str]:
    """A row in words, the model beside what was measured."""
    for arm in ("vanilla", "dropping"):
        found = row[arm]
        yield (
            f"{arm}: {_time(found['step_ms'], found['modelled_ms'])}, MFU {found['mfu']:.1%}, "
            f"peak {found['peak_gib']:.1f} GiB, recomputed: {found['recomputed']}"
        )
        for number, stage in enumerate(found["stages"]):
            yield f"{arm}, stage {number}: forward {_time(stage['ms'], stage['modelled_ms'])}"
    yield (
        f"saved {row['realised']:.1%} of the step; forward and backward {row['realised_compute']:.1%} of "
        f"{row['predicted']:.1%} predicted ({row['realised_over_predicted']:.3f}), ranking "
        f"{row['dropping']['ranking_share']:.1%}"
    )


def _time(ms: float, modelled: float | None = None) -> str:
    unit = time_unit([ms / 1e3, (modelled or 0.0) / 1e3])
    beside = "" if modelled is None else f" (modelled {unit.text(modelled / 1e3)} {unit.name})"
    return f"{unit.text(ms / 1e3)} {unit.name}{beside}"


def training_row(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of a README row, of the report of ``bench train`` with one schedule beside vanilla. ``forced``: the
    same where each side recomputes only what memory forces, if that was measured too; ``error``: why it has none."""
    first, *others = _pairs(report["runs"])
    forced = {"forced": _pair(*others[0])} if others else {}
    return {
        "samples": report["options"]["samples"] or report["shape"]["samples"],
        "optimizer": report["optimizer"]["kind"],
        "kernels": first[0]["kernels"],
        "image_tokens": [round(sum(stage) / len(stage)) for stage in zip(*first[1]["steps"]["image_tokens"])],
        "compared": report["compared"],
        **_pair(*first),
        **forced,
    }


def _pairs(runs: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Vanilla and dropping of every setting."""
    return list(zip(runs[::2], runs[1::2]))


def _pair(vanilla: dict[str, Any], dropping: dict[str, Any]) -> dict[str, Any]:
    if reason := vanilla["error"] or dropping["error"]:
        return {"error": reason}
    return {
        "vanilla": _arm(vanilla),
        "dropping": _arm(dropping),
        "predicted": dropping["predicted_reduction"],
        "realised": dropping["realised_reduction"],
        "realised_compute": dropping["compute_reduction"],
        "realised_over_predicted": dropping["realised_over_predicted"],
        "realised_by_step": dropping["realised_by_step"],
    }


def _arm(run: dict[str, Any]) -> dict[str, Any]:
    low, middle, high = (1000 * seconds for seconds in run["quartiles"]["step"])
    predicted, model = run["predicted_peak_mib"], run["modelled"]
    return {
        "step_ms": middle,
        "quartiles_ms": [low, high],
        "modelled_ms": model and model["step_ms"],
        "stages": [
            {"tokens": stage["tokens"], "ms": 1000 * stage["seconds"], "modelled_ms": modelled}
            for stage, modelled in zip(run["stages"], modelled_stages(run))
        ],
        "recomputed": str(from_json(run)),
        "mfu": run["mfu"],
        "hfu": run["hfu"],
        "ranking_share": run["ranking_share"],
        "peak_gib": run["peak_mib"] * MIB / GIB,
        "predicted_peak_gib": None if predicted is None else predicted * MIB / GIB,
        "tokens_per_second": run["tokens_per_second"],
    }


def _output(check: Check) -> contextlib.redirect_stdout[Any]:
    """The bench's own tables go into a log."""
    return contextlib.redirect_stdout(check.log(".log").open("a", encoding="utf-8"))
