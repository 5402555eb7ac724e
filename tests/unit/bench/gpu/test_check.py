"""The stages in their process: one that fails, hangs or breaks the device costs itself only."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_pdrop.bench.gpu import check
from llava_pdrop.bench.gpu.stages import STAGES, CheckStage

CPU = torch.device("cpu")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "stages").mkdir()
    return tmp_path


def records(work: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in (work / "stages").glob("*.json")}


def soon(names: list[str], seconds: float = 60.0) -> dict[str, float]:
    return dict.fromkeys(names, time.time() + seconds)


@pytest.mark.process
def test_an_error_costs_one_stage(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Whichever it is, and also half-way; what it had found stays."""

    def broken(given: check.Check) -> None:
        given.put(found=given.name)
        raise KeyError(f"planted in {given.name}")

    monkeypatch.setattr(CheckStage, "load", lambda stage: broken)
    assert check.run_stages(list(STAGES), soon(list(STAGES)), work, CPU) == 0
    for name, record in records(work).items():
        assert (record["status"], record["result"]) == ("failed", {"found": name})
        assert record["error"] == f"KeyError: 'planted in {name}'" and record["missing"] == list(STAGES[name].needs)
        assert "in broken" in (work / "logs" / f"{name}-error.txt").read_text()
    assert len(records(work)) == len(STAGES) and (work / "current").read_text() == "done"
    assert len(re.findall(r"failed in \d+ s: KeyError", capsys.readouterr().out)) == len(STAGES)


@pytest.mark.process
def test_a_module_that_does_not_import_costs_one_stage(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "env", CheckStage("no_such_module", 45, ()))
    monkeypatch.setitem(STAGES, "tests", CheckStage("stages", 45, (), "exit_now"))
    assert check.run_stages(["env", "tests"], soon(["env", "tests"]), work, CPU) == 0
    assert {name: record["error"].split(":")[0] for name, record in records(work).items()} == {
        "env": "ModuleNotFoundError",
        "tests": "AttributeError",
    }


@pytest.mark.process
def test_a_stage_ends_with_its_time(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stubborn(given: check.Check) -> None:
        given.put(found=1)
        try:
            time.sleep(60)
        except Exception:  # noqa: BLE001 - what a stage does about its errors must not keep it alive
            time.sleep(60)

    monkeypatch.setattr(CheckStage, "load", lambda stage: stubborn)
    monkeypatch.setattr(check, "LEAST", 0.1)
    began = time.time()
    times = {"env": began + 1.0, "tests": began + 5.0, "next": began + 5.05}
    assert check.run_stages(list(times), times, work, CPU) == 0
    assert time.time() - began < 15
    found = records(work)
    assert {name: record["status"] for name, record in found.items()} == {
        "env": "out of time", "tests": "out of time", "next": "not run",
    }  # fmt: skip
    assert found["env"]["result"] == {"found": 1} and "--seconds" in found["next"]["error"]


@pytest.mark.process
def test_a_broken_device_ends_the_process(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckStage, "load", lambda stage: lambda given: None)
    monkeypatch.setattr(check, "works", lambda device: False)
    assert check.run_stages(["env", "tests"], soon(["env", "tests"]), work, CPU) == check.BROKEN
    assert list(records(work)) == ["env"]
