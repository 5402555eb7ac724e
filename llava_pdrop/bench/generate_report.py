"""What ``bench generate`` sets beside what it measured, and how it is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from llava_pdrop.bench import prefill_report as shared
from llava_pdrop.bench.generate import DROPPING, OVERHEAD_STEPS, Answer, HookCost, hook_cost, measure_answers, paired
from llava_pdrop.bench.subjects import PrefillCase, Subject
from llava_pdrop.report.environment import environment, settings
from llava_pdrop.report.page import Block, Note, Page, Picture, Table
from llava_pdrop.report.units import MEMORY, column, digits, text_of, time_unit
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
    subject: Subject,
    case: PrefillCase,
    text_tokens: int,
    method: str,
    schedule: Schedule,
    counted: Mapping[str, Sequence[Answer]],
) -> dict[str, Any]:
    """One method at one batch size, measured and, where the shape is known, predicted. A method that ran out of memory
    has None for what needs its runs, or those of vanilla."""
    runs, vanilla = counted.get(method, ()), counted.get("vanilla", ())
    steps, firsts = [step for run in runs for step in run.steps], [run.first for run in runs]
    _, predicted, cache = shared.predictions(subject, case, schedule) if subject.geometry else (None, None, None)
    faster = {name: _faster(vanilla, runs, name) for name in ("first", "prefill", "token", "whole")}
    realised = faster["prefill"]
    return {
        "method": method,
        "batch": case.batch,
        "image_tokens": case.image_tokens,
        "text_tokens": text_tokens,
        "new_tokens": case.new_tokens,
        **shared.of_runs(runs),
        "first_token_ms": shared.milliseconds(firsts),
        "first_token_cpu_ms": shared.cpu_milliseconds(firsts),
        "tower_ms": shared.milliseconds([run.tower for run in runs if run.tower is not None]),
        "token_ms": shared.milliseconds(steps),
        "token_cpu_ms": shared.cpu_milliseconds(steps),
        "tokens_per_s": shared.spread([case.batch * case.new_tokens / run.whole.seconds for run in runs]),
        "cache_bytes_predicted": cache,
        "speedup": faster,
        "prefill_speedup_predicted": predicted,
        "prefill_realised_over_predicted": realised / predicted if realised and predicted else None,
    }


def overhead(cost: HookCost, batch: int) -> dict[str, Any]:
    """What the hooks of `attach` add to a step of one token, of CPU times on a CPU. ``share``: the median of what they
    add, of the median step without them."""
    plain, added = [span.cost for span in cost.plain], paired(cost)
    return {
        "batch": batch,
        "steps": len(plain),
        "plain_ms": shared.spread(plain, 1e3),
        "attached_ms": shared.spread([span.cost for span in cost.attached], 1e3),
        "added_ms": shared.spread(added, 1e3),
        "share": median(added) / median(plain),
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
    methods = {"vanilla": Schedule(), DROPPING: subject.schedule}
    for batch, image_tokens in tqdm(cases, desc=f"generate {name}", unit="case", leave=False):
        given = subject.give(batch, image_tokens)
        counted = measure_answers(subject, given, new_tokens, runs, device)
        case = PrefillCase(batch, given.image_tokens, new_tokens)
        results += [entry(subject, case, given.text_tokens, *method, counted) for method in methods.items()]
        cost = hook_cost(subject, given, device)
        hooks += [overhead(cost, batch) | {"image_tokens": given.image_tokens}] if cost else []
    told = {
        "subject": name,
        "model_type": hf.config.model_type,
        "weights": "random" if subject.geometry else "its own",
        **shared.settings_of(hf, methods, new_tokens, runs),
        "cache": "dynamic",
        "hook_steps": OVERHEAD_STEPS,
        "timer": "CUDA events" if device.type == "cuda" else "wall clock; speed-ups and hooks by CPU time",
        "times": CLOCKS[device.type],
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
    title = shared.title_of("generate", told["subject"], report)
    panels = {"First token": "first_token_ms", "Per token": "token_ms", "KV cache after the answer": "cache_bytes"}
    draw = partial(shared.bars, results, title, panels)
    blocks: list[Block] = [
        *tables(results),
        notes,
        *([hook_table(report["hooks"])] if report["hooks"] else []),
        Picture(picture, "time to the first token, time per token and cache size", draw),
        Note(settings(report["environment"]).markdown()),
    ]
    return Page(title, blocks, report)


def tables(results: Sequence[dict[str, Any]]) -> list[Table]:
    """Times, and what they come to."""

    def faster(name: str) -> list[str]:
        return [text_of(result["speedup"][name], ".2f") for result in results]

    times = [
        shared.spreads("first token", results, "first_token_ms"),
        column("of it tower", shared.medians(results, "tower_ms")),
        column("prefill", shared.medians(results, "prefill_ms")),
        ("ranking", [text_of(result["ranking_share"] or None, ".1%") or "-" for result in results]),
        shared.spreads("per token", results, "token_ms"),
        ("tokens/s", list(map(digits, shared.medians(results, "tokens_per_s")))),
    ]
    costs = [
        column("cache", [result["cache_bytes"] for result in results], MEMORY),
        column("peak memory", [result["peak_bytes"] for result in results], MEMORY),
        ("first token, times", faster("first")),
        ("per token, times", faster("token")),
        ("answer, times", faster("whole")),
        ("prefill, times", faster("prefill")),
        ("predicted", [text_of(result["prefill_speedup_predicted"], ".2f") for result in results]),
        ("realised / predicted", [text_of(result["prefill_realised_over_predicted"], ".3f") for result in results]),
    ]
    return shared.case_tables(results, {"Times": times, "Memory, and how many times as fast": costs})


def hook_table(hooks: Sequence[dict[str, Any]]) -> Table:
    """What the hooks add to a token, at ratio 1.0 on caches of the same tokens."""
    unit = time_unit(shared.medians(hooks, "plain_ms"))
    return Table.of_columns(
        [
            ("image tokens", [f"{own['image_tokens']:,}" for own in hooks]),
            ("batch", [str(own["batch"]) for own in hooks]),
            shared.spreads("without hooks", hooks, "plain_ms", unit),
            shared.spreads("added", hooks, "added_ms", unit),
            ("share", [f"{own['share']:.1%}" for own in hooks]),
        ],
        "What the hooks add to a token: attached at ratio 1.0, step by step in turns with a model without hooks",
        left=0,
    )


def _faster(vanilla: Sequence[Answer], runs: Sequence[Answer], name: str) -> float | None:
    if not vanilla or not runs:
        return None

    def cost(answers: Sequence[Answer]) -> float:
        if name == "token":
            return median(step.cost for run in answers for step in run.steps)
        return median(getattr(run, name).cost for run in answers)

    return cost(vanilla) / cost(runs)
