"""A config's model and micro-batch in numbers, from config.json files or ``model.reference_shape``: for `plan`, and
for the benches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, LlavaConfig, LlavaNextConfig

from llava_pdrop.checkpoint.hf_files import reading
from llava_pdrop.checkpoint.original import original_geometry, refuse_unsupported, text_config_of
from llava_pdrop.checkpoint.vocabulary import add_special_tokens, rows_with_specials
from llava_pdrop.config.paths import cached_config, number, part_configs
from llava_pdrop.config.places import is_hub_id
from llava_pdrop.config.schema import Config, ModelSection
from llava_pdrop.cost.flops import Recomputed
from llava_pdrop.cost.paper import paper_tflop
from llava_pdrop.cost.states import FLOAT, States
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.geometry import ImageGeometry, Size
from llava_pdrop.model.vlm import geometry_of
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import IGNORE_INDEX, ImageInput, PackedBatch, Sample

FULL_TEXT_TOKENS = 200
"""Text tokens of a sample in the nominal case (``images="full"``): our estimate of the mixture's typical sample."""


@dataclass(frozen=True)
class NominalModel:
    """The numbers of a config's model: a Hugging Face LLaVA config and the rules for its pictures."""

    config: Any
    geometry: ImageGeometry

    @property
    def layers(self) -> int:
        return self.config.text_config.num_hidden_layers

    def tflop(self, image_tokens: int, schedule: Schedule = Schedule()) -> float:
        """The paper's formula."""
        text = self.config.text_config
        return paper_tflop(image_tokens, self.layers, text.hidden_size, text.intermediate_size, schedule)

    def average_tokens(self, image_tokens: int, schedule: Schedule) -> float:
        """Mean number of image tokens over the layers."""
        return sum(schedule.tokens_per_layer(image_tokens, self.layers)) / self.layers


