"""What ``llava-pdrop plan CONFIG`` prints, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import yaml

from llava_pdrop.config.schema import Config
from llava_pdrop.cost import plan as planning
from llava_pdrop.cost.advice import PEAKS, Advice, AdviceArm, AdviceSetting, overrides, what_lacks
from llava_pdrop.cost.flops import StepFlops
from llava_pdrop.cost.lora import NOT_MODELLED, adapter_parameters
from llava_pdrop.cost.memory import Memory
from llava_pdrop.cost.nominal import FULL_TEXT_TOKENS, model_of, recomputes, states_of
from llava_pdrop.cost.paper import Solution
from llava_pdrop.cost.states import States
from llava_pdrop.cost.time_report import TimeModel, time_blocks, time_json
from llava_pdrop.report.page import Block, Code, Page, Table
from llava_pdrop.report.units import GIB, column, digits, less, saved
from llava_pdrop.schedule import Schedule

PAPER_7B = {
    (576, (), ()): "3.82",
    (576, (8, 16, 24), (0.5, 0.25, 0.125)): "1.78",
    (576, (8, 16, 24), (0.4, 0.16, 0.064)): "1.54",
    (576, (8, 16, 24), (0.6, 0.36, 0.216)): "2.06",
    (576, (10, 20), (0.5, 0.25)): "2.13",
    (576, (6, 12, 18, 24), (0.5, 0.25, 0.125, 0.0625)): "1.38",
    (576, (2,), (0.5,)): "2.01",
    (2880, (), ()): "20.8",
    (2880, (8, 16, 24), (0.5, 0.25, 0.125)): "9.46",
    (2880, (8, 16, 24), (0.4, 0.16, 0.064)): "8.22",
    (2880, (8, 16, 24), (0.6, 0.36, 0.216)): "11.0",
    (5184, (), ()): "40.6",
    (5184, (8, 16, 24), (0.5, 0.25, 0.125)): "18.1",
}
"""TFLOP as printed in Tables 3, 5, 7 and 9 of arXiv 2410.17247: (image tokens, layers, ratios) of a 7B decoder."""


@dataclass(frozen=True)
class PlanReport:
    """All that is printed. ``least``: decoder layers to recompute so that (vanilla, dropping) fit into ``budget`` GiB;
    ``fitting``: the step when each recomputes only those, None where one of them does not fit; ``adapters``: parameters
    of LoRA adapters; ``advice``: how to train on GPUs of a known size, where asked; ``time``: of the step on one GPU,
    or why it is not modelled."""

    plan: planning.TokenPlan
    step: planning.PlanStep
    states: States
    memory: list[planning.MemoryRow]
    budget: float
    least: tuple[int | None, int | None]
    fitting: planning.PlanStep | None
    solution: Solution | None = None
    adapters: int = 0
    advice: Advice | None = None
    time: TimeModel | str | None = None


def make_report(config: Config, gpus: int = 8, budget: float = 80.0, solution: Solution | None = None) -> PlanReport:
    """Works everything out."""
    plan, states = planning.make_plan(config), states_of(config, gpus)
    first_stage = plan.schedule.layers[:1]
    memory = planning.plan_memory(config, sorted({0, *first_stage, plan.layers}), states)
    vanilla, dropping = least = planning.least_recomputed(config, states, budget)
    fitting = None if vanilla is None or dropping is None else planning.plan_step(config, (vanilla, dropping))
    adapters = sum(adapter_parameters(model_of(config).config.text_config, config.lora))
    return PlanReport(plan, planning.plan_step(config), states, memory, budget, least, fitting, solution, adapters)


def to_json(config: Config, report: PlanReport) -> dict[str, Any]:
    """The report for machines: bytes, operations, and shares between 0 and 1."""
    plan, step = report.plan, report.step

    def parts(whole: StepFlops | Memory) -> dict[str, float]:
        return {**asdict(whole), "total": whole.total}

    return {
        "config": config.name,
        "pyramid_drop": plan.schedule.to_dict(),
        "budget": None
        if report.solution is None
        else {key: value for key, value in asdict(report.solution).items() if key != "schedule"},
        "layers": plan.layers,
        "picture": plan.picture,
        "stages": [asdict(stage) for stage in plan.stages],
        "average_tokens": plan.average_tokens,
        "average_share": plan.average,
        "tflop_paper_formula": [asdict(row) for row in plan.rows],
        "paper": {**asdict(plan.paper), "note": paper_note(plan)},
        "step": {
            "samples": step.samples,
            "text_tokens": step.text_tokens,
            "recomputation": recomputes(config.train.arguments),
            "vanilla_flop": parts(step.vanilla),
            "dropping_flop": parts(step.dropping),
            "predicted_reduction": step.reduction,
        },
        "lora": {"adapter_parameters": report.adapters, "not_modelled": NOT_MODELLED} if report.adapters else None,
        "memory": {
            "zero": report.states.zero,
            "gpus": report.states.gpus,
            "budget_gib": report.budget,
            "least_recomputed_layers": {"vanilla": report.least[0], "dropping": report.least[1]},
            "predicted_reduction_at_least_recomputation": report.fitting and report.fitting.reduction,
            "peaks": [
                {"recomputed_layers": row.recomputed, "vanilla": parts(row.vanilla), "dropping": parts(row.dropping)}
                for row in report.memory
            ],
        },
        "time": report.time and time_json(report.time),
        "advice": report.advice and advice_json(config, report.advice),
    }


def page(config: Config, report: PlanReport) -> Page:
    """The report for people."""
    plan, step, blocks = report.plan, report.step, list[Block]()
    if report.solution is not None:
        blocks += [report.solution.reason, Code(schedule_yaml(plan.schedule))]
    again = "with the config's recomputation" if recomputes(config.train.arguments) else "without recomputation"
    blocks += [
        _stages(plan),
        _pictures(config, plan),
        f"Average over {plan.layers} layers: {plan.average_tokens:.1f} image tokens, {plan.average:.1%} of all. "
        "TFLOP by the paper's formula: 1e12 multiply-accumulates of image tokens in the decoder, forward, without "
        "text, tower and head.",
        *(["pyramid_drop drops nothing here: every layer sees all image tokens."] if drops_nothing(plan) else []),
        paper_note(plan),
        _operations(step),
        f"{step.samples} samples, each {step.text_tokens} text tokens and a full picture, {again}. "
        f"Predicted step time: {less(step.reduction)}.",
        _memory(report),
    ]
    if report.adapters:
        blocks.append(f"{report.adapters / 1e6:.1f} M parameters of adapters learn. Not modelled: {NOT_MODELLED}.")
    blocks.append("Not included: CUDA context, fragmentation, NCCL and reduce buckets (llava_pdrop/cost/memory.py).")
    for name, count in zip(("vanilla", "dropping"), report.least):
        answer = "does not fit" if count is None else f"recompute {count} of {plan.layers} decoder layers"
        blocks.append(f"{report.budget:g} GiB with {planning.RESERVE:.0%} left free, {name}: {answer}.")
    if report.fitting is not None:
        blocks.append(f"Step time with just that recomputation: {less(report.fitting.reduction)}.")
    if report.time is not None:
        blocks += time_blocks(time_json(report.time))
    if report.advice is not None:
        blocks += _advice(config, report.advice)
    return Page(config.name, blocks)


def drops_nothing(plan: planning.TokenPlan) -> bool:
    """Whether a schedule that is given leaves every layer all image tokens: shares of 1, counts above what a picture
    has, or a pooling to more features than a tile has."""
    return bool(plan.schedule.layers or plan.schedule.downsample) and plan.average >= 1


def paper_note(plan: planning.TokenPlan) -> str:
    """The cost of the picture as the paper counts its tokens, and what the paper's tables print for it."""
    paper, pooled = plan.paper, " after pooling" if plan.schedule.downsample else ""
    line = (
        f"As the paper counts ({paper.tokens[0]} image tokens{pooled}, no newlines): {digits(paper.vanilla)} TFLOP "
        f"vanilla, {digits(paper.dropping)} with this schedule"
    )
    ratios = tuple(round(ratio, 6) for ratio in plan.schedule.ratios)
    printed = PAPER_7B.get((paper.tokens[0], plan.schedule.layers, ratios)) if plan.layers == 32 else None
    if printed is None:
        return line + "; no row of its tables."
    if printed == digits(paper.dropping):
        return line + ", as in its tables."
    return line + f"; its table prints {printed}, which its own formula does not give."


