"""What a benchmark is made of: files, questions, the value of an answer, and the numbers that are printed of all.

Questions whose right answers only a server knows are asked, and written for the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Grader, Rule, Total


@dataclass(frozen=True)
class Wanted:
    """A file or directory that a benchmark reads.

    ``path``: below its own directory; ``source``: where it comes from; ``licence``: where one is known; ``elsewhere``:
    other directories, below ``eval.root``, where it is looked for.
    """

    path: str
    source: str
    licence: str = ""
    elsewhere: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """A data set and the rule of its score.

    Attributes:
        name: its key in `BENCHMARKS`.
        title: what the paper calls its number; ``aliases``: what else.
        folder: its directory below ``eval.root``, as LLaVA names it; default: its name.
        wanted: files and directories that `read` needs.
        rule: whose rule the score follows: project and file.
        split: the split that is scored, unless its questions name another (`split_of`); ``paper_split``: the one of the
            paper, where that is another, whose answers only a server knows. Their scores are then not compared.
        max_new_tokens: of an answer, at most, as where the prompt comes from.
        headline: the number of `total` that the paper prints, ``factor`` times; ``best``: the most it can be there.
        read: (directory, whether a LLaVA is asked) -> questions. Raises UserError: the files are not what is expected.
            ``facts["question_id"]`` is what LLaVA's files call a question, where that is not its id: MME and TextVQA
            call several by one name, and others by numbers.
        grade: (question, answer) -> its value. ``None`` is an answer that was never given, "" an empty one. No
            function: only a judge can tell.
        total: (questions, grades) -> the numbers of all.
        upload: writes what a server or judge takes: (questions, answers, directory, name) -> its file. None: nothing is
            uploaded.
        also: other rules for the same answers, by the name of their project.
    """

    name: str
    title: str
    wanted: tuple[Wanted, ...]
    rule: str
    split: str
    read: Callable[[Path, bool], list[Question]]
    grade: Grader | None
    total: Total | None
    headline: str
    folder: str = ""
    factor: float = 1.0
    best: float = 100.0
    paper_split: str = ""
    aliases: tuple[str, ...] = ()
    max_new_tokens: int = 128
    upload: Callable[[Sequence[Question], Sequence[str | None], Path, str], Path] | None = None
    also: Mapping[str, Rule] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.folder or self.name)

    def split_of(self, questions: Sequence[Question]) -> str:
        """The split that these questions are of: which files lie there decides it."""
        return str(questions[0].facts.get("split", self.split)) if questions else self.split
