"""Stage ``tests``: ``tests/gpu``, in processes of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from llava_pdrop.bench.gpu.check import Check

ROOT = Path(__file__).resolve().parents[3]

SLOW = "tests/gpu/test_bench.py::test_every_variant_has_the_loss_of_the_others"
"""Left out: it compiles for a minute."""

WORKERS = 6


def run(check: Check) -> None:
    """Runs the tests, and counts what they say.

    Raises:
        RuntimeError: pytest did not come to its end.
    """
    report, log = check.log(".xml"), check.log(".log")
    workers = ["-n", str(WORKERS)] if check.device.type == "cuda" and importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "--tb=short", *workers]
    command += ["--durations=12", "--deselect", SLOW, f"--junitxml={report}"]
    with log.open("w", encoding="utf-8") as output:
        try:
            ended = subprocess.run(
                command,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, check.left - 3),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            finished = log.read_text(errors="replace", encoding="utf-8").count(".")
            raise RuntimeError(f"the tests were not finished in time, about {finished} were") from None
    if not report.is_file():
        last = log.read_text(errors="replace", encoding="utf-8").strip().splitlines()[-1:]
        raise RuntimeError(f"pytest ended with exit status {ended}: {' '.join(last)}")
    check.put(left_out=[SLOW], **counted(report))
    found = check.result
    check.note(f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped")
    for failure in found["failures"][:20]:
        check.note(failure)


def counted(report: Path) -> dict[str, object]:
    """What a JUnit file says: counts, one line per failure, and the reasons of skipped tests with their numbers."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures: list[str] = []
    reasons = Counter[str]()
    for case in cases:
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                why = " ".join((found.get("message") or "").split())[:200]
                failures.append(f"{case.get('classname')}::{case.get('name')}: {why}")
        if (skipped := case.find("skipped")) is not None:
            reasons[skipped.get("message") or ""] += 1
    return {
        "passed": len(cases) - reasons.total() - len(failures),
        "failed": len(failures),
        "skipped": reasons.total(),
        "failures": failures,
        "reasons": reasons,
    }
