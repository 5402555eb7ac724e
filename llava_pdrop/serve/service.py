"""What a server answers with: a model and its loop, the room in its queue, and requests made ready for it."""

from __future__ import annotations

import asyncio
import hmac
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from llava_pdrop.errors import UserError, line_of
from llava_pdrop.eval.evaluate import AnswerSettings, finished, respondent_in
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.respondent import LlavaRespondent, Respondent
from llava_pdrop.eval.subject import subject_config
from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve.loop import Finish, Job, Late, Loop
from llava_pdrop.serve.pictures import Limits, Picture, picture_of
from llava_pdrop.serve.protocol import Asked, Refusal
from llava_pdrop.serve.sampling import Sampler
from llava_pdrop.train.fit import positions_of
from llava_pdrop.types import IMAGE_MARKER, Record

GRACE = 5.0
"""Seconds beyond its time limit that the loop has to end an answer by itself."""


@dataclass(frozen=True)
class Settings:
    """How requests are answered.

    Attributes:
        name: of the model, as requests give it.
        rows: answers that are written at a time. queue: further requests that may wait.
        seconds: for a request, from its arrival to its last token.
        max_new_tokens: of an answer, where the request does not say. most_new_tokens: that it may ask for.
        temperature: where the request does not say (1, as the API has it).
        key: which requests have to bring; None: none.
    """

    name: str
    rows: int = 16
    queue: int = 64
    seconds: float = 300.0
    max_new_tokens: int = 512
    most_new_tokens: int = 4096
    temperature: float = 1.0
    key: str | None = None
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        lowest = {"rows": 1, "queue": 0, "max_new_tokens": 1, "most_new_tokens": self.max_new_tokens}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise UserError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")
        if not 0 < self.seconds < math.inf:
            raise UserError(f"--seconds must be above 0, got {self.seconds}")
        if not 0 <= self.temperature <= 2:
            raise UserError(f"--temperature must be from 0 to 2, got {self.temperature}")
        if self.key is not None and not self.key.strip():
            raise UserError("the key is empty: give one of some length, or none")
        if self.limits.directory is not None and not self.limits.directory.is_dir():
            raise UserError(f"--pictures {self.limits.directory}: no such directory")


class Answering:
    """One request on its way: pieces as they come, then its end."""

    def __init__(self, prompt: int) -> None:
        """
        Args:
            prompt: its tokens, image tokens included.
        """
        self.prompt = prompt
        self.job: Job | None = None
        self._loop = asyncio.get_running_loop()
        self._events = asyncio.Queue[str | Finish | Exception]()

    def put(self, event: str | Finish | Exception) -> None:
        """For the loop's thread."""
        with suppress(RuntimeError):  # the server has gone in the meantime
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> str | Finish:
        """The next piece of the answer; behind the last one its `Finish`.

        Raises:
            UserError: `Late`, or what else ended it.
        """
        assert self.job is not None, "submitted before"
        try:
            event = await asyncio.wait_for(self._events.get(), self.job.deadline + GRACE - time.monotonic())
        except TimeoutError:
            raise Late("the time for this answer is over") from None
        if isinstance(event, Exception):
            raise event
        return event

    def leave(self) -> None:
        """Frees the row; nobody waits for the answer any more."""
        assert self.job is not None, "submitted before"
        self.job.left = True


