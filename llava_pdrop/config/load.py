"""Reads a run from YAML: `load_config` gives a checked, frozen `Config`, `to_yaml` writes it back.

    base file (``base:``) <- file <- dotted overrides (``train.learning_rate=2e-5``) -> one mapping -> `Config`

Whatever is wrong is one `ConfigError` line that names the file (or the override), the key and the nearest valid name.
The schema stands in `schema.py`, the check that everything named exists in `paths.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from llava_pdrop.config import presets
from llava_pdrop.config.nearer import settle
from llava_pdrop.config.paths import decoder_layers
from llava_pdrop.config.places import absolute, expanded, mapped
from llava_pdrop.config.schema import Config, DataSection, TrainSection
from llava_pdrop.config.values import at_least, convert, convert_fields, keys_of, nearest_key, read_mapping
from llava_pdrop.errors import ConfigError, Problem, check_name, clip, did_you_mean, first_line
from llava_pdrop.geometry import PINPOINTS
from llava_pdrop.schedule import Schedule

RUN_FILE = "llava_pdrop.yaml"
"""Name under which the resolved config of a run is saved beside its weights."""


def runs_in(directory: Path) -> str:
    """The end of a message on a ``directory`` that is no run: the runs in it (`compare` leaves two), if any."""
    runs = sorted(str(file.parent) for file in directory.glob(f"*/{RUN_FILE}"))
    return f": name one of the runs in it, {' or '.join(runs)}" if runs else ""


OVERRIDES = "command line"
"""Stands for the file in errors about a dotted override."""

SHORT = {"benchmarks": "eval.benchmarks", "training_free": "eval.training_free"}
"""Words of the command line without a section, which take names with commas between them."""

SECRET = re.compile(r"(?:^|_)(?:token|secret|password|api_key)$")
"""Names of training arguments whose value must not be written anywhere, as a config is with every checkpoint."""

INSIDE = re.compile(r"""(\w+)["']?\s*[=:]\s*([^\s,;{}\[\]]+)""")
"""A key and its value within a text."""

TRAINING_ARGUMENTS_SET_ELSEWHERE = {
    "output_dir": "output_dir (top level)",
    "run_name": "name (top level)",
    "seed": "seed (top level)",
    "per_device_train_batch_size": "data.samples_per_batch or data.tokens_per_batch",
    "per_device_eval_batch_size": "eval.batch_size",
    "resume_from_checkpoint": "train.resume",
    "warmup_ratio": "train.warmup_steps (a value below 1 is a share of all steps)",
}
"""Fields of TrainingArguments, now or once, which a config says in another place."""

LEAST_TRAINING_ARGUMENTS = {
    "dataloader_num_workers": 0,
    "ddp_timeout": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
}
"""Numbers that TrainingArguments takes however small they are, and that fail, or harm, when they are used."""

CHECKED_TYPES = (int, float, bool, str, int | None, float | None, bool | None)
"""Annotations of TrainingArguments that say all about a value."""

ABLATION_KEYS = ("variants", "grid")
"""Keys by which the file of an ablation is known (`llava_pdrop.compare.variants`)."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads ``path``, what it inherits by ``base:`` and the ``overrides`` (``"a.b=c"``, values are YAML).

    Raises:
        ConfigError: anything wrong with the files or their content. That named files exist is not looked at here, see
            `llava_pdrop.config.paths.check_paths`.
    """
    path = _written_out("CONFIG", path)
    return _resolve(_read(path, ()), overrides, path)


def config_of(values: dict[str, Any], overrides: Sequence[str], path: Path) -> Config:
    """A `Config` of plain ``values`` and ``overrides``, as if ``path`` held them.

    Raises:
        ConfigError: as `load_config`.
    """
    return _resolve([(str(path), values)], overrides, path)


