"""A row of the README's tables, of a bench's report: both arms, what memory forces, and the model beside them; a batch
size of ``bench generate``."""

from __future__ import annotations

import re
from typing import Any

from llava_pdrop.bench.gpu.measured import ANSWERED, _lines, answer_row, answer_text, training_row
from llava_pdrop.bench.gpu.stages import STAGES, missing
from llava_pdrop.report.units import GIB
from tests.messages import says


def run(name: str, seconds: float, again: tuple[bool, int | None, bool], **more: Any) -> dict[str, Any]:
    modelled = {"step_ms": 900 * seconds, "parts": [{"name": "tower", "forward_ms": 9.0}]}
    modelled["parts"] += [{"name": f"layers {k}-{k}", "forward_ms": 100.0 + k} for k in range(2)]
    keys = ("recompute", "recompute_layers", "recompute_tower")
    return {
        "name": name,
        "schedule": {"layers": [1], "ratios": [0.5]},
        "error": None,
        "kernels": "eager",
        "quartiles": {"step": [seconds, seconds, seconds]},
        "stages": [{"tokens": 10, "seconds": seconds / 4}, {"tokens": 5, "seconds": seconds / 8}],
        "steps": {"image_tokens": [[8, 4], [10, 5]]},
        "modelled": modelled,
        **dict.fromkeys(("mfu", "hfu", "ranking_share", "tokens_per_second"), 0.25),
        "peak_mib": 2048,
        "predicted_peak_mib": 1024,
        **dict(zip(keys, again)),
        **more,
    }


SAVED = {
    "predicted_reduction": 0.5, "realised_reduction": 0.4, "compute_reduction": 0.45, "realised_over_predicted": 0.9,
    "realised_by_step": [0.4, 0.4, 0.4],
}  # fmt: skip


def report(*runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "runs": list(runs),
        "options": {"samples": None},
        "shape": {"samples": 4},
        "optimizer": {"kind": "sharded"},
        "compared": "forward and backward",
    }


ALL = (run("vanilla", 2.0, (True, None, False)), run("PyramidDrop", 1.0, (True, None, False), **SAVED))
FORCED = (run("vanilla", 1.6, (True, 11, True)), run("PyramidDrop", 0.6, (False, 0, False), **SAVED))


def test_the_first_setting_is_the_row_and_the_second_what_memory_forces() -> None:
    alone, both = training_row(report(*ALL)), training_row(report(*ALL, *FORCED))
    assert "forced" not in alone and both == {**alone, "forced": both["forced"]}
    assert (alone["vanilla"]["step_ms"], alone["dropping"]["step_ms"]) == (2000, 1000)
    assert (both["forced"]["vanilla"]["step_ms"], both["forced"]["dropping"]["step_ms"]) == (1600, 600)
    assert alone["image_tokens"] == [9, 4] and alone["samples"] == 4
    assert (alone["realised"], alone["realised_compute"], alone["realised_over_predicted"]) == (0.4, 0.45, 0.9)


def test_an_arm_without_memory_costs_its_own_setting() -> None:
    failed = {**FORCED[1], "error": "out of memory"}
    row = training_row(report(*ALL, FORCED[0], failed))
    assert row["forced"] == {"error": "out of memory"} and row["dropping"]["step_ms"] == 1000


def test_the_model_is_said_beside_what_was_measured() -> None:
    row = training_row(report(*ALL, *FORCED))
    lines = list(_lines(row["forced"]))
    assert re.search(says("vanilla", "1.60 s", "modelled 1.44 s", "11 decoder layers and the tower"), lines[0])
    assert re.search(says("vanilla, stage 1", "200 ms", "modelled 101 ms"), lines[2])
    assert re.search(says("saved 40.0% of the step", "forward and backward 45.0% of 50.0%", "0.900"), lines[-1])
    unknown = [{**arm, "modelled": None} for arm in ALL]
    assert "modelled" not in " ".join(_lines(training_row(report(*unknown))))


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


def answers(**more: Any) -> dict[str, Any]:
    results = [entry("vanilla", 1.0), entry("PyramidDrop", 0.5, **more)]
    return {"results": results, "hooks": [{"batch": 4, "share": 0.0125}]}


def test_a_row_of_answers_has_what_the_stage_needs() -> None:
    row = answer_row(answers(), 4)
    assert missing(STAGES["generate"], {f"batch_{batch}": row for batch in ANSWERED}, on_cpu=False) == []
    assert (row["vanilla_first_token_ms"], row["dropping_token_ms"]) == (200, 10)
    assert row["cache_gib"] == {"vanilla": 2, "dropping": 1} and row["tokens_per_s"]["dropping"] == 200
    assert re.search(says("200 ms -> 100 ms", "20.0 ms -> 10.0 ms", "2.00x", "0.975", "hooks 1.2%"), answer_text(row))


def test_answers_that_memory_does_not_suffice_for_are_said() -> None:
    lost = answer_row(answers(out_of_memory=True), 4)
    assert lost == {"error": "out of memory"} and answer_text(lost) == "out of memory"
    unmeasured = answer_row({**answers(), "hooks": []}, 4)
    assert unmeasured["hooks_share"] is None and "hooks not measured" in answer_text(unmeasured)
    assert "batch_1.hooks_share" in missing(STAGES["generate"], {"batch_1": unmeasured}, on_cpu=False)
