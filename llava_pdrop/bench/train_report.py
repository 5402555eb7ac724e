"""The report of ``llava-pdrop bench train``: what its JSON holds, and the three files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llava_pdrop.bench import optimizer
from llava_pdrop.bench.recompute import recomputed
from llava_pdrop.bench.train_picture import step_bars
from llava_pdrop.bench.train_step import Measured, Trainer
from llava_pdrop.bench.variants import Compared
from llava_pdrop.cost.step_time import NOTE, is_modelled
from llava_pdrop.cost.time_report import mean
from llava_pdrop.errors import UserError
from llava_pdrop.report.environment import environment
from llava_pdrop.report.pictures import save_picture
from llava_pdrop.report.style import markdown_table
from llava_pdrop.runtime.clock import PIECES, REGIONS, parts_of, quartiles
from llava_pdrop.runtime.device import peak_flops

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

GIB = 1024
"""MiB in a GiB."""

TIMES = {
    "step": "step",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "ranking": "ranking and dropping",
    "tower": "tower forward",
    "tower_backward": "tower backward",
}
"""Region (`clock.REGIONS`) -> its line in the table."""

NOTES = """\
- Times are medians over {steps} counted steps each, with their quartiles: {clock}. All runs took turns on the same
  batches.
- Ranking and dropping includes selecting the survivors; it lies in the forward.
- Tower backward goes from the gradient of its features to the end of the backward pass (that of the text embeddings
  comes last and is in it), and lies in the backward; the picture shows them apart.
- Tokens/s counts the samples before any drop. MFU: operations that the samples ask for, without recomputed layers, by
  time and peak; HFU: all operations. Both count the scores that fused attention computes once more in its backward.
- *Operations saved* is the prediction for these very batches (text, tower, projector, head, ranking and recomputation
  included; the optimizer has none), against the vanilla run with the same setting of recomputation. *Time saved* is
  what the steps saved at the median speed of each run (seconds per operation, since batches differ in length).
  *Realised / predicted* compares forward and backward on both sides: the optimizer is in neither. The JSON has every
  step, and the saving of the plain totals.
- *Modelled* is no measurement: what `llava-pdrop plan` predicts for a named GPU in bfloat16, with this optimizer and
  eager kernels where this run has them, else fused ones.
- *Peak predicted* (GPUs only) is what `llava-pdrop plan` would say with this optimizer, for the largest counted batch
  and eager kernels.
