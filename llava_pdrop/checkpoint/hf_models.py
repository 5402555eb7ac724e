"""Hugging Face LLaVAs without weights: their config, and the module itself, empty or on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.initialization import no_init_weights
from transformers.modeling_utils import set_zero3_state

from llava_pdrop.checkpoint.zero3 import cut_up, overwrite
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.vlm import HfLlava

CLASSES = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
"""model_type -> class of the model."""


def make_config(
    text_config: Any, vision_config: Any, geometry: ImageGeometry, image_token_id: int, feature_layer: int = -2
) -> LlavaConfig | LlavaNextConfig:
    """The config of a model: LLaVA-NeXT for anyres, LLaVA otherwise.

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
        return LlavaConfig(**common, image_seq_length=geometry.patches)
    pinpoints = [[height, width] for width, height in geometry.pinpoints]
    config = LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
    config.mm_patch_merge_type, config.image_rounding = geometry.merge, geometry.rounding
    return config


def make_hf_model(text_config: Any, vision_config: Any, geometry: ImageGeometry, image_token_id: int) -> HfLlava:
    """An untrained LLaVA (see `make_config`). Costs nothing under ``torch.device("meta")``."""
    config = make_config(text_config, vision_config, geometry, image_token_id)
    return CLASSES[config.model_type]._from_config(config)


def empty_hf_model(config: Any, dtype: torch.dtype) -> HfLlava:
    """A LLaVA whose parameters, in ``dtype``, hold nothing yet, except projector and newline, which are initialised.

    Buffers keep float32: rotary frequencies in half precision turn late positions to noise. Memory that is not written
    is not used, so that loading into it needs one copy of the model. Under ZeRO-3 (`transformers` knows from its
    training arguments) the parameters are cut up as they are made, so that no rank ever holds all of them.
    """
    with no_init_weights(), cut_up():
        hf = CLASSES[config.model_type]._from_config(config, dtype=dtype)
    hf.tie_weights()
    _initialise_projector(hf)
    return hf


def _initialise_projector(hf: HfLlava) -> None:
    """Projector and newline as Hugging Face initialises them. Every rank draws the same numbers of the seed, in float32
    on the CPU: every engine starts from these, rounded to its precision. Drawn in place they would be others on a GPU,
    and in half precision (torch 2.11) others and with 8 bits of randomness."""
    projector = hf.model.multi_modal_projector
    with no_init_weights():
        drawn = type(projector)(hf.config)
    drawn.apply(hf._init_weights)
    for own, values in zip(projector.parameters(), drawn.parameters(), strict=True):
        overwrite(own, lambda values=values: values)
    newline = getattr(hf.model, "image_newline", None)
    if newline is not None:
        width = hf.config.text_config.hidden_size
        values = torch.empty(width).normal_(0.0, width**-0.5)
        overwrite(newline, lambda: values)


def meta_hf_model(config: Any) -> HfLlava:
    """A LLaVA of which only names and shapes are wanted (not those of the pieces that ZeRO-3 would cut)."""
    with set_zero3_state(), torch.device("meta"):
        return CLASSES[config.model_type]._from_config(config)
