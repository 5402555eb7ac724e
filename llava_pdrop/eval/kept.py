"""Answers on disk: kept batch by batch, so that an evaluation goes on where it was stopped, and never overwritten.

    DIRECTORY/benchmarks/POPE/pyramid_drop-1a2b3c4d/answers.jsonl     LLaVA's format, in the order of the questions
                                                    facts.json        what they answer: model, schedule, prompt, limit
                                                    score.json        what they are worth

The digest stands for all facts: with another schedule, prompt, model or question file it is another directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llava_pdrop.checkpoint.lora import config_directory, find_base, is_lora
from llava_pdrop.checkpoint.shards import resolve
from llava_pdrop.errors import UserError
from llava_pdrop.eval.answering import Answer
from llava_pdrop.eval.questions import Question
from llava_pdrop.files import save_text, write_json

HOME = "benchmarks"
"""Directory of all answers, below that of the run."""

ANSWERS, FACTS, SCORE = "answers.jsonl", "facts.json", "score.json"
PART = "answers-{rank:05d}.part.jsonl"
WEIGHTS = ("*.safetensors", "*.bin")
SAYS = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "chat_template*",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Small files of a checkpoint that decide what is asked, what is seen, and where an answer ends."""


class Kept:
    """The answers of one model, with one schedule, to one benchmark.

    Args:
        home: ``DIRECTORY/benchmarks/NAME``.
        column: what the answers are called in the table.
        facts: all that the answers depend on, as JSON can hold it.
    """

    def __init__(self, home: Path, column: str, facts: dict[str, Any]) -> None:
        text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=4).hexdigest()
        self.directory, self.facts = home / f"{column}-{digest}", facts

    def read(self) -> dict[str, Answer]:
        """What is answered already, by the id of the question. A line that a kill has cut short is asked again, and so
        is a question that could not be asked: its picture may have been replaced.

        Raises:
            UserError: a whole line cannot be read.
        """
        found = {}
        for file in [self.directory / ANSWERS, *sorted(self.directory.glob("answers-*.part.jsonl"))]:
            with suppress(FileNotFoundError):
                lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
                for number, line in enumerate(lines[:-1], 1):
                    answer = None
                    with suppress(ValueError, KeyError, TypeError, AttributeError):
                        answer = _parsed(json.loads(line))
                    if answer is None:
                        raise UserError(
                            f"{file}:{number}: is no answer of ours: remove the line, and it is asked again"
                        )
                    if answer.problem is None:
                        found[answer.id] = answer
        return found

    def writer(self, rank: int, questions: Sequence[Question]) -> Callable[[Sequence[Answer]], None]:
        """Appends answers to the file of process ``rank``."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / PART.format(rank=rank)
        by_id = {question.id: question for question in questions}
        _end_last_line(file)

        def keep(answers: Sequence[Answer]) -> None:
            with file.open("a", encoding="utf-8", errors="backslashreplace") as opened:
                opened.write("".join(_line(by_id[answer.id], answer, "") for answer in answers))

        return keep

    def finish(self, questions: Sequence[Question], answers: Sequence[Answer], model: str) -> None:
        """Puts all answers into one file, beside what they depend on."""
        lines = [_line(question, answer, model) for question, answer in zip(questions, answers)]
        save_text(self.directory / ANSWERS, "".join(lines))
        write_json(self.directory / FACTS, self.facts)
        for part in self.directory.glob("answers-*.part.jsonl"):
            part.unlink()

    def score(self, score: Any) -> None:
        """Writes what the answers are worth."""
        write_json(self.directory / SCORE, score)


def model_facts(directory: Path) -> dict[str, Any]:
    """What tells the model in ``directory`` from any other, the base under its adapters included: name, size and time
    of every file of weights, enough to tell one training from the next, and the content of the files in `SAYS`."""
    homes = [directory]
    if is_lora(directory):
        homes += [resolve(base)] if (base := find_base(directory)) else [config_directory(directory)]
    weights = sorted(file for home in homes for pattern in WEIGHTS for file in home.glob(pattern))
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(file for home in homes for pattern in SAYS for file in home.glob(pattern)):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode(errors="surrogateescape") + file.read_bytes())
    return {
        "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights],
        "files": digest.hexdigest(),
    }


def questions_digest(questions: Sequence[Question]) -> str:
    """Of ids, words and pictures of all ``questions``, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for question in questions:
        record = question.record
        words = [record.id, *(turn.text for turn in record.turns), *map(str, record.images), str(question.gold)]
        digest.update(json.dumps(words).encode())
    return digest.hexdigest()


def _line(question: Question, answer: Answer, model: str) -> str:
    """A line of LLaVA's answer files; what is ours stands in ``metadata``."""
    own = {"id": answer.id, "image_tokens": list(answer.image_tokens), "seconds": round(answer.seconds, 6)}
    own |= {} if answer.problem is None else {"problem": answer.problem}
    said = f"{question.id}\n{answer.text}".encode(errors="replace")
    line = {
        "question_id": question.facts.get("question_id", question.id),
        "prompt": question.text,
        "text": answer.text,
        "answer_id": hashlib.blake2b(said, digest_size=8).hexdigest(),
        "model_id": model,
        "metadata": own,
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def _parsed(line: dict[str, Any]) -> Answer | None:
    """None where a text, a count or a time is something that `_line` does not write."""
    own = line["metadata"]
    answer = Answer(own["id"], line["text"], tuple(own["image_tokens"]), own["seconds"], own.get("problem"))
    texts = (answer.id, answer.text, "" if answer.problem is None else answer.problem)
    whole = all(isinstance(text, str) for text in texts) and all(type(count) is int for count in answer.image_tokens)
    return answer if whole and type(answer.seconds) in (int, float) else None


def _end_last_line(file: Path) -> None:
    """A kill may have left half a line, which must not become the beginning of the next one."""
    with suppress(FileNotFoundError), file.open("rb+") as opened:
        content = opened.read()
        opened.truncate(content.rfind(b"\n") + 1)
