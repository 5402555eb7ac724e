"""MM-Vet: open questions whose answers a judge reads; here they are asked, and written as it takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_pdrop.eval.benchmarks.base import Benchmark, Wanted
from llava_pdrop.eval.benchmarks.files import ask_row, read_asked
from llava_pdrop.eval.benchmarks.uploads import all_answered
from llava_pdrop.eval.questions import Question
from llava_pdrop.files import write_json


def read(directory: Path, llava: bool) -> list[Question]:
    """Questions of ``llava-mm-vet.jsonl``, as they stand."""
    file = directory / "llava-mm-vet.jsonl"
    return [ask_row(row, directory / "images", file, "", known=False) for row in read_asked(file)]


def upload(questions: Sequence[Question], answers: Sequence[str | None], directory: Path, name: str) -> Path:
    """``results/NAME.json``: v1_ID -> answer (``convert_mmvet_for_eval.py``)."""
    found = {f"v1_{question.id}": answer for question, answer in zip(questions, all_answered(questions, answers))}
    return write_json(directory / "results" / f"{name}.json", found, indent=None)


MMVET = Benchmark(
    name="mmvet",
    title="MM-Vet",
    folder="mm-vet",
    wanted=(
        Wanted("llava-mm-vet.jsonl", "LLaVA's eval.zip (docs/Evaluation.md)"),
        Wanted("images", "github.com/yuweihao/MM-Vet (mm-vet.zip)"),
    ),
    rule="MM-Vet's judge, which is not here",
    split="test",
    read=read,
    grade=None,
    total=None,
    headline="",
    max_new_tokens=1024,
    upload=upload,
)
