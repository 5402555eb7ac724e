"""What ``bench generate`` sets beside what it measured, and how it is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from llava_pdrop.bench.generate import (
    DROPPING,
    OVERHEAD_STEPS,
    Answer,
    HookCost,
    hook_cost,
    measure_answers,
    paired,
)
from llava_pdrop.bench.prefill import WARM_UP, PrefillCase
from llava_pdrop.bench.prefill_report import BARS, predicted_cache_bytes, prefill_flops, spread
from llava_pdrop.bench.subjects import Given, Subject
from llava_pdrop.report.environment import environment, settings
from llava_pdrop.report.page import Block, Note, Page, Picture, Table
from llava_pdrop.report.pictures import subplots
from llava_pdrop.report.units import MEMORY, column, digits, text_of, time_unit, unit_of
from llava_pdrop.runtime.clock import Span
from llava_pdrop.schedule import Schedule

CLOCKS = {
    "cuda": {
        "first_token_ms, prefill_ms, tower_ms, token_ms, tokens_per_s": "between CUDA events in the stream",
        "speedup, ranking_share, hooks": "of the same times",
    },
    "cpu": {
        "first_token_ms, prefill_ms, tower_ms, token_ms, tokens_per_s": "on the clock, other programs included",
        "first_token_cpu_ms, prefill_cpu_ms, token_cpu_ms": "CPU time of this process, all its threads added up",
        "speedup, ranking_share, hooks": "of CPU times",
    },
}
"""Device -> what the times in the JSON of a report are; all are medians with quartiles over runs or tokens."""


def entry(
    subject: Subject, given: Given, batch: int, new_tokens: int, method: str, counted: Mapping[str, Sequence[Answer]]
) -> dict[str, Any]:
    """One method at one batch size, measured and, where the shape is known, predicted. A method that ran out of memory
    has None for what needs its runs, or those of vanilla."""
    runs, vanilla = counted.get(method), counted.get("vanilla")
    steps = [step for run in runs or () for step in run.steps]
    towers = [run.tower for run in runs or () if run.tower is not None]
    peaks = [run.peak_bytes for run in runs or () if run.peak_bytes is not None]
    predicted, cache = _predicted(subject, given, batch, new_tokens, method)
    faster = {name: _faster(vanilla, runs, name) for name in ("first", "prefill", "token", "whole")}
    realised = faster["prefill"]
    return {
        "method": method,
        "batch": batch,
        "image_tokens": given.image_tokens,
        "text_tokens": given.text_tokens,
        "new_tokens": new_tokens,
        "out_of_memory": not runs,
        "first_token_ms": _seconds([run.first for run in runs or ()]),
        "first_token_cpu_ms": _cpu([run.first for run in runs or ()]),
        "prefill_ms": _seconds([run.prefill for run in runs or ()]),
        "prefill_cpu_ms": _cpu([run.prefill for run in runs or ()]),
        "ranking_share": float(np.median([run.ranking.cost / run.prefill.cost for run in runs])) if runs else None,
        "tower_ms": _seconds(towers),
        "token_ms": _seconds(steps),
        "token_cpu_ms": _cpu(steps),
        "tokens_per_s": spread([batch * new_tokens / run.whole.seconds for run in runs]) if runs else None,
        "cache_bytes": runs[-1].cache_bytes if runs else None,
        "cache_bytes_predicted": cache,
        "peak_bytes": max(peaks) if peaks else None,
        "speedup": faster,
        "prefill_speedup_predicted": predicted,
        "prefill_realised_over_predicted": realised / predicted if realised and predicted else None,
    }


def overhead(cost: HookCost, batch: int) -> dict[str, Any]:
    """What the hooks of `attach` add to a step of one token, of CPU times on a CPU. ``share``: the median of what they
    add, of the median step without them."""
    plain = [span.cost for span in cost.plain]
    return {
        "batch": batch,
        "steps": len(plain),
        "plain_ms": spread(plain, 1e3),
        "attached_ms": spread([span.cost for span in cost.attached], 1e3),
        "added_ms": spread(paired(cost), 1e3),
        "share": float(np.median(paired(cost)) / np.median(plain)),
    }


def bench_generate(
    name: str,
    subject: Subject,
    device: torch.device,
    cases: Sequence[tuple[int, int | None]],
    new_tokens: int,
    runs: int,
    seed: int,
) -> dict[str, Any]:
    """Measures both methods at every one of ``cases``, (batch, image tokens), and the hooks at each.

    Returns:
        ``environment``, ``settings``, ``results`` (an `entry` per case and method) and ``hooks`` (an `overhead` per
        case that memory sufficed for).
    """
    hf, results, hooks = subject.hf, list[dict[str, Any]](), list[dict[str, Any]]()
    for batch, image_tokens in tqdm(cases, desc=f"generate {name}", unit="case", leave=False):
        given = subject.give(batch, image_tokens)
        counted = measure_answers(subject, given, new_tokens, runs, device)
        results += [entry(subject, given, batch, new_tokens, method, counted) for method in ("vanilla", DROPPING)]
        cost = hook_cost(subject, given, device)
        hooks += [overhead(cost, batch) | {"image_tokens": given.image_tokens}] if cost else []
    told = {
        "subject": name,
        "model_type": hf.config.model_type,
        "weights": "random" if subject.geometry else "its own",
        "dtype": str(hf.dtype).removeprefix("torch."),
        "attention": hf.config.get_text_config()._attn_implementation,
        "cache": "dynamic",
        "runs": runs,
        "warm_up": WARM_UP,
        "new_tokens": new_tokens,
        "hook_steps": OVERHEAD_STEPS,
        "weights_bytes": sum(parameter.nbytes for parameter in hf.parameters()),
        "timer": "CUDA events" if device.type == "cuda" else "wall clock; speed-ups and hooks by CPU time",
        "times": CLOCKS[device.type],
        "schedules": {"vanilla": Schedule().to_dict(), DROPPING: subject.schedule.to_dict()},
    }
    return {"environment": environment(device, seed), "settings": told, "results": results, "hooks": hooks}


def page(report: dict[str, Any], picture: str) -> Page:
    """The report for people; ``picture`` is its file."""
    told, results = report["settings"], report["results"]
    notes = (
        f"{told['runs']} answers of every method, taking turns, after {told['warm_up']} that are not counted; "
        f"{results[0]['text_tokens']} text tokens a prompt, {told['new_tokens']} new ones an answer. First token: from "
        f"the call, {'with the tower' if told['weights'] == 'random' else 'with tower and projector'}. Prefill: the "
        f"first forward{', without the tower' if told['weights'] == 'random' else ''}. Tokens/s: of all rows, over the "
        f"whole answer. Time: {told['timer']}. Predicted: by the full FLOP count."
    )
    drawn = Picture(picture, "time to the first token, time per token and cache size", partial(bars, report))
    made = Note(settings(report["environment"]).markdown())
    blocks: list[Block] = [
        *tables(results),
        notes,
        *([hook_table(report["hooks"])] if report["hooks"] else []),
        drawn,
        made,
    ]
    return Page(_title(report), blocks, report)


def tables(results: Sequence[dict[str, Any]]) -> list[Table]:
    """Times, and what they come to."""
    cases = [("method", [result["method"] for result in results])]
    cases += [
        (name.replace("_", " "), [f"{result[name]:,}" for result in results]) for name in ("image_tokens", "batch")
    ]

    def medians(key: str) -> list[float | None]:
        return [result[key] and result[key]["median"] / 1e3 for result in results]

    def spreads(title: str, key: str) -> tuple[str, list[str]]:
        unit = time_unit(medians(key))
        cells = [
            unit.spread([result[key][name] / 1e3 for name in ("q1", "median", "q3")])
            if result[key]
            else "out of memory"
            for result in results
        ]
        return f"{title}, {unit.name} [quartiles]", cells

    def faster(name: str) -> list[str]:
        return [text_of(result["speedup"][name], ".2f") for result in results]

    times = [
        spreads("first token", "first_token_ms"),
        column("of it tower", medians("tower_ms")),
        column("prefill", medians("prefill_ms")),
        ("ranking", [text_of(result["ranking_share"] or None, ".1%") or "-" for result in results]),
        spreads("per token", "token_ms"),
        ("tokens/s", [digits(result["tokens_per_s"] and result["tokens_per_s"]["median"]) for result in results]),
    ]
    costs = [
        column("cache", [result["cache_bytes"] for result in results], MEMORY),
        column("peak memory", [result["peak_bytes"] for result in results], MEMORY),
        ("first token, times", faster("first")),
        ("per token, times", faster("token")),
        ("answer, times", faster("whole")),
        ("prefill, times", faster("prefill")),
        ("predicted", [text_of(result["prefill_speedup_predicted"], ".2f") for result in results]),
        (
            "realised / predicted",
            [text_of(result["prefill_realised_over_predicted"], ".3f") for result in results],
        ),
    ]
    named = (("Times", times), ("Memory, and how many times as fast", costs))
    return [Table.of_columns([*cases, *own], title) for title, own in named]


def hook_table(hooks: Sequence[dict[str, Any]]) -> Table:
    """What the hooks add to a token, at ratio 1.0 on caches of the same tokens."""
    unit = time_unit([own["plain_ms"]["median"] / 1e3 for own in hooks])

    def cells(key: str) -> list[str]:
        return [unit.spread([own[key][name] / 1e3 for name in ("q1", "median", "q3")]) for own in hooks]

    return Table.of_columns(
        [
            ("image tokens", [f"{own['image_tokens']:,}" for own in hooks]),
            ("batch", [str(own["batch"]) for own in hooks]),
            (f"without hooks, {unit.name} [quartiles]", cells("plain_ms")),
            (f"added, {unit.name} [quartiles]", cells("added_ms")),
            ("share", [f"{own['share']:.1%}" for own in hooks]),
        ],
        "What the hooks add to a token: attached at ratio 1.0, step by step in turns with a model without hooks",
        left=0,
    )


def bars(report: dict[str, Any]) -> Any:
    """First token, token and cache of every case as bars, a colour per method; no bar where memory ran out."""
    done = [result for result in report["results"] if not result["out_of_memory"]]
    cases = list(dict.fromkeys((result["image_tokens"], result["batch"]) for result in report["results"]))
    methods = list(dict.fromkeys(result["method"] for result in report["results"]))
    size = unit_of([result["cache_bytes"] for result in done], MEMORY)
    panels: list[tuple[str, str, list[float]]] = []
    for title, key in (("First token", "first_token_ms"), ("Per token", "token_ms")):
        unit = time_unit(result[key]["median"] / 1e3 for result in done)
        panels.append((title, f"{unit.name}, median", [result[key]["median"] / 1e3 / unit.size for result in done]))
    panels.append(("KV cache after the answer", size.name, [result["cache_bytes"] / size.size for result in done]))
    figure, axes = subplots(1, 3, figsize=(max(10.0, 3.0 + 2.2 * len(cases)), 4.2), layout="constrained")
    width = 0.8 / len(methods)
    for panel, (title, label, heights) in zip(axes, panels):
        for number, method in enumerate(methods):
            own = [(r, height) for r, height in zip(done, heights) if r["method"] == method]
            x = [
                cases.index((r["image_tokens"], r["batch"])) + (number - (len(methods) - 1) / 2) * width for r, _ in own
            ]
            panel.bar(x, [height for _, height in own], width * 0.92, color=BARS.get(method), label=method)
        panel.set(title=title, ylabel=label, xticks=range(len(cases)))
        panel.set_xticklabels([f"{tokens:,} tokens\nbatch {batch}" for tokens, batch in cases], fontsize=8)
        panel.grid(axis="x", visible=False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    figure.suptitle(_title(report), fontweight="bold")
    return figure


def _predicted(
    subject: Subject, given: Given, batch: int, new_tokens: int, method: str
) -> tuple[float | None, int | None]:
    """How many times as fast operations say that the prefill is, and the bytes of the cache; None where the pictures'
    geometry is not known."""
    if subject.geometry is None:
        return None, None
    case = PrefillCase(batch, given.image_tokens, new_tokens)
    schedule = Schedule() if method == "vanilla" else subject.schedule
    config, geometry = subject.hf.config, subject.geometry
    flops = [prefill_flops(config, case, tried, geometry) for tried in (Schedule(), schedule)]
    return flops[0] / flops[1], predicted_cache_bytes(config, case, schedule, subject.hf.dtype)


def _faster(vanilla: Sequence[Answer] | None, runs: Sequence[Answer] | None, name: str) -> float | None:
    if not vanilla or not runs:
        return None

    def cost(answers: Sequence[Answer]) -> float:
        if name == "token":
            return float(np.median([step.cost for run in answers for step in run.steps]))
        return float(np.median([getattr(run, name).cost for run in answers]))

    return cost(vanilla) / cost(runs)


def _seconds(spans: Sequence[Span]) -> dict[str, float] | None:
    return spread([span.seconds for span in spans], 1e3) if spans else None


def _cpu(spans: Sequence[Span]) -> dict[str, float] | None:
    cpu = [span.cpu for span in spans if span.cpu is not None]
    return spread(cpu, 1e3) if cpu else None


def _title(report: dict[str, Any]) -> str:
    told, device = report["settings"], report["environment"]["device"]
    return f"bench generate: {told['subject']}, {told['dtype']}, {told['attention']}, {device}"
