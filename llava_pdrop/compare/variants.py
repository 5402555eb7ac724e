"""An ablation is a YAML file: a config, and what is changed in it, by name (``variants``) or as a product (``grid``).

base: ../tiny/finetune_pdrop.yaml
variants:
  vanilla: {pyramid_drop: null}
  lambda_04: ../tiny/another_config.yaml
grid:
  pyramid_drop.ratios: [[0.5, 0.25, 0.125], [0.6, 0.36, 0.216]]
  pyramid_drop.ranker: [last_instruction, random]
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from llava_pdrop.config.load import OVERRIDES, load_config
from llava_pdrop.config.paths import missing_model
from llava_pdrop.config.places import expanded
from llava_pdrop.config.schema import AblationFile, CompareSection, Config
from llava_pdrop.config.values import convert_fields, hints_of, read_mapping
from llava_pdrop.errors import ConfigError, Problem, did_you_mean

VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Names of variants, which are names of directories too."""

SET_HERE = ("name", "output_dir")
"""Keys of a run that an ablation gives to its variants."""


@dataclass(frozen=True)
class Variant:
    """One run of an ablation: where it is trained, ``llava-pdrop train`` with ``words`` is the same run."""

    name: str
    words: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Ablation:
    """Without ``checkpoint`` every variant is trained; with one, that model is evaluated with every schedule."""

    file: str
    name: str
    output_dir: Path
    checkpoint: str | None
    variants: tuple[Variant, ...]


def load_ablation(path: str | Path, overrides: Sequence[str] = ()) -> Ablation:
    """Reads the ablation ``path`` with the config of every variant.

    Args:
        overrides: ``key=value`` for all variants; ``name``, ``output_dir`` and ``checkpoint`` are the ablation's own.

    Raises:
        ConfigError: the file or a variant is wrong; one line that names file, variant and key.
    """
    path = Path(os.path.expanduser(path))
    own = {name: word for word in overrides for name in [word.partition("=")[0]] if name in (*SET_HERE, "checkpoint")}
    common = [word for word in overrides if word not in own.values()]
    given = {name: word.partition("=")[2] for name, word in own.items()}
    file = _read(path, {name: None if value in ("", "null") else value for name, value in given.items()})
    name = file.name or f"{path.parent.name}/{path.stem}"
    output_dir = Path(file.output_dir or f"checkpoints/{name}")
    problem = missing_model(file.checkpoint) if file.checkpoint is not None else None
    if problem:
        raise ConfigError(f"{path}: checkpoint: {problem}")
    _load(path, None, _beside(path, file.base), common)  # what is wrong for all is said once

    variants: dict[str, Variant] = {}
    for variant, base, changes in _all_changes(path, file):
        if not VARIANT_NAME.fullmatch(variant):
            raise ConfigError(f"{path}: {variant!r} cannot name a directory: use letters, digits and . _ -")
        if variant in variants:
            raise ConfigError(f"{path}: two variants are called {variant!r}: rename one of them")
        config_file = _beside(path, base)
        words = _without_what_is_null([*changes, *common])
        if words and file.checkpoint is None:  # a config as it stands is its own run, in its own directory
            words += [f"name={name}/{variant}", f"output_dir={output_dir / variant}"]
        whole = _of_checkpoint(file.checkpoint) if file.checkpoint is not None else []
        config = _load(path, variant, config_file, [*words, *whole])
        variants[variant] = Variant(variant, (config_file, *words), config)
    _check_different(path, list(variants.values()))
    if file.checkpoint is not None:
        _check_schedules_only(path, list(variants.values()))
    return Ablation(str(path), name, output_dir, file.checkpoint, tuple(variants.values()))


def _read(path: Path, own: Mapping[str, str | None]) -> AblationFile:
    if not path.is_file():
        raise ConfigError(f"no ablation file {path}{did_you_mean(str(path), map(str, path.parent.glob('*.yaml')))}")
    content = read_mapping(path, resolve=True, wanted="an ablation")
    if not content.get("variants") and not content.get("grid"):
        raise ConfigError(
            f"{path}: neither variants nor grid, so it is no ablation: llava-pdrop train {path} for one run, or write "
            "what is to be changed into a file with it as base: (configs/README.md)"
        )
    try:
        fields = {**convert_fields(content, AblationFile, ""), **own}
        paths = [name for name in ("base", "output_dir", "checkpoint") if fields.get(name) is not None]
        return AblationFile(**fields | {name: expanded(name, str(fields[name])) for name in paths})
    except Problem as problem:
        hint = did_you_mean(problem.key, hints_of(AblationFile)) if problem.unknown else ""
        raise ConfigError(f"{path}: {problem}{hint}") from None


