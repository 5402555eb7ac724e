"""What ``bench prefill`` predicts for a case, sets beside the measurement, and writes down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from llava_pdrop.bench.prefill import FASTV, TEXT_TOKENS, WARM_UP, Case, Run, measure
from llava_pdrop.bench.shapes import Shape, make_model
from llava_pdrop.cost.flops import head_size, key_value_heads, step_flops
from llava_pdrop.errors import UserError
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.report.environment import environment
from llava_pdrop.report.pictures import save_picture, subplots
from llava_pdrop.report.style import markdown_table
from llava_pdrop.runtime.clock import Span, quartiles
from llava_pdrop.runtime.device import peak_flops
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch

COLOURS = {"vanilla": "#6B7C8F", "PyramidDrop": "#E2703A", "FastV": "#3A8FB7"}

HEADERS = (
    "image tokens", "batch", "method", "prefill ms", "quartiles", "ranking", "tower ms", "decode tokens/s", "cache MiB",
    "peak GiB", "prefill TFLOP", "of peak", "speed-up", "predicted", "realised / predicted",
)  # fmt: skip

SHOWN = (0, 1, 2, 3, 5, 7, 8, 12, 13)
"""Columns of the table on the terminal, which is narrower than a page."""

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


def prefill_flops(config: Any, case: Case, schedule: Schedule, geometry: ImageGeometry) -> float:
    """Operations of a prefill by the full count of `cost.flops`: the decoder with its text, ranking, and the head on
    the last token of each prompt. Tower and projector are not in it."""
    before, after = case.text_tokens
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
    flops = step_flops(config, batch, schedule, geometry, trainable=())
    return flops.total - flops.tower - flops.projector


def predicted_cache_bytes(config: Any, case: Case, schedule: Schedule, dtype: torch.dtype) -> int:
    """Bytes of keys and values at the end of an answer, whose last token is never fed back."""
    text = config.text_config
    others = sum(case.text_tokens) + case.new_tokens - 1
    tokens = sum(others + image for image in schedule.tokens_per_layer(case.image_tokens, text.num_hidden_layers))
    return case.batch * tokens * 2 * key_value_heads(text) * head_size(text) * dtype.itemsize


def spread(values: Sequence[float], factor: float = 1.0) -> dict[str, float]:
    """``median``, ``q1`` and ``q3`` of ``values`` times ``factor``."""
    q1, median, q3 = (value * factor for value in quartiles(values))
    return {"median": median, "q1": q1, "q3": q3}


def entry(
    config: Any,
    case: Case,
    method: str,
    schedule: Schedule,
    geometry: ImageGeometry,
    dtype: torch.dtype,
    peak: float,
    tower: Sequence[Span],
    runs: Sequence[Run] | None,
    vanilla: Sequence[Run] | None,
) -> dict[str, Any]:
    """One method at one case, predicted and measured.

    Args:
        peak: operations a second the device can reach.
        tower: times of tower and projector.
        runs, vanilla: of this method and of the one without dropping; None where it ran out of memory, and then the
            figures that need it are None.
    """
    flops = prefill_flops(config, case, schedule, geometry)
    predicted = prefill_flops(config, case, Schedule(), geometry) / flops
    cost = _cost(runs) if runs else None
    realised = _cost(vanilla) / cost if vanilla and cost else None
    decoded = case.batch * (case.new_tokens - 1)
    peaks = [run.peak_bytes for run in runs or () if run.peak_bytes is not None]
    return {
        "method": method,
        "batch": case.batch,
        "image_tokens": case.image_tokens,
        "out_of_memory": not runs,
        "prefill_ms": spread([run.prefill.seconds for run in runs], 1e3) if runs else None,
        "prefill_cpu_ms": _cpu([run.prefill for run in runs]) if runs else None,
        "ranking_ms": spread([run.ranking.seconds for run in runs], 1e3) if runs else None,
        "ranking_share": float(np.median([run.ranking.cost / run.prefill.cost for run in runs])) if runs else None,
        "tower_ms": spread([span.seconds for span in tower], 1e3) if tower else None,
        "decode_tokens_per_s": spread([decoded / run.decode.seconds for run in runs]) if runs else None,
        "cache_bytes": runs[-1].cache_bytes if runs else None,
        "cache_bytes_predicted": predicted_cache_bytes(config, case, schedule, dtype),
        "peak_bytes": max(peaks) if peaks else None,
        "prefill_tflop": flops / 1e12,
        "share_of_peak": flops / cost / peak if cost else None,
        "speedup": realised,
        "speedup_predicted": predicted,
        "realised_over_predicted": realised / predicted if realised else None,
    }


def write(report: dict[str, Any], directory: Path, name: str) -> list[Path]:
    """Writes ``name`` with .json, .md and .png behind it into ``directory``; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / (name + suffix) for suffix in (".json", ".md", ".png")]
    files[0].write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    pictured = save_picture(files[2], lambda: bars(report))
    files[1].write_text(_markdown(report, files[2].name if pictured else None), encoding="utf-8")
    return files if pictured else files[:2]


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Prints the results as a table."""
    table = Table(
        title=_title(report), caption=_notes(report), caption_justify="left", box=SIMPLE, padding=0, show_edge=False
    )
    for column in SHOWN:
        left = HEADERS[column] == "method"
        header = HEADERS[column].replace(" ", "\n")  # 80 columns are enough for words of the headers, not for lines
        table.add_column(header, justify="left" if left else "right", no_wrap=left)
    last = None
    for result in report["results"]:
        if last not in (None, (result["image_tokens"], result["batch"])):
            table.add_section()
        last = (result["image_tokens"], result["batch"])
        cells = _cells(result)
        table.add_row(*(cells[column] for column in SHOWN))
    (console or Console()).print(table)


def bars(report: dict[str, Any]) -> Any:
    """Prefill latency and cache size of every case as bars, a colour per method; no bar where memory ran out."""
    results = report["results"]
    cases = list(dict.fromkeys((result["image_tokens"], result["batch"]) for result in results))
    methods = list(dict.fromkeys(result["method"] for result in results))
    figure, axes = subplots(1, 2, figsize=(max(8.0, 2.4 + 1.6 * len(cases)), 4.2), layout="constrained")
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        own = [result for result in results if result["method"] == method and not result["out_of_memory"]]
        x = [cases.index((r["image_tokens"], r["batch"])) + (number - (len(methods) - 1) / 2) * width for r in own]
        heights = ([r["prefill_ms"]["median"] for r in own], [r["cache_bytes"] / 2**20 for r in own])
        for panel, height in zip(axes, heights):
            panel.bar(x, height, width * 0.92, color=COLOURS.get(method), label=method)
    labels = [f"{tokens:,} tokens\nbatch {batch}" for tokens, batch in cases]
    for panel, title, unit in zip(axes, ("Prefill", "KV cache after the answer"), ("ms, median", "MiB")):
        panel.set(title=title, ylabel=unit, xticks=range(len(cases)))
        panel.set_xticklabels(labels, fontsize=8)
        panel.grid(axis="x", visible=False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    figure.suptitle(_title(report), fontweight="bold")
    return figure


def _cost(runs: Sequence[Run]) -> float:
    return float(np.median([run.prefill.cost for run in runs]))


def _cpu(spans: Sequence[Span]) -> dict[str, float] | None:
    cpu = [span.cpu for span in spans if span.cpu is not None]
    return spread(cpu, 1e3) if cpu else None


def _cells(result: dict[str, Any]) -> list[str]:
    def number(value: float | None, form: str, absent: str = "-") -> str:
        return absent if value is None else format(value, form)

    prefill, tower, decode = (result[key] for key in ("prefill_ms", "tower_ms", "decode_tokens_per_s"))
    spread = f"{prefill['q1']:.1f}-{prefill['q3']:.1f}" if prefill else "-"
    counted, foreseen = result["cache_bytes"], result["cache_bytes_predicted"]
    cache = f"{foreseen / 2**20:.1f} (predicted)" if counted is None else f"{counted / 2**20:.1f}"
    return [
        f"{result['image_tokens']:,}",
        str(result["batch"]),
        result["method"],
        number(prefill and prefill["median"], ".1f", "out of memory"),
        spread,
        number(result["ranking_share"], ".1%"),
        number(tower and tower["median"], ".1f"),
        number(decode and decode["median"], ".1f"),
        cache,
        number(result["peak_bytes"] and result["peak_bytes"] / 2**30, ".1f", "not measured"),
        f"{result['prefill_tflop']:.3g}",
        number(result["share_of_peak"], ".1%"),
        number(result["speedup"], ".2f"),
        f"{result['speedup_predicted']:.2f}",
        number(result["realised_over_predicted"], ".2f"),
    ]


def _title(report: dict[str, Any]) -> str:
    settings, environment = report["settings"], report["environment"]
    return f"bench prefill: {settings['shape']}, {settings['dtype']}, {settings['attention']}, {environment['device']}"


def _notes(report: dict[str, Any]) -> str:
    settings = report["settings"]
    return (
        f"{settings['runs']} runs of every method, taking turns, after {settings['warm_up']} that are not counted; "
        f"{sum(settings['text_tokens'])} text tokens a prompt, {settings['new_tokens']} new ones an answer; "
        f"{settings['kernels']} kernels. Prefill: until the first logits, without the tower. Time: "
        f"{settings['timer']}. Predicted: by the full FLOP count. Of peak: {settings['peak_flops_source']}."
    )


def _markdown(report: dict[str, Any], picture: str | None) -> str:
    environment = report["environment"]
    versions = ", ".join(
        f"{key} {environment[key]}" for key in ("torch", "transformers", "cuda", "commit", "date", "seed")
    )
    table = markdown_table(HEADERS, [_cells(result) for result in report["results"]])
    command = f"`{environment['command']}`"
    text = f"# {_title(report)}\n\n{table}\n{_notes(report)}\n\n{command}; {versions}\n"
    return text if picture is None else f"{text}\n![]({picture})\n"


def bench_prefill(
    name: str,
    shape: Shape,
    device: torch.device,
    batches: Sequence[int],
    image_tokens: Sequence[int],
    new_tokens: int = 32,
    runs: int = 10,
    seed: int = 0,
    attention: str = "sdpa",
) -> dict[str, Any]:
    """Measures every batch size with every number of image tokens, vanilla, PyramidDrop (unless the shape's schedule is
    empty) and FastV.

    Args:
        attention: ``attn_implementation`` of the Hugging Face model.

    Returns:
        ``environment``, ``settings`` and ``results``, one entry per case and method (see `entry`).

    Raises:
        UserError: an attention implementation that is not there.
    """
    dtype = torch.bfloat16 if shape.half and device.type == "cuda" else torch.float32
    hf = make_model(shape, device, dtype, seed=seed).hf.eval()
    try:
        hf.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        raise UserError(f"--attention {attention!r} does not work here: {error}") from error
    hf.generation_config.eos_token_id = None  # every answer has the same length
    hf.generation_config.pad_token_id = 0
    dropping = {"PyramidDrop": shape.schedule} if shape.schedule.layers else {}
    methods = {"vanilla": Schedule(), **dropping, "FastV": FASTV}
    cases = [Case(batch, tokens, TEXT_TOKENS, new_tokens) for tokens in image_tokens for batch in batches]
    peak, peak_source = peak_flops(device, dtype)
    results: list[dict[str, Any]] = []
    for case in tqdm(cases, desc=f"prefill {name}", unit="case", leave=False):
        tower, counted = measure(hf, case, methods, shape, runs, seed, device)
        for method, schedule in methods.items():
            taken, vanilla = counted.get(method), counted.get("vanilla")
            results.append(entry(hf.config, case, method, schedule, shape.geometry, dtype, peak, tower, taken, vanilla))
    settings = {
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "kernels": "eager",  # generation is Hugging Face's: `model.kernels` holds in training
        "runs": runs,
        "warm_up": WARM_UP,
        "new_tokens": new_tokens,
        "text_tokens": list(TEXT_TOKENS),
        "weights_bytes": sum(parameter.nbytes for parameter in hf.parameters()),
        "peak_flops": peak,
        "peak_flops_source": peak_source,
        "timer": "CUDA events" if device.type == "cuda" else "wall clock; speed-ups by CPU time",
        "times": CLOCKS[device.type],
        "schedules": {method: schedule.to_dict() for method, schedule in methods.items()},
    }
    return {"environment": environment(device, seed), "settings": settings, "results": results}
