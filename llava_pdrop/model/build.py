"""Builds the Hugging Face host of a model: from a LLaVA directory of either layout, or from an LLM and a CLIP tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.checkpoint import (
    ORIGINAL_TO_HOST,
    load_projector,
    load_strictly,
    mean_rows,
    read_json,
    read_tensors,
    rename,
)
from llava_pdrop.model.vision import load_image_processor, load_tower, pack_by_geometry
from llava_pdrop.model.vlm import Host, geometry_of
from llava_pdrop.types import IMAGE_MARKER

PAD_TOKEN = "<pad>"
VOCABULARY_MULTIPLE = 64
"""Vocabularies grow to a multiple of this (32000 LLaMA tokens + <image> + <pad> -> 32064, as on the hub)."""


@dataclass(frozen=True)
class Parts:
    """A host with all that is needed to feed it. ``image_processor`` makes one square tile (CLIP's);
    ``geometry`` says how a picture is cut into tiles."""

    host: Host
    tokenizer: Any
    image_processor: CLIPImageProcessorPil
    geometry: ImageGeometry

    def processor(self) -> LlavaProcessor | LlavaNextProcessor:
        """The Hugging Face processor that turns text and pictures into this model's inputs, to be saved with it."""
        clip, geometry = self.image_processor, self.geometry
        settings = dict(
            size=dict(clip.size), crop_size=dict(clip.crop_size), image_mean=clip.image_mean, image_std=clip.image_std
        )
        options = dict(
            tokenizer=self.tokenizer,
            patch_size=geometry.patch,
            vision_feature_select_strategy="default",
            image_token=IMAGE_MARKER,
            num_additional_image_tokens=1,  # the class token, which "default" takes off again
        )
        if geometry.aspect == "anyres":
            pinpoints = [[height, width] for width, height in geometry.pinpoints]
            images = LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=pinpoints)
            return LlavaNextProcessor(image_processor=images, **options)
        return LlavaProcessor(image_processor=LlavaImageProcessorPil(**settings, do_pad=True), **options)


def build_parts(
    path: str | None = None,
    language_model: str | None = None,
    vision_tower: str | None = None,
    projector: str | None = None,
    aspect: str = "pad",
    merge: str = "flat",
    pinpoints: tuple[tuple[int, int], ...] = (),
    rounding: str = "original",
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    pad_vocabulary: bool = True,
) -> Parts:
    """Loads a model.

    Args:
        path: a LLaVA in Hugging Face's or the original layout; its own image settings hold. Otherwise:
        language_model, vision_tower: directories or hub ids of a decoder and a CLIP tower, joined by a new projector
            and the image settings given here. ``image_size``: side of a tile in pixels if not the tower's own (its
            position embeddings are interpolated).
        projector: file with a pretrained projector.
        pad_vocabulary: give an original LLaVA rows for ``<image>`` and ``<pad>``, as Hugging Face's own forward needs.
            Without them its logits are those of the official code to the last column.

    Raises:
        FileNotFoundError: a directory or file that does not exist. ValueError: weights that do not fit.
    """
    if path is not None:
        parts = _from_llava(path, dtype, pad_vocabulary)
    elif language_model is None or vision_tower is None:
        raise ValueError("model: give either path, or language_model and vision_tower")
    else:
        tower = load_tower(vision_tower, image_size, dtype)
        vision = tower.config
        geometry = ImageGeometry(vision.image_size, vision.patch_size, aspect, merge, pinpoints, rounding)  # type: ignore[arg-type]
        parts = _from_parts(
            language_model, tower, load_image_processor(vision_tower, vision.image_size), geometry, dtype
        )
    if projector is not None:
        load_projector(parts.host, Path(projector))
    pack_by_geometry(parts.host, parts.geometry)
    return parts


