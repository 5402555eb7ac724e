"""``config.json`` of the original LLaVA layout: what its fields mean for us, and how we write them.

Source of the names: `llava/model/llava_arch.py`, `llava/model/multimodal_*/builder.py` and `llava/train/train.py` of
LLaVA 1.2 and of the official PyramidDrop. What a Hugging Face config has no place for travels in its section
``original_llava``, so that a checkpoint can go there and back.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig

from llava_pdrop.checkpoint.hf_files import rope_fields
from llava_pdrop.errors import UserError
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.schedule import Schedule

FAMILIES = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}
"""Decoder -> (model_type, class) of the original code."""

NOT_TEXT = re.compile(
    r"^(mm_|image_|tokenizer_|tune_|freeze_|unfreeze_|use_mm_|pyramid_drop$|layer_list$|torch_dtype$|dtype$|model_type$"
    r"|architectures$|auto_map$|transformers_version$|_name_or_path$|max_sequence_length$)"
)
"""Fields of an original config.json that say nothing about its decoder."""

DERIVED = re.compile(
    r"^(pyramid_drop|layer_list|image_token_ratio_list|image_aspect_ratio|image_grid_pinpoints|mm_patch_merge_type"
    r"|mm_hidden_size|mm_projector_type|mm_vision_select_\w+|mm_use_\w+|use_mm_proj|torch_dtype|dtype|model_type"
    r"|architectures|auto_map|transformers_version|_name_or_path)$"
)
"""Those of them that we write anew and need not carry along."""

SECTION = "original_llava"
"""Where a Hugging Face config of ours keeps the rest, and the vocabulary before ``<image>`` and ``<pad>``."""


def refuse_unsupported(config: Mapping[str, Any], origin: str) -> None:
    """Raises `UserError`, one line, for an original checkpoint of a kind that this package does not have."""
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(config.get(key), int):  # transformers would take the number of LLaMA-7B
            raise UserError(f"{origin}/config.json: {key} must be a whole number, got {config.get(key)!r}")
    tower = config["mm_vision_tower"]
    if not isinstance(tower, str) or not tower:
        raise UserError(f"{origin}/config.json: mm_vision_tower names no directory or hub id: {tower!r}")
    kind = str(config.get("model_type"))
    if family_of(config) is None:
        known = ", ".join(sorted(name for name, _ in FAMILIES.values()))
        raise UserError(f"{origin}/config.json: model_type {kind!r} is not supported, only {known}")
    projector = config.get("mm_projector_type", "linear")  # the default of the original builder
    if projector != "mlp2x_gelu":
        raise UserError(f"{origin}/config.json: mm_projector_type {projector!r} is not supported, only 'mlp2x_gelu'")
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if config.get(key):
            raise UserError(f"{origin}/config.json: {key} is not supported: its extra tokens are not")
    if config.get("quantization_config"):
        raise UserError(f"{origin}/config.json: quantised weights are not supported: take the float ones")


def family_of(config: Mapping[str, Any]) -> str | None:
    """The decoder (a key of `FAMILIES`) of an original config, None if it is none of them."""
    kind = str(config.get("model_type"))
    return next((family for family, (name, _) in FAMILIES.items() if kind in (name, family, "llava")), None)


def text_config_of(config: Mapping[str, Any]) -> Any:
    """The decoder's Hugging Face config."""
    fields = {name: value for name, value in config.items() if not NOT_TEXT.match(name)}
    if fields.get("rope_scaling") is None:  # transformers 5 warns of the name alone
        fields.pop("rope_scaling", None)
    return AutoConfig.for_model(family_of(config), **fields)


def original_geometry(config: Mapping[str, Any], vision: Any) -> ImageGeometry:
    """Tiling rules from the ``image_aspect_ratio``, ``mm_patch_merge_type`` and ``image_grid_pinpoints`` of an
    original config.json.

    Raises:
        UserError: a setting that this package does not have.
    """
    if (feature := config.get("mm_vision_select_feature", "patch")) != "patch":
        raise UserError(f"config.json: mm_vision_select_feature {feature!r} is not supported, only 'patch'")
    aspect = config.get("image_aspect_ratio")
    if aspect not in ("pad", "anyres"):
        raise UserError(f"config.json: image_aspect_ratio {aspect!r} is not supported, only 'pad' and 'anyres'")
    if aspect == "pad":
        return ImageGeometry(vision.image_size, vision.patch_size)
    sizes = _literal(config.get("image_grid_pinpoints"), "image_grid_pinpoints")
    if not all(isinstance(size, list | tuple) and len(size) == 2 for size in sizes):
        raise UserError(f"config.json: image_grid_pinpoints {sizes!r} is not a list of [width, height]")
    pinpoints = tuple((int(width), int(height)) for width, height in sizes)
    merge = config.get("mm_patch_merge_type", "flat")
    return ImageGeometry(vision.image_size, vision.patch_size, "anyres", merge, pinpoints)


