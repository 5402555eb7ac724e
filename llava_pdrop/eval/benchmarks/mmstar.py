"""MMStar: multiple choice that cannot be answered without the picture."""

from __future__ import annotations

from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.benchmarks.tables import MOST_TOKENS, read_choices, wanted
from llava_pdrop.eval.rules.choices import CHOICE_RULE, grade_choice, total_choice

MMSTAR = Benchmark(
    name="mmstar",
    title="MMStar",
    folder="mmstar",
    wanted=wanted(["MMStar"]),
    rule=CHOICE_RULE,
    split="val",
    read=lambda directory, llava: read_choices(directory, llava, ["MMStar"], ["category"]),
    grade=grade_choice,
    total=total_choice,
    headline="Overall",
    factor=100,
    max_new_tokens=MOST_TOKENS,
)
