"""A directory of official scores under other names: new ids and indices, pictures renamed, rows in another order.

What official code joins by place keeps its place: POPE's labels within a category, the two questions of an MME picture,
annotations of TextVQA that share a question, answers to questions of one name.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

from tests.golden.official_scores import load_lines

PICTURES = {".jpg", ".jpeg", ".png"}
ROTATION = 1_000_000
IDS = {"question_id", "id", "index", "questionId", "llava_joined_question_id"}
"""Keys whose values name questions."""


class Names:
    """Old name -> new name; names that are not listed stay."""

    def __init__(self, generator: random.Random) -> None:
        self.generator, self.new = generator, dict[str, Any]()

    def add(self, old: Any, new: Any) -> None:
        self.new.setdefault(str(old), new)

    def numbers(self, old: Iterable[Any], most: int = 999_999) -> None:
        """New whole numbers for ``old``."""
        known = list(dict.fromkeys(map(str, old)))
        for name, number in zip(known, self.generator.sample(range(1, most), len(known))):
            self.add(name, number)

    def __call__(self, old: Any) -> Any:
        new = self.new.get(str(old), old)
        return str(new) if isinstance(old, str) else new


def kept_within(rows: list[Any], key: Callable[[Any], Hashable], generator: random.Random) -> list[Any]:
    """``rows`` in another order, but for those of one ``key`` among themselves."""
    order = generator.sample(range(len(rows)), len(rows))
    places = defaultdict(list)
    for place, row in enumerate(order):
        places[key(rows[row])].append(place)
    found: list[Any] = [None] * len(rows)
    waiting = {name: iter(own) for name, own in places.items()}
    for row in rows:
        found[next(waiting[key(row)])] = row
    return found


def shuffled(root: Path, target: Path, seed: int) -> Path:
    """``target``, a copy of ``root`` as above, with the same scores."""
    generator = random.Random(seed)
    shutil.copytree(root, target, copy_function=shutil.copyfile)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    prompts = load_lines(target / "prompts.jsonl")
    for expected in sorted(target.glob("*/expected.json")):
        names = _shuffle_one(expected.parent, generator)
        for line in prompts:
            if line["benchmark"] == expected.parent.name:
                line["id"] = names(line["id"])
    _write_lines(target / "prompts.jsonl", prompts)
    return target


def _shuffle_one(folder: Path, generator: random.Random) -> Names:
    names, pictures = Names(generator), Names(generator)
    tables = sorted(folder.glob("*.tsv"))
    if tables:
        _table(tables[0], names)
    else:
        _name_all(folder, names, pictures)
        _rename_files(folder, names, pictures)
    for file in sorted(folder.rglob("*.json*")):
        if file.name == "expected.json":
            continue
        if file.suffix == ".jsonl" or (folder.name == "pope" and file.parent.name == "coco"):
            rows = [_renamed(row, names, pictures) for row in load_lines(file)]
            _write_lines(file, _in_order(folder.name, rows, generator))
        else:
            _write(file, _reordered(_renamed(_read(file), names, pictures), folder.name, generator))
    expected = _renamed(_read(folder / "expected.json"), names, pictures)
    if "llava_upload_predictions" in expected:
        rows = {names(index): text for index, text in expected["llava_upload_predictions"]}
        with tables[0].open(encoding="utf-8", newline="") as opened:
            order = [int(row["index"]) for row in csv.DictReader(opened, delimiter="\t")]
        expected["llava_upload_predictions"] = [[index, rows[index]] for index in order]
    if "llava_upload" in expected:
        by_id = {row["question_id"]: row for row in expected["llava_upload"]}
        order = [row["question_id"] for row in load_lines(folder / "llava_vqav2_mscoco_test2015.jsonl")]
        expected["llava_upload"] = [by_id[id] for id in order]
    _write(folder / "expected.json", expected)
    return names


def _table(file: Path, names: Names) -> None:
    """New indices (rotations keep theirs above a million), rows in another order, pictures of other rows under the new
    name of their row."""
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t"))
    bases = Names(names.generator)
    bases.numbers(int(row["index"]) % ROTATION for row in rows)
    for row in rows:
        index = int(row["index"])
        names.add(index, bases(index % ROTATION) + index // ROTATION * ROTATION)
    for row in rows:
        row["index"] = names(row["index"])
        row["image"] = names(row["image"]) if len(row["image"]) <= 64 else row["image"]
    names.generator.shuffle(rows)
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _name_all(folder: Path, names: Names, pictures: Names) -> None:
    """New names for questions and pictures in LLaVA's layout."""
    file = next(folder.glob("llava*.json*"))
    rows = _read(file) if file.suffix == ".json" else load_lines(file)
    for file in sorted(folder.glob("llava*2015.jsonl")):
        rows += load_lines(file)
    for row in rows:
        id, picture = row.get("question_id", row.get("id")), row.get("image")
        token = f"{names.generator.getrandbits(48):012x}"
        if folder.name == "scienceqa":
            names.add(id, str(names.generator.getrandbits(40)))
            if picture:
                pictures.add(picture, f"{names(id)}/{Path(picture).name}")
            continue
        if picture:
            path = Path(picture)
            pictures.add(picture, str(path.with_name(token + path.suffix)))
        if folder.name == "textvqa":
            names.add(id, Path(pictures(picture)).stem)
        elif folder.name == "MME":
            names.add(id, pictures(picture))
        elif isinstance(id, int):
            names.add(id, names.generator.getrandbits(40))
        else:
            names.add(id, token[::-1])
    if folder.name == "mm-vet":
        for old, new in list(names.new.items()):
            names.add(f"v1_{old}", f"v1_{new}")
    if folder.name == "textvqa":
        for row in _read(folder / "expected.json")["per_question"]:
            names.add(row["id"], row["id"])


