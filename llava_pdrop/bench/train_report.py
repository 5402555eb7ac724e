"""The report of ``llava-pdrop bench train``: what its JSON holds, and the page made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from llava_pdrop.bench import optimizer
from llava_pdrop.bench.rankings import table_of_rankers
from llava_pdrop.bench.recompute import from_json, to_json
from llava_pdrop.bench.train_step import BenchTrainer, Measured
from llava_pdrop.bench.variants import Compared
from llava_pdrop.cost.step_time import NOTE, is_modelled
from llava_pdrop.cost.time_report import mean
from llava_pdrop.errors import UserError
from llava_pdrop.files import write_json
from llava_pdrop.report.environment import environment, settings
from llava_pdrop.report.page import Note, Page, Picture, Table
from llava_pdrop.report.pictures import subplots
from llava_pdrop.report.units import MEMORY, MIB, column, digits, less, saved, text_of, time_unit
from llava_pdrop.runtime.clock import REGIONS, parts_of, quartiles
from llava_pdrop.runtime.device import peak_flops
from llava_pdrop.schedule import Schedule

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

STEP_PARTS = {
    "step": ("step", ""),
    "forward": ("forward", ""),
    "tower": ("tower forward", "#3E5C76"),
    "embedding": ("projector, embedding", "#748CAB"),
    "decoder": ("decoder forward", "#6B7C8F"),
    "ranking": ("ranking and dropping", "#D7263D"),
    "head": ("head and loss", "#F2B134"),
    "backward": ("backward", "#E2703A"),
    "tower_backward": ("tower backward", "#9A5B3C"),
    "optimizer": ("optimizer", "#8AB17D"),
}
"""Region of a step (`clock.REGIONS`) or piece of it (`clock.parts_of`) -> what it is called, and a piece's colour."""

TIMES = ("step", "forward", "backward", "optimizer", "ranking", "tower", "tower_backward")
"""Regions that have a line in the table, where any run has spent time in them."""

NOTES = """\
- Times are medians over {steps} counted steps each, with their quartiles. All runs took turns on the same batches.
- Ranking and dropping includes selecting the survivors; it is part of the forward.
- Tower backward runs from the gradient of its features to the end of the backward pass, of which it is a part (the text
  embeddings come last and are included); the picture shows them apart.
- Tokens/s counts the samples before any drop. MFU: operations that the samples ask for, without recomputed layers, by
  time and peak; HFU: all operations. Both count the scores that fused attention computes once more in its backward.
- *Operations saved* is the prediction for these very batches (text, tower, projector, head, ranking and recomputation
  included; the optimizer has none), against the vanilla run with the same setting of recomputation. *Time saved* is
  what the steps saved at the median speed of each run (seconds per operation, since batches differ in length).
  *Realised / predicted* compares forward and backward on both sides: the optimizer is in neither. The JSON has every
  step, and the saving of the plain totals.
- *Modelled* is what `llava-pdrop plan` predicts for a named GPU in bfloat16, with this optimizer and eager kernels
  where this run has them, else fused ones.
- *Peak predicted* (GPUs only) is what `llava-pdrop plan` would say with this optimizer, for the largest counted batch
  and the kernels of this run."""

COMPARED = "forward and backward on both sides; the optimizer is in neither"
"""What ``realised_over_predicted`` compares; ``realised_reduction`` is of the whole step, the optimizer included."""


def training_report(
    trainer: BenchTrainer, shape: str, results: Sequence[Measured], options: dict[str, Any], card: str | None = None
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
        "shape": {"name": shape, **asdict(trainer.shape)},
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
        "rankers": [],
    }


def add_comparison(report: dict[str, Any], group: Sequence[Compared]) -> None:
    """Adds the variants of a group to a report, with their runs but for the single steps."""
    for entry in group:
        runs = [_run(result, entry.results[0], report["peak_flops"]["per_second"]) for result in entry.results]
        told = {key: getattr(entry.variant, key) for key in ("group", "name", "unavailable")}
        runs = [{key: value for key, value in run.items() if key != "steps"} for run in runs]
        report["compare"].append(told | {"runs": runs})