"""

COMPARED = "forward and backward on both sides; the optimizer is in neither"
"""What ``realised_over_predicted`` compares; ``realised_reduction`` is of the whole step, the optimizer included."""


def training_report(
    trainer: Trainer, shape: str, results: Sequence[Measured], options: dict[str, Any], card: str | None = None
) -> dict[str, Any]:
    """Everything that was measured, ready for JSON, without comparisons.

    Args:
        results: of each setting of recomputation vanilla first, which the others of that setting are compared with.
        card: one of `cost.step_time.CARDS`, whose modelled time stands beside the measured one.

    Raises:
        UserError: the very first arm ran out of memory, so that there is nothing to compare with.
    """
    if results[0].error is not None:
        raise UserError(
            f"{results[0].error} on {trainer.device} in {results[0].arm.name}: try a smaller --samples or more "
            "--recompute-layers"
        )
    card = card if is_modelled(trainer.model.hf.config) else None
    rate, source = peak_flops(trainer.device, trainer.dtype)
    vanilla = {result.arm.setting: result for result in reversed(results)}
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
        "model": None if card is None else {"card": card, "note": NOTE},
        "compared": COMPARED,
        "runs": [_run(result, vanilla[result.arm.setting], rate, card) for result in results],
        "compare": [],
    }


def add_comparison(report: dict[str, Any], group: Sequence[Compared]) -> None:
    """Adds the variants of a group to a report."""
    report["compare"] += [_comparison(entry, report["peak_flops"]["per_second"]) for entry in group]


def _run(result: Measured, vanilla: Measured, rate: float, card: str | None = None) -> dict[str, Any]:
    """One arm: what it is, its medians, its share of the peak, its saving, and every step."""
    arm = result.arm
    entry: dict[str, Any] = {
        "name": arm.name,
        "schedule": arm.schedule.to_dict(),
        "recompute": arm.recompute,
        "recompute_layers": arm.recompute_layers,
        "recompute_tower": arm.recompute_tower,
        "setting": arm.setting,
        "attention": arm.backend,
        "full_logits": arm.full_logits,
        "kernels": arm.kernels,
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
        "parts": {name: _round([quartiles([piece[name] for piece in pieces])[1]])[0] for name in PIECES},
        "stages": _stages(result, rate),
        "ranking_share": median(ranking / step for ranking, step in zip(result.seconds["ranking"], seconds)),
        "peak_mib": max(result.peak_mib),
        "predicted_peak_mib": max(result.predicted_peak_mib, default=None),
        "modelled": _modelled(result, card),
        "tokens_per_second": result.tokens_per_second,
        "tflop_per_step": sum(result.model_flops) / len(steps) / 1e12,
        "mfu": median(count / step for count, step in zip(result.model_flops, seconds)) / rate,
        "hfu": median(count / step for count, step in zip(result.hardware_flops, seconds)) / rate,
    }
    if result is not vanilla and vanilla.error is None and result.error is None:
        predicted = 1 - sum(result.hardware_flops) / sum(vanilla.hardware_flops)
        realised = 1 - result.typical_seconds / vanilla.typical_seconds
        compute = 1 - result.typical_compute / vanilla.typical_compute
        pairs = zip(vanilla.seconds["step"], seconds)
        entry |= {
            "predicted_reduction": predicted,
            "realised_reduction": realised,
            "compute_reduction": compute,
            "realised_over_predicted": compute / predicted if predicted else None,
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


def _modelled(result: Measured, card: str | None) -> dict[str, Any] | None:
    """Means over the counted steps of what the model says for ``card``."""
    times = [time for time in result.times if time is not None]
    return mean([time.figures(card) for time in times]) if card is not None and times else None


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
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.parent / f"{stem.name}{suffix}" for suffix in (".json", ".md", ".png")]
    files[0].write_text(json.dumps(_plain(report), separators=(",", ":")) + "\n", encoding="utf-8")
    pictured = save_picture(files[2], partial(step_bars, report))
    files[1].write_text(markdown(report, files[2].name if pictured else None), encoding="utf-8")
    return files if pictured else files[:2]


def _round(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _plain(value: Any) -> Any:
    """JSON's own types; tuples become lists."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, lines) of the runs and, where there are any, of the variants."""
    device = report["environment"]["device"]
    title = f"{report['shape']['name']} on {device}, {report['dtype']}"
    columns = [_column(run, report["optimizer"]["kind"], report["model"]) for run in report["runs"]]
    lines = [[name, *(column.get(name, "") for column in columns)] for name in columns[0]]
    head = ["median [quartiles]", *(run["name"] for run in report["runs"])]
    found = [(title, head, [line for line in lines if any(line[1:])])]
    stages = [(run, *stage) for run in report["runs"] for stage in enumerate(run.get("stages", []))]
    lines = [
        [run["name"], str(k), f"{s['tokens']:,.0f}", _ms(s["seconds"]), f"{s['share_of_peak']:.1%}", *_stage(run, k)]
        for run, k, s in stages
    ]
    head = ["run", "stage", "tokens", "ms", "share of peak"]
    head += [f"modelled for {report['model']['card']}, ms"] if report["model"] else []
    found.append(("Decoder layers by stage, forward", head, lines))
    if report["compare"]:
        lines = [line for entry in report["compare"] for line in _variant_lines(entry)]
        found.append(("Variants", ["choice", "variant", "run", "step ms", "peak GiB", "tokens/s", "realised"], lines))
    return found


def markdown(report: dict[str, Any], picture: str | None) -> str:
    """The report as text; ``picture`` is the file name of its PNG, if there is one."""
    machine, stock = report["environment"], report["workload"]
    steps = len(report["runs"][0]["steps"]["loss"])
    text = [f"# Training step: {report['shape']['name']}\n"]
    for title, head, lines in tables(report):
        text.append(f"## {title}\n\n{markdown_table(head, lines)}")
    text.append(NOTES.format(steps=steps, clock=report["times"]["seconds"]))
    if picture is not None:
        text.append(f"![Where the time of a step goes]({picture})\n")
    size = machine["device_memory_gib"]
    host = f"{machine['device_count']} cores, {machine['threads']} used" if size is None else f"{size} GiB"
    again = {f"{run['name']}, recomputed": recomputed(**_again(run)) for run in report["runs"] if run["setting"]}
    settings = {
        "device": f"{machine['device']}, {host}",
        "versions": f"torch {machine['torch']}, CUDA {machine['cuda'] or 'none'}, transformers "
        f"{machine['transformers']}, Python {machine['python']}",
        "commit": str(machine["commit"]),
        "date": machine["date"],
        "command": f"`{machine['command']}`",
        "seed": str(machine["seed"]),
        "optimizer": report["optimizer"]["description"],
        "kernels": report["runs"][0]["kernels"],
        "peak": f"{report['peak_flops']['per_second'] / 1e12:.4g} TFLOP/s, {report['peak_flops']['source']}",
        "batches": f"{stock['source']}: {stock['image_tokens']:.0f} image and {stock['text_tokens']:.0f} text "
        f"tokens, {stock['turns']:.1f} turns a sample, {stock['text_only_share']:.1%} without picture",
        **{run["name"]: _schedule(run["schedule"]) for run in report["runs"] if run["schedule"]["layers"]},
        **again,
    }
    text.append(markdown_table(["setting", ""], [list(item) for item in settings.items()]))
    return "\n".join(text)