def _resolve(layers: list[tuple[str, dict[str, Any]]], overrides: Sequence[str], path: Path) -> Config:
    """The `Config` of what files say one after the other, and of the ``overrides``."""
    sections, others = presets.split(overrides)
    changes = dict(_dotlist(others))
    if sections or changes.keys() & {"model", "pyramid_drop", "lora"}:
        layers[-1][1].pop("paper", None)  # it is about the run as the file has it
    layers = presets.read_sections([*layers, *((OVERRIDES, section) for section in sections), (OVERRIDES, changes)])
    merged: dict[str, Any] = {}
    for name, layer in layers:
        inherited = without_other_engine(merged, layer)
        try:
            merged = OmegaConf.to_container(OmegaConf.merge(inherited, layer))  # type: ignore[assignment]
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise ConfigError(f"{name}: cannot be merged with what it inherits: {first_line(error)}") from None
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(settle(merged, layers)), resolve=True, throw_on_missing=True)
        return _build(resolved, path)
    except Problem as problem:
        hint = nearest_key(problem.key, _all_keys(problem.key)) if problem.unknown else ""
        raise ConfigError(f"{_origin(problem.key, layers, path)}: {problem}{hint}") from None
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        named = re.search(r"Interpolation key '(\w+)' not found", str(error))
        hint = f": an environment variable is written ${named[1]}" if named and named[1] in os.environ else ""
        raise ConfigError(
            f"{_origin(key, layers, path)}: {f'{key}: ' if key else ''}{first_line(error)}{hint}"
        ) from None


def to_yaml(config: Config, from_anywhere: bool = False) -> str:
    """The resolved YAML of a run, no ``base:`` left; `load_config` reads the same `Config` from it.

    Args:
        from_anywhere: with absolute paths, for what a run leaves: it is read from another directory too.
    """
    values = dataclasses.asdict(config)
    del values["file"]
    values["train"] |= values["train"].pop("arguments")
    values["pyramid_drop"] = config.pyramid_drop.to_dict() if config.pyramid_drop else None
    return OmegaConf.to_yaml(OmegaConf.create(mapped(values, absolute) if from_anywhere else values))


def _written_out(key: str, path: str | Path) -> Path:
    """The path of a config file."""
    try:
        return Path(expanded(key, str(path)))
    except Problem as problem:
        raise ConfigError(str(problem)) from None


def _read(path: Path, below: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """(file name, its own mapping) of ``path`` and of all it inherits, deepest base first."""
    if path.resolve() in below:
        chain = " -> ".join(entry.name for entry in (*below, path))
        raise ConfigError(f"{path}: 'base' comes back to itself: {chain}")
    if path.is_dir():
        run = path / RUN_FILE
        raise ConfigError(f"{path} is a directory: give a YAML file{f', such as {run}' if run.is_file() else ''}")
    if not path.exists():
        wanted = f"base of {below[-1].name}: " if below else ""
        siblings = [str(entry) for entry in path.parent.glob("*.yaml")]
        raise ConfigError(f"{wanted}no config file {path}{did_you_mean(str(path), siblings)}")
    content = read_mapping(path)
    if any(key in content for key in ABLATION_KEYS):
        raise ConfigError(f"{path}: is an ablation, which has several runs: llava-pdrop ablate {path}")
    base = content.pop("base", None)
    own: list[tuple[str, dict[str, Any]]] = [(str(path), content)]
    if base is None:
        return own
    if not isinstance(base, str):
        raise ConfigError(f"{path}: 'base' must be the path of one YAML file, got {base!r}")
    inherited = _read(
        Path(os.path.normpath(path.parent / _written_out(f"{path}: base", base))), (*below, path.resolve())
    )
    for _, values in inherited:
        values.pop("paper", None)  # what a paper reports is about one file, not about what is made of it
    return inherited + own


def _dotlist(overrides: Sequence[str]) -> Mapping[str, Any]:
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"{OVERRIDES}: override {override!r} must have the form section.key=value")
    overrides = [_written_whole(override) for override in overrides]
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(overrides))  # type: ignore[return-value]
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        shown = [
            clip(f"{name}=***" if SECRET.search(name) or _secret("", value) is not None else word)
            for word in overrides
            for name, _, value in [word.partition("=")]
        ]
        raise ConfigError(f"{OVERRIDES}: {' '.join(shown)}: {first_line(error)}") from None