def make_host(
    text_config: Any, vision_config: Any, geometry: ImageGeometry, image_token_id: int, feature_layer: int = -2
) -> Host:
    """An untrained host (LLaVA-NeXT for anyres, LLaVA otherwise). Costs nothing under ``torch.device("meta")``.

    Args:
        feature_layer: hidden state of the tower that goes to the projector.
    """
    common = dict(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=image_token_id,
        image_token_index=image_token_id,  # the name before transformers 5
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(getattr(text_config, "tie_word_embeddings", False)),
    )
    if geometry.aspect == "pad":
        return LlavaForConditionalGeneration._from_config(LlavaConfig(**common, image_seq_length=geometry.patches))
    pinpoints = [[height, width] for width, height in geometry.pinpoints]
    config = LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
    config.mm_patch_merge_type, config.image_rounding = geometry.merge, geometry.rounding
    return LlavaNextForConditionalGeneration._from_config(config)


def _from_parts(
    source: str,
    tower: CLIPVisionModel,
    image_processor: CLIPImageProcessorPil,
    geometry: ImageGeometry,
    dtype: torch.dtype,
) -> Parts:
    decoder = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(source)
    image_token_id = add_special_tokens(tokenizer, decoder.config.vocab_size)
    tensors = {f"model.language_model.{name.removeprefix('model.')}": t for name, t in decoder.state_dict().items()}
    tensors["lm_head.weight"] = tensors.pop("model.language_model.lm_head.weight")
    text_config = type(decoder.config)(
        **{**decoder.config.to_dict(), "vocab_size": _vocabulary(decoder.config, tokenizer)}
    )
    if text_config.pad_token_id is None:
        text_config.pad_token_id = tokenizer.pad_token_id
    host = _cast(make_host(text_config, tower.config, geometry, image_token_id), dtype)
    tensors = mean_rows(tensors, text_config.vocab_size)
    tensors |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    fresh = {k: v for k, v in host.state_dict().items() if "multi_modal_projector" in k or k.endswith("image_newline")}
    load_strictly(host, _host_names(tensors, host) | fresh, source)
    return Parts(host, tokenizer, image_processor, geometry)


def _from_llava(source: str, dtype: torch.dtype, pad: bool) -> Parts:
    directory = Path(source)
    if directory.is_dir() and "mm_vision_tower" in read_json(directory / "config.json"):
        return _from_original(directory, dtype, pad)
    config = AutoConfig.from_pretrained(source)
    if config.model_type not in ("llava", "llava_next"):
        raise ValueError(f"{source}: model_type {config.model_type!r} is neither llava nor llava_next")
    host, report = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise ValueError(f"{source} does not fit the model: { {k: sorted(v) for k, v in report.items() if v} }")
    geometry = geometry_of(config)
    tokenizer = AutoTokenizer.from_pretrained(source)
    return Parts(host, tokenizer, load_image_processor(source, geometry.tile), geometry)


def _from_original(directory: Path, dtype: torch.dtype, pad: bool) -> Parts:
    """The layout of `liuhaotian/llava-v1.5-7b`: a LLaMA config with ``mm_*`` fields, the tower inside or beside."""
    config = read_json(directory / "config.json")
    tower_source = _beside(directory, config["mm_vision_tower"])
    tower = load_tower(tower_source, dtype=dtype)
    geometry = original_geometry(config, tower.config)
    text_config = _text_config(config)
    old_rows = text_config.vocab_size
    has_tokenizer = any(directory.glob("tokenizer*"))
    tokenizer = AutoTokenizer.from_pretrained(directory) if has_tokenizer else None
    image_token_id = old_rows if tokenizer is None else add_special_tokens(tokenizer, old_rows)
    text_config.vocab_size = _round_up(old_rows + 2) if pad else old_rows
    layer = config.get("mm_vision_select_layer", -2)
    host = _cast(make_host(text_config, tower.config, geometry, image_token_id, layer), dtype)
    tensors = rename(read_tensors(directory), ORIGINAL_TO_HOST)
    inside = {name for name in tensors if name.startswith("model.vision_tower.")}
    if not config.get("unfreeze_mm_vision_tower") or not inside:  # golden/README 4.13: a frozen tower is CLIP's own
        tensors = {name: tensor for name, tensor in tensors.items() if name not in inside}
        tensors |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    if geometry.aspect == "pad":
        tensors.pop("model.image_newline", None)
    load_strictly(host, _host_names(mean_rows(tensors, text_config.vocab_size), host), str(directory))
    return Parts(host, tokenizer, load_image_processor(tower_source, geometry.tile), geometry)


