"""An ablation is a YAML file: a config, and what is changed in it, by name (``variants``) or as a product (``grid``).

base: ../tiny/finetune_pdrop.yaml
seeds: [0, 1, 2]
budgets: [own, same]
variants:
  vanilla: {pyramid_drop: null}
  lambda_04: ../tiny/another_config.yaml
  hidrop: {pyramid_drop: configs/schedules/hidrop.yaml, seeds: [0]}
grid:
  pyramid_drop.ratios: [[0.5, 0.25, 0.125], [0.6, 0.36, 0.216]]
  pyramid_drop.ranker: [last_instruction, random]
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from llava_pdrop.compare.budgets import Budget, rows_of
from llava_pdrop.compare.entries import SET_HERE, Entry, beside, entries_of, load_entry, under_null
from llava_pdrop.config.load import OVERRIDES
from llava_pdrop.config.paths import missing_model
from llava_pdrop.config.places import expanded
from llava_pdrop.config.schema import AblationFile, Config
from llava_pdrop.config.values import convert_fields, hints_of, read_mapping
from llava_pdrop.errors import ConfigError, Problem, did_you_mean, first_line

VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Names of variants, which are names of directories too."""

OF_THE_ABLATION = ("checkpoint", "seeds", "budgets", "also_training_free")
"""Words of the command line, besides `SET_HERE`, that are keys of the ablation and not of its runs."""


@dataclass(frozen=True)
class Variant:
    """One run of an ablation: where it is trained, ``llava-pdrop train`` with ``words`` is the same run.

    Attributes:
        row: what tables call it: runs that differ in their seed only are one row.
        budgets: in whose tables it stands.
    """

    name: str
    words: tuple[str, ...]
    config: Config
    row: str
    budgets: tuple[Budget, ...] = (Budget(),)


@dataclass(frozen=True)
class Ablation:
    """Without ``checkpoint`` every variant is trained; with one, that model is evaluated with every schedule.

    Attributes:
        budgets: a table each.
        notes: which variants are one run at a budget.
    """

    file: str
    name: str
    output_dir: Path
    checkpoint: str | None
    variants: tuple[Variant, ...]
    budgets: tuple[Budget, ...] = (Budget(),)
    also_training_free: bool = False
    notes: tuple[str, ...] = ()


def load_ablation(path: str | Path, overrides: Sequence[str] = ()) -> Ablation:
    """Reads the ablation ``path`` with the config of every variant.

    Args:
        overrides: ``key=value`` for all variants; `SET_HERE` and `OF_THE_ABLATION` are the ablation's own.

    Raises:
        ConfigError: the file or a variant is wrong; one line that names file, variant and key.
    """
    path = Path(os.path.expanduser(path))
    ours = (*SET_HERE, *OF_THE_ABLATION)
    own = {name: word for word in overrides for name in [word.partition("=")[0]] if name in ours}
    common = [word for word in overrides if word not in own.values()]
    given = {name: _own_value(name, word.partition("=")[2]) for name, word in own.items()}
    file = _read(path, given)
    name = file.name or f"{path.parent.name}/{path.stem}"
    output_dir = Path(file.output_dir or f"checkpoints/{name}")
    problem = missing_model(file.checkpoint) if file.checkpoint is not None else None
    if problem:
        raise ConfigError(f"{path}: checkpoint: {problem}")
    whole = _of_checkpoint(file.checkpoint) if file.checkpoint is not None else []
    base = load_entry(path, None, beside(path, file.base), [*common, *whole])  # what is wrong for all is said once

    entries = list[Entry]()
    for entry in entries_of(path, file):
        if not VARIANT_NAME.fullmatch(entry.name):
            raise ConfigError(f"{path}: {entry.name!r} cannot name a directory: use letters, digits and . _ -")
        if any(entry.name == other.name for other in entries):
            raise ConfigError(f"{path}: two variants are called {entry.name!r}: rename one of them")
        words = [*entry.words, *under_null(common, entry.words)]
        named = {key: getattr(file, key) for key in ("seeds", "budgets") if key in given}  # nearer than the file
        entries.append(replace(entry, base=beside(path, entry.base), words=words, **named))
    rows, budgets, notes = rows_of(path, entries, whole, base)
    variants: dict[str, Variant] = {}
    for row in rows:
        for seed in row.seeds or (row.config.seed,):
            run, words = row.name, list(row.words)
            if seed != row.config.seed:
                run, words = f"{row.name}-seed_{seed}", [*words, f"seed={seed}"]
            if words and file.checkpoint is None:  # a config as it stands is its own run, in its own directory
                words += [f"name={name}/{run}", f"output_dir={output_dir / run}"]
            if run in variants:
                raise ConfigError(f"{path}: two variants are called {run!r}: rename one of them")
            config = load_entry(path, row.name, row.base, [*words, *whole])
            variants[run] = Variant(run, (row.base, *words), config, row.name, row.budgets)
    made = tuple(variants.values())
    _check_different(path, made)
    if file.checkpoint is not None:
        _check_schedules_only(path, made)
    if file.also_training_free:
        _check_training_free(path, file, made)
    return Ablation(str(path), name, output_dir, file.checkpoint, made, budgets, file.also_training_free, notes)


