"""The GPU check, rehearsed on a CPU at the tiny shape, and what it does when stages fail, hang or die."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from llava_pdrop.bench.gpu import runner
from llava_pdrop.bench.gpu.stages import STAGES, CheckStage
from tests.messages import says

ROOT = Path(__file__).parents[4]
CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_rehearsal_finds_all_that_the_readme_needs(tmp_path: Path) -> None:
    """Every stage, as on a GPU but at tiny shapes, by the command that is used there."""
    env = {**os.environ, "LLAVA_PDROP_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "LLAVA_PDROP_COMMIT": "abc"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--device", "cpu", "--seconds", "240", "--out", "found"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "found"
    assert sorted(file.name for file in out.iterdir()) == ["gpu_check.json", "gpu_check.tar.gz", "summary.txt"]
    report = json.loads((out / "gpu_check.json").read_text())["stages"]
    assert list(report) == list(STAGES)
    for name, record in report.items():
        assert (record["status"], record["missing"], record["error"]) == ("done", [], None), name
        assert record["environment"]["torch"] == torch.__version__ and record["environment"]["commit"], name
    assert report["tests"]["result"]["skipped"] > 100 and report["tests"]["result"]["failures"] == []
    engines = report["ranks"]["result"]["engines"]
    for engine in ("zero2", "zero3", "fsdp2"):
        assert engines[engine]["losses"] == pytest.approx(engines["ddp"]["losses"], abs=1e-4), engine
        assert engines[engine]["scaling"] > 0
    arms = report["learn"]["result"]["arms"]
    assert {name: arm["steps"] for name, arm in arms.items()} == dict.fromkeys(arms, 2)
    assert arms["pyramid_drop"]["image_tokens"] == [256, 128, 64, 32] and arms["vanilla"]["image_tokens"] == [256]
    summary = (out / "summary.txt").read_text()
    assert "complete: env, tests, next" in summary and "NOT COMPLETE" not in summary
    assert re.search(says("next: auto, vanilla", "modelled", "MFU", "recomputed"), summary)
    with tarfile.open(out / "gpu_check.tar.gz") as packed:
        names = set(packed.getnames())
    assert {"gpu_check.json", "summary.txt", "logs/tests.log", "logs/inside-dropping.txt"} <= names
    for stage, bench in (
        ("next", "train"),
        ("l15", "train"),
        ("p9", "train"),
        ("prefill", "prefill"),
        ("generate", "generate"),
    ):
        assert f"playground/benchmarks/gpu/{stage}/{bench}-tiny-cpu.json" in names


PLANTED = """
import os, signal, sys, time
from llava_pdrop.bench.gpu import check, runner
from llava_pdrop.bench.gpu.__main__ import main
from llava_pdrop.bench.gpu.stages import CheckStage

def run(given):
    given.put(found=os.getpid())
    if given.name == "tests":
        os.kill(os.getpid(), signal.SIGSEGV)
    if given.name == "next":
        check.works = lambda device: False  # as after an illegal access: done, but nothing works any more
    if given.name == "inside":  # a call of a library that does not come back
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(60)

CheckStage.load = lambda stage: run
check.LEAST = 0.1
sys.exit(main())
"""


def test_what_breaks_the_process_costs_one_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    monkeypatch.setattr(runner, "PROCESS", (sys.executable, str(script)))
    monkeypatch.setattr(runner, "GRACE", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(runner, "ends", lambda names, seconds: dict.fromkeys(names, 100.0) | {"inside": 20.0})
    names = ["inside", "env", "tests", "next", "prefill"]  # first the one whose end is a time: others wait for imports
    for name in names:
        monkeypatch.setitem(STAGES, name, CheckStage("unused", 20, ()))
    assert runner.check(names, 100.0, "cpu", tmp_path / "out") == 1
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["stages"]
    status = {name: record["status"] for name, record in found.items()}
    assert status == {"inside": "broken", "env": "done", "tests": "broken", "next": "done", "prefill": "done"}
    assert "signal 11" in found["tests"]["error"] and "signal 6" in found["inside"]["error"]
    processes = {name: record["result"]["found"] for name, record in found.items()}
    assert processes["env"] == processes["tests"]
    assert len(set(processes.values())) == 4  # each of three left the rest to another
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert re.search(says("NOT COMPLETE: tests: broken", "signal 11"), summary)
    assert "NOT COMPLETE: inside: broken" in summary


def test_a_check_that_cannot_begin_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PROCESS", (sys.executable, "-c", "raise SystemExit('no module named so')"))
    assert runner.check(["env", "next"], 100.0, "cpu", tmp_path / "out") == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert re.search(says("no stage", "exit status 1", "no module named so"), summary)
    assert summary.count("NOT COMPLETE") == 2


STUCK = """
import sys, time
from pathlib import Path
current = Path(sys.argv[sys.argv.index("--child") + 1]) / "current"
current.write_text(DONE)
time.sleep(60)
"""


def test_a_process_that_is_done_but_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PROCESS", (sys.executable, "-c", STUCK.replace("DONE", repr(runner.DONE))))
    monkeypatch.setattr(runner, "GRACE", 0.2)
    began = time.time()
    runner.check(["env"], 100.0, "cpu", tmp_path / "out")
    assert time.time() - began < 30


INTERRUPTED = """
import os, signal, sys
from llava_pdrop.bench.gpu.__main__ import main
from llava_pdrop.bench.gpu.stages import CheckStage

def run(given):
    given.put(found=given.name)
    if given.name == "next":
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()

CheckStage.load = lambda stage: run
sys.exit(main())
"""


def test_an_interrupted_check_keeps_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    monkeypatch.setattr(runner, "PROCESS", (sys.executable, str(script)))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.check(["env", "next"], 100.0, "cpu", tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["stages"]
    assert [found[name]["result"]["found"] for name in ("env", "next")] == ["env", "next"]
    assert found["env"]["environment"]["command"].startswith(
        "bash scripts/gpu_check.sh --stages env,next --seconds 100"
    )