def schedule_yaml(schedule: Schedule) -> str:
    """The ``pyramid_drop`` section of a config, without what is the default."""
    default = Schedule().to_dict()
    section = {k: v for k, v in schedule.to_dict().items() if k == "layers" or v != default.get(k)}
    lines = (
        f"  {key}: {yaml.safe_dump(value, default_flow_style=True, width=1000).split(chr(10))[0]}"
        for key, value in section.items()
    )
    return "\n".join(["pyramid_drop:", *lines])


def _stages(plan: planning.TokenPlan) -> Table:
    width, height = plan.picture
    rows = [(f"{s.first}-{s.last}", f"{s.image_tokens:,}", f"{s.share:.1%}") for s in plan.stages]
    return Table(("layers", "image tokens", "share"), rows, f"Full picture, {width}x{height}")


def _pictures(config: Config, plan: planning.TokenPlan) -> Table:
    edges = pairwise((plan.schedule.inject, *plan.schedule.layers, plan.layers))
    stages = (f"layers {first}-{stop - 1}" if first < stop else "whole" for first, stop in edges)
    same = len({tuple(row.tokens) for row in plan.rows}) == 1
    rows = []
    for row in plan.rows[:1] if same else plan.rows:
        size = "any size" if same else f"{row.size[0]}x{row.size[1]}"
        costs = (digits(row.vanilla), digits(row.dropping), f"{saved(row.vanilla, row.dropping):.1%}")
        rows.append((size, *(f"{count:,}" for count in row.tokens), *costs))
    own = "has its own budget" if plan.schedule.keep else "keeps int(n * ratio) of its own n"
    if plan.schedule.downsample:
        pooled = f"is pooled to at most {plan.schedule.downsample} features a tile"
        own = f"{pooled} and {own}" if plan.schedule.layers else pooled
    title = f"{config.name}: image tokens of one picture; every picture {own}"
    return Table(("picture", *stages, "TFLOP vanilla", "TFLOP dropping", "saved"), rows, title)


