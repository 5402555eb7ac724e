"""The loop that answers: one thread runs the model, and requests join and leave between tokens.

Rows of one schedule are one batch; of several schedules each has its turn, a token at a time. Models whose sequences
cannot be joined (`batch.why_alone`) answer one request after the other, by ``generate``.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from llava_pdrop.errors import UserError
from llava_pdrop.eval.respondent import Respondent
from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.generate.unhook import plugin_of
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve.batch import RowBatch, why_alone
from llava_pdrop.serve.sampling import Sampler
from llava_pdrop.serve.stream import AnswerStream

log = logging.getLogger(__name__)

TIDY = 32
"""Answers after which freed memory is given back to the system. Tensors of ever new lengths leave holes between them,
which the C library would keep: a server's memory would grow for hours."""


@dataclass(frozen=True)
class Finish:
    """A whole answer. ``reason``: it came to an end, or no more tokens were allowed. ``tokens`` that were written, the
    one that ends it included. ``stages``: image tokens that enter the decoder, and that are left after every drop."""

    text: str
    reason: Literal["stop", "length"]
    tokens: int
    stages: tuple[int, ...]


class Late(UserError):
    """The time for an answer is over."""


class Unable(UserError):
    """The server cannot answer, whatever is asked."""


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        inputs: of the model, one row without padding. image_tokens: of every picture, as they enter the decoder.
        most: tokens of the answer. stops: texts that end it, beside those of the model.
        deadline: of the whole answer, by ``time.monotonic``.
        say: is given the answer piece by piece. end: is called once, with the `Finish` or with what went wrong. Both
            are called on the loop's thread.
        left: nobody waits for the answer any more.
    """

    inputs: dict[str, Tensor]
    image_tokens: Sequence[int]
    schedule: Schedule
    most: int
    sampler: Sampler
    end: Callable[[Finish | Exception], None]
    say: Callable[[str], None] = lambda piece: None
    stops: tuple[str, ...] = ()
    deadline: float = float("inf")
    left: bool = False


@dataclass
class Live:
    """An answer that is being written."""

    job: Job
    stream: AnswerStream
    stages: tuple[int, ...] = ()
    token: int = 0
    tokens: int = 0
    ended: bool = False

    def take(self, logits_V: Tensor) -> None:
        """Writes the next token, given its logits (vocabulary,) on the host.

        Raises:
            Unable: they are no numbers.
        """
        if bool(logits_V.isnan().any()):
            raise Unable("the model computes logits that are no numbers: its weights do not fit this precision")
        self.token = self.job.sampler.pick(logits_V)
        self.tokens += 1
        self.stream.put(torch.tensor([self.token]))
        self.ended = self.stream.stopped or self.token in self.stream.ends or self.tokens >= self.job.most

    def finish(self) -> None:
        """Hands on what was held back, and the `Finish`."""
        self.stream.end()
        reason: Literal["stop", "length"] = (
            "stop" if self.stream.stopped or self.token in self.stream.ends else "length"
        )
        self.job.end(Finish(self.stream.answer, reason, self.tokens, self.stages))


@dataclass
class Group:
    """The rows of one schedule, and the answer of each."""

    batch: RowBatch
    lives: list[Live] = field(default_factory=list)

    def leave(self, places: Sequence[int]) -> None:
        """Frees the rows at ``places``."""
        if places:
            self.batch.leave(places)
            self.lives = [live for place, live in enumerate(self.lives) if place not in places]


class Loop:
    """Answers what is submitted, on a thread of its own, which owns the model from `start` to `stop`."""

    def __init__(self, respondent: Respondent, dtype: torch.dtype | None = None, rows: int = 16) -> None:
        """
        Args:
            dtype: half precision to run in by autocast; None: the weights' own.
            rows: answers that are written at a time.
        """
        self.hf, self.dtype = respondent.hf, dtype
        self.alone = why_alone(self.hf)
        self.rows = rows if self.alone is None else 1
        self.ends, self.stops = list(respondent.ends), tuple(respondent.stops)
        self.tokenizer = deepcopy(respondent.tokenizer)  # a fast one cannot be shared with the thread that encodes
        self.pad = respondent.tokenizer.pad_token_id
        config: Any = self.hf.config
        tokens = (getattr(config, f"{kind}_token_id", None) for kind in ("image", "video"))
        self.pictured = [token for token in tokens if token is not None]
        self._changed = threading.Condition()
        self._waiting = deque[Job]()
        self._groups = dict[Schedule, Group]()
        self._solo: Live | None = None
        self._attached: tuple[Schedule, Any] | None = None
        self._stopping = False
        self._answered = 0
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def start(self) -> Loop:
        """Starts the thread; the model is in evaluation mode from here on."""
        self.hf.eval()
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread and detaches the model; what is not answered ends with an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, job: Job) -> None:
        """Puts ``job`` at the end of the queue.

        Raises:
            Unable: the loop has ended.
        """
        with self._changed:
            if self._stopping:
                raise Unable("the server is stopping")
            self._waiting.append(job)
            self._changed.notify()

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return sum(len(group.lives) for group in list(self._groups.values())) + (self._solo is not None)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def _run(self) -> None:
        device = next(self.hf.parameters()).device
        try:
            with torch.inference_mode(), torch.autocast(device.type, self.dtype, self.dtype is not None):
                while True:
                    if not (self._waiting or self._groups):
                        self._tidy(TIDY)  # it rests
                    with self._changed:
                        self._changed.wait_for(lambda: self._stopping or self._waiting or self._groups)
                        if self._stopping:
                            return
                    self._turn()
        finally:
            detach(self.hf)
            with self._changed:
                self._stopping = True
                lives = [live.job for group in self._groups.values() for live in group.lives]
                left = [*lives, *self._waiting]
                self._groups.clear()
                self._waiting.clear()
            for job in left:
                job.end(Unable("the server is stopping"))

    def _turn(self) -> None:
        """Frees the rows of those who have left, lets one request join, and writes a token of every answer."""
        self._sweep()
        if self._waiting and self.running < self.rows:
            job = self._waiting.popleft()
            self._guarded([job], partial(self._begin, job))
        for schedule, group in list(self._groups.items()):
            jobs = [live.job for live in group.lives]
            if not self._guarded(jobs, partial(self._advance, schedule, group)) or not group.lives:
                del self._groups[schedule]

    def _tidy(self, answered: int) -> None:
        """Gives freed memory back, now and then."""
        self._answered += answered
        if self._answered >= TIDY and self._trim is not None:
            self._answered = 0
            self._trim(0)

    def _guarded(self, jobs: Sequence[Job], act: Callable[[], None]) -> bool:
        """Does ``act``; whatever goes wrong ends ``jobs``, and nothing else."""
        try:
            act()
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("an answer failed")
            for job in jobs:
                job.end(error)
            return False
        return True

    def _sweep(self) -> None:
        """Ends what nobody waits for or what is late."""
        now = time.monotonic()
        with self._changed:
            gone = [job for job in self._waiting if job.left or now > job.deadline]
            for job in gone:
                self._waiting.remove(job)
        for schedule, group in list(self._groups.items()):
            places = [n for n, live in enumerate(group.lives) if live.job.left or now > live.job.deadline]
            gone += [group.lives[place].job for place in places]
            group.leave(places)
            if not group.lives:
                del self._groups[schedule]
        for job in gone:
            job.end(Late("the time for this answer is over"))

    def _use(self, schedule: Schedule) -> None:
        """Attaches ``schedule``, unless it is: somebody else may have attached another while the loop was at rest."""
        if self._attached != (schedule, plugin_of(self.hf)):
            attach(self.hf, schedule)
            self._attached = schedule, plugin_of(self.hf)

    def _begin(self, job: Job) -> None:
        """Prefills a prompt; its row joins those of its schedule."""
        self._use(job.schedule)
        torch.manual_seed(job.sampler.seed)  # of the random ranker
        live = Live(job, AnswerStream(self.tokenizer, self.ends, (*self.stops, *job.stops), job.say))
        device = next(self.hf.parameters()).device
        inputs = {name: value.to(device) for name, value in job.inputs.items()}
        live.stream.put(job.inputs["input_ids"])
        if self.alone is not None:
            return self._write_alone(live, inputs)
        output = self.hf(**inputs, use_cache=True)
        live.stages = self._stages(job, output.past_key_values)
        live.take(output.logits[0, -1].float().cpu())
        if live.ended:
            return live.finish()
        group = self._groups.get(job.schedule) or Group(RowBatch(self.hf))
        group.batch.join(output.past_key_values, inputs["input_ids"].shape[1])
        group.lives.append(live)
        self._groups[job.schedule] = group

    def _advance(self, schedule: Schedule, group: Group) -> None:
        """Writes a token of every answer of ``group``."""
        self._use(schedule)
        logits_BV = group.batch.step([live.token for live in group.lives])
        took = [
            self._guarded([live.job], partial(live.take, logits_V)) for live, logits_V in zip(group.lives, logits_BV)
        ]
        finished = [live for live, well in zip(group.lives, took) if well and live.ended]
        group.leave([place for place, live in enumerate(group.lives) if live.ended or not took[place]])
        for live in finished:
            live.finish()
        self._tidy(len(finished))

    def _write_alone(self, live: Live, inputs: dict[str, Tensor]) -> None:
        """Writes a whole answer by ``generate``."""
        self._solo = live
        try:
            output = self.hf.generate(
                **inputs,
                max_new_tokens=live.job.most,
                do_sample=False,
                pad_token_id=self.pad,
                eos_token_id=self.ends or None,
                logits_processor=LogitsProcessorList([_Drawn(live)]),
                stopping_criteria=StoppingCriteriaList([_Ended(live)]),
                return_dict_in_generate=True,
            )
        finally:
            self._solo = None
        if not live.ended:
            raise Late("the time for this answer is over")
        live.stages = self._stages(live.job, output.past_key_values)
        live.finish()
        self._tidy(1)

    def _stages(self, job: Job, cache: Any) -> tuple[int, ...]:
        """Image tokens that enter, and that are left after every drop."""
        stages, ids = getattr(cache, "stages", None), job.inputs["input_ids"]
        text = ids.numel() - sum(int((ids == token).sum()) for token in self.pictured)
        drops = [] if stages is None else stages.real_BN[len(stages.real_BN) - len(stages.schedule.layers) :]
        return (sum(job.image_tokens), *(int(real_BN.sum()) - text for real_BN in drops))


class _Drawn(LogitsProcessor):
    """Lets ``generate`` take the token that an answer's own sampler picks."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (1, vocabulary) of which only the picked one is left."""
        self.live.take(scores[0].float().cpu())
        picked = torch.full_like(scores, float("-inf"))
        picked[0, self.live.token] = 0
        return picked


class _Ended(StoppingCriteria):
    """Ends ``generate`` where the answer has ended, nobody waits for it or its time is over."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(1,) bool."""
        job = self.live.job
        over = self.live.ended or job.left or time.monotonic() > job.deadline
        return torch.full((1,), over, device=input_ids.device)