def model_of(config: Config) -> NominalModel:
    """The model of ``config`` in numbers.

    Raises:
        ConfigError: neither config.json nor ``model.reference_shape`` gives them. UserError: they are of no model that
            is supported.
    """
    decoder, tower = part_configs(config.model)
    if decoder is None or tower is None:
        part = "decoder" if decoder is None else "tower"
        raise ConfigError(
            f"{config.file}: the config.json of the {part} is not on this machine: download it, or give its numbers in "
            "model.reference_shape"
        )
    for part_config, keys in (
        (decoder, ("num_hidden_layers", "hidden_size", "intermediate_size")),
        (tower, ("image_size", "patch_size")),
    ):
        for key in keys:
            if not isinstance(number(part_config, key), int):
                raise ConfigError(
                    f"{config.file}: {key} is neither in the part's config.json nor in model.reference_shape"
                )
    section, original = config.model, "mm_vision_tower" in decoder
    if original:
        refuse_unsupported(decoder, str(section.path))
    with reading(Path(config.file)):
        text = text_config_of(decoder) if original else _hugging_face(decoder, "llama")
        vision = _hugging_face(tower, "clip_vision_model")
        if section.path is None:
            vision.image_size = section.image_size or vision.image_size
        geometry = original_geometry(decoder, vision) if original else _geometry(section, vision)
    if section.path is None or original:  # they get their rows for <image> and <pad> when they are read
        text.vocab_size = rows_with_specials(text.vocab_size, tokenizer=None)
    kind = LlavaNextConfig if geometry.aspect == "anyres" else LlavaConfig
    tied = bool(getattr(text, "tie_word_embeddings", False))
    whole = kind(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return NominalModel(whole, geometry)


def paper_tokens(geometry: ImageGeometry, size: tuple[int, int], budget: int = 0) -> int:
    """Image tokens of a picture as the paper counts them: all patches of all tiles, without newlines."""
    return geometry.num_tiles(size) * geometry.features(budget)


def nominal_batch(geometry: ImageGeometry, config: Config) -> PackedBatch:
    """A micro-batch of ``config``: each sample has a picture that fills the canvas and `FULL_TEXT_TOKENS` text tokens,
    the second half of which is one answer. It has no pixels."""
    size = full_picture(geometry)
    image = geometry.num_tokens(size)
    length = image + FULL_TEXT_TOKENS
    samples = samples_of(config, geometry)
    ids, labels = torch.ones(length, dtype=torch.int64), torch.full((length,), IGNORE_INDEX)
    labels[length - FULL_TEXT_TOKENS // 2 :] = 1
    picture = ImageInput(torch.empty(0), size)
    return PackedBatch.pack([Sample(str(i), ids, labels, (picture,), ((1, 1 + image),)) for i in range(samples)])


def samples_of(config: Config, geometry: ImageGeometry) -> int:
    """Samples of a micro-batch: ``data.samples_per_batch``, or as many samples of `nominal_batch` as
    ``data.tokens_per_batch`` has room for."""
    length = geometry.num_tokens(full_picture(geometry)) + FULL_TEXT_TOKENS
    return config.data.samples_per_batch or max(1, (config.data.tokens_per_batch or length) // length)


def recomputed_by(config: Config, layers: int) -> Recomputed:
    """What ``config`` recomputes of a decoder of ``layers`` layers, and of its tower.

    Raises:
        ConfigError: it is more than there are.
    """
    count = config.train.recompute_layers
    if count is not None and count > layers:
        raise ConfigError(
            f"{config.file}: train.recompute_layers must be at most {layers}, the decoder's depth: {count}"
        )
    return Recomputed(count, True) if recomputes(config.train.arguments) else Recomputed()


def recomputes(arguments: Mapping[str, Any]) -> bool:
    """Whether training ``arguments`` ask for recomputation in the backward pass; transformers 5.23 renamed the key."""
    return bool(arguments.get("activation_checkpointing") or arguments.get("gradient_checkpointing"))


def states_of(config: Config, gpus: int) -> States:
    """Precision and engine of ``config``: its DeepSpeed settings, FSDP2, or neither: DDP, on one GPU nothing.

    Raises:
        ConfigError: the file with these settings cannot be read.
    """
    arguments = config.train.arguments
    settings = arguments.get("deepspeed") or {}
    if isinstance(settings, str):
        try:
            settings = json.loads(Path(settings).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(f"{config.file}: train.deepspeed: {settings} cannot be read: {error}") from None
    half = bool(arguments.get("bf16") or arguments.get("fp16"))
    accumulate = arguments.get("gradient_accumulation_steps", 1) > 1
    known = partial(States, gpus=gpus, bytes=2 if half else FLOAT, accumulate=accumulate)
    if not settings:  # float32 weights and AdamW on them
        if arguments.get("fsdp"):
            return known(zero=3, optimizer=8.0, float32=True, layerwise=True)
        return known(optimizer=8.0, float32=True, autocast=half, buckets=FLOAT if gpus > 1 else 0.0)
    zero = settings.get("zero_optimization", {})
    sections = {"optimizer": "offload_optimizer", "weights": "offload_param"}
    offloaded = [place for place, name in sections.items() if (zero.get(name) or {}).get("device", "none") != "none"]
    return known(zero=zero.get("stage", 0), optimizer=12.0 if half else 8.0, offloaded=tuple(offloaded))


def model_home(name: str) -> Path:
    """The directory of a model on this machine: ``name`` itself, or where the hub's cache has it."""
    cached = cached_config(name) if is_hub_id(name) else None
    return Path(name) if cached is None else cached.parent


def _geometry(section: ModelSection, vision: Any) -> ImageGeometry:
    """The rules for pictures: those of a whole Hugging Face model, as in training, else those of ``section``."""
    if section.path is not None and (model_home(section.path) / "config.json").is_file():
        return geometry_of(AutoConfig.from_pretrained(model_home(section.path)))
    return ImageGeometry(
        vision.image_size, vision.patch_size, section.aspect, section.merge, section.pinpoints, section.rounding
    )


def _hugging_face(part: dict[str, Any], default: str) -> Any:
    fields = {key: value for key, value in part.items() if key != "model_type"}
    kind = part.get("model_type", default)
    if kind not in CONFIG_MAPPING:
        raise UserError(f"model_type {kind!r} is none that the installed transformers knows")
    return AutoConfig.for_model(kind, **fields)


def full_picture(geometry: ImageGeometry) -> Size:
    """(width, height) of a picture that fills the largest canvas, the squarest one of several: all tiles, nothing
    padded."""
    canvases = geometry.pinpoints if geometry.aspect == "anyres" else ((geometry.tile, geometry.tile),)
    return max(canvases, key=lambda size: (size[0] * size[1], -abs(size[0] - size[1]), size))


def make_encoder(config: Config, tokenizer: str | None = None) -> Encoder:
    """How the records of ``config`` become tokens, without its model's weights.

    Args:
        tokenizer: directory of a tokenizer; None: that of the model.

    Raises:
        ConfigError: no tokenizer on this machine, or nothing says how many tokens a picture has.
    """
    model = config.model
    names = [tokenizer] if tokenizer else [name for name in (model.path, model.language_model) if name is not None]
    directory = next((home for home in map(model_home, names) if any(home.glob("tokenizer*"))), None)
    if directory is None:
        raise ConfigError(
            f"{config.file}: no tokenizer on this machine in {' or '.join(names)}: give --tokenizer DIR, or --no-tokens"
        )
    try:
        loaded = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory}: not readable as a tokenizer: {' '.join(str(error).split())}") from None
    geometry = model_of(config).geometry
    return Encoder.of(config, loaded, add_special_tokens(loaded, len(loaded)), geometry)


def geometry_of_config(config: Config) -> ImageGeometry | None:
    """The rules for the pictures of ``config``: a whole model's own, else those of the config; None where nothing on
    this machine tells."""
    try:
        return model_of(config).geometry
    except ConfigError:
        return None
