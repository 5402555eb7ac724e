"""Benchmarks in VLMEvalKit's TSV files: questions, and the rows of those with short answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.base import Benchmark, Wanted
from llava_pdrop.eval.benchmarks.files import cell, find_table, pictures_of_table, read_table
from llava_pdrop.eval.benchmarks.prompts import choice, generic_choice, short
from llava_pdrop.eval.questions import Question, ask
from llava_pdrop.eval.rules.choices import CHOICE_RULE, grade_choice, options_of, total_choice
from llava_pdrop.eval.rules.grades import Rule, by_text, means

SOURCE = "VLMEvalKit (addresses in vlmeval/dataset)"
MOST_TOKENS = 512
"""Of an answer, as VLMEvalKit lets LLaVA say (``vlmeval/vlm/llava/llava.py``)."""


def read_choices(directory: Path, llava: bool, table: str) -> list[Question]:
    """Questions with options, and their category.

    Raises:
        UserError: a row without options, or whose answer is none of them. Otherwise as `read_table`.
    """
    file = find_table(directory, [table])
    rows = read_table(file, ("image", "question", "answer", "A", "category"))
    questions = []
    for row, picture in zip(rows, pictures_of_table(rows, file)):
        options = options_of(row)
        if row.get("answer") not in options:
            raise UserError(
                f"{file}: index {row['index']}: its answer is {row.get('answer')}, and its options are "
                f"{', '.join(options) or 'missing'}"
            )
        words = (choice if llava else generic_choice)(cell(row, "question", file), options, row.get("hint"))
        category, origin = row.get("category", ""), f"{file}[{row['index']}]"
        questions.append(ask(row["index"], words, [picture], origin, row["answer"], options=options, category=category))
    return questions


def check_whole(questions: Sequence[Question], file: Path) -> None:
    """Raises `UserError`: answers of some rows only, or a rotation of a question that is not there."""
    unknown = [question.id for question in questions if not question.facts["known"]]
    if unknown and len(unknown) < len(questions):
        raise UserError(
            f"{file}: index {unknown[0]}: has no answer ({len(unknown)} of {len(questions)} rows have none)"
        )
    there = {question.id for question in questions}
    for question in questions:
        if question.unit not in there:
            raise UserError(f"{file}: index {question.id}: is a rotation of {question.unit}, which is not there")


def read_answers_of(directory: Path, tables: Mapping[str, str], by: str | None = None) -> list[Question]:
    """Questions that a word or two answer; the cell of the right one is ``gold`` as it stands.

    ``tables``: name of a table -> its split; ``by``: a column whose cell is kept as the fact ``part``.
    """
    file = find_table(directory, [*tables])
    rows = read_table(file, ("image", "question", "answer", *([by] if by else [])), whole=("answer",))
    questions = []
    for row, picture in zip(rows, pictures_of_table(rows, file)):
        words, origin = short(cell(row, "question", file)), f"{file}[{row['index']}]"
        facts = {"split": tables[file.stem], "part": row.get(by or "", "")}
        questions.append(ask(row["index"], words, [picture], origin, row["answer"], **facts))
    return questions


def wanted(
    tables: Sequence[str], licence: str = "", source: str = SOURCE, elsewhere: tuple[str, ...] = (".",)
) -> tuple[Wanted, ...]:
    """One of ``tables``: the first, which is from ``source``, or another instead."""
    first, *others = (f"{table}.tsv" for table in tables)
    return (
        Wanted(first, source, licence, elsewhere),
        *(Wanted(other, f"{SOURCE}; instead of {first}", licence, elsewhere) for other in others),
    )


def choices(name: str, title: str, table: str, split: str, also: Mapping[str, Rule] | None = None) -> Benchmark:
    """A row whose table has options."""
    return Benchmark(
        name=name,
        title=title,
        wanted=wanted([table]),
        rule=CHOICE_RULE,
        split=split,
        read=lambda directory, llava: read_choices(directory, llava, table),
        grade=grade_choice,
        total=total_choice,
        headline="Overall",
        factor=100,
        max_new_tokens=MOST_TOKENS,
        also=also or {},
    )


def short_answers(
    name: str,
    title: str,
    tables: Mapping[str, str],
    rule: str,
    read: Callable[[str], str],
    value: Callable[[str, str], float],
    *,
    by: str | None = None,
    also: Mapping[str, Rule] | None = None,
    licence: str = "",
) -> Benchmark:
    """A row whose table has short answers. ``read``: what the rule makes of an answer before it compares; ``value``:
    (that, gold cell) -> [0, 1]."""
    return Benchmark(
        name=name,
        title=title,
        wanted=wanted([*tables], licence),
        rule=rule,
        split=next(iter(tables.values())),
        read=lambda directory, llava: read_answers_of(directory, tables, by),
        grade=by_text(read, value),
        total=lambda questions, grades: means(questions, grades, ["part"] if by else ()),
        headline="Overall",
        max_new_tokens=MOST_TOKENS,
        also=also or {},
    )
