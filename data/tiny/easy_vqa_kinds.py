"""Accuracy by kind of question, from the answers that a comparison or an ablation on the easy-vqa records has written.

    python data/tiny/easy_vqa_kinds.py checkpoints/tiny/easy_vqa [--train data/tiny/prepared/easy_vqa/train.json]

prints a Markdown table: a row for each variant of the last run there, mean and standard error over its seeds. With
``--train`` a first row says what is right without looking: the most frequent answer to each question in that file.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "prepare"))  # forms.py, which base_text.py imports
from easy_vqa_text import KINDS, kind_of


def read_rates(file: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Share of right answers, and number of questions, of all questions and of each kind."""
    scores: dict[str, list[float]] = {kind: [] for kind in ("all", *KINDS)}
    for line in file.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        for kind in ("all", kind_of(answer["question"], answer["gold"])):
            scores[kind].append(answer["score"])
    asked = {kind: those for kind, those in scores.items() if those}
    return {kind: statistics.mean(those) for kind, those in asked.items()}, {
        k: len(those) for k, those in asked.items()
    }


def blind_rates(train: Path, answers: Path) -> dict[str, float]:
    """Share of right answers by kind, if each question of ``answers`` gets its most frequent answer in ``train``."""
    said: dict[str, Counter[str]] = {}
    for record in json.loads(train.read_text(encoding="utf-8")):
        turns = [turn["value"] for turn in record["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2]):
            said.setdefault(plain(question), Counter())[answer.strip()] += 1
    scores: dict[str, list[float]] = {}
    for line in answers.read_text(encoding="utf-8").splitlines():
        asked = json.loads(line)
        counts = said.get(plain(asked["question"]), Counter())
        right = float(bool(counts) and counts.most_common(1)[0][0] == asked["gold"].strip())
        for kind in ("all", kind_of(asked["question"], asked["gold"])):
            scores.setdefault(kind, []).append(right)
    return {kind: statistics.mean(those) for kind, those in scores.items()}


def plain(question: str) -> str:
    """The question without the mark of its picture."""
    return question.replace("<image>", "").strip()


def in_words(rates: list[float]) -> str:
    """``98.2 % ± 0.3``: mean and, of several, the standard error of the mean."""
    mean = f"{100 * statistics.mean(rates):.1f} %"
    return mean if len(rates) == 1 else f"{mean} ± {100 * statistics.stdev(rates) / len(rates) ** 0.5:.1f}"


def make_table(folder: Path, train: Path | None = None) -> list[str]:
    """The table's lines; ``folder`` holds ``predictions/VARIANT[-seed_N][_on_SCHEDULE].jsonl``, of which those count
    that are rows of the ablation, if it is one: files of variants that were taken out may be left."""
    variants: dict[str, list[dict[str, float]]] = {}
    counts: dict[str, int] = {}
    files = sorted((folder / "predictions").glob("*.jsonl"))
    if (folder / "ablation.json").is_file():
        made = json.loads((folder / "ablation.json").read_text(encoding="utf-8"))
        rows = {row["name"].replace(" + ", "_on_") for row in (*made["variants"], *made["training_free"])}
        files = [file for file in files if file.stem in rows]
    if train and files:
        variants["blind"] = [blind_rates(train, files[0])]
    for file in files:
        rates, counts = read_rates(file)
        variants.setdefault(re.sub(r"-seed_\d+", "", file.stem).replace("_on_", " + "), []).append(rates)
    if not variants:
        sys.exit(f"easy_vqa_kinds.py: {folder / 'predictions'} has no answers: give what compare or ablate has written")
    lines = ["| variant | " + " | ".join(f"{kind} {count}" for kind, count in counts.items()) + " |"]
    lines.append("|---|" + "---:|" * len(counts))
    for name, seeds in variants.items():
        lines.append(f"| {name} | " + " | ".join(in_words([rates[kind] for rates in seeds]) for kind in counts) + " |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the top of the file."""
    parser = argparse.ArgumentParser(description="Accuracy by kind of question on the easy-vqa records.")
    parser.add_argument("folder", type=Path, help="output directory of a comparison or an ablation")
    parser.add_argument("--train", type=Path, help="training records, for what is right without looking")
    args = parser.parse_args(arguments)
    print("\n".join(make_table(args.folder, args.train)))


if __name__ == "__main__":
    main()
