"""Numbers as a person would write them."""

from __future__ import annotations

from collections.abc import Iterable
from math import floor, log10
from typing import NamedTuple

GIB = 2**30
"""Bytes in a GiB."""


class Unit(NamedTuple):
    """``name`` and what one of it is, in the base unit."""

    name: str
    size: float

    def text(self, value: float) -> str:
        """``value``, given in the base unit, to three digits."""
        return digits(value / self.size)


TIME = (Unit("h", 3600.0), Unit("min", 60.0), Unit("s", 1.0), Unit("ms", 1e-3), Unit("µs", 1e-6))
"""Units of seconds, largest first."""


def time_unit(seconds: Iterable[float]) -> Unit:
    """The unit in which figures side by side are read best: the largest one that the largest of ``seconds`` has at
    least 1.5 of."""
    largest = max(map(abs, seconds), default=1.0)
    return next((unit for unit in TIME if largest >= 1.5 * unit.size), TIME[-1] if largest else TIME[2])


def time_text(seconds: float) -> str:
    """One time with its unit: ``62.6 ms``, ``26.9 s``, ``3.42 h``."""
    unit = time_unit([seconds])
    return f"{unit.text(seconds)} {unit.name}"


def digits(value: float, count: int = 3) -> str:
    """``value`` to ``count`` significant digits, without an exponent: ``26,900``, ``26.9``, ``0.00269``."""
    if not value:
        return "0"
    places = count - 1 - floor(log10(abs(value)))
    rounded = round(value, places)
    places = count - 1 - floor(log10(abs(rounded)))  # 9.996 has become 10.0
    return f"{rounded:,.{max(0, places)}f}"


def text_of(value: float | None, style: str) -> str:
    """``value`` for a cell of a table, by a format specification; nothing for None."""
    return "" if value is None else format(value, style)
