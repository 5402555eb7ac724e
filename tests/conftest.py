"""For all tests: no network, one thread (the test processes already share the cores), the fast set, a line about the
golden cases."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests import kinds, restarts
from tests.messages import Says

torch.set_num_threads(1)


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="only tests that start no process, train nothing, are not slow"
    )


def pytest_configure(config) -> None:
    restarts.begin(config)
    if config.getoption("fast"):
        golden = Path(__file__).parent / "golden"  # what lies in the repository
        os.environ["PDROP_GOLDEN"] = str(golden / "reference")
        os.environ["PDROP_SCORING"] = str(golden / "scoring" / "set.tar.xz")


def pytest_make_parametrize_id(val: object) -> str | None:
    """A test with the pattern of a message is called by the message's parts."""
    return " ".join(val.parts) if isinstance(val, Says) else None


def pytest_collection_modifyitems(config, items: list) -> None:
    """Marks what starts processes and what trains; ``--fast`` leaves these and the slow ones out."""
    for item in items:
        kinds.mark(item)
    if config.getoption("fast"):
        chosen = [i for i in items if not any(map(i.get_closest_marker, ("process", "trains", "slow")))]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item) -> Iterator[None]:
    with kinds.neither_process_nor_training() if item.config.getoption("fast") else nullcontext():
        return (yield)


def pytest_unconfigure(config) -> None:
    restarts.end(config)


def pytest_terminal_summary(terminalreporter) -> None:
    """What was started once more, and how many golden entries were compared."""
    restarts.report(terminalreporter)
    golden_summary(terminalreporter)


def golden_summary(terminalreporter) -> None:
    """How many golden entries of each kind were compared, none included. (Here because xdist's controller reads no
    other conftest.)"""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    if not any(getattr(report, "nodeid", "").startswith("tests/golden/") for report in reports):
        return
    found = [dict(r.user_properties) for r in reports if getattr(r, "when", "") == "teardown"]
    for line in [
        *_text_lines([properties["golden_text"] for properties in found if "golden_text" in properties]),
        _preprocess_line([entry["golden_preprocess"] for entry in found if "golden_preprocess" in entry]),
        *_case_lines([properties for properties in found if "golden_case" in properties]),
        _model_line(found),
    ]:
        terminalreporter.write_line(f"golden {line}")


def _text_lines(compared: list) -> list[str]:
    """A line per kind of recorded text: how many entries are as recorded, and why the others are not."""
    lines = []
    for kind in dict.fromkeys(kind for kind, _ in compared):
        counts = sum((Counter(verdicts) for name, verdicts in compared if name == kind), Counter())
        shown = ", ".join(f"{count:,} {verdict}" for verdict, count in counts.most_common())
        lines.append(f"text, {kind}: {counts.total():,} entries compared: {shown}")
    return lines or ["text: 0 entries compared"]


def _preprocess_line(compared: list) -> str:
    pictures = Counter({"picture sizes": 0, "pixel tensors": 0})
    for kind, count in compared:
        pictures[kind] += count
    return f"preprocess: {', '.join(f'{count} {kind}' for kind, count in pictures.items())} compared"


def _case_lines(cases: list[dict]) -> list[str]:
    """End-to-end cases, which start from a JSON file and pictures, and those that start from tensors."""
    lines = []
    for kind, wanted in (("e2e", True), ("cases", False)):
        here = [properties for properties in cases if properties["golden_end_to_end"] == wanted]
        names = {properties["golden_case"] for properties in here}
        flagged = {properties["golden_case"] for properties in here if properties["golden_flagged"]}
        cut = {properties["golden_case"] for properties in here if properties["golden_cut_short"]}
        numbers = sum(properties["golden_numbers"] for properties in here)
        lines.append(
            f"{kind}: {len(names)} compared ({len(names - flagged)} with the official results, {len(flagged)} with our "
            f"own expectations), {numbers:,} numbers"
            + (f"; {len(cut)} of them no further than their pixels, see the skipped tests" if cut else "")
        )
    return lines


def _model_line(found: list[dict]) -> str:
    models, logits = ({p[key] for p in found if key in p} for key in ("golden_model", "golden_logits"))
    return f"models: {len(models)} compared there and back in both layouts, {len(logits)} with recorded logits"
