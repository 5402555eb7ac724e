"""Keys that cancel each other: the one nearer to the user wins, and one line says so.

Nearer is a file than what it inherits, and the command line than all files. Without this an inherited
``train.max_steps`` would silently outdo the ``train.num_train_epochs`` that somebody has just given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_pdrop.world import is_first

log = logging.getLogger(__name__)

_said: set[str] = set()


@dataclass(frozen=True)
class Rivals:
    """``key`` has no effect while ``rival`` has a value that ``cancels`` it; ``off`` is the value that does not."""

    key: str
    rival: str
    cancels: Callable[[Any], bool]
    off: Any


def _above_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _constant(value: Any) -> bool:
    return value == "constant"


def _not_steps(value: Any) -> bool:
    return value in ("no", "epoch", False)


RIVALS = (
    Rivals("train.num_train_epochs", "train.max_steps", _above_zero, -1),
    Rivals("train.save_steps", "train.save_strategy", _not_steps, "steps"),
    Rivals("train.warmup_steps", "train.lr_scheduler_type", _constant, "constant_with_warmup"),
    Rivals("train.logging_steps", "train.logging_strategy", _not_steps, "steps"),
)

Layers = Sequence[tuple[str, Mapping[str, Any]]]


def settle(merged: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """``merged``, all ``layers`` (the deepest base first) in one, with every rival switched off over which a key wins.
    Who wins over a key that somebody has given is said."""
    for pair in RIVALS:
        section, key = pair.key.split(".")
        rival = pair.rival.split(".")[1]
        part = merged.get(section)
        if not isinstance(part, dict) or part.get(key) is None or not pair.cancels(part.get(rival)):
            continue
        given, other = _where(layers, section, key), _where(layers, section, rival)
        if given > other:
            _say(
                f"{pair.key}={part[key]} ({_name(layers, given)})", f"{pair.rival}={part[rival]}", _name(layers, other)
            )
            part = {**part, rival: pair.off}
            merged = {**merged, section: part}
        elif pair.rival == "train.max_steps":  # who saves or logs nothing wants that, whatever is inherited
            _say(
                f"{pair.rival}={part[rival]} ({_name(layers, other)})", f"{pair.key}={part[key]}", _name(layers, given)
            )
    return merged


def _where(layers: Layers, section: str, key: str) -> int:
    """The number of the nearest layer that sets a key."""
    setting = [n for n, (_, layer) in enumerate(layers) if key in (layer.get(section) or {})]
    return max(setting, default=-1)


def _name(layers: Layers, number: int) -> str:
    return layers[number][0]


def _say(winner: str, loser: str, where: str) -> None:
    """Once a program, however often the config is read, on its first rank."""
    line = f"{winner} wins over {loser} ({where}), which has no effect"
    if line not in _said and is_first():
        log.warning("%s", line)
    _said.add(line)
