"""Soft accuracy over the answers of ten people: VQAv2, TextVQA, VizWiz.

Three normal forms of an answer are in use. All of them keep two slips of the first official code, which are part of
every published score: a full stop is kept only in front of a digit, whatever stands before it, and at most 32 of them
are removed (a flag is passed where a count is expected).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from llava_pdrop.eval.rules.grades import Grade, Grader, Rule, grader, means
from llava_pdrop.eval.rules.text import from_sheet

MARKS = ';/[]"{}()=+\\_-><@`,?!'
GROUPED_DIGITS = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOP_OF_TEXT = re.compile(r"(?<!\d)\.(?!\d)")
MOST_FULL_STOPS = 32
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
ARTICLES = frozenset(["a", "an", "the"])

CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _without_one(word: str) -> list[str]:
    """``word`` without one of its apostrophes, in every way."""
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {short: word for word in CONTRACTED.split() for short in _without_one(word)} | {
    "somebody'd": "somebodyd"
}
"""Contractions that lack one apostrophe -> with it; one of the table goes the other way."""


def eval_ai(text: str) -> str:
    """Normal form of LLaVA (``llava/eval/m4c_evaluator.py``) and of lmms-eval's TextVQA and VizWiz."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return official(words)


def official(text: str) -> str:
    """Normal form of the official VQA code (GT-Vision-Lab/VQA, ``vqaEval.py``): no commas, question marks and
    possessives of its own."""
    return _normal(text, FULL_STOP)


def vlmevalkit(text: str) -> str:
    """Normal form of VLMEvalKit (``vqa_eval.py process_answer``): a full stop beside any digit stays."""
    return _normal(text, FULL_STOP_OF_TEXT)


def one_line(text: str) -> str:
    """Line breaks and tabs as blanks, none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_marks(text: str, full_stop: re.Pattern[str] = FULL_STOP_OF_TEXT) -> str:
    """Every punctuation mark is removed if it has a blank beside it somewhere in the text, or if the text has a comma
    between digits; else it becomes a blank."""
    all_go = GROUPED_DIGITS.search(text) is not None
    table = {ord(mark): "" if all_go or f"{mark} " in text or f" {mark}" in text else " " for mark in MARKS}
    return full_stop.sub("", text.translate(table), count=MOST_FULL_STOPS)


def _normal(text: str, full_stop: re.Pattern[str]) -> str:
    words = without_marks(one_line(text), full_stop).lower().split()
    numbered = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ARTICLES)


def soft_accuracy(answer: str, golds: Sequence[str]) -> float:
    """Mean over the annotators of min(1, equal answers among the others / 3): 0.3, 0.6, 0.9, 1 of ten."""
    equal = sum(gold == answer for gold in golds)
    others = equal * min(1.0, (equal - 1) / 3) + (len(golds) - equal) * min(1.0, equal / 3)
    return others / len(golds) if equal else 0.0


def normalised(answer: str, golds: Sequence[str], normal: Callable[[str], str]) -> tuple[float, str]:
    """`soft_accuracy` of the normal forms, and that of the answer."""
    form = normal(answer)
    forms = {gold: normal(gold) for gold in set(golds)}
    return soft_accuracy(form, [forms[gold] for gold in golds]), form


def official_accuracy(answer: str, golds: Sequence[str]) -> tuple[float, str]:
    """As the official code: nothing is normalised where all people gave the same answer."""
    given = [one_line(gold) for gold in golds]
    if len(set(given)) == 1:
        return soft_accuracy(one_line(answer), given), one_line(answer)
    return normalised(answer, given, official)


def by_form(normal: Callable[[str], str], fact: str = "answers", read: Callable[[str], str] = str) -> Grader:
    """The rule that normal forms of what is ``read`` are compared; ``fact`` holds the people's answers."""
    return grader(lambda question, answer: Grade(*normalised(read(answer), question.facts[fact], normal)))


def by_vlmevalkit(fact: str) -> Rule:
    """VLMEvalKit: its own normal form, behind a spreadsheet; ``fact`` holds the annotation's answers."""
    rule = "VLMEvalKit vlmeval/dataset/utils/vqa_eval.py (vqa_score)"
    return Rule(rule, by_form(vlmevalkit, fact, from_sheet), means)
