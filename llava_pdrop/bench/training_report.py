"""The report of ``llava-pdrop bench train``: what its JSON holds, and the three files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from llava_pdrop.bench import optimizer
from llava_pdrop.bench.report import environment
from llava_pdrop.bench.timing import PARTS, REGIONS, parts_of, quartiles
from llava_pdrop.bench.training import Measured, Trainer
from llava_pdrop.bench.training_tables import markdown
from llava_pdrop.model.hardware import peak_flops

if TYPE_CHECKING:
    from llava_pdrop.bench.variants import Compared

CLOCKS = {
    "cuda": {
        "seconds": "seconds between CUDA events in the stream. A step begins on an idle device, so what the host plans "
        "before the first kernel is in it",
    },
    "cpu": {
        "seconds": "CPU seconds of this process, all its threads added up: other programs take none of it",
        "wall": "seconds on the clock",
    },
}
"""Device -> what the times of a report are: ``seconds`` are in the tables, in ``quartiles``, ``parts``, ``stages`` and
``steps.seconds`` of the JSON; ``wall`` in its ``steps.wall``."""


def training_report(
    trainer: Trainer, shape: str, results: Sequence[Measured], options: dict[str, Any]
) -> dict[str, Any]:
    """Everything that was measured, ready for JSON, without comparisons. The first of ``results`` is vanilla."""
    rate, source = peak_flops(trainer.device, trainer.dtype)
    vanilla = results[0]
    return {
        "bench": "train",
        "shape": {"name": shape, **_plain(asdict(trainer.shape))},
        "options": options,
        "environment": environment(trainer.device, trainer.workload.seed),
        "dtype": str(trainer.dtype).removeprefix("torch."),
        "clock": "CUDA events" if trainer.device.type == "cuda" else "CPU seconds of the process",
        "times": CLOCKS[trainer.device.type],
        "workload": {
            "images": trainer.workload.images,
            "source": trainer.workload.source,
            **trainer.workload.statistics(),
        },
        "optimizer": {"kind": trainer.kind, "description": optimizer.DESCRIPTIONS[trainer.kind]},
        "peak_flops": {"per_second": rate, "source": source},
        "runs": [_run(result, vanilla, rate) for result in results],
        "compare": [],
    }


def add_comparison(report: dict[str, Any], group: Sequence[Compared]) -> None:
    """Adds the variants of a group to a report."""
    report["compare"] += [_comparison(entry, report["peak_flops"]["per_second"]) for entry in group]


def _run(result: Measured, vanilla: Measured, rate: float) -> dict[str, Any]:
    """One arm: what it is, its medians, its share of the peak, its saving, and every step."""
    arm = result.arm
    entry: dict[str, Any] = {
        "name": arm.name,
        "schedule": arm.schedule.to_dict(),
        "recompute": arm.recompute,
        "recompute_layers": arm.recompute_layers,
        "attention": arm.backend,
        "full_logits": arm.full_logits,
        "compiled": arm.compiled,
        "samples": arm.samples,
        "error": result.error,
    }
    if not result.losses:
        return entry
    steps = [dict(zip(REGIONS, values)) for values in zip(*(result.seconds[name] for name in REGIONS))]
    pieces = [parts_of(step) for step in steps]
    seconds = result.seconds["step"]
    entry |= {
        "quartiles": {name: _round(quartiles(result.seconds[name])) for name in REGIONS},
        "parts": {name: _round([quartiles([piece[name] for piece in pieces])[1]])[0] for name in PARTS},
        "stages": _stages(result, rate),
        "ranking_share": median(ranking / step for ranking, step in zip(result.seconds["ranking"], seconds)),
        "peak_mib": max(result.peak_mib),
        "predicted_peak_mib": max(result.predicted_peak_mib, default=None),
        "tokens_per_second": result.tokens_per_second,
        "tflop_per_step": sum(result.model_flops) / len(steps) / 1e12,
        "mfu": median(count / step for count, step in zip(result.model_flops, seconds)) / rate,
        "hfu": median(count / step for count, step in zip(result.hardware_flops, seconds)) / rate,
    }
    if result is not vanilla and vanilla.error is None and result.error is None:
        predicted = 1 - sum(result.hardware_flops) / sum(vanilla.hardware_flops)
        realised = 1 - result.typical_seconds / vanilla.typical_seconds
        pairs = zip(vanilla.seconds["step"], seconds)
        entry |= {
            "predicted_reduction": predicted,
            "realised_reduction": realised,
            "realised_over_predicted": realised / predicted if predicted else None,
            "realised_total": 1 - sum(seconds) / sum(vanilla.seconds["step"]),
            "realised_by_step": _round(quartiles([1 - dropping / full for full, dropping in pairs])),
        }
    return entry | {
        "steps": {
            "seconds": {name: _round(result.seconds[name]) for name in REGIONS},
            "wall": {name: _round(values) for name, values in result.wall.items() if values},
            "peak_mib": _round(result.peak_mib),
            "loss": _round(result.losses),
            "tokens": result.stage_tokens,
            "image_tokens": result.image_tokens,
            "model_flops": result.model_flops,
            "hardware_flops": result.hardware_flops,
        }
    }


def _stages(result: Measured, rate: float) -> list[dict[str, float]]:
    """Of every stage of the decoder, forward only: tokens, and medians of its seconds and of its share of the peak."""
    tokens = zip(*result.stage_tokens)
    return [
        {
            "tokens": median(lengths),
            "seconds": _round([median(seconds)])[0],
            "share_of_peak": _round([median(count / taken for count, taken in zip(counts, seconds)) / rate])[0],
        }
        for lengths, seconds, counts in zip(tokens, zip(*result.stage_seconds), zip(*result.stage_flops))
    ]


def _comparison(entry: Compared, rate: float) -> dict[str, Any]:
    """A variant, its runs without their single steps."""
    runs = [_run(result, entry.results[0], rate) for result in entry.results]
    for run in runs:
        run.pop("steps", None)
    variant = entry.variant
    return {"group": variant.group, "name": variant.name, "unavailable": variant.unavailable, "runs": runs}


def write(report: dict[str, Any], stem: Path) -> list[Path]:
    """Writes ``stem``.json, .md and .png; returns their paths."""
    from llava_pdrop.bench.figures import step_bars  # matplotlib only where something is drawn

    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.parent / f"{stem.name}{suffix}" for suffix in (".json", ".md", ".png")]
    files[0].write_text(json.dumps(_plain(report), separators=(",", ":")) + "\n", encoding="utf-8")
    files[1].write_text(markdown(report, files[2].name), encoding="utf-8")
    step_bars(report, files[2])
    return files


def _round(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _plain(value: Any) -> Any:
    """JSON's own types; tuples become lists."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
