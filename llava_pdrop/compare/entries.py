"""What the file of an ablation says of its variants: a config each, and words that change it."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_pdrop.config.load import OVERRIDES, load_config
from llava_pdrop.config.schema import AblationFile, Config, check_budgets, check_seeds
from llava_pdrop.config.values import convert, hints_of
from llava_pdrop.errors import ConfigError, Problem

SET_HERE = ("name", "output_dir")
"""Keys of a run that an ablation gives to its variants."""


CHECKS = {"seeds": check_seeds, "budgets": check_budgets}
"""Keys of an ablation that a variant may have too."""


@dataclass(frozen=True)
class Entry:
    """What the file says of one variant, or of one point of the grid: a config and words that change it; seeds (none:
    the config's) and budgets."""

    name: str
    base: str
    words: Sequence[str]
    seeds: tuple[int, ...]
    budgets: tuple[str | float, ...]


def entries_of(path: Path, file: AblationFile) -> Iterator[Entry]:
    """Every variant, then every point of the grid."""
    for name, entry in file.variants.items():
        changes = {"base": entry} if isinstance(entry, str) else entry
        if not isinstance(changes, dict):
            raise ConfigError(
                f"{path}: variants.{name} must be keys to change, such as {{seed: 1}}, or a config: {entry!r}"
            )
        for key in SET_HERE:
            if key in changes:
                raise ConfigError(f"{path}: variants.{name}.{key}: is the ablation's to give: leave it out")
        rest = {key: value for key, value in changes.items() if key not in ("base", *CHECKS)}
        own = {key: _own(path, name, key, changes[key]) for key in CHECKS if key in changes}
        own = {"seeds": file.seeds, "budgets": file.budgets, **own}
        yield Entry(str(name), str(changes.get("base", file.base)), list(words_of(rest)), **own)
    for key, values in file.grid.items():
        if key in (*SET_HERE, "base"):
            raise ConfigError(f"{path}: grid.{key}: names no setting to vary: use variants")
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: grid.{key} must be a list of one value or more, got {values!r}")
    for point in itertools.product(*file.grid.values()) if file.grid else ():
        changes = dict(zip(file.grid, point))
        name = "-".join(f"{str(key).rsplit('.', 1)[-1]}_{_slug(value)}" for key, value in changes.items())
        words = list(words_of(changes))
        yield Entry(name, file.base, under_null(words, words), file.seeds, file.budgets)


def _own(path: Path, variant: str, key: str, value: Any) -> Any:
    """A variant's own ``seeds`` or ``budgets``."""
    try:
        found = convert(value, hints_of(AblationFile)[key], f"variants.{variant}.{key}")
        CHECKS[key](found, f"variants.{variant}.{key}")
    except Problem as problem:
        raise ConfigError(f"{path}: {problem}") from None
    return found


def words_of(changes: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Nested or dotted keys as ``a.b=value``."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and value:
            yield from words_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value, separators=(',', ':'))}"


def under_null(words: Sequence[str], own: Sequence[str]) -> list[str]:
    """``words`` less those below a key that ``own`` take away: a variant with ``pyramid_drop=null`` stays vanilla
    whatever the ranker of the others is. (What stands below it in the variant itself is a section anew.)"""
    null = tuple(word.removesuffix("=null") + "." for word in own if word.endswith("=null"))
    return [word for word in words if not word.startswith(null)]


def _slug(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")


def beside(path: Path, name: str) -> str:
    return os.path.normpath(path.parent / name)


def load_entry(path: Path, variant: str | None, file: str, words: Sequence[str]) -> Config:
    """The config ``file`` with ``words``, those of the command line alone where it is for no ``variant``."""
    try:
        return load_config(file, words)
    except ConfigError as error:
        if variant is None and str(error).startswith(f"{OVERRIDES}: "):
            raise
        raise ConfigError(f"{path}: {variant or 'base'}: {str(error).removeprefix(f'{OVERRIDES}: ')}") from None
