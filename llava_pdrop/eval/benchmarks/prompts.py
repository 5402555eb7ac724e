"""How questions are put: in LLaVA's words, and in VLMEvalKit's where LLaVA has none (``scoring/prompts.jsonl``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
CHINESE = re.compile("[\u4e00-\u9fff]")


def short(question: str) -> str:
    """For answers of a word or two; all of LLaVA, VLMEvalKit and lmms-eval put it so."""
    return f"{question}\n{SHORT}"


def choice(question: str, options: Mapping[str, str], hint: str | None, last: str | None = None) -> str:
    """Hint, question, a line per option, and what is asked for: as LLaVA does for MMBench, and VLMEvalKit for every
    choice it puts to a LLaVA. ``last``: instead of the line in the question's language."""
    lines = [*([hint] if hint else []), question, *(f"{letter}. {text}" for letter, text in options.items())]
    words = "\n".join(lines)
    return f"{words}\n{last or (LETTER_CN if CHINESE.search(words) else LETTER)}"


def nothing(cell: str | None) -> bool:
    """Whether LLaVA takes a cell for none."""
    return cell is None or cell.lower() in ("nan", "none")


def mmbench_choice(row: Mapping[str, str], question: str, last: str) -> str:
    """LLaVA's words for a row of MMBench (``model_vqa_mmbench.py``): its options end at the first that is missing."""
    options = {letter: row[letter] for letter in takewhile(lambda letter: not nothing(row.get(letter)), "ABCD")}
    return choice(question, options, None if nothing(row.get("hint")) else row["hint"], last)


def generic_choice(question: str, options: Mapping[str, str], hint: str | None) -> str:
    """As VLMEvalKit asks models it has no words of their own for."""
    head = f"Hint: {hint}\n" if hint else ""
    lines = "".join(f"{letter}. {text}\n" for letter, text in options.items())
    return f"{head}Question: {question}\nOptions:\n{lines}Please select the correct answer from the options above. \n"
