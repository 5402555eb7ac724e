"""The stage that runs tests/gpu: its report is counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from llava_pdrop.bench.gpu import suite


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
