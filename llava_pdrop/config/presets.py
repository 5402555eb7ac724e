"""``pyramid_drop`` as the path of a YAML file: ``pyramid_drop=configs/schedules/hidrop.yaml``.

The file holds the keys of the section and takes the place of what is inherited; dotted overrides change single keys of
it. Its key ``depth`` says for how many decoder layers its ``layers`` are written: they are scaled to the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_pdrop.config.places import expanded
from llava_pdrop.config.values import at_least, build_schedule, convert, read_mapping
from llava_pdrop.errors import ConfigError, Problem, UserError, did_you_mean
from llava_pdrop.schedule import Schedule

KEY = "pyramid_drop"
CHECKOUT = Path(__file__).parents[2]

Layers = list[tuple[str, dict[str, Any]]]


def split(overrides: Sequence[str]) -> tuple[list[dict[str, str]], list[str]]:
    """The ``overrides`` that name a file for the section, as layers of a config, and the others."""
    named = {word: word.split("=", 1)[1].strip("\"'") for word in overrides if word.startswith(f"{KEY}=")}
    named = {word: path for word, path in named.items() if path.endswith((".yaml", ".yml"))}
    return [{KEY: path} for path in named.values()], [word for word in overrides if word not in named]


def read_sections(layers: Layers) -> Layers:
    """``layers`` of a config, each whose section is a path followed by what the file holds, in the place of all before.

    Raises:
        ConfigError: a file that is not there, or holds no mapping.
    """
    found: Layers = []
    for name, layer in layers:
        section = layer.get(KEY)
        if not isinstance(section, str):
            found.append((name, layer))
            continue
        path = file_of(name, section)
        content = read_mapping(path, wanted="a schedule")
        if not content:
            raise ConfigError(f"{path}: holds no keys: give layers with ratios or keep; {KEY}=null drops nothing")
        found += [(name, {**layer, KEY: None}), (str(path), {KEY: content})]
    return found


def file_of(name: str, given: str) -> Path:
    """The file, relative to the working directory or to the checkout."""
    try:
        path = Path(expanded(KEY, given))
    except Problem as problem:
        raise ConfigError(f"{name}: {problem}") from None
    for candidate in (path, CHECKOUT / path):
        if candidate.is_file():
            return candidate
    presets = [f"configs/schedules/{file.name}" for file in (CHECKOUT / "configs" / "schedules").glob("*.yaml")]
    raise ConfigError(
        f"{name}: {KEY}: no file {given}: give a section of keys, or the path of a YAML file that holds one, such as "
        f"those in configs/schedules{did_you_mean(given, presets)}"
    )


def taken_depth(values: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The ``values`` of a config without the section's ``depth``, and that.

    Raises:
        Problem: it is no whole number above 0.
    """
    section = values.get(KEY)
    if not isinstance(section, Mapping) or "depth" not in section:
        return dict(values), None
    depth = convert(section["depth"], int | None, f"{KEY}.depth")
    at_least(1, f"{KEY}.depth", depth)
    return {**values, KEY: {name: value for name, value in section.items() if name != "depth"}}, depth


def bare_schedule(section: Mapping[str, Any], num_layers: int) -> Schedule:
    """What a file for the section says to a decoder of ``num_layers`` layers.

    Raises:
        UserError: an unknown key, a wrong type, or an impossible schedule.
    """
    values, depth = taken_depth({KEY: section})
    schedule = build_schedule(values[KEY])
    return schedule if depth is None else schedule.scaled_to(num_layers, depth)


def scaled(schedule: Schedule | None, depth: int | None, num_layers: int | None) -> Schedule | None:
    """``schedule``, written for ``depth`` decoder layers, for ``num_layers``.

    Raises:
        Problem: two drops would come at one layer, or ``num_layers`` is not known.
    """
    if schedule is None or depth is None:
        return schedule
    if num_layers is None:
        raise Problem(
            f"{KEY}.depth",
            f"{KEY}.depth: {depth}: how many layers the decoder has is not known: download the model, or give its "
            "numbers in model.reference_shape",
        )
    try:
        return schedule.scaled_to(num_layers, depth)
    except UserError as error:
        raise Problem(f"{KEY}.layers", str(error)) from None
