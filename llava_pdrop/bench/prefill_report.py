"""What ``bench prefill`` predicts for a case, sets beside the measurement, and writes down; and what the report of
``bench generate`` has in common with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from llava_pdrop.bench.generate import DROPPING, Answer
from llava_pdrop.bench.prefill import FASTV, WARM_UP, PrefillRun, measure_prefill
from llava_pdrop.bench.subjects import TEXT_TOKENS, PrefillCase, Subject
from llava_pdrop.cost.flops import CountedStep, head_size, key_value_heads, step_flops
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.report.environment import environment, settings
from llava_pdrop.report.page import Note, Page, Picture, Table
from llava_pdrop.report.pictures import COLOURS, subplots
from llava_pdrop.report.units import MEMORY, OPERATIONS, TIME, Unit, column, digits, text_of, time_unit, unit_of
from llava_pdrop.runtime.clock import Span, quartiles
from llava_pdrop.runtime.device import peak_flops
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch

BARS = {"vanilla": COLOURS["vanilla"], "PyramidDrop": COLOURS["pyramid_drop"], "FastV": "#3A8FB7"}
"""Method -> its colour."""

QUARTILES = ("q1", "median", "q3")
"""Keys of a `spread`."""

CLOCKS = {
    "cuda": {
        "prefill_ms, ranking_ms, tower_ms, decode_tokens_per_s": "between CUDA events in the stream",
        "speedup, ranking_share, share_of_peak": "of the same times",
    },
    "cpu": {
        "prefill_ms, ranking_ms, tower_ms, decode_tokens_per_s": "on the clock, other programs included",
        "prefill_cpu_ms": "CPU time of this process, all its threads added up",
        "speedup, ranking_share, share_of_peak": "of CPU times",
    },
}
"""Device -> what the times in the JSON of a report are; all are medians with quartiles over the counted runs."""


def prefill_flops(config: Any, case: PrefillCase, schedule: Schedule, geometry: ImageGeometry) -> float:
    """Operations of a prefill by the full count of `cost.flops`: the decoder with its text, ranking, and the head on
    the last token of each prompt. Tower and projector are not in it."""
    before, after = TEXT_TOKENS
    length = before + case.image_tokens + after
    starts = range(0, case.batch * length, length)
    batch = PackedBatch(
        input_ids=torch.empty(0),  # the count asks for the layout only
        labels=torch.empty(0),
        pixels=torch.empty(0),
        seq_lens=[length] * case.batch,
        image_spans=[(start + before, start + before + case.image_tokens) for start in starts],
        image_sizes=[],
        answer_starts=[[start + length] for start in starts],
        label_positions=[start + length - 1 for start in starts],
    )
    flops = step_flops(CountedStep(config, batch, schedule, geometry, trainable=()))
    return flops.total - flops.tower - flops.projector


def predicted_cache_bytes(config: Any, case: PrefillCase, schedule: Schedule, dtype: torch.dtype) -> int:
    """Bytes of keys and values at the end of an answer, whose last token is never fed back."""
    text = config.text_config
    others = sum(TEXT_TOKENS) + case.new_tokens - 1
    tokens = sum(others + image for image in schedule.tokens_per_layer(case.image_tokens, text.num_hidden_layers))
    return case.batch * tokens * 2 * key_value_heads(text) * head_size(text) * dtype.itemsize


def predictions(subject: Subject, case: PrefillCase, schedule: Schedule) -> tuple[float, float, int]:
    """Operations of the prefill of a shape, how many times as many it has without drops, and bytes of the cache."""
    config, geometry = subject.hf.config, subject.geometry
    assert geometry is not None, "it is a shape"
    flops, vanilla = (prefill_flops(config, case, tried, geometry) for tried in (schedule, Schedule()))
    return flops, vanilla / flops, predicted_cache_bytes(config, case, schedule, subject.hf.dtype)


def spread(values: Sequence[float], factor: float = 1.0) -> dict[str, float] | None:
    """``median``, ``q1`` and ``q3`` of ``values`` times ``factor``; None of none."""
    return dict(zip(QUARTILES, (value * factor for value in quartiles(values)))) if values else None


def milliseconds(spans: Sequence[Span]) -> dict[str, float] | None:
    """`spread` of the times of ``spans``."""
    return spread([span.seconds for span in spans], 1e3)


def cpu_milliseconds(spans: Sequence[Span]) -> dict[str, float] | None:
    """`spread` of their processor time, where it is known."""
    return spread([span.cpu for span in spans if span.cpu is not None], 1e3)


def of_runs(runs: Sequence[PrefillRun | Answer]) -> dict[str, Any]:
    """What both benches say of the counted runs of a method, which has none if it ran out of memory."""
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return {
        "out_of_memory": not runs,
        "prefill_ms": milliseconds([run.prefill for run in runs]),
        "prefill_cpu_ms": cpu_milliseconds([run.prefill for run in runs]),
        "ranking_share": median(run.ranking.cost / run.prefill.cost for run in runs) if runs else None,
        "cache_bytes": runs[-1].cache_bytes if runs else None,
        "peak_bytes": max(peaks, default=None),
    }


def entry(
    subject: Subject,
    case: PrefillCase,
    method: str,
    schedule: Schedule,
    tower: Sequence[Span],
    counted: Mapping[str, Sequence[PrefillRun]],
    peak: float,
) -> dict[str, Any]:
    """One method at one case, predicted and measured: what `measure_prefill` found of ``tower`` and of all methods. A
    method that ran out of memory has None for what needs its runs, or those without dropping."""
    runs, vanilla = counted.get(method, ()), counted.get("vanilla", ())
    flops, predicted, cache = predictions(subject, case, schedule)
    before, cost = (median(run.prefill.cost for run in own) if own else None for own in (vanilla, runs))
    realised = before / cost if before and cost else None
    decoded = case.batch * (case.new_tokens - 1)
    return {
        "method": method,
        "batch": case.batch,
        "image_tokens": case.image_tokens,
        **of_runs(runs),
        "ranking_ms": milliseconds([run.ranking for run in runs]),
        "tower_ms": milliseconds(tower),
        "decode_tokens_per_s": spread([decoded / run.decode.seconds for run in runs]),
        "cache_bytes_predicted": cache,
        "prefill_tflop": flops / 1e12,
        "share_of_peak": flops / cost / peak if cost else None,
        "speedup": realised,
        "speedup_predicted": predicted,
        "realised_over_predicted": realised / predicted if realised else None,
    }


def page(report: dict[str, Any], picture: str) -> Page:
    """The report for people; ``picture`` is its file."""
    told = report["settings"]
    notes = (
        f"{told['runs']} runs of every method, taking turns, after {told['warm_up']} that are not counted; "
        f"{sum(told['text_tokens'])} text tokens a prompt, {told['new_tokens']} new ones an answer; "
        f"{told['kernels']} kernels. Prefill: until the first logits, without the tower. Time: "
        f"{told['timer']}. Predicted: by the full FLOP count. Of peak: {told['peak_flops_source']}."
    )
    title = title_of("prefill", told["shape"], report)
    panels = {"Prefill": "prefill_ms", "KV cache after the answer": "cache_bytes"}
    drawn = Picture(picture, "prefill latency and cache size", partial(bars, report["results"], title, panels))
    made = Note(settings(report["environment"]).markdown())
    return Page(title, [*tables(report["results"]), notes, drawn, made], report)


def title_of(bench: str, name: str, report: dict[str, Any]) -> str:
    """Of a page and its picture; ``name`` is that of what was measured."""
    told, device = report["settings"], report["environment"]["device"]
    return f"bench {bench}: {name}, {told['dtype']}, {told['attention']}, {device}"


def tables(results: Sequence[dict[str, Any]]) -> list[Table]:
    """Times, and what they come to."""

    def texts(key: str, style: str) -> list[str]:
        return [text_of(result[key] or None, style) or "-" for result in results]

    size = unit_of([result["cache_bytes_predicted"] for result in results], MEMORY)
    caches = [
        size.text(result["cache_bytes"]) or f"{size.text(result['cache_bytes_predicted'])} (predicted)"
        for result in results
    ]
    times = [
        spreads("prefill", results, "prefill_ms"),
        ("ranking", texts("ranking_share", ".1%")),
        column("tower", medians(results, "tower_ms")),
        ("decode, tokens/s", list(map(digits, medians(results, "decode_tokens_per_s")))),
    ]
    costs = [
        (f"cache, {size.name}", caches),
        column("peak memory", [result["peak_bytes"] for result in results], MEMORY),
        column("prefill", [result["prefill_tflop"] * 1e12 for result in results], OPERATIONS),
        ("of peak", texts("share_of_peak", ".1%")),
        ("speed-up", texts("speedup", ".2f")),
        ("predicted", texts("speedup_predicted", ".2f")),
        ("realised / predicted", texts("realised_over_predicted", ".2f")),
    ]
    return case_tables(results, {"Times": times, "Costs": costs})


def case_tables(
    results: Sequence[dict[str, Any]], columns: Mapping[str, Sequence[tuple[str, Sequence[str]]]]
) -> list[Table]:
    """Title -> ``columns``, behind those that say which case and method a result is of."""
    cases = [("method", [result["method"] for result in results])]
    cases += [(key.replace("_", " "), [f"{result[key]:,}" for result in results]) for key in ("image_tokens", "batch")]
    return [Table.of_columns([*cases, *own], title) for title, own in columns.items()]


def medians(results: Sequence[dict[str, Any]], key: str) -> list[float | None]:
    """Of every result, times in seconds."""
    factor = 1e-3 if key.endswith("_ms") else 1.0
    return [result[key] and factor * result[key]["median"] for result in results]


def spreads(title: str, results: Sequence[dict[str, Any]], key: str, unit: Unit | None = None) -> tuple[str, list[str]]:
    """A column of times with their quartiles, in a ``unit`` of its own where none is given."""
    unit = unit or time_unit(medians(results, key))
    cells = [
        unit.spread([found[name] / 1e3 for name in QUARTILES]) if (found := result[key]) else "out of memory"
        for result in results
    ]
    return f"{title}, {unit.name} [quartiles]", cells


def bars(results: Sequence[dict[str, Any]], title: str, panels: Mapping[str, str]) -> Any:
    """A group of bars for every case, with a colour per method; no bar where memory ran out.

    Args:
        panels: title -> key of a result: times, of which the median is drawn, or bytes.
    """
    cases = list(dict.fromkeys((result["image_tokens"], result["batch"]) for result in results))
    methods = list(dict.fromkeys(result["method"] for result in results))
    done = [result for result in results if not result["out_of_memory"]]
    size = (len(panels) * max(3.6, 1.1 + 0.75 * len(cases)), 4.2)
    figure, axes = subplots(1, len(panels), figsize=size, layout="constrained")
    width = 0.8 / len(methods)
    for panel, (head, key) in zip(axes, panels.items()):
        timed = key.endswith("_ms")
        values: list[Any] = medians(done, key) if timed else [result[key] for result in done]
        unit = unit_of(values, TIME if timed else MEMORY)
        for number, method in enumerate(methods):
            heights = {
                cases.index((result["image_tokens"], result["batch"])): value / unit.size
                for result, value in zip(done, values)
                if result["method"] == method
            }
            x = [place + (number - (len(methods) - 1) / 2) * width for place in heights]
            panel.bar(x, list(heights.values()), width * 0.92, color=BARS.get(method), label=method)
        panel.set(title=head, ylabel=f"{unit.name}, median" if timed else unit.name, xticks=range(len(cases)))
        panel.set_xticklabels([f"{tokens:,} tokens\nbatch {batch}" for tokens, batch in cases], fontsize=8)
        panel.grid(axis="x", visible=False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    figure.suptitle(title, fontweight="bold")
    return figure


def settings_of(hf: Any, methods: Mapping[str, Schedule], new_tokens: int, runs: int) -> dict[str, Any]:
    """What both benches tell of the model ``hf``, and of how it was measured."""
    return {
        "dtype": str(hf.dtype).removeprefix("torch."),
        "attention": hf.config.get_text_config()._attn_implementation,
        "runs": runs,
        "warm_up": WARM_UP,
        "new_tokens": new_tokens,
        "weights_bytes": sum(parameter.nbytes for parameter in hf.parameters()),
        "schedules": {method: schedule.to_dict() for method, schedule in methods.items()},
    }


def bench_prefill(
    name: str,
    subject: Subject,
    device: torch.device,
    cases: Sequence[tuple[int, int]],
    new_tokens: int,
    runs: int,
    seed: int,
) -> dict[str, Any]:
    """Measures vanilla, PyramidDrop (unless the shape has no schedule) and FastV at every one of ``cases``, which are
    (batch, image tokens); ``name`` is the shape's.

    Returns:
        ``environment``, ``settings`` and ``results``, one entry per case and method (see `entry`).
    """
    hf, results = subject.hf, list[dict[str, Any]]()
    dropping = {DROPPING: subject.schedule} if subject.schedule.layers else {}
    methods = {"vanilla": Schedule(), **dropping, "FastV": FASTV}
    peak, source = peak_flops(device, hf.dtype)
    for batch, image_tokens in tqdm(cases, desc=f"prefill {name}", unit="case", leave=False):
        case = PrefillCase(batch, image_tokens, new_tokens)
        measured = measure_prefill(subject, methods, case, runs, device)
        results += [entry(subject, case, *method, *measured, peak) for method in methods.items()]
    told = {
        "shape": name,
        **settings_of(hf, methods, new_tokens, runs),
        "kernels": "eager",  # generation is Hugging Face's: `model.kernels` holds in training
        "text_tokens": list(TEXT_TOKENS),
        "peak_flops": peak,
        "peak_flops_source": source,
        "timer": "CUDA events" if device.type == "cuda" else "wall clock; speed-ups by CPU time",
        "times": CLOCKS[device.type],
    }
    return {"environment": environment(device, seed), "settings": told, "results": results}