def _run(result: Measured, vanilla: Measured, rate: float, card: str | None = None) -> dict[str, Any]:
    """One arm: what it is, its medians, its share of the peak, its saving, and every step."""
    arm = result.arm
    entry: dict[str, Any] = {
        "name": arm.name,
        "schedule": arm.schedule.to_dict(),
        **to_json(arm.recomputed),
        "setting": arm.setting,
        "attention": arm.backend,
        "full_logits": arm.full_logits,
        "kernels": arm.kernels,
        "samples": arm.samples,
        "error": result.error,
    }
    if not result.losses:
        return entry
    seconds = result.seconds["step"]
    pieces = [parts_of(dict(zip(REGIONS, step))) for step in zip(*(result.seconds[name] for name in REGIONS))]
    entry |= {
        "quartiles": {name: _round(quartiles(result.seconds[name])) for name in REGIONS},
        "parts": {name: _round([median(piece[name] for piece in pieces)])[0] for name in pieces[0]},
        "stages": _stages(result, rate),
        "ranking_share": median(ranking / step for ranking, step in zip(result.seconds["ranking"], seconds)),
        "peak_mib": max(result.peak_mib),
        "predicted_peak_mib": max(result.predicted_peak_mib, default=None),
        "modelled": mean([time.figures(card) for time in result.times]) if card is not None and result.times else None,
        "tokens_per_second": result.tokens_per_second,
        "tflop_per_step": sum(result.model_flops) / len(seconds) / 1e12,
        "mfu": median(count / step for count, step in zip(result.model_flops, seconds)) / rate,
        "hfu": median(count / step for count, step in zip(result.hardware_flops, seconds)) / rate,
    }
    if result is not vanilla and vanilla.error is None and result.error is None:
        predicted = saved(sum(vanilla.hardware_flops), sum(result.hardware_flops))
        realised = saved(vanilla.typical(vanilla.seconds["step"]), result.typical(seconds))
        compute = saved(vanilla.typical(vanilla.compute_seconds), result.typical(result.compute_seconds))
        entry |= {
            "predicted_reduction": predicted,
            "realised_reduction": realised,
            "compute_reduction": compute,
            "realised_over_predicted": compute / predicted if predicted else None,
            "realised_total": saved(sum(vanilla.seconds["step"]), sum(seconds)),
            "realised_by_step": _round(quartiles(list(map(saved, vanilla.seconds["step"], seconds)))),
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
            "share_of_peak": _round([median(map(_rate, counts, seconds)) / rate])[0],
        }
        for lengths, seconds, counts in zip(tokens, zip(*result.stage_seconds), zip(*result.stage_flops))
    ]


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds else 0.0  # a stage has no layers where a drop comes before layer 0


