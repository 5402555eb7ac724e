"""Several data files as one: a YAML file that names parts, how much of each, and how they are to be read.

    parts:
      - path: llava_v1_5_mix665k.json     # relative to this file, as all paths here
        image_root: images
      - path: sharegpt4v                  # parquet files
        limit: random:20%                 # or first:5000, last:10%
        repeat: 2                         # every record twice per epoch; 1.5: once, and half of them a second time
        template: llama_3

With ``weight`` instead of ``repeat`` (in all parts), a part has that share of an epoch of ``size`` records; by default
``size`` is the number of records of all parts after their limits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from llava_pdrop.config.places import expanded
from llava_pdrop.config.values import convert_fields, keys_of, nearest_key
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.readers import READERS
from llava_pdrop.data.records import DataPart, Records
from llava_pdrop.errors import ConfigError, MissingFileError, Problem, UserError, check_name, clip

SUFFIXES = (".yaml", ".yml")
"""A data file with one of these is a mixture."""

LIMIT = re.compile(r"(first|last|random):(\d+(?:\.\d+)?)(%?)")


@dataclass(frozen=True)
class PartSection:
    """An entry of ``parts``. A number of records is exact; a share is rounded down, to at least one record."""

    path: str
    format: str | None = None
    image_root: str | None = None
    template: str | None = None
    limit: str | None = None
    repeat: float | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        for key, known in (("format", READERS), ("template", TEMPLATES)):
            if (value := getattr(self, key)) is not None:
                check_name(key, value, known)
        if self.limit is not None and not LIMIT.fullmatch(self.limit):
            raise Problem("limit", f"limit cannot be {self.limit!r}: write first:N, last:N or random:N, N may be 10%")
        for key in ("repeat", "weight"):
            if (value := getattr(self, key)) is not None and not 0 < value < float("inf"):
                raise Problem(key, f"{key} must be greater than 0, got {value}")


@dataclass(frozen=True)
class MixtureFile:
    """The schema of a mixture file."""

    parts: tuple[PartSection, ...] = field()
    size: int | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise Problem("parts", "parts is empty: name at least one data file")
        weighted = [part.weight is not None for part in self.parts]
        if any(weighted) and not all(weighted):
            raise Problem(f"parts[{weighted.index(False)}]", f"parts[{weighted.index(False)}] has no weight, others do")
        if any(weighted) and any(part.repeat is not None for part in self.parts):
            raise Problem("parts", "weight and repeat exclude each other: give one of them in all parts")
        if self.size is not None and (not all(weighted) or self.size < 1):
            raise Problem("size", "size (at least 1) is the number of records that the parts share by weight")


def read_data(
    path: str | Path, image_root: str | Path | None = None, format: str | None = None, seed: int = 0
) -> Records:
    """Records of a data file or of a mixture file, not yet looked at one by one.

    Args:
        image_root: of the parts that name none; default: the folder of each data file.
        format: key of `READERS` for a plain data file; default: by its suffix.
        seed: of random limits, and of which records a part repeats.

    Raises:
        ConfigError: a mistake in the mixture file, in one line with file and key.
        MissingFileError, UserError: as `llava_pdrop.data.records.DataPart.open`.
    """
    path, root = Path(path), None if image_root is None else Path(image_root)
    if not _is_mixture(path):
        return Records.of(DataPart.open(path, root, format))
    if format is not None:
        raise ConfigError(f"{path}: a mixture says for every part what format it has; set data.format=null")
    return _mix(path, _read_mixture(path), root, seed)


def data_files(path: str | Path) -> list[Path]:
    """The files and directories that `read_data` reads: ``path``, and the parts of a mixture.

    Raises:
        ConfigError, MissingFileError: as `read_data`.
    """
    path = Path(path)
    return [path, *(path.parent / part.path for part in _read_mixture(path).parts)] if _is_mixture(path) else [path]


def _is_mixture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _read_mixture(path: Path) -> MixtureFile:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such mixture file; check the path") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    place = ""
    try:
        if not isinstance(content, dict):
            raise Problem("parts", f"expected the key 'parts', a list of data files, found {clip(repr(content))}")
        listed = content.get("parts") or []
        if not isinstance(listed, list):
            raise Problem("parts", f"parts must be a list of data files, found {clip(repr(listed))}")
        parts = []
        for number, part in enumerate(listed):
            place = f"parts[{number}]"
            fields = convert_fields(part, PartSection, place)
            paths = [name for name in ("path", "image_root") if fields.get(name) is not None]
            parts.append(PartSection(**fields | {name: expanded(f"{place}.{name}", fields[name]) for name in paths}))
            place = ""
        return MixtureFile(**convert_fields({**content, "parts": []}, MixtureFile, "") | {"parts": tuple(parts)})
    except Problem as problem:
        hint = ""
        if problem.unknown and not place and problem.key in keys_of(PartSection):
            hint = " (it belongs into an entry of parts)"
        elif problem.unknown:
            hint = nearest_key(problem.key.rpartition(".")[2], keys_of(PartSection if place else MixtureFile))
        line = str(problem) if not place or place in str(problem) else f"{place}.{problem}"
        raise ConfigError(f"{path}: {line}{hint}") from None


def _mix(file: Path, mixture: MixtureFile, image_root: Path | None, seed: int) -> Records:
    """The records of all parts, part after part. Every part draws from a generator of its own, so that adding one does
    not change what is drawn from the others."""
    parts, chosen, generators = [], [], []
    for number, section in enumerate(mixture.parts):
        root = file.parent / section.image_root if section.image_root is not None else image_root
        part = DataPart.open(file.parent / section.path, root, section.format, section.template)
        generator = np.random.default_rng((seed, number))
        try:
            chosen.append(_limited(section.limit, len(part.entries), generator))
        except UserError as error:
            raise ConfigError(f"{file}: parts[{number}].limit: {error}") from None
        parts.append(part)
        generators.append(generator)
    rows = []
    counts = _counts(mixture, [len(indices) for indices in chosen])
    for number, (indices, count, generator) in enumerate(zip(chosen, counts, generators)):
        if count == 0:
            share = "repeat" if mixture.parts[number].weight is None else "weight"
            raise ConfigError(f"{file}: parts[{number}].{share} is so small that no record is left: raise it")
        indices = _repeated(indices, count, generator)
        rows.append(np.stack([np.full(count, number), indices], axis=1).astype(np.int32))
    return Records(parts, np.concatenate(rows))


def _limited(limit: str | None, total: int, generator: np.random.Generator) -> np.ndarray:
    """Indices that ``limit`` leaves of ``total``, in ascending order."""
    match = LIMIT.fullmatch(limit or "first:100%")
    assert match is not None
    which, number, percent = match.groups()
    if percent and 0 < float(number) <= 100:
        count = max(1, int(total * float(number) / 100))
    elif not percent and number.isdigit() and 1 <= int(number) <= total:
        count = int(number)
    else:
        raise UserError(
            f"{limit}, but the part has {total} records: write a whole number from 1 to {total}, or more than 0% "
            "and at most 100%"
        )
    if which == "random":
        return np.sort(generator.permutation(total)[:count])
    return np.arange(total)[:count] if which == "first" else np.arange(total)[total - count :]


def _counts(mixture: MixtureFile, lengths: Sequence[int]) -> list[int]:
    """Records of every part in an epoch. By weight, what rounding leaves over goes to the largest remainders."""
    if mixture.parts[0].weight is None:
        return [round(n * (part.repeat or 1.0)) for n, part in zip(lengths, mixture.parts)]
    weights = np.array([part.weight for part in mixture.parts], dtype=float)
    size = mixture.size or sum(lengths)
    shares = size * weights / weights.sum()
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: size - counts.sum()]] += 1
    return counts.tolist()


def _repeated(indices: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Whole passes over ``indices``, and of a last one as many as are missing, drawn without repeats."""
    passes, rest = divmod(count, len(indices))
    drawn = np.sort(generator.permutation(len(indices))[:rest])
    return np.concatenate([np.tile(indices, passes), indices[drawn]])
