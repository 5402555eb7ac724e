"""Where questions come from. A new benchmark is one function (a file of its own if it is long) and one row in
`BENCHMARKS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llava_pdrop.data.records import read_records
from llava_pdrop.errors import UserError, clip
from llava_pdrop.types import Record


@dataclass(frozen=True)
class Question:
    """A record that ends in the question to be answered, and the answer expected."""

    record: Record
    gold: str

    @property
    def text(self) -> str:
        """The words of the question, without image markers."""
        asked = [turn.text for turn in self.record.turns if turn.role == "human"][-1]
        return asked.replace("<image>", "").strip()


def llava_json(path: str | Path, image_root: str | Path | None = None) -> list[Question]:
    """LLaVA records: of each the last question, with the turns before it as they stand; its answer is the gold one.

    Raises:
        UserError: a record does not end in an answer. MissingFileError, UserError: as `read_records`.
    """
    questions = []
    for record in read_records(path, image_root):
        if record.turns[-1].role != "gpt":
            raise UserError(
                f"{record.origin} (id {clip(record.id)}): does not end in an answer, so nothing can be scored"
            )
        questions.append(Question(record, record.turns[-1].text.strip()))
    return questions


BENCHMARKS: dict[str, Callable[[str | Path, str | Path | None], list[Question]]] = {"llava_json": llava_json}
"""Name -> function from (data file, image folder) to questions."""
