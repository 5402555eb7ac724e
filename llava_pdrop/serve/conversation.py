"""One conversation with one model: its turns and pictures, the schedule in force, and what every answer took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, StoppingCriteriaList

from llava_pdrop.data.images import load_image
from llava_pdrop.errors import MissingFileError, UserError
from llava_pdrop.eval.evaluate import AnswerSettings, finished, respondent_in
from llava_pdrop.eval.generation import generating
from llava_pdrop.eval.questions import Question, check_asked
from llava_pdrop.eval.respondent import Respondent
from llava_pdrop.eval.subject import subject_config
from llava_pdrop.generate.cache import cache_bytes
from llava_pdrop.generate.prefill import ForwardStep
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve.stream import AnswerStream, AtStop
from llava_pdrop.train.fit import positions_of
from llava_pdrop.types import IMAGE_MARKER, ImageSource, Record, Turn


@dataclass(frozen=True)
class Reply:
    """An answer and what it took.

    Attributes:
        text: the answer; ``finished``: whether it came to an end before ``max_new_tokens``.
        stages: image tokens of the whole conversation that enter, and that are left after every drop.
        prompt_tokens: of the whole conversation, image tokens as they enter. tokens: of the answer.
        first_seconds: from the question to the first token, reading pictures included. seconds: to the last one.
        cache_bytes: of keys and values at the end. whole_cache_bytes: the same, had nothing been dropped.
        reused: whether an earlier cache was gone on with, so that this question ranked nothing.
        schedule: what was in force.
    """

    text: str
    finished: bool
    stages: tuple[int, ...]
    prompt_tokens: int
    tokens: int
    first_seconds: float
    seconds: float
    cache_bytes: int
    whole_cache_bytes: int
    reused: bool = False
    schedule: Schedule = Schedule()

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None where there are none."""
        return (self.tokens - 1) / (self.seconds - self.first_seconds) if self.tokens > 1 else None


@dataclass(frozen=True)
class Written:
    """How the last answer came about: the ``question`` as it was put, the ``ids`` of the answer's tokens, and what the
    forward of its prompt did (of a reused cache: the forward of what was new)."""

    question: Question
    ids: tuple[int, ...]
    step: ForwardStep


