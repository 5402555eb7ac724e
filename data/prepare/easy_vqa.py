"""Converts the records of the `easy-vqa <https://github.com/vzhou842/easy-VQA>`_ package to LLaVA JSON and PNG files.

The package (MIT licence, 3 MB, not a dependency of this project: ``pip install easy-vqa==1.0``) holds 64x64 pictures of
one coloured shape with 38,575 training and 9,673 test questions that have 13 different answers.

    python data/prepare/easy_vqa.py --out DIR [--seed 0] [--train N] [--eval N] [--turns 8] [--single] [--package PATH]

writes to DIR, from the package's own training and test split (image paths in the JSON files are relative to DIR):
    train.json      up to ``--turns`` questions per picture, in one conversation; with ``--single`` one record each
    eval.json       one question per picture, the answer as its gpt turn
    images/*.png    the pictures, bytes as in the package
    manifest.json   arguments and counts; a second run with equal arguments finds it and does nothing
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import random
import shutil
import sys
from pathlib import Path

FORMAT_VERSION = 1
"""Goes into the manifest: raise it when texts change, so that directories made before are remade."""

SPLITS = {"train": "train", "eval": "test"}
"""Our name of a split -> the package's."""


def find_package() -> Path:
    """Directory of the installed package; ends the program with one line if there is none."""
    # This file has the name of the package: look past its own directory.
    here = Path(__file__).resolve().parent
    path = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("easy_vqa", path)
    if spec is None or not spec.submodule_search_locations:
        sys.exit("easy_vqa.py: the package easy-vqa is not installed: pip install easy-vqa==1.0")
    return Path(next(iter(spec.submodule_search_locations)))


def read_questions(package: Path, split: str) -> dict[int, list[tuple[str, str]]]:
    """Questions and answers of every picture of a split, in the order of the package."""
    path = package / "data" / SPLITS[split] / "questions.json"
    if not path.is_file():
        sys.exit(f"easy_vqa.py: {path} does not exist (is this the easy_vqa package?)")
    pictures: dict[int, list[tuple[str, str]]] = {}
    for question, answer, picture in json.loads(path.read_text(encoding="utf-8")):
        pictures.setdefault(int(picture), []).append((question, answer))
    return pictures


def make_records(
    pictures: dict[int, list[tuple[str, str]]], split: str, count: int, turns: int, seed: int, single: bool = False
) -> list[tuple[int, dict]]:
    """Picks ``count`` pictures and up to ``turns`` questions for each: (number of the picture, LLaVA record).

    The questions of a picture are turns of one record, or with ``single`` a record each.
    """
    rng = random.Random(f"{seed} {split}")
    chosen = rng.sample(sorted(pictures), min(count, len(pictures)))
    records = []
    for picture in chosen:
        asked = rng.sample(pictures[picture], min(turns, len(pictures[picture])))
        name = f"{split}_{picture:05d}"
        for number, part in enumerate([[turn] for turn in asked] if single else [asked]):
            conversations = []
            for i, (question, answer) in enumerate(part):
                conversations += [
                    {"from": "human", "value": ("<image>\n" if i == 0 else "") + question},
                    {"from": "gpt", "value": answer},
                ]
            identity = f"{name}_{number}" if single else name
            records.append((picture, {"id": identity, "image": f"images/{name}.png", "conversations": conversations}))
    return records


def prepare(out: Path, package: Path, seed: int, counts: dict[str, int], turns: int, single: bool = False) -> bool:
    """Writes the data set into ``out``; returns False if it was there already."""
    manifest = {"format": FORMAT_VERSION, "seed": seed, "turns": turns, "counts": counts}
    if single:  # directories made before there was a choice have no such key
        manifest["single"] = True
    path = out / "manifest.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == manifest:
        return False
    path.unlink(missing_ok=True)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        for stale in (out / "images").glob(f"{split}_*.png"):
            stale.unlink()
        train = split == "train"
        questions = read_questions(package, split)
        records = make_records(questions, split, count, turns if train else 1, seed, single and train)
        for picture, image in {(picture, record["image"]) for picture, record in records}:  # each once
            shutil.copyfile(package / "data" / SPLITS[split] / "images" / f"{picture}.png", out / image)
        (out / f"{split}.json").write_text(
            json.dumps([record for _, record in records], indent=1) + "\n", encoding="utf-8"
        )
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return True


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the top of the file."""
    parser = argparse.ArgumentParser(description="Converts the easy-vqa package's records to LLaVA JSON.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=2560, metavar="N", help="training pictures (the package has 4000)")
    parser.add_argument("--eval", type=int, default=1000, metavar="N", help="held-out pictures (the package has 1000)")
    parser.add_argument("--turns", type=int, default=8, help="most questions per training picture")
    parser.add_argument("--single", action="store_true", help="a training record for every question")
    parser.add_argument("--package", type=Path, help="directory of the easy_vqa package (default: the installed one)")
    args = parser.parse_args(arguments)
    if min(args.train, args.eval) < 0 or args.turns < 1:
        parser.error("the numbers of pictures cannot be negative, and --turns is at least 1")
    counts = {"train": args.train, "eval": args.eval}
    package = args.package or find_package()
    try:
        made = prepare(args.out, package, args.seed, counts, args.turns, args.single)
    except OSError as error:
        sys.exit(f"{error.filename or args.out}: cannot be read or written ({error.strerror or error})")
    what = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{args.out}: {what} pictures" + ("" if made else " (already there)"))


if __name__ == "__main__":
    main()
