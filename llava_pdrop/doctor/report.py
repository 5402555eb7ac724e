"""What the check of a data set comes to: JSON for machines, a page with histograms for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from llava_pdrop.doctor.checks import PROBLEM_KINDS
from llava_pdrop.doctor.examine import Findings
from llava_pdrop.report.page import Block, Note, Page, Picture, Table
from llava_pdrop.report.pictures import subplots
from llava_pdrop.report.units import OPERATIONS, less, time_text, unit_of

SHOWN = 5
"""Problems of one kind that the Markdown shows."""

PERCENTILES = (1, 50, 90, 99)

BAR, MARK = "#3E5C76", "#E2703A"

LARGEST = 99.9
"""Percentile up to which lengths and sizes are drawn; the last bin holds what lies behind."""


def describe(findings: Findings, data: str, max_length: int | None) -> dict[str, Any]:
    """Everything found about one data set, ready for JSON. Problems are counted in distinct records; ``records`` and
    ``usable`` count a record as often as a mixture repeats it."""
    records = findings.records
    return {
        "data": data,
        "records": len(findings.which),
        "distinct_records": len(records),
        "usable": len(findings.clean),
        "parts": [
            {"path": str(part.path), "template": part.template, "distinct_records": int(count)}
            for part, count in zip(records.parts, np.bincount(records.rows[:, 0], minlength=len(records.parts)))
        ],
        "problems": {kind: _problems(findings, kind) for kind in PROBLEM_KINDS if findings.count(kind)},
        "unknown_keys": dict(sorted(findings.unknown_keys.items())),
        "images": _images(findings),
        "tokens": _tokens(findings, max_length),
    }


def _problems(findings: Findings, kind: str) -> dict[str, Any]:
    listed = [{key: value for key, value in asdict(p).items() if key != "kind"} for p in findings.problems[kind]]
    return {
        "summary": PROBLEM_KINDS[kind],
        "refused": kind in findings.checks.refused(),
        "records": findings.count(kind),
        "listed": listed,
    }


def _images(findings: Findings) -> dict[str, Any]:
    pictures = findings.pictures
    sizes = pictures.sizes[pictures.readable]
    modes = Counter(mode for mode in pictures.modes if mode)
    return {
        "checked": "all pixels" if findings.checks.decode else "header",
        "shown": int(findings.counts.sum()),
        "distinct": len(pictures.bytes),
        "readable": len(sizes),
        "modes": dict(modes.most_common()),
        "duplicate_files": findings.duplicates,
        "same_content": findings.same_images,
        "records_with_images": int((findings.counts > 0).sum()),
        "width": _percentiles(sizes[:, 0]),
        "height": _percentiles(sizes[:, 1]),
    }


def _tokens(findings: Findings, max_length: int | None) -> dict[str, Any] | None:
    """None where none were counted."""
    if findings.checks.encoder is None:
        return None
    before, after = findings.lengths[findings.which].T
    return {
        "max_length": max_length,
        "truncation": findings.checks.truncation,
        "counted_records": int((before >= 0).sum()),
        "before_truncation": _percentiles(before[before >= 0]),
        "after_truncation": _percentiles(after[after >= 0]),
        "longer_than_max_length": 0 if max_length is None else int((before > max_length).sum()),
        "total_after_truncation": int(after[after >= 0].sum(dtype=np.int64)),
    }


def _percentiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    marks = np.percentile(values, PERCENTILES)
    named = {f"p{which}": round(float(mark), 1) for which, mark in zip(PERCENTILES, marks)}
    return {"mean": round(float(values.mean()), 1), "min": int(values.min()), **named, "max": int(values.max())}


def pictures(findings: Findings, name: str, max_length: int | None) -> dict[str, Picture]:
    """What is shown -> the histogram, of what there is material for."""
    lengths, sizes = findings.lengths[findings.which, 0], findings.pictures.sizes[findings.pictures.readable]
    found, known = {}, lengths[lengths >= 0]
    if len(known):
        draw = partial(length_histogram, known, max_length)
        found["lengths"] = Picture(f"{name}_lengths.png", f"lengths of data.{name}", draw)
    if len(sizes):
        draw = partial(size_histogram, sizes)
        found["image_sizes"] = Picture(f"{name}_image_sizes.png", f"image sizes of data.{name}", draw)
    return found


def length_histogram(lengths: np.ndarray, limit: int | None) -> Any:
    """How many records have how many tokens, before truncation; ``limit`` is marked."""
    figure, axes = subplots(figsize=(7.2, 3.4), layout="constrained")
    end = max(float(np.percentile(lengths, LARGEST)), float(lengths.min()) + 1)
    axes.hist(np.minimum(lengths, end), bins=60, color=BAR)
    axes.locator_params(axis="x", integer=True)
    if limit is not None and limit <= end * 1.3:
        over = int((lengths > limit).sum())
        axes.axvline(limit, color=MARK, linewidth=2, label=f"data.max_length {limit:,}: {over:,} are longer")
        axes.legend()
    axes.set(
        xlabel=f"tokens, image tokens included (longest: {int(lengths.max()):,})",
        ylabel="records",
        title=f"Length of {len(lengths):,} records",
    )
    return figure


def size_histogram(sizes: np.ndarray) -> Any:
    """How many pictures have which width and height; ``sizes`` is (m, 2)."""
    figure, axes = subplots(figsize=(5.6, 4.6), layout="constrained")
    ends = np.percentile(sizes, LARGEST, axis=0)
    edges = [np.linspace(0, end * 1.05 + 1, 49) for end in ends]
    widths, heights = np.minimum(sizes, ends).T
    counts, *_ = np.histogram2d(widths, heights, bins=edges)
    shown, most = np.ma.masked_equal(counts.T, 0), max(2.0, float(counts.max()))
    mesh = axes.pcolormesh(*edges, shown, cmap="viridis_r", norm="log", vmin=1, vmax=most)
    figure.colorbar(mesh, ax=axes, label="images")
    largest = "x".join(str(side) for side in sizes[sizes.prod(axis=1).argmax()])
    axes.set(
        xlabel="width (pixels)",
        ylabel="height (pixels)",
        title=f"Sizes of {len(sizes):,} images (largest: {largest})",
    )
    return figure


def page(report: Mapping[str, Any], drawn: Mapping[str, Mapping[str, Picture]]) -> Page:
    """The report of a config, as `llava_pdrop.commands.doctor` puts it together; ``drawn``: the `pictures` of each data
    set."""
    blocks: list[Block] = [Note(report["verdict"])]
    for name, found in report["data"].items():
        blocks += [
            Note(f"## data.{name}: `{found['data']}`"),
            *_summary(name, found),
            *_problems_found(found["problems"]),
        ]
        blocks += [*_lengths(found["tokens"]), *drawn[name].values()]
    return Page(f"Data of {report['name']}", [*blocks, *_cost(report["cost"])])


def _summary(name: str, found: Mapping[str, Any]) -> list[Block]:
    images = found["images"]
    usable = f"data.{name}: {found['usable']:,} of {found['records']:,} records can be used"
    if found["records"] != found["distinct_records"]:
        usable += f" ({found['distinct_records']:,} distinct)"
    lines = [
        f"{images['distinct']:,} distinct images, {images['readable']:,} of them readable (checked: "
        f"{images['checked']}), shown {images['shown']:,} times by {images['records_with_images']:,} records"
    ]
    if images["modes"]:
        lines.append("image modes: " + ", ".join(f"{mode} {count:,}" for mode, count in images["modes"].items()))
    if images["duplicate_files"]:
        lines.append(f"{images['duplicate_files']:,} image files have the content of another one")
    if found["unknown_keys"]:
        keys = ", ".join(f"`{key}` ({count:,} records)" for key, count in found["unknown_keys"].items())
        lines.append(f"keys that are not read: {keys}")
    return [usable, Note("\n".join(f"- {line}" for line in lines))]


def _problems_found(problems: Mapping[str, Any]) -> list[Block]:
    if not problems:
        return [Note("No problems.")]
    rows = [
        (f"{entry['summary']} ({kind})", f"{entry['records']:,}", "refuses" if entry["refused"] else "takes")
        for kind, entry in problems.items()
    ]
    blocks: list[Block] = [Table(("problem", "records", "training"), rows)]
    for kind, entry in problems.items():
        listed = entry["listed"][:SHOWN]
        lines = [f"- {p['index']} `{p['origin']}` (id {p['id']}): {p['reason']}" for p in listed]
        blocks.append(Note("\n".join([f"`{kind}`, the first {len(listed)} of {entry['records']:,}:", "", *lines])))
    return blocks


def _lengths(tokens: Mapping[str, Any] | None) -> list[Block]:
    if tokens is None:
        return ["Tokens were not counted (`--no-tokens`): whether records fit `data.max_length` is not known."]
    if not tokens["counted_records"]:
        return ["No record's tokens could be counted."]
    columns = list(tokens["before_truncation"])
    rows = [
        (name.replace("_", " "), *(f"{tokens[name][key]:,.0f}" for key in columns))
        for name in ("before_truncation", "after_truncation")
        if tokens[name]
    ]
    blocks: list[Block] = [Table(("tokens per record", *columns), rows)]
    if tokens["max_length"] is not None:
        blocks.append(
            f"{tokens['longer_than_max_length']:,} of {tokens['counted_records']:,} records are longer than "
            f"data.max_length {tokens['max_length']}; data.truncation is `{tokens['truncation']}`."
        )
    return blocks


def _cost(cost: Mapping[str, Any]) -> list[Block]:
    tokens, step, hours = cost["image_tokens_per_stage"], cost["step"], cost["hours_per_1000_records"]
    blocks: list[Block] = [Note("## What training on it costs")]
    if tokens is not None:
        means = zip(tokens["mean_per_image"], tokens["total"])
        rows = [
            (f"after drop {stage}" if stage else "before any drop", f"{mean:,.1f}", f"{total:,}")
            for stage, (mean, total) in enumerate(means)
        ]
        blocks.append(Table(("stage", "image tokens per image", "of all images"), rows))
    if step is not None:
        operations = [1e12 * step["tflop_per_record"][name] for name in ("vanilla", "dropping")]
        unit = unit_of(operations, OPERATIONS)
        vanilla, dropping = (time_text(3600 * hours[name]) for name in ("vanilla", "dropping"))
        blocks += [
            f"Of {step['records']:,} records in {step['batches']} micro-batches: {unit.text(operations[0])} "
            f"{unit.name} per record without dropping, {unit.text(operations[1])} with the schedule of this config; "
            f"predicted step time: {less(step['predicted_reduction'])}.",
            f"1,000 records take {vanilla} without dropping, {dropping} with it "
            f"({hours['unit'].replace('hours', 'time')}; {hours['source']}).",
        ]
    return blocks if cost["why_not"] is None else [*blocks, cost["why_not"]]