def original_schedule(config: Mapping[str, Any]) -> Schedule | None:
    """The dropping schedule written in a config.json: our ``pyramid_drop`` section, or in an original one the official
    ``layer_list`` and ``image_token_ratio_list`` (lists or their text, with or without the leading 1.0). None if it
    says nothing.

    Raises:
        UserError: only one of the two lists, keys that no schedule has, or a schedule that cannot be.
    """
    section = config.get("pyramid_drop")
    if section is not None:
        try:
            return Schedule.from_dict(section).at("renumber")  # the positions of a LLaVA have one axis
        except TypeError as error:
            raise UserError(f"config.json: pyramid_drop {section!r} is no schedule ({error})") from None
    layers, ratios = config.get("layer_list"), config.get("image_token_ratio_list")
    if layers is None and ratios is None:
        return None
    if layers is None or ratios is None:
        lacking = "layer_list" if layers is None else "image_token_ratio_list"
        raise UserError(f"config.json: {lacking} is missing, without which the other of the two says nothing")
    layers, ratios = _literal(layers, "layer_list"), _literal(ratios, "image_token_ratio_list")
    if len(ratios) == len(layers) + 1 and ratios[0] == 1.0:
        ratios = ratios[1:]  # train and eval scripts insert it (golden/README 4.1)
    return Schedule(tuple(layers), tuple(ratios), positions="renumber")


def _literal(value: Any, key: str) -> list[Any]:
    """A list, or the text of one, as the original scripts hand it on."""
    try:
        value = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"config.json: {key} is not a list with entries")
    return list(value)


def carried(config: Mapping[str, Any]) -> dict[str, Any]:
    """What section `SECTION` of a Hugging Face config keeps of an original one."""
    kept = {name: value for name, value in config.items() if NOT_TEXT.match(name) and not DERIVED.match(name)}
    return {**kept, "vocab_size": config["vocab_size"]}


def carried_by(config: Any) -> dict[str, Any]:
    """That section of a Hugging Face config; empty where it has none."""
    return getattr(config, SECTION, None) or {}


def original_config(
    config: Any, geometry: ImageGeometry, schedule: Schedule | None, rows: int, tower: str, trained: bool, dtype: Any
) -> dict[str, Any]:
    """``config.json`` of the original layout for a Hugging Face LLaVA ``config``.

    Args:
        rows: vocabulary without ``<image>`` and ``<pad>``.
        tower: ``mm_vision_tower``, the directory or hub id of the CLIP tower.
        trained: whether the tower is to be read from the checkpoint (``unfreeze_mm_vision_tower``).

    Raises:
        UserError: the original code has no class, or no setting, for such a model.
    """
    text = config.text_config
    if text.model_type not in FAMILIES:
        raise UserError(f"the original LLaVA code has no {text.model_type} decoder, only {', '.join(FAMILIES)}")
    if config.projector_hidden_act != "gelu" or not getattr(config, "multimodal_projector_bias", True):
        raise UserError("the original LLaVA code has no such projector, only linear, gelu, linear with biases")
    if geometry.rounding != "original":
        raise UserError("the original LLaVA code rounds picture sizes by its own rule, but this model by 'hf'")
    kind, architecture = FAMILIES[text.model_type]
    fields = {k: v for k, v in json.loads(text.to_json_string()).items() if k not in ("rope_parameters", "dtype")}
    if fields.get("pad_token_id") is not None and fields["pad_token_id"] >= rows:
        fields["pad_token_id"] = None  # our <pad>
    rope = rope_fields(text)
    if rope["rope_scaling"]:  # transformers 4.37 calls its kind "type", and takes no other fields than it needs
        rope["rope_scaling"]["type"] = rope["rope_scaling"].pop("rope_type")
    anyres = geometry.aspect == "anyres"
    return {
        **fields,
        **rope,
        "mm_patch_merge_type": "flat",
        "tokenizer_padding_side": "right",
        "transformers_version": "4.37.2",
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        **carried_by(config),
        **({"mm_patch_merge_type": geometry.merge} if anyres else {}),
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": rows,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "use_mm_proj": True,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": tower,
        "unfreeze_mm_vision_tower": trained,
        "image_aspect_ratio": geometry.aspect,
        "image_grid_pinpoints": [list(size) for size in geometry.pinpoints] if anyres else None,
        **_schedule_fields(schedule),
    }


def _schedule_fields(schedule: Schedule | None) -> dict[str, Any]:
    """Ours, and for readers of the official names those as well, where layers and ratios say all that there is."""
    if schedule is None:
        return {}
    lists = {"layer_list": list(schedule.layers), "image_token_ratio_list": list(schedule.ratios)}
    alone = schedule.ratios and schedule.at("renumber") == Schedule(schedule.layers, schedule.ratios).at("renumber")
    return {"pyramid_drop": schedule.to_dict(), **(lists if alone else {})}


def dtype_of(tensors: Mapping[str, Any]) -> torch.dtype:
    """The precision of most of a checkpoint's weights."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    return max(sizes, key=lambda dtype: sizes[dtype])
