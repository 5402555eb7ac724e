"""One budget for several schedules: the same average number of image tokens, so that what they keep is compared and not
how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_pdrop.compare.entries import Entry, load_entry, words_of
from llava_pdrop.config.presets import KEY
from llava_pdrop.config.schema import Config
from llava_pdrop.cost.nominal import full_picture, model_of
from llava_pdrop.cost.paper import solve_shape
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.schedule import Schedule

NEAR = 0.5
"""A schedule that averages the budget to so many image tokens is left as it is."""

OWN, SAME = "own", "same"
"""Entries of ``budgets``: the schedules as they are written; the average of the base's."""


@dataclass(frozen=True)
class Budget:
    """An average number of image tokens over the decoder layers, of a picture that fills every tile; None: what each
    schedule has itself."""

    tokens: float | None = None

    @property
    def title(self) -> str:
        """Of the table of its rows."""
        return "Variants" if self.tokens is None else f"At {self.tokens:g} image tokens on average"


def average_tokens(config: Config) -> float:
    """Image tokens per decoder layer of a picture that fills every tile.

    Raises:
        ConfigError: the sizes of the model are not known here.
    """
    model, schedule = model_of(config), config.schedule
    n = model.geometry.num_tokens(full_picture(model.geometry), schedule.downsample)
    return model.average_tokens(n, schedule.check(model.layers))


def at_budget(config: Config, tokens: float) -> Schedule:
    """The schedule of ``config`` with ratios that average at most ``tokens`` image tokens, and as near to that as whole
    tokens allow: see `solve_shape`. Pooling without drops takes the largest square grid that is not above it. What has
    that average already, or drops nothing, stays as it is.

    Raises:
        UserError: no ratios at its layers do that.
        ConfigError: the sizes of the model are not known here.
    """
    schedule, model = config.schedule, model_of(config)
    if schedule.vanilla or abs(average_tokens(config) - tokens) <= NEAR:
        return schedule
    full = full_picture(model.geometry)
    if not schedule.layers:
        for side in range(model.geometry.patches_per_side, 0, -1):
            if model.geometry.num_tokens(full, side**2) <= tokens:
                return replace(schedule, downsample=side**2)
        raise UserError(f"one feature a tile is more than {tokens:g} image tokens")
    n = model.geometry.num_tokens(full, schedule.downsample)
    solution = solve_shape(lambda tried: model.average_tokens(n, tried), tokens, n, model.layers, schedule)
    return solution.schedule


def counts(config: Config) -> tuple[Any, ...]:
    """What two runs have in common that keep equally many tokens of equal choice in every layer, and are alike besides:
    ratios that differ behind the point keep the same."""
    model, schedule = model_of(config), config.schedule
    n = model.geometry.num_tokens(full_picture(model.geometry), schedule.downsample)
    pooled = model.geometry.features(schedule.downsample) if schedule.downsample else 0
    alike = replace(schedule, ratios=(0.0,) * len(schedule.layers), keep=(), downsample=pooled)
    other = replace(config, name="", output_dir="", paper=None, pyramid_drop=alike)
    return other, tuple(schedule.tokens_per_layer(n, model.layers))


@dataclass(frozen=True)
class BudgetRow:
    """A row of the table: runs that differ in their seed only."""

    name: str
    base: str
    words: Sequence[str]
    config: Config
    seeds: tuple[int, ...]
    budgets: tuple[Budget, ...]


def rows_of(
    path: Path, entries: Sequence[Entry], whole: Sequence[str], base: Config
) -> tuple[list[BudgetRow], tuple[Budget, ...], tuple[str, ...]]:
    """Every entry at each of its budgets. What is run already, because ratios come out alike, is not run again.

    Args:
        whole: words that replace the model, if a checkpoint is evaluated.
        base: gives the average number of image tokens where a budget is `SAME`.

    Returns:
        the rows, the budgets, and sentences on which entries are one row.

    Raises:
        ConfigError: an entry is wrong, or cannot have a budget.
    """
    for entry in entries:
        if entry.seeds and any(word.startswith("seed=") for word in entry.words):
            raise ConfigError(f"{path}: {entry.name}: has seeds, and a seed: give one of the two")
    configs = {entry.name: load_entry(path, entry.name, entry.base, [*entry.words, *whole]) for entry in entries}
    same = Budget(average_tokens(base)) if any(SAME in entry.budgets for entry in entries) else Budget()
    if same.tokens and base.schedule.vanilla:
        raise ConfigError(f"{path}: budgets: {SAME}: the base drops nothing: give a number of image tokens")
    fixed = {OWN: Budget(), SAME: same}
    wanted = {
        entry.name: [fixed[each] if isinstance(each, str) else Budget(each) for each in entry.budgets]
        for entry in entries
    }
    found = {each for row in wanted.values() for each in row}
    budgets = sorted(found, key=lambda each: each.tokens or 0.0)  # schedules as they are written come first
    rows, notes = list[BudgetRow](), list[str]()
    for budget in budgets:
        for entry in entries:
            config = configs[entry.name]
            row = BudgetRow(entry.name, entry.base, entry.words, config, entry.seeds, (budget,))
            if config.schedule.vanilla:  # stands beside whatever others keep
                rows += [replace(row, budgets=tuple(budgets))] if budget == budgets[0] else []
                continue
            if budget not in wanted[entry.name]:
                continue
            if budget.tokens is not None:
                row = _solved(path, row, budget, whole)
                alike = [counts(other.config) == counts(row.config) for other in rows]
                if any(alike):
                    twin = rows[place := alike.index(True)]
                    rows[place] = replace(twin, budgets=tuple(dict.fromkeys((*twin.budgets, budget))))
                    if twin.name not in (entry.name, row.name):
                        notes.append(f"{entry.name} at {budget.tokens:g} image tokens is {twin.name}.")
                    continue
            rows.append(row)
    return rows, tuple(budgets), tuple(notes)


def _solved(path: Path, row: BudgetRow, budget: Budget, whole: Sequence[str]) -> BudgetRow:
    """``row`` with the ratios that have the ``budget``; as it is, where its own have."""
    assert budget.tokens is not None
    own = row.config.schedule
    try:
        schedule = at_budget(row.config, budget.tokens)
    except UserError as error:
        raise ConfigError(
            f"{path}: {row.name}: budgets: {budget.tokens:g} image tokens on average: {error} (budgets: [own] in this "
            "variant leaves it out)"
        ) from None
    if schedule == own:
        return row
    changes = {key: value for key, value in schedule.to_dict().items() if value != own.to_dict().get(key)}
    changes |= {"keep": []} if own.keep else {}
    words = [*row.words, *words_of({KEY: changes})]
    name = f"{row.name}-at_{budget.tokens:g}"
    return replace(row, name=name, words=words, config=load_entry(path, name, row.base, [*words, *whole]))
