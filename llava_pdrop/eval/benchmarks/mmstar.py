"""MMStar: multiple choice that cannot be answered without the picture."""

from __future__ import annotations

from llava_pdrop.eval.benchmarks.tables import choices

MMSTAR = choices("mmstar", "MMStar", "MMStar", "val")
