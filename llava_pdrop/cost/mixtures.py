"""The training mixtures of LLaVA-1.5 and Open-LLaVA-NeXT: samples, pictures, turns and tokens of every set. Each number
stands in ``mixtures.yaml`` beside this file, with its source or the word "estimate"."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_pdrop.geometry import Size


@dataclass(frozen=True)
class Component:
    """One data set of a mixture.

    Attributes:
        thousands: samples, in thousands.
        pictures: ((width, height), weight) of its pictures; empty: text only.
        turns: least and most questions of a sample, all counts between being equally likely.
        question, answer: mean text tokens of each.
    """

    name: str
    thousands: float
    pictures: tuple[tuple[Size, float], ...]
    turns: tuple[int, int]
    question: float
    answer: float


def _components(rows: list[dict[str, Any]], kinds: dict[str, list[Any]]) -> tuple[Component, ...]:
    """Of a list in the file, whose pictures name ``kinds``."""
    found = []
    for row in rows:
        pictures = tuple(
            ((width, height), weight) for kind in row["pictures"] for (width, height), weight in kinds[kind]
        )
        least, most = row["turns"]
        found.append(Component(**{**row, "pictures": pictures, "turns": (least, most)}))
    return tuple(found)


_FILE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))

LLAVA_15 = _components(_FILE["llava_15"], _FILE["pictures"])
"""The 665K samples that LLaVA-1.5 is tuned on."""

OPEN_LLAVA_NEXT = (*LLAVA_15, *_components(_FILE["open_llava_next"], _FILE["pictures"]))
"""The 1M samples that Open-LLaVA-NeXT is tuned on."""
