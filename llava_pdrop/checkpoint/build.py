"""Builds a Hugging Face LLaVA: from a LLaVA directory of either layout, or from an LLM and a CLIP tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import LlavaNextProcessor, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llava_pdrop.checkpoint.hf_models import empty_hf_model
from llava_pdrop.checkpoint.layouts import is_projector
from llava_pdrop.checkpoint.load import load_projector, load_strictly
from llava_pdrop.checkpoint.open import Source, open_llava, open_parts
from llava_pdrop.errors import MissingFileError, UserError, naming
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.vision import pack_by_geometry
from llava_pdrop.model.vlm import HfLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import IMAGE_MARKER


@dataclass(frozen=True)
class ModelParts:
    """A Hugging Face LLaVA with all that is needed to feed it. ``image_processor`` makes one square tile (CLIP's);
    ``geometry`` says how a picture is cut into tiles; ``schedule`` is the one the checkpoint was trained with (an empty
    one: without dropping), None where the checkpoint says nothing; ``notes`` are lines for the user on what its files
    contradict each other in."""

    hf: HfLlava
    tokenizer: Any
    image_processor: CLIPImageProcessorPil
    geometry: ImageGeometry
    schedule: Schedule | None = None
    notes: tuple[str, ...] = ()

    def processor(self) -> LlavaProcessor | LlavaNextProcessor:
        """The Hugging Face processor that turns text and pictures into this model's inputs, to be saved with it."""
        return make_processor(self.tokenizer, self.image_processor, self.geometry)


def require_tokenizer(parts: ModelParts, directory: str | Path) -> None:
    """Raises `MissingFileError` if ``directory``, which ``parts`` were read from, holds no tokenizer."""
    if parts.tokenizer is None:
        raise MissingFileError(
            f"{directory}: holds no tokenizer (tokenizer.json or tokenizer.model, and tokenizer_config.json), without "
            "which no text can be read: copy its files there from where the model comes from"
        )


def make_processor(
    tokenizer: Any, clip: CLIPImageProcessorPil, geometry: ImageGeometry
) -> LlavaProcessor | LlavaNextProcessor:
    """The Hugging Face processor of a model with these parts."""
    kind = LlavaNextProcessor if geometry.aspect == "anyres" else LlavaProcessor
    return kind(
        image_processor=make_image_processor(clip, geometry),
        tokenizer=tokenizer,
        patch_size=geometry.patch,
        vision_feature_select_strategy="default",
        image_token=IMAGE_MARKER,
        num_additional_image_tokens=1,  # the class token, which "default" takes off again
        chat_template=tokenizer.chat_template,
    )


def make_image_processor(
    clip: CLIPImageProcessorPil, geometry: ImageGeometry
) -> LlavaImageProcessorPil | LlavaNextImageProcessorPil:
    """Hugging Face's image processor that pads or tiles as ``geometry`` says."""
    settings = dict(
        size=dict(clip.size), crop_size=dict(clip.crop_size), image_mean=clip.image_mean, image_std=clip.image_std
    )
    if geometry.aspect == "anyres":
        pinpoints = [[height, width] for width, height in geometry.pinpoints]
        return LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=pinpoints)
    return LlavaImageProcessorPil(**settings, do_pad=True)


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
) -> ModelParts:
    """Loads a model.

    Args:
        path: a LLaVA in Hugging Face's or the original layout; its own image settings hold. With ``language_model``: a
            LoRA run or a projector-only directory of the original code, and the model under it. With ``vision_tower``:
            that tower instead of the one an original config names. Without ``path``:
        language_model, vision_tower: directories or hub ids of a decoder and a CLIP tower, joined by a new projector
            and the image settings given here. ``image_size``: side of a tile in pixels if not the tower's own (its
            position embeddings are interpolated).
        projector: file with a pretrained projector.
        pad_vocabulary: give an original LLaVA rows for ``<image>`` and ``<pad>``, as Hugging Face's own forward needs.
            Without them its logits are those of the official code to the last column.

    Raises:
        MissingFileError: a directory or file that does not exist. UserError: weights that do not fit. Their ``key``
            says which part it is, as a config names it: ``model.path``, ``model.language_model``,
            ``model.vision_tower`` or ``model.projector``.
    """
    if path is not None:
        with naming("model.path"):
            source = open_llava(path, language_model, vision_tower, pad_vocabulary)
    elif language_model is None or vision_tower is None:
        raise UserError("model: give either path, or language_model and vision_tower")
    else:
        options = {"aspect": aspect, "merge": merge, "pinpoints": pinpoints, "rounding": rounding}
        source = open_parts(language_model, vision_tower, options, image_size)
    with naming("model.path" if path is not None else "model.language_model", SafetensorError):
        parts = load_source(source, dtype)
    if projector is not None:
        with naming("model.projector", SafetensorError):
            load_projector(parts.hf, Path(projector))
    return parts


def load_source(source: Source, dtype: torch.dtype = torch.float32) -> ModelParts:
    """Reads an opened checkpoint one tensor at a time: the memory needed is that of the model in ``dtype`` and of its
    largest tensor."""
    hf = empty_hf_model(source.config, dtype)
    load_strictly(hf, source.tensors, source.origin, {name for name, _ in hf.named_parameters() if is_projector(name)})
    hf.generation_config = source.generation
    pack_by_geometry(hf, source.geometry)
    return ModelParts(hf, source.tokenizer, source.image_processor, source.geometry, source.schedule, source.notes)