def _written_whole(override: str) -> str:
    """``benchmarks=mme,pope`` as the override of its key; others as they are."""
    name, value = override.split("=", 1)
    if name not in SHORT:
        return override
    if not value.startswith("[") and not all(word.strip() for word in value.split(",")):
        raise ConfigError(f"{OVERRIDES}: {override}: give names with commas between them, such as {name}=one,two")
    return f"{SHORT[name]}={value if value.startswith('[') else f'[{value}]'}"


def _build(values: Any, path: Path) -> Config:
    values = {"name": f"{path.parent.name}/{path.stem}", **values}
    if isinstance(values.get("data"), Mapping):
        values["data"] = {"cache": DataSection.cache, **values["data"]}
    values, depth = presets.taken_depth(mapped(values, expanded))
    values.setdefault("output_dir", f"checkpoints/{values['name']}")
    for section in ("train", "eval", "compare"):
        if values.get(section, {}) is None:  # a bare `train:` in YAML
            values[section] = {}
    model = values.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("pinpoints"), str):
        values["model"] = {**model, "pinpoints": _pinpoints(model["pinpoints"])}
    train = values.get("train", {})
    arguments: dict[str, Any] = {}
    if isinstance(train, Mapping):
        train = with_engine(train)
        own = {field.name for field in dataclasses.fields(TrainSection)} - {"arguments"}
        arguments = _training_arguments({key: value for key, value in train.items() if key not in own})
        values["train"] = {key: value for key, value in train.items() if key in own}
    config = Config(**convert_fields(values, Config, ""), file=str(path))
    layers = decoder_layers(config.model)
    schedule = presets.scaled(config.pyramid_drop, depth, layers)
    train = dataclasses.replace(config.train, arguments=arguments)
    config = dataclasses.replace(config, train=train, pyramid_drop=schedule)
    config.check(layers, compares=False)
    return config


def _pinpoints(name: str) -> list[list[int]]:
    """The canvases that ``name`` stands for."""
    if name not in PINPOINTS:
        hint = did_you_mean(name, PINPOINTS)
        raise Problem(
            "model.pinpoints",
            f"model.pinpoints cannot be {name!r}: write a list of [width, height], or one of {list(PINPOINTS)}{hint}",
        )
    return [list(size) for size in PINPOINTS[name]]


def _training_arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    """Checks names, and values of plain type or with a fixed list, against the installed
    `transformers.TrainingArguments`.
    """
    if not section:
        return {}
    hints = _training_argument_hints()  # imported only where a config has such keys: it takes seconds
    for name, value in section.items():
        key = f"train.{name}"
        if name in TRAINING_ARGUMENTS_SET_ELSEWHERE:
            raise Problem(key, f"{key!r} is not set here: write {TRAINING_ARGUMENTS_SET_ELSEWHERE[name]}")
        if (secret := _secret(key, value)) is not None:
            remedy = "set HF_TOKEN in the environment, or log in (hf auth login), and leave the key out"
            raise Problem(key, f"{secret} is a secret, and a config is saved in clear with every checkpoint: {remedy}")
        if name not in hints:
            raise Problem(key, f"unknown key {key!r}, also not a field of TrainingArguments", unknown=True)
        convert(value, hints[name], key)
        if name in LEAST_TRAINING_ARGUMENTS:
            at_least(LEAST_TRAINING_ARGUMENTS[name], key, value)
    if section.get("bf16") and section.get("fp16"):
        raise Problem("train.fp16", "train.bf16 and train.fp16 exclude each other: set one of them to false")
    return dict(section)


def _secret(key: str, value: Any) -> str | None:
    """The first key with a secret in it, of ``key`` and those in its ``value``: a mapping, or what is written as one
    (``optim_args: a=1,b=2``, JSON)."""
    if SECRET.search(key.rsplit(".", 1)[-1]) and value is not None:
        return key
    if isinstance(value, Mapping):
        parts = [(str(name), entry) for name, entry in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(str(number), entry) for number, entry in enumerate(value)]
    else:
        parts = INSIDE.findall(value) if isinstance(value, str) else []
    return next((found for name, entry in parts if (found := _secret(f"{key}.{name}", entry)) is not None), None)


