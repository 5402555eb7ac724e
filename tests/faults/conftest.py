"""The long, randomised tests run where ``make test-faults`` asks for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.conftest import one_thread, tiny_config, tiny_files

__all__ = ["one_thread", "tiny_config", "tiny_files"]

HERE = Path(__file__).parent
SWITCH = "LLAVA_PDROP_FAULTS"
"""Number of kills per engine; unset or 0: these tests are skipped."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if int(os.environ.get(SWITCH, "0")) == 0:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="takes minutes: make test-faults runs it"))
