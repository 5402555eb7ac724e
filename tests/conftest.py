"""For all tests: no network, one thread (the test processes already share the cores), a line about the golden cases."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter) -> None:
    """How many golden cases and numbers were compared. (Here because xdist's controller reads no other conftest.)"""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    cases = [dict(r.user_properties) for r in reports if getattr(r, "when", "") == "teardown"]
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
