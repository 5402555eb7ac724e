"""Which stages are chosen, how long each may take, and what it must find."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llava_pdrop.bench.gpu.stages import LATER, STAGES, CheckStage, chosen, ends, limit_of, missing
from tests.messages import says

ROOT = Path(__file__).parents[4]


def test_stages_and_their_time() -> None:
    one_call = chosen(None, "cuda", gpus=1)
    times = ends(one_call, limit_of(one_call))
    assert list(STAGES)[:3] == ["env", "tests", "next"] and times["next"] <= 280
    assert times[one_call[-1]] <= 580
    assert set(STAGES) - set(one_call) == set(LATER)
    assert ends(one_call, 100)["mixture"] == 100
    assert chosen(None, "cuda", gpus=8)[-1] == "ranks" and chosen(None, "cpu", gpus=0) == list(STAGES)
    assert chosen("learn, env", "cuda", gpus=1) == ["env", "learn"]


@pytest.mark.parametrize("words", [None, "learn", "generate", "ranks", "env,tests,next"])
def test_by_default_no_stage_is_cut_short_by_others(words: str | None) -> None:
    names = chosen(words, "cuda", gpus=8)
    times = [0.0, *ends(names, limit_of(names)).values()]
    assert [end - begin for begin, end in zip(times, times[1:])] == [STAGES[name].seconds for name in names]


def test_the_script_names_its_default_limits() -> None:
    """One GPU, several, ``learn`` and ``generate``: in its help, where whoever books a machine looks."""
    text = (ROOT / "scripts" / "gpu_check.sh").read_text()
    one, several = (limit_of(chosen(None, "cuda", gpus)) for gpus in (1, 8))
    assert re.search(says(f"{one:g} for", "one GPU", f"{several:g} on several", f"{limit_of(['learn']):g} for learn",
                          f"{limit_of(['generate']):g} for generate"), text.replace("\n#", " "))  # fmt: skip


def test_what_is_missing_is_named() -> None:
    stage = CheckStage("unused", 1, ("vanilla.mfu", "vanilla.predicted_peak_gib", "saved"))
    result: dict[str, Any] = {"vanilla": {"mfu": None, "predicted_peak_gib": None}}
    assert missing(stage, result, on_cpu=False) == ["vanilla.mfu", "vanilla.predicted_peak_gib", "saved"]
    assert missing(stage, result, on_cpu=True) == ["vanilla.mfu", "saved"]
    result = {"vanilla": {"mfu": 0.0, "predicted_peak_gib": 1.0}, "saved": 0}
    assert missing(stage, result, on_cpu=False) == []
