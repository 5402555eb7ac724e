"""The model that lmms-eval runs. It is asked by the code of `llava-pdrop eval`, so that answers are equal.

    python -m lmms_eval --model llava_pdrop --model_args pretrained=DIR,layers=8-16-24,ratios=0.5-0.25-0.125 --tasks ...

Tasks are shared among processes by lmms-eval itself (``accelerate launch`` or torchrun); each answers its own part.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms

from llava_pdrop.errors import UserError, is_about_a_file, line_of
from llava_pdrop.eval.answering import Answer, answer_all
from llava_pdrop.eval.evaluate import image_tokens_of, used_schedule
from llava_pdrop.eval.generation import until_stop
from llava_pdrop.eval.lmms.arguments import open_subject, words_of
from llava_pdrop.eval.lmms.requests import asked, by_limits
from llava_pdrop.eval.team import ALONE
from llava_pdrop.report.console import say
from llava_pdrop.world import number_of_processes, rank


@contextmanager
def in_one_line() -> Iterator[None]:
    """A user's error ends the program with status 2 and one line. lmms-eval would print its traceback and end with
    status 0, and other processes would wait a day for this one.

    Raises:
        SystemExit: in the place of a `UserError`, or of what the system says of a file.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if not (isinstance(error, UserError) or is_about_a_file(error)):
            raise
        here = f"[rank {rank()}] " if number_of_processes() > 1 else ""
        print(f"{here}error: {line_of(error)}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


class LlavaPdrop(lmms):
    """A LLaVA, or another model that `attach` knows, with a schedule. Words: see `arguments`.

    Raises:
        SystemExit: after one line on what is wrong with the words or the model.
    """

    is_simple = True

    def __init__(self, **words: Any) -> None:
        super().__init__()
        self.accelerator = Accelerator()  # finds the other processes, and this one's GPU
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        with in_one_line():
            self.subject = open_subject(words)
        if self.rank == 0:
            own, used = self.subject.respondent.schedule, self.subject.config.schedule
            say(f"{self.subject.config.name}: {used_schedule(used, own)}")

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> LlavaPdrop:
        """Of ``--model_args``, and what other options of lmms-eval say."""
        with in_one_line():
            words = words_of(arg_string)
            more = {name: value for name, value in (additional_config or {}).items() if value is not None}
            for name in words.keys() & more.keys():
                raise UserError(f"model_args: {name} is an option of its own: --{name} {words[name]}")
        return cls(**words, **more)

    @property
    def device(self) -> torch.device:
        """Where the model lies: lmms-eval counts the requests of all processes there."""
        return self.subject.settings.device

    @property
    def batch_size(self) -> int:
        """Questions per batch."""
        return self.subject.settings.batch_size

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers to ``requests``, in their order. One whose picture cannot be read is empty.

        Raises:
            SystemExit: after one line: a request cannot be answered as it asks, or more than ``eval.max_unread`` of
                the pictures cannot be read.
        """
        with in_one_line():
            found, subject = asked(requests, self.task_dict), self.subject
            answers = dict[str, Answer]()
            for limits, questions in by_limits(found).items():
                given = answer_all(
                    subject.respondent,
                    questions,
                    subject.config.schedule,
                    **subject.settings.options(subject.respondent, ALONE),
                    max_new_tokens=limits.max_new_tokens,
                    progress=subject.config.name if self.rank == 0 else None,
                    strict=False,
                )
                for answer in given.answers:
                    answers[answer.id] = replace(answer, text=until_stop(answer.text, limits.until))
            for entry in found:
                if entry is not None and entry.problem is not None:
                    answers[entry.question.id] = Answer(entry.question.id, "", problem=entry.problem)
            self._tell(list(answers.values()))
        return ["" if entry is None else answers[entry.question.id].text for entry in found]

    def _tell(self, answers: list[Answer]) -> None:
        """Says how many image tokens a question had, and which could not be asked."""
        here = f"[rank {self.rank}] " if self.world_size > 1 else ""
        if read := [answer for answer in answers if answer.problem is None]:
            tokens = " -> ".join(f"{count:g}" for count in image_tokens_of(read, self.subject.config.schedule))
            say(f"{here}{self.subject.config.name}: {len(read)} questions, image tokens {tokens}")
        if problems := [answer.problem for answer in answers if answer.problem is not None]:
            share, most = len(problems) / len(answers), self.subject.config.eval.max_unread
            line = f"{len(problems)} of {len(answers)} questions cannot be asked, such as: {problems[0]}"
            if share > most:
                raise UserError(f"{line} (eval.max_unread={most:g} admits fewer)")
            say(f"{here}{line}: their answers are empty")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not offered.

        Raises:
            SystemExit: after one line that says so.
        """
        self._refuse(requests, "compares probabilities of given answers (loglikelihood)")
        return []

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered.

        Raises:
            SystemExit: after one line that says so.
        """
        self._refuse(requests, "asks in several rounds (generate_until_multi_round)")
        return []

    def _refuse(self, requests: list[Any], what: str) -> None:
        with in_one_line():
            for request in requests:
                raise UserError(f"task {request.task_name} {what}, which --model llava_pdrop does not: leave it out")
