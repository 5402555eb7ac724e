"""What the check of a data set writes: JSON for machines, Markdown for people, histograms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llava_pdrop.doctor.checks import KINDS
from llava_pdrop.doctor.examine import Findings
from llava_pdrop.doctor.figures import length_histogram, size_histogram

SHOWN = 5
"""Problems of one kind that the Markdown shows."""

PERCENTILES = (1, 50, 90, 99)


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
        "problems": {kind: _problems(findings, kind) for kind in KINDS if findings.count(kind)},
        "unknown_keys": dict(sorted(findings.unknown_keys.items())),
        "images": _images(findings),
        "tokens": _tokens(findings, max_length),
    }


def _problems(findings: Findings, kind: str) -> dict[str, Any]:
    listed = [{key: value for key, value in asdict(p).items() if key != "kind"} for p in findings.problems[kind]]
    return {
        "summary": KINDS[kind].summary,
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


def draw(findings: Findings, name: str, max_length: int | None, directory: Path) -> dict[str, str]:
    """Draws the histograms there is material for; returns what is shown -> file name in ``directory``."""
    files = {}
    lengths = findings.lengths[findings.which, 0]
    if (lengths >= 0).any():
        file = directory / f"{name}_lengths.png"
        files["lengths"] = length_histogram(lengths[lengths >= 0], max_length, file) and file.name
    if findings.pictures.readable.any():
        file = directory / f"{name}_image_sizes.png"
        files["image_sizes"] = size_histogram(findings.pictures.sizes[findings.pictures.readable], file) and file.name
    return {shown: name for shown, name in files.items() if name}


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report of a config, as `llava_pdrop.commands.doctor` puts it together."""
    text = f"# Data of {report['name']}\n\n{report['verdict']}\n"
    for name, found in report["data"].items():
        text += f"\n## data.{name}: `{found['data']}`\n\n{_summary(found)}"
        text += _problem_table(found["problems"]) + _token_table(found["tokens"])
        for file in found["figures"].values():
            text += f"\n![{file}]({file})\n"
    return text + _cost(report["cost"])


def _summary(found: Mapping[str, Any]) -> str:
    images = found["images"]
    lines = [
        f"- {found['usable']:,} of {found['records']:,} records can be used"
        + (f" ({found['distinct_records']:,} distinct)" if found["records"] != found["distinct_records"] else ""),
        f"- {images['distinct']:,} distinct images, {images['readable']:,} of them readable (checked: "
        f"{images['checked']}), shown {images['shown']:,} times by {images['records_with_images']:,} records",
    ]
    if images["modes"]:
        lines.append("- image modes: " + ", ".join(f"{mode} {count:,}" for mode, count in images["modes"].items()))
    if images["duplicate_files"]:
        lines.append(f"- {images['duplicate_files']:,} image files have the content of another one")
    if found["unknown_keys"]:
        keys = ", ".join(f"`{key}` ({count:,} records)" for key, count in found["unknown_keys"].items())
        lines.append(f"- keys that are not read: {keys}")
    return "\n".join(lines) + "\n"


def _problem_table(problems: Mapping[str, Any]) -> str:
    if not problems:
        return "\nNo problems.\n"
    text = "\n| problem | records | training |\n| --- | ---: | --- |\n"
    for kind, entry in problems.items():
        verdict = "refuses" if entry["refused"] else "takes"
        text += f"| {entry['summary']} (`{kind}`) | {entry['records']:,} | {verdict} |\n"
    for kind, entry in problems.items():
        text += f"\n`{kind}`, the first {min(SHOWN, len(entry['listed']))} of {entry['records']:,}:\n\n"
        for problem in entry["listed"][:SHOWN]:
            text += f"- {problem['index']} `{problem['origin']}` (id {problem['id']}): {problem['reason']}\n"
    return text


def _token_table(tokens: Mapping[str, Any] | None) -> str:
    if tokens is None:
        return "\nTokens were not counted (`--no-tokens`): whether records fit `data.max_length` is not known.\n"
    if not tokens["counted_records"]:
        return "\nNo record's tokens could be counted.\n"
    columns = list(tokens["before_truncation"])
    text = f"\n| tokens per record | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}\n"
    for name in ("before_truncation", "after_truncation"):
        if tokens[name]:
            text += f"| {name.replace('_', ' ')} | {' | '.join(f'{tokens[name][c]:,}' for c in columns)} |\n"
    if tokens["max_length"] is None:
        return text
    return text + (
        f"\n{tokens['longer_than_max_length']:,} of {tokens['counted_records']:,} records are longer than "
        f"data.max_length {tokens['max_length']}; data.truncation is `{tokens['truncation']}`.\n"
    )


def _cost(cost: Mapping[str, Any]) -> str:
    tokens, step, hours = cost["image_tokens_per_stage"], cost["step"], cost["hours_per_1000_records"]
    text = "\n## What training on it costs\n"
    if tokens is not None:
        text += "\n| stage | image tokens per image | of all images |\n| --- | ---: | ---: |\n"
        for stage, (mean, total) in enumerate(zip(tokens["mean_per_image"], tokens["total"])):
            text += f"| {'before any drop' if not stage else f'after drop {stage}'} | {mean:,.1f} | {total:,} |\n"
    if step is not None:
        operations = step["tflop_per_record"]
        text += (
            f"\nOf {step['records']:,} records in {step['batches']} micro-batches: {operations['vanilla']:,.3g} TFLOP "
            f"per record without dropping, {operations['dropping']:,.3g} with the schedule of this config; predicted "
            f"saving of step time {step['predicted_reduction']:.1%}.\n\n{hours['vanilla']:.3g} {hours['unit']} per "
            f"1,000 records without dropping, {hours['dropping']:.3g} with ({hours['source']}).\n"
        )
    return text if cost["why_not"] is None else f"{text}\n{cost['why_not']}\n"