class Service:
    """Everything but HTTP. Its coroutines run in one event loop; `Loop` has a thread, so has what prepares prompts."""

    def __init__(
        self, respondent: Respondent, settings: Settings, schedule: Schedule = Schedule(), dtype: Any = None
    ) -> None:
        """
        Args:
            schedule: where a request names none. dtype: half precision, as `Loop` takes it.
        """
        self.respondent, self.settings, self.schedule = respondent, settings, schedule
        self.loop = Loop(respondent, dtype, settings.rows)
        self.created = int(time.time())
        self.inside = 0
        self._preparing = ThreadPoolExecutor(1, "prepare")  # a tokenizer is for one thread
        self._fetching = ThreadPoolExecutor(4, "pictures")
        config: Any = respondent.hf.config.get_text_config()
        self.depth = int(config.num_hidden_layers)
        self.context: int | None = positions_of(config)
        named = [respondent.tokenizer.convert_ids_to_tokens(token) for token in self.loop.pictured]
        self._placeholders = [name for name in named if name]
        self._orders = isinstance(respondent, LlavaRespondent) and respondent.template is not None

    @classmethod
    def of(cls, directory: Path, overrides: Sequence[str], settings: Settings) -> Service:
        """With the model in ``directory``: a run, an original checkpoint, or any other that `attach` knows.

        Raises:
            ConfigError, UserError: there is none, it cannot be opened, or its schedule does not fit it.
        """
        config = subject_config(directory, list(overrides), asks=False)
        own = AnswerSettings.of(config)
        respondent = respondent_in(finished(config, writes=False), config)
        respondent.hf.to(own.device)
        detach(attach(respondent.hf, config.schedule))  # which refuses what does not fit the model
        return cls(respondent, settings, config.schedule, own.dtype)

    def start(self) -> Service:
        """Starts the loop."""
        self.loop.start()
        return self

    def stop(self) -> None:
        """Ends the loop and the threads."""
        self.loop.stop()
        for pool in (self._preparing, self._fetching):
            pool.shutdown(wait=False, cancel_futures=True)

    def check_key(self, header: str | None) -> None:
        """Compares the key of an ``Authorization`` header, in a time that does not tell how much of it is right.

        Raises:
            Refusal: a key is asked for, and this is not it.
        """
        if self.settings.key is None:
            return
        kind, _, given = (header or "").partition(" ")
        wanted, got = (sha256(key.encode("utf-8", "replace")).digest() for key in (self.settings.key, given.strip()))
        if not hmac.compare_digest(wanted, got) or kind.lower() != "bearer":
            raise Refusal("the key is missing or wrong: send Authorization: Bearer KEY", None, 401, "invalid_api_key")

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among those that are answered or wait.

        Raises:
            Refusal: all are taken.
        """
        if self.inside >= self.loop.rows + self.settings.queue:
            raise Refusal(f"{self.inside} requests are here, and no more may wait: try later", None, 429, "queue_full")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def model(self) -> dict[str, Any]:
        """The model, as ``/v1/models`` lists it."""
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.created,
            "owned_by": "llava_pdrop",
            "pyramid_drop": None if self.schedule.vanilla else self.schedule.to_dict(),
            "decoder_layers": self.depth,
            "context": self.context,
            "rows": self.loop.rows,
            "one_by_one": self.loop.alone,
        }

    async def answer(self, asked: Asked, arrived: float) -> Answering:
        """Makes a request ready and puts it into the queue.

        Args:
            arrived: when, by ``time.monotonic``.

        Raises:
            UserError: a picture that cannot be had, or a prompt that does not fit.
        """
        loop, limits = asyncio.get_running_loop(), self.settings.limits
        self._check(asked)
        pictures = [
            await loop.run_in_executor(self._fetching, _picture, url, where, limits) for where, url in asked.pictures
        ]
        inputs, tokens, most = await loop.run_in_executor(self._preparing, self._prepared, asked, pictures)
        made = Answering(int(inputs["input_ids"].shape[1]))
        seed = secrets.randbits(63) if asked.seed is None and asked.temperature > 0 else asked.seed or 0
        made.job = Job(
            inputs,
            tokens,
            asked.schedule,
            most,
            Sampler(asked.temperature, asked.top_p, seed),
            end=made.put,
            say=made.put,
            stops=asked.stops,
            deadline=arrived + self.settings.seconds,
        )
        self.loop.submit(made.job)
        return made

    def _check(self, asked: Asked) -> None:
        """Raises `Refusal` at what no prompt can be made of."""
        settings = self.settings
        if len(asked.pictures) > settings.limits.pictures:
            raise Refusal(
                f"{len(asked.pictures)} pictures are shown, and at most {settings.limits.pictures} are taken",
                "messages",
            )
        if asked.most is not None and asked.most > settings.most_new_tokens:
            raise Refusal(
                f"max_tokens is {asked.most}, and at most {settings.most_new_tokens} are written", "max_tokens"
            )
        for turn in asked.turns:
            *before, _ = turn.text.split(IMAGE_MARKER)
            if not self._orders and len(before) > 1 and any(text.strip() for text in before):
                raise Refusal(
                    "this model's format has pictures in front of a message's text: put its image_url parts first",
                    "messages",
                )
        texts = [turn.text.replace(IMAGE_MARKER, "") for turn in asked.turns] + [asked.system or ""]
        for name in self._placeholders:
            if any(name in text for text in texts):
                raise Refusal(f"{name} stands for a picture: write it otherwise", "messages")

    def _prepared(self, asked: Asked, pictures: Sequence[Picture]) -> tuple[dict[str, Any], list[int], int]:
        """Inputs of the model, tokens of every picture, and how long the answer may be."""
        record = Record("request", asked.turns, tuple(pictures), "request", system=asked.system)
        own = self.respondent
        inputs, tokens = own.inputs([own.prepare(Question(record, ""))], asked.schedule)
        length = int(inputs["input_ids"].shape[1])
        most = asked.most or self.settings.max_new_tokens
        if self.context is None:
            return inputs, tokens[0], most
        room = self.context - length
        if room < (asked.most or 1):
            answer = f" and an answer of {asked.most}" if asked.most else ""
            raise Refusal(
                f"the prompt has {length} tokens{answer}, and the model takes {self.context} in all",
                "messages", code="context_length_exceeded",
            )  # fmt: skip
        return inputs, tokens[0], min(most, room)


def _picture(url: str, where: str, limits: Limits) -> Picture:
    try:
        return picture_of(url, where, limits)
    except UserError as error:
        raise Refusal(f"{where}: {line_of(error)}", where, code="invalid_image") from None
