"""A small set in POPE's official layout, of pictures that are at hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

CATEGORIES = ("random", "popular", "adversarial")


def write_pope(root: Path, pictures: Sequence[Path], questions: int = 6) -> Path:
    """Writes ``root/pope``, its questions in turn about ``pictures``, half of them to be answered with yes."""
    home, rows = root / "pope", []
    labels: dict[str, list[dict]] = {name: [] for name in CATEGORIES}
    (home / "val2014").mkdir(parents=True)
    (home / "coco").mkdir()
    for picture in pictures:
        shutil.copyfile(picture, home / "val2014" / picture.name)
    for number in range(questions):
        name, image = CATEGORIES[number % 3], pictures[number % len(pictures)].name if pictures else "none.png"
        text = f"Is there a thing {number} in the image?"
        labels[name].append({"image": image, "text": text, "label": "yes" if number < questions // 2 else "no"})
        prompt = f"{text}\nAnswer the question using a single word or phrase."
        rows.append({"question_id": number, "image": image, "text": prompt, "category": name})
    (home / "llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, own in labels.items():
        (home / "coco" / f"coco_pope_{name}.json").write_text("".join(json.dumps(row) + "\n" for row in own))
    return root