def _own_value(key: str, text: str) -> Any:
    """A word of the command line for a key of the ablation."""
    if text in ("", "null"):
        return None
    if key in (*SET_HERE, "checkpoint"):
        return text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={text}"]))[key]  # type: ignore[index,call-overload]
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{OVERRIDES}: {key}={text}: {first_line(error)}") from None


def _read(path: Path, own: Mapping[str, Any]) -> AblationFile:
    if not path.is_file():
        raise ConfigError(f"no ablation file {path}{did_you_mean(str(path), map(str, path.parent.glob('*.yaml')))}")
    content = read_mapping(path, resolve=True, wanted="an ablation")
    if not content.get("variants") and not content.get("grid"):
        raise ConfigError(
            f"{path}: neither variants nor grid, so it is no ablation: llava-pdrop train {path} for one run, or write "
            "what is to be changed into a file with it as base: (configs/README.md)"
        )
    try:
        merged = {key: value for key, value in {**content, **own}.items() if value is not None or key not in own}
        fields = convert_fields(merged, AblationFile, "")
        paths = [name for name in ("base", "output_dir", "checkpoint") if fields.get(name) is not None]
        return AblationFile(**fields | {name: expanded(name, str(fields[name])) for name in paths})
    except Problem as problem:
        hint = did_you_mean(problem.key, hints_of(AblationFile)) if problem.unknown else ""
        raise ConfigError(f"{path}: {problem}{hint}") from None


def _of_checkpoint(checkpoint: str) -> list[str]:
    """A config's model is taken from ``checkpoint``, whole."""
    parts = ("language_model", "vision_tower", "projector")
    return [f"model.path={checkpoint}", *(f"model.{part}=null" for part in parts), "pretrain=null"]


def _check_different(path: Path, variants: Sequence[Variant]) -> None:
    runs = [(variant.name, replace(variant.config, name="", output_dir="", paper=None)) for variant in variants]
    for (name, run), (other, same) in combinations(runs, 2):
        if run == same:
            raise ConfigError(f"{path}: {name} and {other} are the same run: take one of them away")


def _check_training_free(path: Path, file: AblationFile, variants: Sequence[Variant]) -> None:
    """The schedules of all others can be tried on the runs of one variant without drops."""
    key = f"{path}: also_training_free"
    if file.checkpoint is not None:
        raise ConfigError(f"{key}: with checkpoint= nothing is trained, so every row is training-free: leave it out")
    rows = {variant.row for variant in variants if variant.config.schedule.vanilla}
    if len(rows) != 1:
        raise ConfigError(
            f"{key}: wants one variant without drops, such as vanilla: {{pyramid_drop: null}}, on whose runs the "
            f"others' schedules are tried: there are {len(rows)}"
        )
    models = {variant.config.seed: variant for variant in variants if variant.row in rows}
    for variant in variants:
        if "_on_" in variant.name:
            raise ConfigError(
                f"{key}: {variant.row} has _on_ in its name, as files of answers have where a schedule is tried on "
                "another run: rename it"
            )
        model = models.get(variant.config.seed)
        if model is None:
            raise ConfigError(
                f"{key}: {variant.row} has seed {variant.config.seed}, which {rows.pop()} has not: add it"
            )
        if model.config.model != variant.config.model:
            raise ConfigError(f"{key}: {variant.row}: its model is not that of {model.row}: leave it out")


def _check_schedules_only(path: Path, variants: Sequence[Variant]) -> None:
    """One checkpoint can be evaluated with other schedules, and with nothing else that is other."""
    theirs = ("file", "name", "output_dir", "pyramid_drop", "paper", "compare")
    shared = [entry.name for entry in fields(Config) if entry.name not in theirs]
    first = variants[0].config
    for variant in variants:
        other = [name for name in shared if getattr(variant.config, name) != getattr(first, name)]
        if other:
            raise ConfigError(
                f"{path}: {variant.name}: {', '.join(other)} is not as in {variants[0].name}, but with checkpoint= "
                "nothing is trained: only pyramid_drop may differ"
            )