def _rename_files(folder: Path, names: Names, pictures: Names) -> None:
    """Pictures, and what is called like them, under their new names."""
    done = {}
    for old, new in pictures.new.items():
        for file in [path for path in folder.rglob(Path(old).name) if str(path).endswith(f"/{old}")]:
            done[file] = Path(str(file).removesuffix(old) + new)
        if folder.name == "MME":
            old_text, new_text = Path(old).with_suffix(".txt"), Path(new).with_suffix(".txt")
            home = folder / "MME_Benchmark_release_version"
            if "images" in old_text.parts:
                old_text, new_text = (
                    Path(str(path).replace("images", "questions_answers_YN")) for path in (old_text, new_text)
                )
            done[home / old_text] = home / new_text
    for old_file, new_file in done.items():
        new_file.parent.mkdir(parents=True, exist_ok=True)
        old_file.rename(new_file)


def _renamed(value: Any, names: Names, pictures: Names, key: str = "") -> Any:
    if isinstance(value, dict):
        return {
            names(name) if key != "question_type" else name: _renamed(entry, names, pictures, name)
            for name, entry in value.items()
        }
    if isinstance(value, list):
        return [_renamed(entry, names, pictures, key) for entry in value]
    if key in IDS or key == "test":
        return names(value)
    if key == "image":
        return pictures(value)
    if key == "image_id" and isinstance(value, str):
        return names(value)
    return value


def _in_order(folder: str, rows: list[Any], generator: random.Random) -> list[Any]:
    """Lines of questions, answers or labels."""
    if folder == "pope":  # by the new picture and the question: the same order of a category in all three files
        if "category" not in rows[0] and "label" not in rows[0]:
            return kept_within(rows, lambda row: row["question_id"], generator)
        rows = sorted(rows, key=lambda row: (row["image"], row["text"].split("\n")[0]))
        return rows if "label" in rows[0] else kept_within(rows, lambda row: row["category"], generator)
    if folder == "MME":
        ids = list(dict.fromkeys(row["question_id"] for row in rows))
        generator.shuffle(ids)
        return [row for id in ids for row in rows if row["question_id"] == id]
    return kept_within(rows, lambda row: row.get("question_id", row.get("index")), generator)


def _reordered(content: Any, folder: str, generator: random.Random) -> Any:
    """Lists of questions and labels in another order, and objects whose keys name them."""
    if isinstance(content, list):
        return kept_within(content, lambda row: row.get("id", row.get("image")), generator)
    for name in ("data", "questions", "annotations", "test"):
        if name in content:
            key = (lambda row: (row["image_id"], row["question"].lower())) if name == "data" else id
            return content | {name: kept_within(content[name], key, generator)}
    entries = list(content.items())
    generator.shuffle(entries)
    return dict(entries)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _write_lines(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