@dataclass(frozen=True)
class Settings:
    """How answers are written. ``temperature`` 0 takes the likeliest token; else tokens are drawn, by ``seed``.
    ``reuse_cache``: a later question goes on with the cache of the one before instead of prefilling all again."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    dtype: torch.dtype | None = None
    reuse_cache: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature must be 0 or more, got {self.temperature}")


@dataclass
class Conversation:
    """Questions and answers so far. Pictures wait in ``waiting`` until the next question shows them. ``if_full`` tells
    what can be done where the conversation is longer than the model takes.

    Every question prefills the whole conversation, so that it is the one that ranks.
    """

    respondent: Respondent
    schedule: Schedule
    settings: Settings = field(default_factory=Settings)
    turns: list[Turn] = field(default_factory=list)
    images: list[ImageSource] = field(default_factory=list)
    waiting: list[ImageSource] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    written: Written | None = None
    if_full: str = "/clear"
    _cache: Cache | None = None
    _cached_ids: list[int] = field(default_factory=list)
    _last_stages: tuple[int, ...] = ()

    @classmethod
    def of(cls, directory: Path, overrides: Sequence[str], settings: Settings) -> Conversation:
        """With the model in ``directory`` (a run, a config of one, or any model that `attach` knows), on the device and
        in the half precision of its config.

        Raises:
            ConfigError, UserError: there is none, it cannot be opened, or its schedule does not fit it.
        """
        config = subject_config(directory, list(overrides), asks=False)
        own = AnswerSettings.of(config)
        respondent = respondent_in(finished(config, writes=False), config)
        respondent.hf.to(own.device)
        made = cls(respondent, Schedule(), replace(settings, dtype=own.dtype))
        made.take(config.schedule)
        return made

    @property
    def depth(self) -> int:
        """Decoder layers of the model."""
        config: Any = self.respondent.hf.config.get_text_config()
        return int(config.num_hidden_layers)

    def show(self, picture: Path) -> None:
        """Adds a picture to the next question.

        Raises:
            MissingFileError, UserError: it cannot be read.
        """
        if not picture.is_file():
            raise MissingFileError(f"{picture}: no such picture")
        load_image(picture)
        self.waiting.append(picture)

    def take(self, schedule: Schedule) -> None:
        """Drops by ``schedule`` from the next question on.

        Raises:
            UserError: it does not fit the model.
        """
        with generating(self.respondent.hf, schedule):
            pass
        self.schedule = schedule
        self.forget_cache()

    def forget_cache(self) -> None:
        """The next question prefills everything."""
        self._cache, self._cached_ids = None, []

    def clear(self) -> None:
        """Starts anew, without turns and pictures."""
        self.turns, self.images, self.waiting, self.replies, self.written = [], [], [], [], None
        self.forget_cache()

    def ask(self, text: str, say: Callable[[str], None] | None = None) -> Reply:
        """Answers ``text``, which shows the pictures that wait. After an error the conversation is as it was.

        Args:
            say: is given the answer piece by piece, as it is written.

        Raises:
            UserError: nothing is asked, a picture cannot be read, or the conversation is longer than the model takes.
        """
        check_asked(text)
        start = time.perf_counter()
        shown = [*self.images, *self.waiting]
        turns = [*self.turns, Turn("human", f"{IMAGE_MARKER}\n" * len(self.waiting) + text)]
        record = Record(f"question {len(self.replies) + 1}", tuple(turns), tuple(shown), "this conversation")
        reply = self._generate(Question(record, ""), start, say)
        self.turns, self.images, self.waiting = [*turns, Turn("gpt", reply.text)], shown, []
        self.replies.append(reply)
        return reply

    def _generate(self, question: Question, start: float, say: Callable[[str], None] | None) -> Reply:
        own, settings = self.respondent, self.settings
        inputs, image_tokens = own.inputs([own.prepare(question)], self.schedule)
        ids, trace = inputs["input_ids"], list[ForwardStep]()
        room = self._room(ids.shape[1])
        held = self._cache if self._goes_on(ids[0].tolist()) else None
        reused = held is not None
        self.forget_cache()  # generate writes into it: what an error or Ctrl-C leaves there is no prompt
        if reused:
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        stream = AnswerStream(own.tokenizer, own.ends, own.stops, say)
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
        with generating(own.hf, self.schedule, trace, settings.dtype):
            torch.manual_seed(settings.seed)
            output = own.hf.generate(
                **{name: value.to(own.hf.device) for name, value in inputs.items()},
                **({"past_key_values": held} if reused else {}),
                **(sampling if settings.temperature > 0 else {"do_sample": False}),
                max_new_tokens=room,
                pad_token_id=own.tokenizer.pad_token_id,
                eos_token_id=own.ends or None,
                streamer=stream,
                stopping_criteria=StoppingCriteriaList([AtStop(stream)]),
                return_dict_in_generate=True,
            )
        stages = self._last_stages if reused else _stages(trace[0], sum(image_tokens[0]))
        pooled = 0  # placeholders of what is averaged into others
        if self.schedule.downsample:
            pooled = int((ids == own.hf.config.image_token_id).sum()) - stages[0]
        if settings.reuse_cache:
            self._cache, self._cached_ids = output.past_key_values, output.sequences[0].tolist()
            self._last_stages = stages
        assert stream.first is not None and stream.last is not None, "generate writes at least one token"
        tokens = output.sequences.shape[1] - ids.shape[1]
        self.written = Written(question, tuple(output.sequences[0, ids.shape[1] :].tolist()), trace[0])
        return Reply(
            stream.answer,
            stream.stopped or (bool(stream.ids) and stream.ids[-1] in own.ends),
            stages,
            ids.shape[1] - pooled,
            tokens,
            stream.first - start,
            stream.last - start,
            cache_bytes(output.past_key_values),
            _whole_bytes(output.past_key_values, output.sequences.shape[1] - 1),
            reused,
            self.schedule,
        )

    def _goes_on(self, ids: Sequence[int]) -> bool:
        """Whether the cache of the question before can be gone on with: no picture is new, and what it holds is how the
        prompt begins (the tokens of an answer need not be those of its text)."""
        held = self._cached_ids[:-1]  # the last token was written and not fed
        return self._cache is not None and not self.waiting and len(ids) > len(held) and list(ids[: len(held)]) == held

    def _room(self, tokens: int) -> int:
        """How long an answer may be behind a prompt of so many tokens."""
        most = positions_of(self.respondent.hf.config.get_text_config())
        if most is None:
            return self.settings.max_new_tokens
        if tokens >= most:
            raise UserError(
                f"the conversation has {tokens} tokens, and the model takes {most} with the answer: {self.if_full}"
            )
        return min(self.settings.max_new_tokens, most - tokens)

    def as_record(self) -> dict[str, Any]:
        """The conversation as a record of LLaVA's JSON, with what its answers took."""
        turns = [{"from": turn.role, "value": turn.text} for turn in self.turns]
        return {
            "id": "conversation",
            "image": [str(picture) for picture in self.images],
            "conversations": turns,
            "replies": [
                {name: value for name, value in vars(own).items() if name != "text"}
                | {"schedule": own.schedule.to_dict()}
                for own in self.replies
            ],
            "schedule": self.schedule.to_dict(),
        }


def _stages(step: ForwardStep, image_tokens: int) -> tuple[int, ...]:
    if not step.survivors:
        return (image_tokens,)
    entering = sum(map(len, step.entering()))
    return (entering, *(sum(map(len, step.kept(drop))) for drop in range(len(step.survivors))))


def _whole_bytes(cache: Any, tokens: int) -> int:
    """Bytes of a ``cache`` that holds all of ``tokens`` in every layer, as far as its window reaches."""
    total = 0
    for layer in cache.layers:
        if layer.is_initialized:
            held = layer.keys.shape[-2]
            most = min(tokens, getattr(layer, "sliding_window", None) or tokens)
            total += (layer.keys.nbytes + layer.values.nbytes) // max(1, held) * most
    return total