def _all_changes(path: Path, file: AblationFile) -> Iterator[tuple[str, str, list[str]]]:
    """(name, config, words that change it) of every variant, then of every point of the grid."""
    for name, entry in file.variants.items():
        changes = {"base": entry} if isinstance(entry, str) else entry
        if not isinstance(changes, dict):
            raise ConfigError(
                f"{path}: variants.{name} must be keys to change, such as {{seed: 1}}, or a config: {entry!r}"
            )
        for key in SET_HERE:
            if key in changes:
                raise ConfigError(f"{path}: variants.{name}.{key}: is the ablation's to give: leave it out")
        rest = {key: value for key, value in changes.items() if key != "base"}
        yield str(name), str(changes.get("base", file.base)), list(_words(rest))
    for key, values in file.grid.items():
        if key in (*SET_HERE, "base"):
            raise ConfigError(f"{path}: grid.{key}: names no setting to vary: use variants")
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: grid.{key} must be a list of one value or more, got {values!r}")
    for point in itertools.product(*file.grid.values()) if file.grid else ():
        changes = dict(zip(file.grid, point))
        name = "-".join(f"{str(key).rsplit('.', 1)[-1]}_{_slug(value)}" for key, value in changes.items())
        yield name, file.base, list(_words(changes))


def _words(changes: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Nested or dotted keys as ``a.b=value``."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and value:
            yield from _words(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value, separators=(',', ':'))}"


def _without_what_is_null(words: Sequence[str]) -> list[str]:
    """``words`` less those below a key that is taken away: a variant with ``pyramid_drop=null`` stays vanilla whatever
    the ranker of the others is."""
    null = tuple(word.removesuffix("=null") + "." for word in words if word.endswith("=null"))
    return [word for word in words if not word.startswith(null)]


def _slug(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")


def _beside(path: Path, name: str) -> str:
    return os.path.normpath(path.parent / name)


def _of_checkpoint(checkpoint: str) -> list[str]:
    """A config's model is taken from ``checkpoint``, whole."""
    parts = ("language_model", "vision_tower", "projector")
    return [f"model.path={checkpoint}", *(f"model.{part}=null" for part in parts), "pretrain=null"]


def _load(path: Path, variant: str | None, file: str, words: Sequence[str]) -> Config:
    """The config ``file`` with ``words``, those of the command line alone where it is for no ``variant``."""
    try:
        return load_config(file, words)
    except ConfigError as error:
        if variant is None and str(error).startswith(f"{OVERRIDES}: "):
            raise
        raise ConfigError(f"{path}: {variant or 'base'}: {str(error).removeprefix(f'{OVERRIDES}: ')}") from None


def _check_different(path: Path, variants: Sequence[Variant]) -> None:
    seen: list[tuple[str, Config]] = []
    for variant in variants:
        run = replace(variant.config, name="", output_dir="", paper=None)
        for name, other in seen:
            if run == other:
                raise ConfigError(f"{path}: {name} and {variant.name} are the same run: take one of them away")
        seen.append((variant.name, run))


def _check_schedules_only(path: Path, variants: Sequence[Variant]) -> None:
    """One checkpoint can be evaluated with other schedules, and with nothing else that is other."""
    first = _but_schedule(variants[0].config)
    for variant in variants:
        run = _but_schedule(variant.config)
        other = [entry.name for entry in fields(Config) if getattr(run, entry.name) != getattr(first, entry.name)]
        other = [name for name in other if name != "file"]
        if other:
            raise ConfigError(
                f"{path}: {variant.name}: {', '.join(other)} is not as in {variants[0].name}, but with checkpoint= "
                "nothing is trained: only pyramid_drop may differ"
            )


def _but_schedule(config: Config) -> Config:
    return replace(config, name="", output_dir="", pyramid_drop=None, paper=None, compare=CompareSection())
