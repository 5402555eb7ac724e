"""What is asked of a model, and what is known of the right answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_pdrop.data.records import read_records
from llava_pdrop.errors import UserError, clip
from llava_pdrop.types import IMAGE_MARKER, ImageSource, Record, Turn


@dataclass(frozen=True)
class Question:
    """A record that ends in the question to be answered.

    Attributes:
        gold: the answer expected, as it is shown beside a model's own.
        facts: what the rule of its benchmark needs besides: category, options, the answers of all annotators.
        unit: questions of one unit are one draw of the benchmark (the two of an MME picture, the rotations of an
            MMBench question): what an interval is made of. Empty: it is one by itself.
    """

    record: Record
    gold: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    unit: str = ""

    @property
    def id(self) -> str:
        """Its name, which no other question of the benchmark has."""
        return self.record.id

    @property
    def text(self) -> str:
        """The words of the question, without image markers."""
        asked = [turn.text for turn in self.record.turns if turn.role == "human"][-1]
        return asked.replace(IMAGE_MARKER, "").strip()


def check_asked(text: str) -> None:
    """Raises `UserError` unless ``text`` is something to ask: words, and no marker of a picture."""
    if not text.strip():
        raise UserError("nothing is asked: write a question")
    if IMAGE_MARKER in text:
        raise UserError(f"{IMAGE_MARKER} stands for a picture and cannot be asked about: write it otherwise")


def ask(
    id: str, text: str, images: Sequence[ImageSource], origin: str, gold: str, unit: str = "", **facts: Any
) -> Question:
    """A question of one turn, its pictures in front of ``text``, each on a line of its own."""
    turn = Turn("human", f"{IMAGE_MARKER}\n" * len(images) + text)
    return Question(Record(id, (turn,), tuple(images), origin), gold, facts, unit)


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
