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
    """A ``key`` of ``train`` has no effect while its ``rival`` has a value that ``cancels`` it; ``off`` does not."""

    key: str
    rival: str
    cancels: Callable[[Any], bool]
    off: Any


def _not_steps(value: Any) -> bool:
    return value in ("no", "epoch", False)


RIVALS = (
    Rivals("num_train_epochs", "max_steps", lambda value: isinstance(value, int | float) and value > 0, -1),
    Rivals("save_steps", "save_strategy", _not_steps, "steps"),
    Rivals("warmup_steps", "lr_scheduler_type", lambda value: value == "constant", "constant_with_warmup"),
    Rivals("logging_steps", "logging_strategy", _not_steps, "steps"),
)

Layers = Sequence[tuple[str, Mapping[str, Any]]]


def settle(merged: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """``merged``, all ``layers`` (the deepest base first) in one, with every rival switched off over which a key wins.
    Who wins over a key that somebody has given is said."""
    if not isinstance(merged.get("train"), dict):
        return merged
    train = dict(merged["train"])
    for pair in RIVALS:
        if train.get(pair.key) is None or not pair.cancels(train.get(pair.rival)):
            continue
        given, other = _nearest(layers, pair.key), _nearest(layers, pair.rival)
        key = f"train.{pair.key}={train[pair.key]} ({layers[given][0]})"
        rival = f"train.{pair.rival}={train[pair.rival]} ({layers[other][0]})"
        if given > other:
            _say(key, rival)
            train[pair.rival] = pair.off
        elif pair.rival == "max_steps":  # who saves or logs nothing wants that, whatever is inherited
            _say(rival, key)
    return {**merged, "train": train}


def _nearest(layers: Layers, key: str) -> int:
    """The number of the nearest layer that sets a key of ``train``."""
    return max((n for n, (_, layer) in enumerate(layers) if key in (layer.get("train") or {})), default=-1)


def _say(winner: str, loser: str) -> None:
    """Once a program, however often the config is read, on its first rank."""
    line = f"{winner} wins over {loser}, which has no effect"
    if line not in _said and is_first():
        log.warning("%s", line)
    _said.add(line)
