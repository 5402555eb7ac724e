"""The miniature run of the unit tests."""

from __future__ import annotations

from tests.unit.conftest import one_thread, tiny_config, tiny_files

__all__ = ["one_thread", "tiny_config", "tiny_files"]
