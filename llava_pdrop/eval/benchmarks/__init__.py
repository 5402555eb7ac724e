"""The benchmarks of the paper's tables. A new one is one file, one row in `BENCHMARKS` and one test."""

from __future__ import annotations

from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.benchmarks.pope import POPE

BENCHMARKS: dict[str, Benchmark] = {row.name: row for row in (POPE,)}
"""Name -> benchmark, in the order of the paper's tables."""