def show(report: dict[str, Any]) -> None:
    """Prints the tables, and what they come to."""
    console = Console()
    for title, head, lines in tables(report):
        shown = Table(title=escape(title), box=box.SIMPLE_HEAD, header_style="bold")
        for place, name in enumerate(head):
            shown.add_column(escape(name), justify="left" if place == 0 else "right")
        for line in lines:
            shown.add_row(*map(escape, line))
        console.print(shown)
    peak, kind = report["peak_flops"], report["optimizer"]
    console.print(f"Times: {report['times']['seconds']}.", style="dim", highlight=False)
    console.print(f"Optimizer: {kind['description']}. Peak: {peak['source']}.", style="dim", highlight=False)
    for run in report["runs"]:
        if run["setting"]:
            console.print(escape(f"{run['name']}: recomputes {recomputed(**_again(run))}."), highlight=False)
        if run["error"]:
            console.print(escape(f"{run['name']}: {run['error']}."), highlight=False)
        if "realised_reduction" in run:
            console.print(escape(_verdict(run)), highlight=False)
    if report["model"]:
        console.print(escape(f"Modelled: {NOTE}"), style="dim", highlight=False)


def _column(run: dict[str, Any], optimizer_kind: str, model: dict[str, str] | None) -> dict[str, str]:
    """Title of a line -> what it says of one run; nothing where there is nothing to say."""
    if "quartiles" not in run:
        return {f"{TIMES['step']}, ms": run["error"] or ""}
    spread, foreseen, ratio = run["quartiles"], run["predicted_peak_mib"], run.get("realised_over_predicted")
    column = {f"{title}, ms": _spread(spread[name]) for name, title in TIMES.items()}
    if optimizer_kind == "none":
        column[f"{TIMES['optimizer']}, ms"] = "left out"
    if model is not None:
        told = run["modelled"]
        column[f"step modelled for {model['card']}, ms"] = "" if told is None else f"{told['step_ms']:,.4g}"
    return column | {
        "ranking and dropping, of the step": f"{run['ranking_share']:.1%}" if run["ranking_share"] else "-",
        "peak memory, GiB": f"{run['peak_mib'] / GIB:.2f}",
        "peak predicted, GiB": "" if foreseen is None else f"{foreseen / GIB:.2f}",
        "tokens/s": f"{run['tokens_per_second']:,.0f}",
        "MFU": f"{run['mfu']:.1%}",
        "HFU": f"{run['hfu']:.1%}",
        "operations saved (predicted)": _share(run.get("predicted_reduction")),
        "time saved (realised)": _share(run.get("realised_reduction")),
        "time saved, forward and backward": _share(run.get("compute_reduction")),
        "realised / predicted": "" if ratio is None else f"{ratio:.3f}",
    }


def _verdict(run: dict[str, Any]) -> str:
    ratio = run["realised_over_predicted"]
    share = "" if ratio is None else f": {ratio:.3f} of it"
    return (
        f"{run['name']}: a step takes {run['realised_reduction']:.1%} less time than vanilla, forward and backward "
        f"{run['compute_reduction']:.1%}; their operations predict {run['predicted_reduction']:.1%}{share}."
    )


def _stage(run: dict[str, Any], stage: int) -> list[str]:
    """What the model says of the forward of a stage, where the report has a model."""
    if run["modelled"] is None:
        return []
    layers = [part for part in run["modelled"]["parts"] if part["name"].startswith("layers")]
    return [f"{layers[stage]['forward_ms']:.3g}"]


def _again(run: dict[str, Any]) -> dict[str, Any]:
    return {"recompute": run["recompute"], "layers": run["recompute_layers"], "tower": run["recompute_tower"]}


def _schedule(schedule: dict[str, Any]) -> str:
    layers, ratios = (", ".join(map(str, schedule[key])) for key in ("layers", "ratios"))
    return f"before layers {layers} keep {ratios} ({schedule['ranker']}, {schedule['positions']})"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _variant_lines(entry: dict[str, Any]) -> list[list[str]]:
    if entry["unavailable"]:
        return [[entry["group"], entry["name"], "", f"not available: {entry['unavailable']}", "", "", ""]]
    lines = []
    for run in entry["runs"]:
        numbers = [run["error"] or "", "", "", ""]
        if "quartiles" in run and run["error"] is None:
            step, rate = _spread(run["quartiles"]["step"]), f"{run['tokens_per_second']:,.0f}"
            numbers = [step, f"{run['peak_mib'] / GIB:.2f}", rate, _share(run.get("realised_reduction"))]
        lines.append([entry["group"], entry["name"], run["name"], *numbers])
    return lines


def _spread(values: Sequence[float]) -> str:
    first, middle, third = values
    if not any(values):
        return "-"
    return f"{_ms(middle)} [{_ms(first)}, {_ms(third)}]"


def _ms(seconds: float) -> str:
    """Milliseconds with three digits and no exponent."""
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
