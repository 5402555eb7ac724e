"""Runs the stages in a process of their own, starts another one where that breaks, and keeps the results packed.

The directory of a check receives ``summary.txt``, ``gpu_check.json`` (all stages, for ``playground/benchmarks/``) and
``gpu_check.tar.gz``: the same, the files of every bench under the paths they have in the repository, and logs. They are
written anew after every stage, so a machine that goes away takes one stage with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from llava_pdrop.bench.gpu.stages import STAGES, ends
from llava_pdrop.files import read_json, write_json
from llava_pdrop.report.environment import COMMAND, check_out

SUMMARY, GPU_CHECK_FILE, ARCHIVE = "summary.txt", "gpu_check.json", "gpu_check.tar.gz"

GRACE = 15.0
"""Seconds that a stage may go on after its time (in one long call of a library, say) before its process is ended."""

PATIENCE = 60.0
"""Seconds that a process may take before its first stage: imports, and the device's first answer."""

MOST_BYTES = 15 * 2**20
"""Of the archive. Traces are left out of one that would be larger."""

DONE = "done"
"""In the file ``current``, instead of a stage, when all of a process's stages are over."""

PROCESS = (sys.executable, "-X", "faulthandler", "-m", "llava_pdrop.bench.gpu")
"""What runs stages."""

TRACES = ".trace.json.gz"


def check(names: list[str], seconds: float, device: str, out: Path) -> int:
    """Runs the stages ``names`` within ``seconds``; returns 0 if all of them found all that they need, else 1.

    Raises:
        UserError: ``out`` cannot be made or written to.
        KeyboardInterrupt: Ctrl-C, or SIGTERM. What was found until then is packed.
    """
    check_out(out)
    started = time.time()
    clock = {name: started + end for name, end in ends(names, seconds).items()}
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as directory:
        work = Path(directory)
        (work / "stages").mkdir()
        command = f"bash scripts/gpu_check.sh --stages {','.join(names)} --seconds {seconds:g} --device {device}"
        left = list(names)
        try:
            while left:
                status, now = _one_process(left, clock, device, command, work, out)
                if now == DONE:
                    break
                if now is None:  # it did not come to its first stage: neither would another
                    say(work, f"no stage could begin, the process ended with {_ending(status)}: {_last_line(work)}")
                    break
                _mark_broken(work, now, status)
                left = left[left.index(now) + 1 :]
        except KeyboardInterrupt:
            say(work, "interrupted")
            _finish(work, out, names)
            raise
        return _finish(work, out, names)


def _one_process(
    names: list[str], clock: dict[str, float], device: str, command: str, work: Path, out: Path
) -> tuple[int, str | None]:
    """Runs as many of ``names`` as one process lives to; returns its exit status and the stage it was at (None: none
    yet, `DONE`: all are over). ``command`` is what reports name as their command line."""
    current = work / "current"
    current.unlink(missing_ok=True)
    words = ["--child", str(work), "--stages", ",".join(names), "--device", device, "--ends", json.dumps(clock)]
    with (work / "errors.txt").open("a", encoding="utf-8") as errors:
        process = subprocess.Popen([*PROCESS, *words], stderr=errors, env={**os.environ, COMMAND: command})
        now, seen = "", -1
        limits = {**clock, now: time.time() + PATIENCE}
        try:
            while process.poll() is None:
                time.sleep(0.1)
                now = (
                    current.read_text(encoding="utf-8") if current.is_file() else ""
                ) or now  # empty while it is being written
                if time.time() > limits.setdefault(now, time.time()) + GRACE:  # `DONE`: it only has to end
                    end(process)
                written = sum(1 for _ in (work / "stages").glob("*.json"))
                if written != seen:
                    seen = written
                    _pack(work, out)
        finally:
            if process.poll() is None:  # interrupted, or an error of this process
                end(process, signal.SIGINT)
    return process.returncode, current.read_text(encoding="utf-8") if current.is_file() else None


def end(process: subprocess.Popen[bytes], first: int = signal.SIGABRT, seconds: float = 5.0) -> None:
    """Ends a process: by ``first``, and by force after ``seconds``. At SIGABRT one that does not come back still says
    where it is; at SIGINT one that does ends the processes it has started."""
    process.send_signal(first)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _mark_broken(work: Path, name: str, status: int) -> None:
    """The stage that a process did not survive. One that was over (the device broke after it) stays as it is."""
    file = stage_file(work, name)
    never = {"stage": name, "status": "running", "missing": list(STAGES[name].needs), "result": {}}
    record = read_json(file) if file.is_file() else never  # it may have come to its name and no further
    if record["status"] == "running":
        record |= {"status": "broken", "error": f"its process ended with {_ending(status)}: {_last_line(work)}"}
        write_json(file, record)
        say(work, f"{name}: broken: {record['error']}")


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


def _last_line(work: Path) -> str:
    lines = (work / "errors.txt").read_text(errors="replace", encoding="utf-8").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def stage_file(work: Path, name: str) -> Path:
    """Where the record of a stage lies."""
    return work / "stages" / f"{name}.json"


def say(work: Path, line: str) -> None:
    """Prints a line and adds it to the summary of the check in ``work``."""
    print(line, flush=True)
    with (work / SUMMARY).open("a", encoding="utf-8") as summary:
        summary.write(line + "\n")


def _finish(work: Path, out: Path, names: list[str]) -> int:
    """Says what is missing, and packs the results."""
    records = _records(work)
    failed = []
    for name in names:
        record = records.get(name, {"status": "not run", "missing": list(STAGES[name].needs)})
        if record["status"] != "done" or record["missing"]:
            lacking = f", missing {', '.join(record['missing'])}" if record["missing"] else ""
            why = f" ({record['error']})" if record.get("error") else ""
            failed.append(f"{name}: {record['status']}{why}{lacking}")
    for line in failed:
        say(work, f"NOT COMPLETE: {line}")
    if not failed:
        say(work, f"complete: {', '.join(names)}")
    files = _pack(work, out)
    print(f"written: {', '.join(map(str, files))}")
    return 1 if failed else 0


def _records(work: Path) -> dict[str, dict[str, Any]]:
    """Stage -> its record, in the order of the stages."""
    files = {name: stage_file(work, name) for name in STAGES}
    return {name: read_json(file) for name, file in files.items() if file.is_file()}


def _pack(work: Path, out: Path) -> list[Path]:
    """Writes the results so far."""
    write_json(work / GPU_CHECK_FILE, {"bench": "gpu_check", "stages": _records(work)})
    (work / SUMMARY).touch()
    for name in (SUMMARY, GPU_CHECK_FILE):
        (out / name).write_text((work / name).read_text(encoding="utf-8"), encoding="utf-8")
    archive, partial = out / ARCHIVE, out / f"{ARCHIVE}.partial"
    for with_traces in (True, False):
        with tarfile.open(partial, "w:gz") as packed:
            for path in sorted(work.rglob("*")):
                if path.is_file() and (with_traces or not path.name.endswith(TRACES)) and not _is_for_us(path):
                    packed.add(path, arcname=str(path.relative_to(work)))
        if partial.stat().st_size <= MOST_BYTES:
            break
    os.replace(partial, archive)
    return [out / SUMMARY, out / GPU_CHECK_FILE, archive]


def _is_for_us(path: Path) -> bool:
    """Whether a file is in the making, or scratch of a stage."""
    return path.suffix == ".partial" or path.name == "current" or "scratch" in path.parts
