"""Requests of lmms-eval -> questions, and how long and how each may be answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llava_pdrop.errors import UserError, clip, did_you_mean
from llava_pdrop.eval.lmms.pictures import Unshown, pictures_of
from llava_pdrop.eval.questions import Question, ask
from llava_pdrop.types import IMAGE_MARKER, Record, Turn

MAX_NEW_TOKENS = 1024
"""Where a task says nothing: what lmms-eval's own LLaVAs take."""

DELIMITER = "\n\n"
"""What lmms-eval writes under ``until`` where a task says nothing: it stands between the examples of a prompt, and as a
stop it would end every answer after its first paragraph."""

ONLY_WHEN_SAMPLING = ("top_p", "top_k", "seed")
"""Keys of ``generation_kwargs`` that change nothing in a greedy answer."""

OF_OTHERS = ("image_aspect_ratio",)
"""Keys by which tasks tell one model of lmms-eval's own how to cut pictures: here it is as the model was trained."""


@dataclass(frozen=True)
class Limits:
    """Where an answer ends: after so many tokens, or before the first of ``until``."""

    max_new_tokens: int = MAX_NEW_TOKENS
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """One request: its question, or the ``problem`` why there is none."""

    question: Question
    limits: Limits
    problem: str | None = None


def asked(requests: Iterable[Any], documents: Mapping[str, Any]) -> list[Asked | None]:
    """What ``generate_until`` requests ask. Requests that only fill up a process (lmms-eval gives all of them as many)
    ask nothing; one that is there several times, for a task's ``repeats``, is one question.

    Args:
        requests: ``Instance`` objects of lmms-eval.
        documents: task -> split -> its documents.

    Raises:
        UserError: one is to be answered in a way that is not offered, or shows something else than pictures.
    """
    found, known, names = list[Asked | None](), dict[int, Asked](), set[str]()
    for number, request in enumerate(requests):
        if request.metadata.get("__padding_only__"):
            found.append(None)
            continue
        if id(request) not in known:
            *_, doc_id, task, split = request.args
            name = f"{task} {split}[{doc_id}]"
            name = f"{name}, request {number}" if name in names else name
            names.add(name)
            known[id(request)] = _asked(name, request, documents[task][split])
        found.append(known[id(request)])
    return found


def _asked(name: str, request: Any, documents: Any) -> Asked:
    context, settings, doc_to_visual, doc_id, task, _ = request.args
    limits = limits_of(task, settings or {})
    try:
        return Asked(question_of(name, str(context), lambda: doc_to_visual(documents[doc_id])), limits)
    except Unshown as error:
        return Asked(ask(name, "", [], name, ""), limits, str(error))


def question_of(name: str, context: str, visuals: Callable[[], Any]) -> Question:
    """A question about what ``visuals`` shows. Its markers stay where they are; without any, its pictures stand in
    front, each on a line of its own, as LLaVA trains it.

    Raises:
        Unshown: its pictures cannot be read. UserError: it shows something else, or markers for other pictures.
    """
    pictures, markers = pictures_of(name, visuals), context.count(IMAGE_MARKER)
    if not markers:
        return ask(name, context, pictures, name, "")
    if markers != len(pictures):
        raise UserError(f"{name}: its text has {markers} {IMAGE_MARKER} for {len(pictures)} pictures: mend the task")
    return Question(Record(name, (Turn("human", context),), pictures, name), "")


def limits_of(task: str, settings: Mapping[str, Any]) -> Limits:
    """What ``generation_kwargs`` of a task ask for.

    Raises:
        UserError: sampling, beams, or a key that is not known here.
    """
    known = ("max_new_tokens", "until", "temperature", "do_sample", "num_beams", *ONLY_WHEN_SAMPLING, *OF_OTHERS)
    for name in settings:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"{task}: generation_kwargs: {clip(name)} is not offered{hint}: {', '.join(known)} are")
    temperature, sample = settings.get("temperature") or 0, settings.get("do_sample")
    if (sample is None and temperature) or (sample and (temperature or "temperature" not in settings)):
        raise UserError(
            f"{task}: generation_kwargs ask for sampling (do_sample {sample}, temperature "
            f"{settings.get('temperature')}): answers are greedy here: add --gen_kwargs do_sample=false,temperature=0"
        )
    if settings.get("num_beams") not in (None, 1):
        raise UserError(
            f"{task}: generation_kwargs: num_beams {settings['num_beams']}: answers are greedy here: give 1"
        )
    most, until = settings.get("max_new_tokens"), settings.get("until")
    most = MAX_NEW_TOKENS if most is None else most
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise UserError(f"{task}: generation_kwargs: max_new_tokens must be a whole number from 1, got {clip(most)}")
    stops = [until] if isinstance(until, str) else [] if until is None else until
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"{task}: generation_kwargs: until must be a text or a list of texts, got {clip(until)}")
    return Limits(most, tuple(stop for stop in stops if stop and stop != DELIMITER))


def by_limits(found: Iterable[Asked | None]) -> dict[Limits, list[Question]]:
    """The questions that can be asked, each once, in their order."""
    groups: dict[Limits, dict[str, Question]] = {}
    for entry in found:
        if entry is not None and entry.problem is None:
            groups.setdefault(entry.limits, {})[entry.question.id] = entry.question
    return {limits: list(group.values()) for limits, group in groups.items()}
