"""Plain values from YAML -> the types that annotations ask for. Everything that does not fit is a `Problem`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from llava_pdrop.errors import ConfigError, Problem, UserError, did_you_mean, first_line
from llava_pdrop.schedule import Schedule


def read_mapping(path: Path, resolve: bool = False, wanted: str = "a config") -> dict[str, Any]:
    """The content of a YAML file.

    Args:
        resolve: replace interpolations (``${seed}``) by what they stand for in this file.
        wanted: what the file should be, for messages: somebody may have named a file of records instead.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    names = ", which names records by data.train or data.eval" if wanted == "a config" else ""
    remedy = f"give {wanted}, a YAML file of keys (configs/README.md){names}"
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=resolve)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:  # OSError: also of a lone number
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        line = f"{path}{where}: not readable as YAML: {first_line(error)}"
        raise ConfigError(line if path.suffix in (".yaml", ".yml") else f"{line}; {remedy}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a list: {remedy}")
    return content  # type: ignore[return-value]


def at_least(least: int, key: str, value: float | None) -> None:
    """Raises `Problem` if ``value`` is smaller than ``least``; None, which sets nothing, is not."""
    if value is not None and value < least:
        raise Problem(key, f"{key} must be at least {least}, got {value}")


def build_schedule(section: Any, key: str = "pyramid_drop") -> Schedule:
    """A `Schedule` from plain values; its own messages already name keys and values.

    Raises:
        Problem: unknown key, wrong type, or an impossible schedule.
    """
    values = convert_fields(section, Schedule, key)
    try:
        return Schedule(**values).at("renumber")  # the positions of a LLaVA have one axis
    except UserError as error:
        raise Problem(key, str(error) if key == "pyramid_drop" else f"{key}: {error}") from None


def convert(value: Any, hint: Any, key: str) -> Any:
    """``value`` as read from YAML -> the type that annotation ``hint`` asks for (lists become tuples, whole numbers
    become floats where a float is wanted; nothing else is bent).

    Raises:
        Problem: it does not fit.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        *others, last = [arg for arg in args if arg is not NoneType]
        for kind in others:  # the first that fits
            with suppress(Problem):
                return convert(value, kind, key)
        try:
            return convert(value, last, key)
        except Problem:
            if not others:
                raise
            raise Problem(key, f"{key} must be {_name(hint)}, got {value!r}") from None
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        hint = ' (YAML reads a bare no as false: write "no")' if value is False and "no" in args else ""
        hint = hint or did_you_mean(str(value), args)
        raise Problem(key, f"{key} cannot be {value!r}: choose {_choice(args)}{hint}")
    if origin is tuple and isinstance(value, list | tuple):
        if args[-1] is Ellipsis:
            return tuple(convert(entry, args[0], f"{key}[{i}]") for i, entry in enumerate(value))
        if len(args) == len(value):
            return tuple(convert(entry, arg, f"{key}[{i}]") for i, (entry, arg) in enumerate(zip(value, args)))
    if hint is Schedule:
        return build_schedule(value, key)
    if is_dataclass(hint) and isinstance(hint, type):
        return hint(**convert_fields(value, hint, key))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    plain = dict if origin is dict else hint
    if plain in (bool, int, str, dict) and type(value) is plain:
        return value
    raise Problem(key, f"{key} must be {_name(hint)}, got {value!r}")


def convert_fields(section: Any, schema: type, key: str) -> dict[str, Any]:
    """The fields of dataclass ``schema`` in mapping ``section``, converted one by one.

    Raises:
        Problem: no mapping, an unknown key, a key without value that has no default, or a wrong type.
    """
    if not isinstance(section, Mapping):
        raise Problem(key, f"{key} must be a section of keys, got {section!r}")
    hints, prefix = hints_of(schema), f"{key}." if key else ""
    for name in section:
        if name not in hints:
            raise Problem(f"{prefix}{name}", f"unknown key {f'{prefix}{name}'!r}", unknown=True)
    values = {name: convert(value, hints[name], f"{prefix}{name}") for name, value in section.items()}
    for entry in fields(schema):
        if entry.default is MISSING and entry.default_factory is MISSING and entry.name not in section:
            raise Problem(key, f"{prefix}{entry.name} is missing")
    return values


def keys_of(schema: type, prefix: str = "") -> Iterable[str]:
    """Every dotted key of a schema."""
    for name, hint in hints_of(schema).items():
        yield prefix + name
        for kind in (hint, *get_args(hint)):
            if is_dataclass(kind) and isinstance(kind, type):
                yield from keys_of(kind, f"{prefix}{name}.")


def nearest_key(key: str, keys: Iterable[str]) -> str:
    """`did_you_mean` for dotted keys: one with the same last part in another section is nearer than a misspelling."""
    keys = list(keys)
    leaf = key.rsplit(".", 1)[-1]
    return did_you_mean(key, [entry for entry in keys if entry.rsplit(".", 1)[-1] == leaf] or keys, cutoff=0.3)


@functools.cache
def hints_of(schema: type) -> dict[str, Any]:
    """The fields of ``schema`` that a YAML file may set, with their types."""
    hidden = {"arguments", "file"}
    return {name: hint for name, hint in get_type_hints(schema).items() if name not in hidden}


def _choice(values: Iterable[Any]) -> str:
    return " or ".join(repr(value) for value in values)


def _name(hint: Any) -> str:
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if inner[-1] is Ellipsis:
            return f"a list, each entry {_name(inner[0])}"
        return f"a list of {len(inner)} entries, each {_name(inner[0])}"
    if get_origin(hint) is Literal:
        return _choice(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_name(kind) for kind in get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a section of keys"}
    return names.get(get_origin(hint) or hint, str(hint))
