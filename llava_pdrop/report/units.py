"""Numbers as a person would write them, and the share that one of them is less than another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import NamedTuple

MIB, GIB = 2**20, 2**30
"""Bytes in a MiB and in a GiB."""


class Unit(NamedTuple):
    """``name`` and what one of it is, in the base unit."""

    name: str
    size: float

    def text(self, value: float | None) -> str:
        """``value``, given in the base unit, to three digits; nothing for None."""
        return "" if value is None else digits(value / self.size)

    def spread(self, quartiles: Sequence[float]) -> str:
        """Median and quartiles; a dash where all are zero, nothing where there are none."""
        if not any(quartiles):
            return "-" if quartiles else ""
        first, median, third = map(self.text, quartiles)
        return f"{median} [{first}, {third}]"


TIME = (Unit("h", 3600.0), Unit("min", 60.0), Unit("s", 1.0), Unit("ms", 1e-3), Unit("µs", 1e-6))
"""Units of seconds, largest first."""

MEMORY = (Unit("GiB", GIB), Unit("MiB", MIB), Unit("KiB", 2**10))
"""Units of bytes, largest first."""

OPERATIONS = (Unit("TFLOP", 1e12), Unit("GFLOP", 1e9), Unit("MFLOP", 1e6))
"""Units of operations, largest first."""


def unit_of(values: Iterable[float | None], units: Sequence[Unit]) -> Unit:
    """The one of ``units`` in which figures side by side are read best: the largest that the largest of ``values`` has
    at least 1.5 of."""
    largest = max((abs(value) for value in values if value), default=1.5)
    return next((unit for unit in units if largest >= 1.5 * unit.size), units[-1])


def time_unit(seconds: Iterable[float | None]) -> Unit:
    """`unit_of` times."""
    return unit_of(seconds, TIME)


def column(title: str, values: Sequence[float | None], units: Sequence[Unit] = TIME) -> tuple[str, list[str]]:
    """(head, cells) of a column or row of a table: all in one unit, which the head names."""
    unit = unit_of(values, units)
    return f"{title}, {unit.name}", [unit.text(value) for value in values]


def time_text(seconds: float) -> str:
    """One time with its unit: ``62.6 ms``, ``26.9 s``, ``3.42 h``."""
    unit = time_unit([seconds])
    return f"{unit.text(seconds)} {unit.name}"


def digits(value: float | None) -> str:
    """``value`` to three significant digits, without an exponent: ``26,900``, ``26.9``, ``0.00269``; nothing for
    None."""
    if not value:
        return "" if value is None else "0"
    places = 2 - int(f"{value:.2e}".partition("e")[2])  # of the rounded value: 9.996 becomes 10.0
    return f"{round(value, places):,.{max(0, places)}f}"


def text_of(value: float | None, style: str) -> str:
    """``value`` for a cell of a table, by a format specification; nothing for None."""
    return "" if value is None else format(value, style)


def mean_and_error(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Mean and its standard error, by the standard deviation of the sample; 0.0 for one value. None where there is no
    value."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return fmean(known), stdev(known) / sqrt(len(known)) if len(known) > 1 else 0.0


def spread_of(values: Sequence[float | None], text: Callable[[float | None], str]) -> str:
    """A cell for ``values``, each written by ``text``: the value, of several their mean ± its standard error; nothing
    where there is none."""
    found, known = mean_and_error(values), sum(value is not None for value in values)
    if found is None:
        return ""
    return text(found[0]) + (f" ± {text(found[1])}" if known > 1 else "")


def saved(before: float, after: float) -> float:
    """Share of ``before`` that is saved where ``after`` is enough: 0.25 of 4 and 3, less than 0 where it takes more."""
    return 1 - after / before


def less(share: float, what: str = "") -> str:
    """A `saved` share in words, of ``what``: ``12.3% less time``, ``0.6% more time``."""
    return f"{abs(share):.1%} {'less' if share >= 0 else 'more'} {what}".rstrip()