def _all_keys(unknown: str) -> list[str]:
    """Valid dotted keys near which a misspelt one may lie."""
    free = "compare.training_free."
    if unknown.startswith(free):
        section = unknown.rsplit(".", 1)[0]
        return [f"{section}.{name}" for name in (*keys_of(Schedule), "single_drop")]
    arguments = [f"train.{name}" for name in _training_argument_hints() if name not in TRAINING_ARGUMENTS_SET_ELSEWHERE]
    return [*keys_of(Config), "train.engine", *arguments]


@functools.cache
def _training_argument_hints() -> dict[str, Any]:
    """Every field of TrainingArguments with what `convert` is to ask of it: its annotation, a `Literal` where the
    library has a list of values, and `Any` where the annotation says too little."""
    from transformers import TrainingArguments

    annotations, hints = get_type_hints(TrainingArguments), dict[str, Any]()
    for field in dataclasses.fields(TrainingArguments):
        if not field.init:
            continue
        hint = annotations[field.name]
        choices = list(field.metadata.get("choices", ()))
        for kind in get_args(hint):
            choices += [entry.value for entry in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []
        if choices:
            hint = Literal[tuple(choices)]  # type: ignore[valid-type]
            hint = hint | None if field.default is None else hint
        elif hint not in CHECKED_TYPES:
            hint = Any
        hints[field.name] = hint
    return hints


def _origin(key: str, layers: Sequence[tuple[str, Mapping[str, Any]]], path: Path) -> str:
    """The name of the last layer that sets ``key`` or, where none does, the part of it that is set; else ``path``."""
    parts = key.split("[")[0].split(".") if key else []
    while parts:
        for name, layer in reversed(layers):
            node: Any = layer
            for part in parts:
                node = node.get(part, _ABSENT) if isinstance(node, Mapping) else _ABSENT
            if node is not _ABSENT:
                return name
        parts.pop()
    return str(path)


_ABSENT = object()


# ``train.engine``: one word for the training arguments that say what is cut up over the GPUs. A new engine is a row in
# `ENGINES`.

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": "configs/deepspeed/zero2.json"},
    "zero3": {"deepspeed": "configs/deepspeed/zero3.json"},
    "zero2_offload": {"deepspeed": "configs/deepspeed/zero2_offload.json"},
    "zero3_offload": {"deepspeed": "configs/deepspeed/zero3_offload.json"},
    "fsdp2": {"fsdp": True, "fsdp_config": "configs/fsdp2.json"},
}
"""``train.engine`` -> fields of TrainingArguments. Memory and use of each: configs/deepspeed/README.md."""

SET_BY_ENGINE = ("deepspeed", "fsdp", "fsdp_config")


def without_other_engine(inherited: Mapping[str, Any], layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """``inherited`` less what the ``train.engine`` of ``layer`` takes the place of: a saved run, and a config that is
    older than that key, say their engine by its training arguments."""
    before, now = inherited.get("train"), layer.get("train")
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)) or now.get("engine") is None:
        return inherited
    return {**inherited, "train": {name: value for name, value in before.items() if name not in SET_BY_ENGINE}}


def with_engine(train: Mapping[str, Any]) -> dict[str, Any]:
    """The ``train:`` section with its ``engine`` replaced by what that stands for: a name in `ENGINES`, or a file with
    settings for DeepSpeed (``*.json``).

    Raises:
        Problem: it is neither, or the section says the same in another way too.
    """
    engine = train.get("engine")
    rest = {name: value for name, value in train.items() if name != "engine"}
    if engine is None:
        return rest
    if isinstance(engine, str) and engine.endswith(".json"):
        chosen = {"deepspeed": engine}
    else:
        check_name("train.engine", str(engine), [*ENGINES, "FILE.json"])
        chosen = ENGINES[str(engine)]
    for name in SET_BY_ENGINE:
        if name in rest:
            raise Problem(
                f"train.{name}",
                f"train.{name} is said by train.engine here ({engine}): leave it away, and change train.engine: one of "
                f"{list(ENGINES)}, a DeepSpeed file, or null to say it by train.{name}",
            )
    return {**rest, **chosen}
