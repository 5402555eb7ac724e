"""For all tests: no network, one thread (the test processes already share the cores), a line about the golden cases."""

from __future__ import annotations

import os
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter) -> None:
    """How many golden cases and numbers were compared. (Here because xdist's controller reads no other conftest.)"""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    cases = [dict(r.user_properties) for r in reports if getattr(r, "when", "") == "teardown"]
    models = {properties["golden_model"] for properties in cases if "golden_model" in properties}
    if models:
        terminalreporter.write_line(f"golden: {len(models)} models compared, weights and logits, in both layouts")
    _text_summary(terminalreporter, [properties["golden_text"] for properties in cases if "golden_text" in properties])
    pictures: Counter[str] = Counter()
    for kind, count in [properties["golden_preprocess"] for properties in cases if "golden_preprocess" in properties]:
        pictures[kind] += count
    if pictures:
        shown = ", ".join(f"{count} {kind}" for kind, count in pictures.items())
        terminalreporter.write_line(f"golden preprocess: {shown} compared")
    cases = [properties for properties in cases if "golden_case" in properties]
    if not cases:
        return
    names = {properties["golden_case"] for properties in cases}
    flagged = {properties["golden_case"] for properties in cases if properties["golden_flagged"]}
    numbers = sum(properties["golden_numbers"] for properties in cases)
    terminalreporter.write_line(
        f"golden: {len(names)} cases ({len(names - flagged)} against the official results, {len(flagged)} against our "
        f"own expectations), {numbers:,} numbers compared"
    )


def _text_summary(terminalreporter, compared) -> None:
    """A line per kind of recorded text: how many entries are as recorded, and why the others are not."""
    for kind in dict.fromkeys(kind for kind, _ in compared):
        counts = sum((Counter(verdicts) for name, verdicts in compared if name == kind), Counter())
        shown = ", ".join(f"{count:,} {verdict}" for verdict, count in counts.most_common())
        terminalreporter.write_line(f"golden text, {kind}: {counts.total():,} entries compared: {shown}")
