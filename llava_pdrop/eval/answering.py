"""Questions -> answers by Hugging Face's own ``generate``, in batches of alike length, by all processes of a team."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from llava_pdrop.errors import UserError, clip
from llava_pdrop.eval.generation import answer_text, generating
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.respondent import Respondent
from llava_pdrop.eval.team import ALONE, Team
from llava_pdrop.generate.prefill import ForwardStep
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import ImageSource


@dataclass(frozen=True)
class Answer:
    """One answered question. ``image_tokens`` of its pictures before any drop; ``seconds`` its share of its batch's;
    ``problem``: why it could not be asked, its answer then being empty."""

    id: str
    text: str
    image_tokens: tuple[int, ...] = ()
    seconds: float = 0.0
    problem: str | None = None


@dataclass
class Answers:
    """Answers in the order of the questions. ``seconds`` are those of the slowest process, ``cpu_seconds`` of all."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def answer_all(
    respondent: Respondent,
    questions: Sequence[Question],
    schedule: Schedule = Schedule(),
    batch_size: int = 16,
    max_new_tokens: int = 16,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: str | None = None,
    steps: list[ForwardStep] | None = None,
    team: Team = ALONE,
    known: Mapping[str, Answer] | None = None,
    keep: Callable[[Sequence[Answer]], None] | None = None,
    strict: bool = True,
) -> Answers:
    """Answers all ``questions`` greedily. Batches are the same, and so are the answers, whatever the number of
    processes that share them, and wherever an earlier call was stopped.

    Args:
        respondent: its model is left as it was.
        dtype: half precision to run in by autocast, as training does; None: the weights' own.
        seed: of the ``random`` ranker; every batch begins with numbers of its own.
        progress: text of the progress bar; None: no bar.
        steps: receives what each forward dropped, of this process's batches.
        team: the processes that share the questions; all call this and have the same result.
        known: answers of an earlier call, by id: they are not asked again.
        keep: is given the answers of every batch as soon as they are there.
        strict: raise at a question that cannot be asked; else its answer is empty and has a `Answer.problem`.

    Raises:
        UserError: a picture that cannot be read (``strict``), or a schedule that does not fit the model.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    known, own = known or {}, Answers()
    order = by_length(respondent, questions)
    batches = [[questions[i] for i in order[first : first + batch_size]] for first in range(0, len(order), batch_size)]
    turns = range(team.rounds(len(batches)))
    left = [[q for q in batches[number] if q.id not in known] for number in team.tasks(len(batches))]
    if "random" in schedule.rankers:  # what is drawn for a question depends on the others of its batch
        left = [batches[number] if some else [] for number, some in zip(team.tasks(len(batches)), left)]
    with generating(respondent.hf, schedule, steps, dtype), _prepared(respondent, left) as ready:
        for turn in tqdm(turns, desc=progress, disable=progress is None, leave=False):
            team.at(f"round {turn + 1} of the questions")
            if turn >= len(left):
                break
            torch.manual_seed(seed + team.task(turn))
            new = _batch(respondent, next(ready), schedule, max_new_tokens, strict)
            own.answers += new
            if keep is not None and new:
                keep(new)
    own.seconds, own.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    team.at("gathering the answers")
    shares = team.gather(own)
    by_id = dict(known) | {answer.id: answer for share in shares for answer in share.answers}
    return Answers(
        [by_id[question.id] for question in questions],
        seconds=max(share.seconds for share in shares),
        cpu_seconds=sum(share.cpu_seconds for share in shares),
    )


def by_length(respondent: Respondent, questions: Sequence[Question]) -> list[int]:
    """Places of the questions, the longest first: a batch pads little, and one that does not fit into memory is met at
    once. Among those of about one length questions about one picture stand together: they share its features."""

    def length(question: Question) -> int:
        try:
            return respondent.length(question)
        except UserError:  # `prepare` says it again, where it is told or counted
            return 0

    first: dict[tuple[ImageSource, ...], int] = {}
    pictures = [first.setdefault(question.record.images, place) for place, question in enumerate(questions)]
    lengths = [length(question) for question in questions]
    return sorted(range(len(questions)), key=lambda place: (-(lengths[place] // ALIKE), pictures[place]))


ALIKE = 16
"""Tokens within which prompts count as of one length: at most these are padded in exchange for sharing a picture."""


@contextmanager
def _prepared(
    respondent: Respondent, batches: Sequence[Sequence[Question]]
) -> Iterator[Iterator[list[tuple[Question, Any]]]]:
    """Every batch with its questions' prompts, or the `UserError` in the place of one. The next batch is made while the
    model answers: reading pictures takes as long as a GPU needs for them."""

    def one(question: Question) -> Any:
        try:
            return respondent.prepare(question)
        except UserError as error:
            return error

    def batch(questions: Sequence[Question]) -> list[tuple[Question, Any]]:
        return [(question, one(question)) for question in questions]

    def ready() -> Iterator[list[tuple[Question, Any]]]:
        coming = pool.submit(batch, batches[0])
        for following in [*batches[1:], []]:
            here, coming = coming.result(), pool.submit(batch, following)
            yield here

    with ThreadPoolExecutor(1, "prepare") as pool:
        try:
            yield ready()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _batch(
    respondent: Respondent,
    batch: Sequence[tuple[Question, Any]],
    schedule: Schedule,
    max_new_tokens: int,
    strict: bool,
) -> list[Answer]:
    """The answers to the questions of a batch that can be asked; the others are empty."""
    start = time.perf_counter()
    refused = {question.id: own for question, own in batch if isinstance(own, UserError)}
    for problem in refused.values() if strict else ():
        raise problem
    problems = {id: str(problem) for id, problem in refused.items()}  # an error would keep this frame, and its tensors
    asked = [(question, own) for question, own in batch if question.id not in problems]
    try:
        given = respondent.inputs([own for _, own in asked], schedule) if asked else None
    except UserError:  # of one of them at least; the others are asked without it
        for question, own in asked:
            try:
                respondent.inputs([own], schedule)
            except UserError as error:
                if strict:
                    raise UserError(f"question {clip(question.id)}: {error}") from None
                problems[question.id] = str(error)
        asked = [(question, own) for question, own in asked if question.id not in problems]
        given = respondent.inputs([own for _, own in asked], schedule) if asked else None
    answers = {id: Answer(id, "", problem=problem) for id, problem in problems.items()}
    if given is not None:
        inputs, image_tokens = given
        device = next(respondent.hf.parameters()).device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with respondent.sharing([own for _, own in asked]):
            ids = respondent.hf.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=respondent.tokenizer.pad_token_id,
                eos_token_id=respondent.ends or None,
            )
        rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
        seconds = (time.perf_counter() - start) / len(asked)
        for (question, _), row, tokens in zip(asked, rows, image_tokens):
            text = answer_text(row, respondent.tokenizer, respondent.ends, respondent.stops)
            answers[question.id] = Answer(question.id, text, tuple(tokens), seconds)
    return [answers[question.id] for question, _ in batch]