def _operations(step: planning.PlanStep) -> Table:
    rows = []
    for name in (*(field.name for field in fields(StepFlops)), "total"):
        vanilla, dropping = getattr(step.vanilla, name), getattr(step.dropping, name)
        share = f"{saved(vanilla, dropping):.1%}" if vanilla else "-"
        rows.append((name, digits(vanilla / 1e12), digits(dropping / 1e12), share))
    head = ("TFLOP (2 per multiply-accumulate)", "vanilla", "dropping", "saved")
    return Table(head, rows, "Operations of a training step's micro-batch")


def _memory(report: PlanReport) -> Table:
    parts = ("weights", "gathered", "gradients", "optimizer", "activations", "total")
    rows = []
    for row in report.memory:
        layers = {0: "none", report.plan.layers: "all"}.get(row.recomputed, f"0-{row.recomputed - 1}")
        for head, name, memory in ((layers, "vanilla", row.vanilla), ("", "dropping", row.dropping)):
            rows.append((head, name, *(f"{getattr(memory, part) / GIB:.1f}" for part in parts)))
    title = f"Predicted peak of one GPU in GiB by recomputed layers, {report.states.label}"
    return Table(("layers", "", *parts), rows, title, left=2)


# What ``llava-pdrop plan CONFIG --gpus 8x80`` says besides, as a table and as JSON.

