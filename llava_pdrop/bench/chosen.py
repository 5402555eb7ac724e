"""Which shape a bench measures: one of `shapes.SHAPES`, or that of a run's config, without its weights and data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from llava_pdrop.bench.nominal import checkpointing, model_of, recomputed_layers, samples_of
from llava_pdrop.bench.shapes import Shape, shape_named
from llava_pdrop.config import RUN_FILE, Config, ConfigError, load_config

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""model_type of the decoders that are measured: those that `model.decoder` runs."""


def chosen_shape(shape: str | None, words: Sequence[str], cuda: bool) -> tuple[str, Shape]:
    """(name, shape) that a bench is asked for: by ``--shape``, or by ``words``, which are CONFIG (a YAML file, or the
    directory of a run) and its overrides; by default the shape that suits the device.

    Raises:
        ValueError: both are given, there is no such shape, or the config cannot be measured.
    """
    if not words:
        name = shape or ("llava-next-7b" if cuda else "tiny")
        return name, shape_named(name)
    if shape is not None:
        raise ValueError(f"--shape {shape} and CONFIG ({words[0]}) exclude each other: give one of them")
    path = Path(words[0])
    config = load_config(path / RUN_FILE if path.is_dir() else path, words[1:])
    return config.name, shape_of(config)


def shape_of(config: Config) -> Shape:
    """What the benches measure of a run: its model and how it is trained. Its data are not asked for.

    The decoder gets positions for ``data.max_length`` where its config.json has fewer, since training does not stop at
    its limit either (rotary embeddings go on). ``fp16`` is measured in bfloat16, as fast on GPUs that have both.

    Raises:
        ConfigError: the numbers are not on this machine (`model_of`), a decoder or tower that cannot be trained here,
            or LoRA, whose steps the benches do not do.
    """
    if config.lora is not None:
        raise ConfigError(
            f"{config.file}: lora: the benches have no adapters: add lora=null to measure the model trained whole, or "
            "train some steps (train.max_steps=20) and read metrics.jsonl"
        )
    model = model_of(config)
    text, vision = model.config.text_config, model.config.vision_config
    for part, kind, known in (
        ("decoder", text.model_type, DECODERS),
        ("vision tower", vision.model_type, ("clip_vision_model",)),
    ):
        if kind not in known:
            raise ConfigError(
                f"{config.file}: the {part} is of model_type {kind!r}, which cannot be trained here: choose "
                f"{' or '.join(known)}"
            )
    arguments = config.train.arguments
    return Shape(
        text={
            **_own_fields(text),
            "model_type": text.model_type,
            "tie_word_embeddings": model.config.tie_word_embeddings,
            "max_position_embeddings": max(text.max_position_embeddings, config.data.max_length),
        },
        vision=_own_fields(vision),
        geometry=model.geometry,
        trainable=config.model.trainable,
        samples=samples_of(config, model.geometry),
        schedule=config.schedule.check(model.layers),
        recompute=checkpointing(config),
        recompute_layers=recomputed_layers(config, model.layers),
        attention=config.model.attention,
        max_length=config.data.max_length,
        half=bool(arguments.get("bf16") or arguments.get("fp16")),
    )


def _own_fields(config: Any) -> dict[str, Any]:
    """The fields of a Hugging Face config that are about its kind of model and not about models in general."""
    general = PretrainedConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if name not in general}


def file_name(bench: str, name: str, device: str) -> str:
    """Of a report, without its ending. A config's ``name`` may hold what a file's must not."""
    safe = re.sub(r"[^\w.-]+", "-", name).strip("-")
    return f"{bench}-{safe}-{device}"
