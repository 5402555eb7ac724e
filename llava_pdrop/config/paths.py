"""What a config names must exist: files, directories, hub ids. Checked once, before any work begins.

Also reads the few numbers of the model parts (`part_configs`) that validation and `plan` need, without loading weights.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_pdrop.config.places import is_hub_id
from llava_pdrop.config.schema import Config, ModelSection
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.files import read_json


def check_paths(config: Config) -> None:
    """Raises at the first thing ``config`` names that is not there: model parts, pretrained projector, stage-1 YAML,
    data files (unless ``data.prepare`` makes them), image root, DeepSpeed settings, checkpoint to resume from.

    Raises:
        ConfigError: one line with file, key, what is missing and what to do.
    """

    def need(key: str, path: str | None, what: str) -> None:
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{config.file}: {key}: {what} {path} does not exist")

    for name in ("path", "language_model", "vision_tower"):
        entry = getattr(config.model, name)
        problem = missing_model(entry) if entry is not None else None
        if problem:
            raise ConfigError(f"{config.file}: model.{name}: {problem}")
    need("pretrain", pretrain_words(config)[0] if config.pretrain else None, "the stage-1 config")
    need("model.projector", config.model.projector, "the projector file")
    if config.data.prepare is None:
        need("data.train", config.data.train, "the data file")
        need("data.eval", config.data.eval, "the data file")
        need("data.image_root", config.data.image_root, "the image directory")
    else:
        need("data.prepare", config.data.prepare[0], "the script")
    need("data.index", config.data.index, "the clean index")
    if config.data.index is not None and Path(config.data.index).is_dir():
        raise ConfigError(f"{config.file}: data.index: {config.data.index} is a directory: name the file in it")
    deepspeed = config.train.arguments.get("deepspeed")
    if isinstance(deepspeed, str):
        need("train.deepspeed", deepspeed, "the DeepSpeed settings file")
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"{config.file}: train.deepspeed: the package deepspeed is not installed: "
            "pip install -e '.[train]', or train.engine=fsdp2 (ddp: nothing is cut up)"
        )
    if config.train.resume not in ("auto", "never"):
        need("train.resume", config.train.resume, "the checkpoint")


def pretrain_words(config: Config) -> list[str]:
    """``pretrain`` split as a shell would: the stage-1 config, then the overrides for it."""
    try:
        words = shlex.split(config.pretrain or "")
    except ValueError as error:
        raise ConfigError(f"{config.file}: pretrain: {config.pretrain!r}: {error}") from None
    if not words:
        raise ConfigError(f"{config.file}: pretrain: names no config")
    return words


def missing_model(entry: str) -> str | None:
    """Why the model ``entry`` (directory or hub id) cannot be opened, or None if it can.

    A hub id counts as there if its config lies in the local Hugging Face cache or the hub answers for it.
    """
    if Path(entry).is_dir():
        return None if (Path(entry) / "config.json").is_file() else f"directory {entry} has no config.json"
    if not is_hub_id(entry):
        return f"no directory {entry}, and it does not look like a hub id (organisation/name)"
    if cached_config(entry) is not None:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().model_info(entry, timeout=5)
    except OfflineModeIsEnabled:
        reason = "the hub is switched off (HF_HUB_OFFLINE)"
    except HfHubHTTPError as error:
        reason = f"the hub refuses it ({type(error).__name__}; a gated model needs a login)"
    except Exception as error:  # noqa: BLE001  every HTTP client has its own kinds, with one meaning here
        reason = f"the hub cannot be reached ({type(error).__name__})"
    else:
        return None
    return f"hub id {entry} is not in the local cache and {reason}: download it beforehand, or give a local directory"


def cached_config(entry: str) -> Path | None:
    """The config.json of hub id ``entry`` in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(entry, "config.json")
    return Path(found) if isinstance(found, str) else None


def part_configs(model: ModelSection) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The config.json contents of (decoder, vision tower): of local directories or the hub's cache, else
    ``model.reference_shape``, else None."""
    if model.path is not None:
        whole = _config_json(model.path)
        if whole is not None and isinstance(whole.get("text_config"), dict):
            return whole["text_config"], whole.get("vision_config", {})
        language, vision = whole, None  # original LLaVA layout: decoder numbers at top level, the tower by name
        if whole is not None and isinstance(whole.get("mm_vision_tower"), str):
            vision = _config_json(whole["mm_vision_tower"])
    else:
        language, vision = _config_json(model.language_model or ""), _config_json(model.vision_tower or "")
    if vision is not None:
        vision = vision.get("vision_config", vision)  # the published CLIP checkpoints hold text and vision
    shape = model.reference_shape
    language = language or (shape.language_model if shape else None)
    vision = vision or (shape.vision_tower if shape else None)
    return language, vision


def decoder_layers(model: ModelSection) -> int | None:
    """Number of decoder layers, None where nothing on this machine tells."""
    language, _ = part_configs(model)
    return number(language, "num_hidden_layers") if language else None


def number(part: Mapping[str, Any], key: str) -> int | None:
    """``part[key]``; a config.json leaves out what equals the default of its model type, so that is asked next."""
    if key not in part and "model_type" in part:
        from transformers import AutoConfig

        try:
            return getattr(AutoConfig.for_model(part["model_type"]), key, None)
        except ValueError:
            return None
    return part.get(key)


def _config_json(entry: str) -> dict[str, Any] | None:
    directory = Path(entry)
    path = directory / "config.json" if directory.is_dir() else cached_config(entry) if is_hub_id(entry) else None
    if path is None or not path.is_file():
        return None
    try:
        return read_json(path)
    except UserError as error:
        raise ConfigError(str(error)) from None