NOT_MEASURED = "Arithmetic on counted bytes and operations: several GPUs together have not been measured."


def advice_json(config: Config, advice: Advice) -> dict[str, Any]:
    """The advice for machines: bytes, operations, seconds."""

    def times(arm: AdviceArm, samples: float | None, unit: float) -> dict[str, float] | None:
        if arm.setting is None or not samples:
            return None
        return {name: advice.seconds(arm, peak, samples) / unit for name, peak in PEAKS.items()}

    return {
        "gpus": advice.gpus,
        "gib": advice.gib,
        "reserve": planning.RESERVE,
        "global_batch": advice.batch,
        "mfu": advice.mfu,
        "peak_flops": PEAKS,
        "run": asdict(advice.length),
        "note": NOT_MEASURED,
        "arms": {
            arm.name: {
                "setting": arm.setting and asdict(arm.setting),
                "overrides": overrides(config, arm) or None,
                "why_not": None if arm.setting else what_lacks(advice, arm, config),
                "missing_bytes": 0.0 if arm.setting else arm.least.total - planning.room_in(advice.gib),
                "flop_per_sample": arm.flops,
                "seconds_per_1000_samples": times(arm, 1000, 1),
                "hours": times(arm, advice.length.samples, 3600),
            }
            for arm in advice.arms
        },
    }


def _advice(config: Config, advice: Advice) -> list[Block]:
    whole = advice.length.samples
    samples = whole or 1000
    settings = [arm.setting for arm in advice.arms]
    lines = [f"{a.name}: {overrides(config, a) if a.setting else what_lacks(advice, a, config)}" for a in advice.arms]

    def cells(text: Callable[[AdviceSetting], str]) -> list[str]:
        return [text(setting) if setting else "" for setting in settings]

    columns = [
        ("", [arm.name for arm in advice.arms]),
        ("engine", [setting.engine if setting else "none fits" for setting in settings]),
        ("batch", cells(lambda setting: str(setting.samples))),
        ("accumulated", cells(lambda setting: str(setting.accumulation))),
        ("recomputed", cells(lambda setting: str(setting.recomputed))),
        ("GiB per GPU", cells(lambda setting: f"{setting.total / GIB:.1f}")),
        ("GiB of CPUs", cells(lambda setting: f"{setting.cpu * advice.gpus / GIB:.0f}" if setting.cpu else "")),
    ]
    for name, peak in PEAKS.items():
        times = [advice.seconds(arm, peak, samples) if arm.setting else None for arm in advice.arms]
        columns.append(column(name if whole else f"{name}, 1,000 samples", times))
    rates = ", ".join(f"{name}: {peak / 1e12:g}" for name, peak in PEAKS.items())
    return [
        Table.of_columns(columns, f"Advice for {_gpus(advice)}", left=2),
        Code("\n".join(lines)),
        f"Global batch {advice.batch}: {advice.told}. {planning.RESERVE:.0%} of the memory stays free. Preferred: the "
        "engine whose GPUs wait least for each other, then the fewest recomputed layers, then the largest micro-batch "
        "(llava_pdrop/cost/advice.py).",
        f"Times are of {samples:,.0f} samples ({advice.length.source}), each a full picture and {FULL_TEXT_TOKENS} "
        f"text tokens, on {_gpus(advice)} at an assumed MFU of {advice.mfu:g} (--mfu) of their peak in TFLOP/s "
        f"({rates}). Recomputed operations come on top at the same rate; communication and waiting for data are not "
        "included.",
        NOT_MEASURED,
    ]


def _gpus(advice: Advice) -> str:
    return f"{advice.gpus} GPU{'s' if advice.gpus > 1 else ''} of {advice.gib:g} GiB"