def _round(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def write(report: dict[str, Any], stem: Path) -> list[Path]:
    """Writes ``stem``.json, .md and .png; returns their paths."""
    files = page(report, stem.name).write(stem.parent, f"{stem.name}.md")
    return [write_json(stem.parent / f"{stem.name}.json", report, indent=None), *files]


def page(report: dict[str, Any], stem: str) -> Page:
    """The report for people; its picture is ``stem``.png."""
    peak, kind = report["peak_flops"], report["optimizer"]
    told = f"Times: {report['times']['seconds']}. Optimizer: {kind['description']}. Peak: {peak['source']}."
    again = [f"{run['name']}: recomputes {from_json(run)}." for run in report["runs"] if run["setting"]]
    return Page(
        f"Training step: {report['shape']['name']}",
        [
            *tables(report),
            told,
            *again,
            *(f"{run['name']}: {run['error']}." for run in report["runs"] if run["error"]),
            *(_verdict(run) for run in report["runs"] if "realised_reduction" in run),
            *([f"Modelled: {report['model']['note']}"] if report["model"] else []),
            Note(NOTES.format(steps=len(report["runs"][0]["steps"]["loss"]))),
            Picture(f"{stem}.png", "Where the time of a step goes", partial(step_bars, report)),
            Note(_settings(report).markdown()),
        ],
    )


def tables(report: dict[str, Any]) -> list[Table]:
    """The runs, their stages and, where there are any, the variants."""
    runs, shape = report["runs"], report["shape"]["name"]
    title = f"{shape} on {report['environment']['device']}, {report['dtype']}"
    rows = [[head, *cells] for head, cells in _rows(report) if any(cells)]
    found = [Table(["median [quartiles]", *(run["name"] for run in runs)], rows, title)]
    stages = [(run, place, stage) for run in runs for place, stage in enumerate(run.get("stages", []))]
    columns = [
        ("run", [run["name"] for run, *_ in stages]),
        ("stage", [str(place) for _, place, _ in stages]),
        ("tokens", [f"{stage['tokens']:,.0f}" for *_, stage in stages]),
        column("time", [stage["seconds"] for *_, stage in stages]),
        ("share of peak", [f"{stage['share_of_peak']:.1%}" for *_, stage in stages]),
    ]
    if report["model"]:
        modelled = [ms and ms / 1e3 for run in runs if "stages" in run for ms in modelled_stages(run)]
        columns.append(column(f"modelled for {report['model']['card']}", modelled))
    found.append(Table.of_columns(columns, "Decoder layers by stage, forward"))
    more = ((_variants, report["compare"]), (table_of_rankers, report["rankers"]))
    return [*found, *(table(entries) for table, entries in more if entries)]


def _rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(head, a cell for each run) of the first table; a run that failed has its error under ``step`` and no more."""
    runs, card = report["runs"], report["model"] and report["model"]["card"]

    def known(key: str) -> list[Any]:
        return [run.get(key) for run in runs]

    def shares(key: str) -> list[str]:
        return [text_of(value, ".1%") for value in known(key)]

    rows = []
    for name in TIMES:
        spreads = [run["quartiles"][name] if "quartiles" in run else [] for run in runs]
        if not any(map(any, spreads)):
            continue
        unit = time_unit(value for spread in spreads for value in spread)
        cells = [unit.spread(spread) for spread in spreads]
        if name == "step":
            cells = [cell or run["error"] or "" for cell, run in zip(cells, runs)]
        if name == "optimizer" and report["optimizer"]["kind"] == "none":
            cells = ["left out" if cell else "" for cell in cells]
        rows.append((f"{STEP_PARTS[name][0]}, {unit.name}", cells))
    modelled = [told and told["step_ms"] / 1e3 for told in known("modelled")]
    return [
        *rows,
        column(f"step modelled for {card}", modelled),
        ("ranking and dropping, of the step", [text_of(share or None, ".1%") for share in known("ranking_share")]),
        column("peak memory", _bytes(runs, "peak_mib"), MEMORY),
        column("peak predicted", _bytes(runs, "predicted_peak_mib"), MEMORY),
        ("tokens/s", list(map(digits, known("tokens_per_second")))),
        ("MFU", shares("mfu")),
        ("HFU", shares("hfu")),
        ("operations saved (predicted)", shares("predicted_reduction")),
        ("time saved (realised)", shares("realised_reduction")),
        ("time saved, forward and backward", shares("compute_reduction")),
        ("realised / predicted", [text_of(ratio, ".3f") for ratio in known("realised_over_predicted")]),
    ]


def modelled_stages(run: dict[str, Any]) -> list[float | None]:
    """Milliseconds that the model gives the forward of every stage of a ``run``, None where there is no model."""
    if run["modelled"] is None:
        return [None] * len(run["stages"])
    schedule, found = Schedule.from_dict(run["schedule"]), [0.0] * len(run["stages"])
    for part in run["modelled"]["parts"]:
        if part["name"].startswith("layers"):  # more parts than stages where image tokens enter late
            found[schedule.stage(int(part["name"].split()[1].split("-")[0]))] += part["forward_ms"]
    return list(found)


def _variants(entries: Sequence[dict[str, Any]]) -> Table:
    lines = [(entry, run) for entry in entries for run in entry["runs"] or [{"error": None}]]
    done = [{} if run["error"] else run for _, run in lines]
    unit = time_unit(value for run in done if run for value in run.get("quartiles", {"step": ()})["step"])
    steps = []
    for (entry, run), found in zip(lines, done):
        spread = unit.spread(found["quartiles"]["step"]) if "quartiles" in found else run["error"]
        steps.append(spread or f"not available: {entry['unavailable']}")
    columns = [
        ("choice", [entry["group"] for entry, _ in lines]),
        ("variant", [entry["name"] for entry, _ in lines]),
        ("run", [run.get("name", "") for _, run in lines]),
        (f"step, {unit.name}", steps),
        column("peak", _bytes(done, "peak_mib"), MEMORY),
        ("tokens/s", [digits(run.get("tokens_per_second")) for run in done]),
        ("time saved", [text_of(run.get("realised_reduction"), ".1%") for run in done]),
    ]
    return Table.of_columns(columns, "Variants", left=3)


def _bytes(runs: Sequence[dict[str, Any]], key: str) -> list[float | None]:
    return [run[key] * MIB if run.get(key) else None for run in runs]


def _settings(report: dict[str, Any]) -> Table:
    stock, peak = report["workload"], report["peak_flops"]["per_second"]
    schedules = {run["name"]: told for run in report["runs"] if (told := _schedule(run["schedule"]))}
    return settings(
        report["environment"],
        kernels=report["runs"][0]["kernels"],
        peak=f"{digits(peak / 1e12)} TFLOP/s",
        batches=f"{stock['source']}: {stock['image_tokens']:.0f} image and {stock['text_tokens']:.0f} text tokens, "
        f"{stock['turns']:.1f} turns a sample, {stock['text_only_share']:.1%} without picture",
        **schedules,
    )


def _verdict(run: dict[str, Any]) -> str:
    ratio = run["realised_over_predicted"]
    share = "" if ratio is None else f", of which {ratio:.3f} is realised"
    return (
        f"{run['name']}: a step takes {less(run['realised_reduction'], 'time')} than vanilla, forward and backward "
        f"{less(run['compute_reduction'])}; their operations predict {less(run['predicted_reduction'])}{share}."
    )


def _schedule(schedule: dict[str, Any]) -> str:
    pools = f"pool tiles to at most {schedule['downsample']} features" if schedule.get("downsample") else ""
    layers, kept = (
        ", ".join(map(str, values)) for values in (schedule["layers"], schedule.get("keep") or schedule["ratios"])
    )
    drops = f"before layers {layers} keep {kept} ({schedule['ranker']}, {schedule['positions']})" if layers else ""
    return "; ".join(filter(None, (pools, drops)))


def step_bars(report: dict[str, Any]) -> Any:
    """A bar per run, stacked by where the time of its median step goes."""
    runs = [run for run in report["runs"] if "parts" in run]
    spent = {name: [max(0.0, run["parts"].get(name, 0.0)) for run in runs] for name in STEP_PARTS}
    unit = time_unit(sum(run["parts"].values()) for run in runs)
    figure, axes = subplots(figsize=(8.4, 2.0 + 0.7 * len(runs)), layout="constrained")
    ends = [0.0] * len(runs)
    for name, (label, colour) in STEP_PARTS.items():
        if any(spent[name]):
            widths = [seconds / unit.size for seconds in spent[name]]
            axes.barh(range(len(runs)), widths, left=ends, height=0.6, color=colour, label=label)
            ends = [end + width for end, width in zip(ends, widths)]
    for place, (run, end) in enumerate(zip(runs, ends)):
        less = run.get("realised_reduction")
        text = f" {digits(end)} {unit.name}" + (f"  ({-less:+.1%})" if less is not None else "")
        axes.text(end, place, text, va="center", ha="left")
    axes.set_yticks(range(len(runs)), [run["name"] for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.margins(x=0.22)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"time of a training step in {unit.name} (medians of its parts; clock: {report['clock']})")
    axes.set_title(f"Where the time goes: {report['shape']['name']} on {report['environment']['device']}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure
