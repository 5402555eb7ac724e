"""Turns evaluation pages of forms.py into three small benchmarks in the layouts of the real ones, so that the whole way
from files to a table can be walked on this machine.

    python data/prepare/benchmarks.py --forms data/tiny/prepared/forms --out data/tiny/prepared/benchmarks [--pages 60]

writes to OUT, for ``llava-pdrop eval RUN benchmarks=pope,textvqa,mmbench eval.root=OUT``:
    pope/       llava_pope_test.jsonl, coco/coco_pope_*.json, val2014/    is there a 7 to the right of K?
    textvqa/    llava_textvqa_val_v051_ocr.jsonl, TextVQA_0.5.1_val.json, train_images/    which digit is it?
    mmbench/    mmbench_dev_20230712.tsv    the same with four options, each question in four rotations

The pages are those of forms; the questions are new. Nothing is taken from the real benchmarks but their layouts.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

SHORT = "Answer the question using a single word or phrase."
CATEGORIES = ("random", "popular", "adversarial")
HEAD = "index question hint A B C D answer category image source l2-category comment split"
"""Columns of MMBench's table."""

ROTATION = 1_000_000
"""What MMBench adds to the index of a question for each of its rotations."""


def make(forms: Path, out: Path, pages: int, seed: int = 0) -> None:
    """Writes the three benchmarks from the first ``pages`` records of ``forms/eval.json``."""
    records = json.loads((forms / "eval.json").read_text(encoding="utf-8"))[:pages]
    random = np.random.default_rng(seed)
    asked = []
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        letter = re.search(r"(\w)$", question)
        assert letter is not None, "forms.py asks for a letter at the end"
        asked.append((forms / record["image"], letter[1], answer))
    if out.exists():
        shutil.rmtree(out)
    pope(out / "pope", asked, random)
    textvqa(out / "textvqa", asked)
    mmbench(out / "mmbench", asked, random)


def pope(out: Path, asked: list[tuple[Path, str, str]], random: np.random.Generator) -> None:
    """A page is asked about twice in each of the three categories, once to be answered with yes, with another wrong
    digit each time. (POPE itself asks three of both.)"""
    questions, labels = list[dict[str, Any]](), {name: list[dict[str, Any]]() for name in CATEGORIES}
    for page, letter, digit in asked:
        wrong = (int(digit) + random.permutation(9)[: len(CATEGORIES)] + 1) % 10
        for category, other in zip(CATEGORIES, wrong.tolist()):
            for shown, label in ((digit, "yes"), (other, "no")):
                text, image = f"Is there a {shown} to the right of {letter} in the image?", page.name
                question = {"question_id": len(questions), "image": image, "text": f"{text}\n{SHORT}"}
                questions.append(question | {"category": category})
                own = labels[category]
                own.append({"question_id": len(own) + 1, "image": image, "text": text, "label": label})
        _copy(page, out / "val2014")
    _lines(out / "llava_pope_test.jsonl", questions)
    for name, rows in labels.items():
        _lines(out / "coco" / f"coco_pope_{name}.json", rows)


def textvqa(out: Path, asked: list[tuple[Path, str, str]]) -> None:
    """Ten annotators who agree; no tokens of a text reader."""
    questions, data = [], []
    for number, (page, letter, digit) in enumerate(asked):
        text = f"Which digit is written to the right of {letter}"
        prompt = f"{text}\nReference OCR token: \n{SHORT}"
        questions.append({"question_id": page.stem, "image": page.name, "text": prompt, "category": "default"})
        data.append({"question": text, "image_id": page.stem, "answers": [digit] * 10, "question_id": number})
        _copy(page, out / "train_images")
    _lines(out / "llava_textvqa_val_v051_ocr.jsonl", questions)
    table = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
    (out / "TextVQA_0.5.1_val.json").write_text(json.dumps(table) + "\n", encoding="utf-8")


def mmbench(out: Path, asked: list[tuple[Path, str, str]], random: np.random.Generator) -> None:
    """Four rotations of a question share their index but for millions; the picture stands in the first of them."""
    out.mkdir(parents=True)
    rows = []
    for number, (page, letter, digit) in enumerate(asked):
        options = [digit, *random.permutation([other for other in "0123456789" if other != digit])[:3].tolist()]
        question = f"Which digit is written to the right of {letter}?"
        for rotation in range(4):
            picture = base64.b64encode(page.read_bytes()).decode() if rotation == 0 else str(number)
            answer = "ABCD"[options.index(digit)]
            index = number + rotation * ROTATION
            rows.append([index, question, "", *options, answer, "ocr", picture, "forms", "finegrained_perception"])
            options = options[-1:] + options[:-1]
    with (out / "mmbench_dev_20230712.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(HEAD.split())
        table.writerows([*row, "", "dev"] for row in sorted(rows, key=lambda row: row[0]))


def _copy(page: Path, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(page, directory / page.name)


def _lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the top of the file."""
    parser = argparse.ArgumentParser(description="Makes three small benchmarks of the pages of forms.py.")
    parser.add_argument("--forms", type=Path, required=True, help="directory that forms.py has written")
    parser.add_argument("--out", type=Path, required=True, help="directory to write (what is there goes)")
    parser.add_argument("--pages", type=int, default=60, metavar="N", help="pages to ask about")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.pages < 1:
        parser.error(f"--pages {args.pages}: at least one page has to be asked about")
    if not (args.forms / "eval.json").is_file():
        sys.exit(f"{args.forms}/eval.json: no such file: run data/prepare/forms.py --out {args.forms} first")
    make(args.forms, args.out, args.pages, args.seed)
    print(f"{args.out}: pope, textvqa and mmbench of {args.pages} pages")


if __name__ == "__main__":
    main()
