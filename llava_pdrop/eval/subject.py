"""What ``llava-pdrop eval`` is given: a run, by its config or its directory, or a model that was not trained here,
whose files say how it is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_pdrop.checkpoint.export import template_on
from llava_pdrop.checkpoint.hf_files import chat_template_in, reading
from llava_pdrop.checkpoint.lora import config_directory, is_lora
from llava_pdrop.checkpoint.original import original_schedule
from llava_pdrop.config.load import RUN_FILE, config_of, load_config, runs_in
from llava_pdrop.config.presets import file_of
from llava_pdrop.config.schema import Config
from llava_pdrop.config.values import read_mapping
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.files import read_json
from llava_pdrop.generate.families import ATTACHABLE

CHAT = "chat"
"""Instead of the name of a template: the chat template that the checkpoint brings along. For evaluation only."""


def subject_config(path: Path, overrides: list[str], asks: bool = True) -> Config:
    """The config that ``path`` stands for: a file, or a directory, in which a run or another model is evaluated as it
    lies there.

    Args:
        asks: whether the ``overrides`` must name questions where nothing else can.

    Raises:
        ConfigError: the directory holds neither, or as `load_config` and `foreign_config` say.
    """
    if not path.is_dir():
        return load_config(path, overrides)
    if not (path / RUN_FILE).is_file():
        if not (path / "config.json").is_file() and not is_lora(path):
            raise ConfigError(
                f"{path} is no run and no model: it has neither {RUN_FILE} nor config.json{runs_in(path)}"
            )
        return foreign_config(path, overrides, asks)
    whole = [f"model.path={path}", "model.language_model=null", "model.vision_tower=null", "model.projector=null"]
    config = load_config(path / RUN_FILE, whole + overrides)
    return replace(config, paper=load_config(path / RUN_FILE, overrides).paper)  # it is about this very run


def foreign_config(directory: Path, overrides: list[str], asks: bool = True) -> Config:
    """The config by which the model in ``directory`` is evaluated: with the schedule in its config.json, if any, and
    asked as its files say.

    Raises:
        ConfigError: it ``asks``, and the ``overrides`` name no questions. MissingFileError, UserError: its config.json
            cannot be read, or nothing says how it is asked.
    """
    names = {word.split("=", 1)[0] for word in overrides}
    if asks and not names & {"data.eval", "benchmarks", "eval.benchmarks"}:
        raise ConfigError(
            f"{directory} has no {RUN_FILE} that names questions: add data.eval=FILE data.image_root=DIR, or "
            "benchmarks=NAME"
        )
    home = config_directory(directory)  # of adapters that peft has saved: their base
    fields = read_json(home / "config.json")
    with reading(home / "config.json"):
        schedule = original_schedule(fields)
    model = {"path": str(directory)}
    if "model.template" not in names:
        chat = chat_template_in(directory) or chat_template_in(home)
        model["template"] = asked_by(home, fields, chat) if is_ours(home) else CHAT
    data = "${data.eval}" if "data.eval" in names else str(directory)  # required keys, which evaluation does not read
    values = {
        "name": directory.name,
        "output_dir": str(directory),
        "model": model,
        "data": {"train": data, "samples_per_batch": 1},
        "pyramid_drop": schedule.to_dict() if schedule else None,
    }
    config = config_of(values, overrides, directory / RUN_FILE)
    kind = ATTACHABLE.get(str(fields.get("model_type")))
    if config.pyramid_drop is None or kind is None or kind.positions == "renumber" or _says_positions(overrides):
        return config
    return replace(config, pyramid_drop=replace(config.pyramid_drop, positions=kind.positions))


def _says_positions(overrides: list[str]) -> bool:
    """Whether the schedule that ``overrides`` give says how positions go on: what a config leaves open is meant for a
    LLaVA, whose positions have one axis."""
    for name, value in (word.partition("=")[::2] for word in overrides):
        if name == "pyramid_drop.positions" or (name == "pyramid_drop" and "positions" in value):
            return True
        if name == "pyramid_drop" and value.endswith((".yaml", ".yml")):
            return "positions" in read_mapping(file_of("command line", value), wanted="a schedule")
    return False


def is_ours(directory: Path) -> bool:
    """Whether it is a LLaVA with CLIP's tower, or its layout is the original code's: all others go by a processor."""
    fields = read_json(directory / "config.json")
    tower = (fields.get("vision_config") or {}).get("model_type", "clip_vision_model")
    whole = fields.get("model_type") not in ("llava", "llava_next") or tower not in ("clip_vision_model", "clip")
    return "mm_vision_tower" in fields or not whole


def asked_by(directory: Path, fields: dict[str, Any], chat: str | None) -> str:
    """How a LLaVA that was not trained here is asked: by its own chat template, else as LLaVAs on its decoder are.

    Args:
        fields: of its ``config.json``.
        chat: its chat template, where it has one.

    Raises:
        UserError: neither is known.
    """
    if chat is not None and "image" in chat:
        return CHAT
    text = fields.get("text_config") or fields
    kind = str(text.get("model_type", "")).removeprefix("llava_")
    rows = int(text.get("vocab_size") or 0)
    known = kind not in ("llama", "") or rows or "_name_or_path" in text
    if known and (name := template_on(kind or "llama", rows)) is not None:
        return name
    raise UserError(
        f"{directory}: neither a chat template that places pictures nor its model_type {kind!r} says how it is asked: "
        f"give model.template, one of {', '.join(TEMPLATES)}"
    )
