"""What can be wrong with a run, looked for before the first step: names, files, and the stage 1 it starts from."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from llava_pdrop.config import Config, ConfigError, check_paths, load_config
from llava_pdrop.config_paths import number, part_configs, pretrain_words
from llava_pdrop.config_values import did_you_mean
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.readers import READERS
from llava_pdrop.train.check_arguments import check_arguments
from llava_pdrop.train.history import FINISHED_FILE


def check_run(config: Config) -> None:
    """Checks names, paths and training arguments of ``config`` and of its stage 1.

    Raises:
        ConfigError: one line with file, key and remedy.
    """
    check_paths(config)
    check_name(config, "model.template", config.model.template, TEMPLATES)
    if config.data.format is not None:
        check_name(config, "data.format", config.data.format, READERS)
    check_bits(config)
    check_reporting(config)
    if not (Path(config.output_dir) / FINISHED_FILE).is_file():  # that one is used as it is, wherever it was made
        check_output(config)
        check_arguments(config)
    first = stage1_config(config)
    if first is not None:
        check_run(first)


def check_output(config: Config) -> None:
    """Raises `ConfigError` if ``output_dir`` cannot be made, or not be written to."""
    place = os.path.abspath(config.output_dir)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    problem = None if os.path.isdir(place) else "is no directory"
    if problem is None and not os.access(place, os.W_OK | os.X_OK):
        problem = "cannot be written to"
    if problem is not None:
        raise ConfigError(f"{config.file}: output_dir: {place} {problem}: give another output_dir")


def check_bits(config: Config) -> None:
    """Raises `ConfigError` if ``lora.bits`` asks for weights that cannot be quantised on this machine."""
    if config.lora is None or config.lora.bits is None:
        return
    line = f"{config.file}: lora.bits: {config.lora.bits}-bit weights need"
    if config.train.arguments.get("use_cpu") or not torch.cuda.is_available():
        raise ConfigError(f"{line} a CUDA GPU, and this run has none: lora.bits=null trains plain LoRA")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{line} bitsandbytes, which is not installed: pip install bitsandbytes, or lora.bits=null")


def check_reporting(config: Config) -> None:
    """Raises `ConfigError` if ``train.report_to`` names a service that is unknown or not installed."""
    named = config.train.arguments.get("report_to") or []
    for service in [named] if isinstance(named, str) else named:
        key = f"{config.file}: train.report_to:"
        if service in ("all", "none"):
            continue
        if service not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"{key} unknown service {service!r}{did_you_mean(service, INTEGRATION_TO_CALLBACK)}")
        if service in ("wandb", "tensorboard"):
            if importlib.util.find_spec(service) is None:
                raise ConfigError(
                    f"{key} {service} is not installed: pip install {service}, or llava_pdrop with its extra [train]"
                )
        elif service not in get_available_reporting_integrations():
            raise ConfigError(f"{key} the package of {service} is not installed")


def check_name(config: Config, key: str, name: str, known: Iterable[str]) -> None:
    """Raises `ConfigError` if ``name``, the value of ``key``, is none of ``known``."""
    known = sorted(known)
    if name not in known:
        raise ConfigError(
            f"{config.file}: unknown {key} {name!r}: choose one of {known}{did_you_mean(name, known, cutoff=0.3)}"
        )


def stage1_config(config: Config) -> Config | None:
    """The config that ``pretrain`` names, with its overrides; None where the run has no stage 1.

    Raises:
        ConfigError: it trains the projector of another decoder, tower or image size than this run has.
    """
    if config.pretrain is None:
        return None
    path, *overrides = pretrain_words(config)
    first = load_config(path, overrides)
    for key in ("language_model", "vision_tower", "image_size"):
        here, there = _part(config, key), _part(first, key)
        if here != there:
            raise ConfigError(
                f"{config.file}: pretrain: {first.file} has model.{key} {there}, this run has {here}: the projector "
                f"would not fit; give stage 1 the same, e.g. pretrain: '{path} model.{key}={here} output_dir=...'"
            )
    return first


def _part(config: Config, key: str) -> str | int | None:
    """A model part by its path or id, the image size in pixels where it is known."""
    if key == "image_size":
        tower = part_configs(config.model)[1]
        return config.model.image_size or (number(tower, "image_size") if tower else None)
    part = config.model.path or getattr(config.model, key)
    return os.path.normpath(part) if part else None
