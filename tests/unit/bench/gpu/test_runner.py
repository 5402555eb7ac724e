"""The GPU check, rehearsed on a CPU at the tiny shape, and what it does when stages fail, hang or die."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_pdrop.bench.gpu import check, inside, runner, suite
from llava_pdrop.bench.gpu.__main__ import main
from llava_pdrop.bench.gpu.stages import LATER, STAGES, CheckStage, chosen, ends, limit_of, missing
from tests.messages import says

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "stages").mkdir()
    return tmp_path


def records(work: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in (work / "stages").glob("*.json")}


def soon(names: list[str], seconds: float = 60.0) -> dict[str, float]:
    return dict.fromkeys(names, time.time() + seconds)


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
    with tarfile.open(out / "gpu_check.tar.gz") as packed:
        names = set(packed.getnames())
    assert {"gpu_check.json", "summary.txt", "logs/tests.log", "logs/inside-dropping.txt"} <= names
    for stage, bench in (("next", "train"), ("l15", "train"), ("p9", "train"), ("prefill", "prefill")):
        assert f"playground/benchmarks/gpu/{stage}/{bench}-tiny-cpu.json" in names


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
    with pytest.raises(KeyboardInterrupt):
        runner.check(["env", "next"], 100.0, "cpu", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["stages"]
    assert [found[name]["result"]["found"] for name in ("env", "next")] == ["env", "next"]
    assert found["env"]["environment"]["command"].startswith(
        "bash scripts/gpu_check.sh --stages env,next --seconds 100"
    )


def test_stages_and_their_time() -> None:
    one_call = chosen(None, "cuda", gpus=1)
    times = ends(one_call, limit_of(one_call))
    assert list(STAGES)[:3] == ["env", "tests", "next"] and times["next"] <= 280
    assert times[one_call[-1]] <= 580
    assert set(STAGES) - set(one_call) == set(LATER)
    assert ends(one_call, 100)["mixture"] == 100
    assert chosen(None, "cuda", gpus=8)[-1] == "ranks" and chosen(None, "cpu", gpus=0) == list(STAGES)
    assert chosen("learn, env", "cuda", gpus=1) == ["env", "learn"]


@pytest.mark.parametrize("words", [None, "learn", "ranks", "env,tests,next"])
def test_by_default_no_stage_is_cut_short_by_others(words: str | None) -> None:
    names = chosen(words, "cuda", gpus=8)
    times = [0.0, *ends(names, limit_of(names)).values()]
    assert [end - begin for begin, end in zip(times, times[1:])] == [STAGES[name].seconds for name in names]


def test_the_script_names_its_default_limits() -> None:
    """One GPU, several, and ``learn``: in its help, where whoever books a machine looks."""
    text = (ROOT / "scripts" / "gpu_check.sh").read_text()
    one, several = (limit_of(chosen(None, "cuda", gpus)) for gpus in (1, 8))
    assert re.search(says(f"{one:g} for", "one GPU", f"{several:g} on several", f"{limit_of(['learn']):g} for learn"),
                     text.replace("\n#", " "))  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), [([], 275.0), (["--seconds", "99"], 99.0)])
def test_the_limit_that_is_passed_on(given: list[str], expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(runner, "check", lambda names, seconds, *rest: seen.append(seconds) or 0)
    assert main(["--device", "cpu", "--stages", "env,tests,next", *given]) == 0
    assert seen == [expected]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stages", "env,nexst"], says("'nexst'", "env,tests,next")),
        (["--stages", ","], says("stage none")),
        (["--seconds", "0"], says("error", "--seconds", "got 0")),
        (["--device", "tpu"], says("error", "--device", "'tpu'")),
        (["--stages", "env", "--out", __file__], says("--out", __file__)),
        (["--stages", "env", "--out", "/proc/none/there"], says("--out", "/proc/none/there")),
    ],
)
def test_wrong_words_are_said(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cpu", *words])
    assert re.search(said, capsys.readouterr().err)


def test_what_is_missing_is_named() -> None:
    stage = CheckStage("unused", 1, ("vanilla.mfu", "vanilla.predicted_peak_gib", "saved"))
    result: dict[str, Any] = {"vanilla": {"mfu": None, "predicted_peak_gib": None}}
    assert missing(stage, result, on_cpu=False) == ["vanilla.mfu", "vanilla.predicted_peak_gib", "saved"]
    assert missing(stage, result, on_cpu=True) == ["vanilla.mfu", "saved"]
    result = {"vanilla": {"mfu": 0.0, "predicted_peak_gib": 1.0}, "saved": 0}
    assert missing(stage, result, on_cpu=False) == []


def test_the_busy_share_and_the_gaps() -> None:
    """Microseconds 0 to 10, 8 to 12 beside it, nothing until 20, then to 30."""
    found = inside.busy([(20, 30, "late"), (0, 10, "first"), (8, 12, "beside"), (9, 9.5, "within")])
    assert found["busy_share"] == pytest.approx(22 / 30, abs=1e-4)
    assert found["gaps_us"] == [[8, "late"]] and found["kernels"] == 4 and found["wall_ms"] == 0.0
    assert inside.busy([])["busy_share"] == 0.0


def test_kernels_by_kind() -> None:
    kernels = [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_TNT", 3.0),
        ("void flash::flash_fwd_kernel<...>", 2.0),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", 1.0),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", 0.5),
        ("vectorized_layer_norm_kernel", 0.25),
        ("void at::native::reduce_kernel<512, 1, ...>", 0.125),
        ("mystery", 0.0625),
    ]
    assert inside.by_kind(kernels) == {
        "matrix products": 3.0, "attention": 2.0, "elementwise and copies": 1.5, "norms": 0.25, "reductions": 0.12,
        "other": 0.06,
    }  # fmt: skip


def test_a_synchronisation_is_reported_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning like CUDA's, since a CPU has nothing to wait for."""
    import warnings

    from llava_pdrop.bench.shapes import SHAPES
    from llava_pdrop.bench.train_step import Arm, Trainer
    from llava_pdrop.bench.workload import Workload

    shape = SHAPES["tiny"]
    trainer = Trainer(shape, CPU, Workload(shape), "none")
    batch = trainer.workload.batch(0, CPU, 1)
    assert inside.synchronisations(trainer, Arm("vanilla"), batch) == []
    monkeypatch.setattr(
        trainer.model.hf.lm_head, "forward",
        lambda x, real=trainer.model.hf.lm_head.forward: (
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1), real(x)
        )[1],
    )  # fmt: skip
    (place,) = inside.synchronisations(trainer, Arm("vanilla"), batch)
    assert place.startswith("test_gpu_check.py:") and place.endswith("called a synchronizing CUDA operation")
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_the_tests_are_counted(tmp_path: Path) -> None:
    cases = tmp_path / "test_some.py"
    cases.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no such thing')\n"
        "def test_left_out(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError('in a fixture')\n"
        "def test_error(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(cases)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    found = suite.counted(report)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert any("test_bad" in line and "assert 1 == 2" in line for line in found["failures"])
    assert any("test_error" in line and "in a fixture" in line for line in found["failures"])
    assert found["reasons"] == {"no such thing": 1}
