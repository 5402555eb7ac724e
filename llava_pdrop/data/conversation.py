"""Turns -> pieces of text that know whether they are trained on. A new chat format is one row in `TEMPLATES`.

Labels come from the pieces the text is put together from, never from tokenising parts of it again and counting: counts
go wrong wherever a tokeniser joins text across a border, and then whole conversations silently lose their labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava_pdrop.types import IMAGE_MARKER, Turn


@dataclass(frozen=True)
class Piece:
    """A stretch of text; ``is_target`` if the model learns to write it."""

    text: str
    is_target: bool = False


@dataclass(frozen=True)
class Template:
    """A chat format. One round is written as

        before_question + question + after_question + before_answer + [answer_lead + answer + end]

    and what stands in brackets is trained on. The whole conversation starts with ``system``; the beginning-of-sequence
    token is the tokeniser's business.

    Attributes:
        end_empty: an empty answer still gets its ``end``. Off in v1, where LLaVA writes nothing behind "ASSISTANT:", so
            that nobody learns to say nothing.
        question_only_images: the question's words are replaced by its images (captioning, LLaVA stage 1); the
            conversation must then be one question with an image and one answer.
        image_first: a turn with one image shows it in front of its text (`image_to_front`).
        stop: texts that end an answer in generation.
    """

    system: str = ""
    before_question: str = ""
    after_question: str = ""
    before_answer: str = ""
    answer_lead: str = ""
    end: str = ""
    end_empty: bool = True
    question_only_images: bool = False
    image_first: bool = False
    stop: tuple[str, ...] = ()

    def rounds(self, turns: Sequence[Turn]) -> list[tuple[str, str | None]]:
        """(question, answer) pairs; the answer of the last one is None if the conversation ends with a question.

        A greeting by the assistant before the first question is left out, as LLaVA does.

        Raises:
            ValueError: no question, a greeting that shows an image, two turns of one speaker in a row, or a
                conversation this template cannot write.
        """
        turns = list(turns)
        if turns and turns[0].role == "gpt":
            if IMAGE_MARKER in turns[0].text:
                raise ValueError("the conversation starts with an answer that shows an image; start with a question")
            turns = turns[1:]
        if not turns:
            raise ValueError("the conversation has no question")
        for i, turn in enumerate(turns):
            if turn.role != ("human", "gpt")[i % 2]:
                raise ValueError(
                    f"two turns by '{turn.role}' in a row (turn {i}); questions and answers must alternate"
                )
        if self.question_only_images and (len(turns) > 2 or IMAGE_MARKER not in turns[0].text):
            raise ValueError("a captioning template needs exactly one question with an image and its answer")
        texts = [image_to_front(turn.text) if self.image_first else turn.text for turn in turns]
        if self.question_only_images:
            texts[0] = IMAGE_MARKER * texts[0].count(IMAGE_MARKER)
        answers: list[str | None] = [*texts[1::2]]
        return list(zip(texts[::2], answers + [None] * (len(texts) % 2), strict=True))

    def pieces(self, rounds: Sequence[tuple[str, str | None]]) -> list[Piece]:
        """The text of whole rounds, for training."""
        pieces = [Piece(self.system)]
        for question, answer in rounds:
            pieces.append(Piece(self.before_question + question + self.after_question))
            if answer is not None:
                target = self.answer_lead + answer + self.end if answer else self.end if self.end_empty else ""
                pieces += [Piece(self.before_answer), Piece(target, is_target=True)]
        return [piece for piece in pieces if piece.text]

    def generation_prompt(self, rounds: Sequence[tuple[str, str | None]]) -> list[Piece]:
        """The text up to where the last round's answer starts; an answer given there (a reference) is not shown."""
        *before, (question, _) = rounds
        return [*self.pieces([*before, (question, None)]), Piece(self.before_answer)]


def image_to_front(text: str) -> str:
    """The image of a turn moved in front of its text, on a line of its own: what LLaVA does to its training data.

    A turn with several images is left as it is written, because there the places say which image is meant. (LLaVA
    merges them into one marker and loses all but the first image: golden/README 4.16.)
    """
    if text.count(IMAGE_MARKER) != 1:
        return text
    return f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()


TEMPLATES: dict[str, Template] = {
    # LLaVA stage 1: <image>caption\n
    "plain": Template(end="\n", question_only_images=True, image_first=True, stop=("\n",)),
    # Vicuna 1.1, the format of LLaVA-1.5 and of LLaVA-NeXT on Vicuna
    "v1": Template(
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        ),
        before_question="USER: ",
        after_question=" ",
        before_answer="ASSISTANT:",
        answer_lead=" ",
        end="</s>",
        end_empty=False,
        image_first=True,
        stop=("</s>",),
    ),
    # The embedded task: question, answer, end of line. No role names: every token more is one a miniature must learn
    "qa": Template(answer_lead=" ", end="\n", stop=("\n",)),
}
