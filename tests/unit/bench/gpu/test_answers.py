"""The row of a batch size, of a report of ``bench generate``."""

from __future__ import annotations

import re
from typing import Any

from llava_pdrop.bench.gpu.answers import BATCHES, answer_row, said
from llava_pdrop.bench.gpu.stages import STAGES, missing
from llava_pdrop.report.units import GIB
from tests.messages import says


def entry(method: str, factor: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "batch": 4,
        "out_of_memory": False,
        "first_token_ms": {"median": 200 * factor},
        "token_ms": {"median": 20 * factor},
        "tokens_per_s": {"median": 100 / factor},
        "cache_bytes": 2 * GIB * factor,
        "speedup": dict.fromkeys(("first", "prefill", "token", "whole"), 1 / factor),
        "prefill_realised_over_predicted": 0.975,
        **more,
    }


def report(**more: Any) -> dict[str, Any]:
    results = [entry("vanilla", 1.0), entry("PyramidDrop", 0.5, **more)]
    return {"results": results, "hooks": [{"batch": 4, "share": 0.0125}]}


def test_a_row_has_what_the_stage_needs() -> None:
    row = answer_row(report(), 4)
    assert missing(STAGES["generate"], {f"batch_{batch}": row for batch in BATCHES}, on_cpu=False) == []
    assert (row["vanilla_first_token_ms"], row["dropping_token_ms"]) == (200, 10)
    assert row["cache_gib"] == {"vanilla": 2, "dropping": 1} and row["tokens_per_s"]["dropping"] == 200
    assert re.search(says("200 ms -> 100 ms", "20.0 ms -> 10.0 ms", "2.00x", "0.975", "hooks 1.2%"), said(row))


def test_what_memory_does_not_suffice_for_is_said() -> None:
    lost = answer_row(report(out_of_memory=True), 4)
    assert lost == {"error": "out of memory"} and said(lost) == "out of memory"
    unmeasured = answer_row({**report(), "hooks": []}, 4)
    assert unmeasured["hooks_share"] is None and "hooks not measured" in said(unmeasured)
    assert "batch_1.hooks_share" in missing(STAGES["generate"], {"batch_1": unmeasured}, on_cpu=False)