def original_geometry(config: Mapping[str, Any], vision: Any) -> ImageGeometry:
    """Tiling rules from the ``image_aspect_ratio``, ``mm_patch_merge_type`` and ``image_grid_pinpoints`` of an
    original config.json.

    Raises:
        ValueError: a setting that this package does not have.
    """
    for key, value in (("mm_vision_select_feature", "patch"), ("mm_projector_type", "mlp2x_gelu")):
        if config.get(key, value) != value:
            raise ValueError(f"config.json: {key} {config[key]!r} is not supported, only {value!r}")
    aspect = config.get("image_aspect_ratio")
    if aspect not in ("pad", "anyres"):
        raise ValueError(f"config.json: image_aspect_ratio {aspect!r} is not supported, only 'pad' and 'anyres'")
    if aspect == "pad":
        return ImageGeometry(vision.image_size, vision.patch_size)
    pinpoints = tuple((width, height) for width, height in config["image_grid_pinpoints"])
    merge = config.get("mm_patch_merge_type", "flat")
    return ImageGeometry(vision.image_size, vision.patch_size, "anyres", merge, pinpoints)


def add_special_tokens(tokenizer: Any, rows: int) -> int:
    """Gives ``tokenizer`` the tokens ``<image>`` and ``<pad>`` where it lacks them; returns the id of ``<image>``.

    Args:
        rows: vocabulary size of the decoder. New tokens get the first ids behind it, as llava-hf numbers them.
    """
    known = tokenizer.get_vocab()
    new = [
        AddedToken(token, special=True, normalized=False) for token in (IMAGE_MARKER, PAD_TOKEN) if token not in known
    ]
    if new and len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, but the decoder only {rows} embeddings")
    tokenizer.add_tokens(new, special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.unk_token:
        tokenizer.pad_token = PAD_TOKEN  # never <unk>: padding must not look like a token of the text
    return tokenizer.convert_tokens_to_ids(IMAGE_MARKER)


def _cast(host: Host, dtype: torch.dtype) -> Host:
    """Parameters in ``dtype``; buffers stay: rotary frequencies in half precision turn late positions to noise."""
    for parameter in host.parameters():
        parameter.data = parameter.data.to(dtype)
    return host


def _vocabulary(config: Any, tokenizer: Any) -> int:
    return config.vocab_size if len(tokenizer) <= config.vocab_size else _round_up(len(tokenizer))


def _round_up(rows: int) -> int:
    return -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _text_config(config: Mapping[str, Any]) -> Any:
    family = "mistral" if "mistral" in str(config.get("model_type", "")) else "llama"
    fields = {k: v for k, v in config.items() if not k.startswith("mm_") and k not in ("model_type", "architectures")}
    return AutoConfig.for_model(family, **fields)


def _beside(directory: Path, tower: str) -> str:
    """The tower named in an original config: as it stands, or relative to the checkpoint or one of its parents."""
    for parent in (Path(), directory, *directory.resolve().parents[:3]):
        if (parent / tower).is_dir():
            return str(parent / tower)
    return tower


def _host_names(tensors: Mapping[str, Tensor], host: Host) -> dict[str, Tensor]:
    """Tower tensors under the names this transformers version uses in memory (with or without ``vision_model.``)."""
    nested = any(name.startswith("model.vision_tower.vision_model.") for name in host.state_dict())
    prefix = "model.vision_tower.vision_model." if nested else "model.vision_tower."
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("model.vision_tower."):
            name = prefix + name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
        renamed[name] = tensor
    return renamed
