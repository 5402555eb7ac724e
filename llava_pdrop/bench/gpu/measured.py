"""Stages ``next``, ``l15``, ``p9``, ``mixture``, ``prefill``, ``generate``: the benches at the shapes of the README's
tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llava_pdrop.bench.generate import DROPPING
from llava_pdrop.bench.gpu.check import Check
from llava_pdrop.bench.recompute import ALL, AUTO, from_json
from llava_pdrop.bench.run import GenerateSettings, PrefillSettings, TrainSettings, run_generate, run_prefill, run_train
from llava_pdrop.bench.train_report import modelled_stages
from llava_pdrop.report.units import GIB, MIB, time_text, time_unit

TRAINED = {
    "next": TrainSettings(
        shape="llava-next-7b", images=("full",), steps=6, warmup=2, recompute_layers=(ALL, AUTO)
    ),
    "l15": TrainSettings(shape="llava15-7b", images=("full",), steps=5, warmup=1, recompute_layers=(ALL, AUTO)),
    "p9": TrainSettings(shape="llava-next-7b-p9", images=("full",), steps=4, warmup=1, recompute_layers=(ALL,)),
    "mixture": TrainSettings(shape="llava15-7b", images=("mixture",), steps=6, warmup=1, recompute_layers=(ALL,)),
}  # fmt: skip
"""Stage -> the steps that it measures. ``next`` (full pictures of 5 tiles) and ``l15`` (a picture in every sample) are
the goal rows: there each side is measured once more, recomputing only what memory forces. ``p9`` has full pictures of 9
tiles. ``mixture`` is no goal row: its text-only samples and short questions save less."""

ANSWERED = (1, 4, 8)
"""Batch sizes of stage ``generate``."""


def train(check: Check) -> None:
    """The stage's row of `TRAINED`."""
    asked = replace(TRAINED[check.name], device=check.device.type, out=check.benchmarks, card=check.card)
    if check.rehearsal:
        asked = replace(asked, shape="tiny", images=("mixture",), steps=1, warmup=0)
    with check.printed():
        (report,) = run_train(asked)
    check.put(shape=asked.shape, images=asked.images[0], **training_row(report))
    rows = {"": check.result, **{f"{AUTO}, ": check.result["forced"] for _ in asked.recompute_layers[1:]}}
    for setting, row in rows.items():
        for line in _lines(row) if "error" not in row else [row["error"]]:
            check.note(f"{setting}{line}")
    if report["model"]:
        check.note(f"modelled for {report['model']['card']}: {report['model']['note']}")


def prefill(check: Check) -> None:
    """LLaVA-NeXT-7B, prompts of 2,880 image tokens, one at a time and eight at once."""
    shape, tokens, runs = ("tiny", 100, 1) if check.rehearsal else ("llava-next-7b", 2880, 6)
    asked = PrefillSettings(
        shape=shape, device=check.device.type, out=check.benchmarks, image_tokens=(tokens,), new_tokens=8, runs=runs
    )
    with check.printed():
        report = run_prefill(asked)
    for batch in (1, 8):
        arms = _by_arm(report, batch)
        row = {
            **{f"{arm}_ms": own["prefill_ms"]["median"] for arm, own in arms.items()},
            **{key: arms["dropping"][key] for key in ("speedup", "speedup_predicted", "ranking_share")},
            "decode_tokens_per_s": {arm: own["decode_tokens_per_s"]["median"] for arm, own in arms.items()},
        }
        check.put(**{f"batch_{batch}": row})
        check.note(
            f"batch {batch}: {_times(row, 'ms')}, {row['speedup']:.2f}x (operations {row['speedup_predicted']:.2f}x), "
            f"ranking {row['ranking_share']:.1%}"
        )


def generate(check: Check) -> None:
    """LLaVA-NeXT-7B, answers to prompts of 2,880 image tokens, one at a time and several at once, in one bench: a batch
    size that memory does not suffice for costs its own row."""
    shape, tokens, new, runs = ("tiny", 100, 4, 1) if check.rehearsal else ("llava-next-7b", 2880, 32, 3)
    asked = GenerateSettings(
        shape=shape, device=check.device.type, out=check.benchmarks, image_tokens=(tokens,), batch=ANSWERED,
        new_tokens=new, runs=runs,
    )  # fmt: skip
    with check.printed():
        report = run_generate(asked)
    for batch in ANSWERED:
        row = answer_row(report, batch)
        check.put(**{f"batch_{batch}": row})
        check.note(f"batch {batch}: {answer_text(row)}")


def answer_row(report: dict[str, Any], batch: int) -> dict[str, Any]:
    """The figures of one batch size of ``bench generate``; ``error``: why it has none."""
    arms = _by_arm(report, batch)
    if any(own["out_of_memory"] for own in arms.values()):
        return {"error": "out of memory"}
    hooks = {own["batch"]: own["share"] for own in report["hooks"]}
    return {
        **{f"{arm}_{key}": own[key]["median"] for arm, own in arms.items() for key in ("first_token_ms", "token_ms")},
        "tokens_per_s": {arm: own["tokens_per_s"]["median"] for arm, own in arms.items()},
        "cache_gib": {arm: own["cache_bytes"] / GIB for arm, own in arms.items()},
        **{key: arms["dropping"][key] for key in ("speedup", "prefill_realised_over_predicted")},
        "hooks_share": hooks.get(batch),
    }


def answer_text(row: dict[str, Any]) -> str:
    """An `answer_row` in words."""
    if "error" in row:
        return str(row["error"])
    hooks = "not measured" if row["hooks_share"] is None else f"{row['hooks_share']:.1%}"
    return (
        f"first token {_times(row, 'first_token_ms')}, per token {_times(row, 'token_ms')}, prefill "
        f"{row['speedup']['prefill']:.2f}x (realised / predicted {row['prefill_realised_over_predicted']:.3f}), hooks "
        f"{hooks} of a token"
    )


def _by_arm(report: dict[str, Any], batch: int) -> dict[str, dict[str, Any]]:
    """Both results of one batch size in the report of ``bench prefill`` or ``bench generate``."""
    found = {entry["method"]: entry for entry in report["results"] if entry["batch"] == batch}
    return {"vanilla": found["vanilla"], "dropping": found[DROPPING]}


def _times(row: dict[str, Any], key: str) -> str:
    """Without dropping and with it."""
    return " -> ".join(time_text(row[f"{arm}_{key}"] / 1e3) for arm in ("vanilla", "dropping"))


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


def _time(ms: float, modelled: float | None) -> str:
    unit = time_unit([ms / 1e3, (modelled or 0.0) / 1e3])
    beside = "" if modelled is None else f" (modelled {unit.text(modelled / 1e3)} {unit.name})"
    return f"{unit.text(ms / 1e3)} {unit.name}{beside}"


def training_row(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of a README row, of the report of ``bench train`` with one schedule beside vanilla. ``forced``: the
    same where each side recomputes only what memory forces, if that was measured too; ``error``: why it has none."""
    first, *others = zip(report["runs"][::2], report["runs"][1::2])  # vanilla and dropping of every setting
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
