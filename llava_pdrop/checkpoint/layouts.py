"""Key names of the checkpoint layouts, and the way between them.

The names in the middle ("names in memory") are those of a Hugging Face LLaVA under transformers 5: ``lm_head.``,
``model.language_model.``, ``model.vision_tower.`` (without ``vision_model.``), ``model.multi_modal_projector.`` and
``model.image_newline``. Every layout on disk has a table to them and, where we write it, one from them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias, TypeVar

from llava_pdrop.errors import UserError

NameTable: TypeAlias = tuple[tuple[str, str], ...]
Value = TypeVar("Value")

ORIGINAL_TO_MEMORY: NameTable = (
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.image_newline$", "model.image_newline"),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
)
"""The original LLaVA layout, which for the decoder is that of a raw LLM as well."""

HF_TO_MEMORY: NameTable = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.(model\.)?", "model.language_model."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^(model\.)?image_newline$", "model.image_newline"),
)
"""Hugging Face's LLaVA as any version writes it: 4.x, 5.x, and 5.x after loading a 4.x file."""

TOWER_TO_MEMORY: NameTable = (
    (r"^(vision_model\.)?(embeddings|encoder|pre_layrnorm|post_layernorm)\b", r"model.vision_tower.\2"),
)
"""A CLIP tower, or the whole of CLIP."""

MEMORY_TO_HF: NameTable = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"^model\.image_newline$", "image_newline"),
)
"""The names of the llava-hf checkpoints on the hub: the ones that transformers 4, transformers 5 and vLLM all read."""

CANONICAL = re.compile(
    r"language_model\.(model\.(embed_tokens|layers|norm)|lm_head)\."
    r"|vision_tower\.vision_model\.|multi_modal_projector\.|image_newline$"
)
"""What every name made by `MEMORY_TO_HF` begins with."""

MEMORY_TO_ORIGINAL: NameTable = (
    (r"^model\.language_model\.", "model."),
    (r"^model\.vision_tower\.(vision_model\.)?", "model.vision_tower.vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
)
"""The names that the code of `haotian-liu/LLaVA` and of the official PyramidDrop opens."""

OBSOLETE = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
"""Buffers that old checkpoints carry and that are computed today."""

TEXT_HALF = re.compile(r"^(text_model\.|text_projection|visual_projection|logit_scale)")
"""What a whole CLIP has besides its tower."""

TOWER = "model.vision_tower."
EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
"""The model's two tensors with a row per token."""


def rename(tensors: Mapping[str, Value], table: NameTable = ORIGINAL_TO_MEMORY) -> dict[str, Value]:
    """Every tensor under its new name; obsolete buffers are left out, names that no entry fits stay.

    Raises:
        UserError: two tensors would get the same name.
    """
    renamed: dict[str, Value] = {}
    for name, tensor in tensors.items():
        if OBSOLETE.search(name):
            continue
        new = rename_one(name, table)
        if new in renamed:
            raise UserError(f"the checkpoint holds {new} twice under different names, one of them {name}")
        renamed[new] = tensor
    return renamed


def rename_one(name: str, table: NameTable) -> str:
    """``name`` by the first entry of ``table`` that fits it."""
    for pattern, replacement in table:
        new, hits = re.subn(pattern, replacement, name)
        if hits:
            return new
    return name


def in_memory(tensors: Mapping[str, Value], own: Mapping[str, object]) -> dict[str, Value]:
    """Names in memory with the tower as this version of transformers names it (``own``: the model's state_dict)."""
    nested = any(name.startswith(f"{TOWER}vision_model.") for name in own)
    prefix = f"{TOWER}vision_model." if nested else TOWER
    return {re.sub(rf"^{re.escape(TOWER)}(vision_model\.)?", prefix, name): t for name, t in tensors.items()}


def is_projector(name: str) -> bool:
    """Whether a name in memory belongs to what stage 1 trains: projector and newline."""
    return ".multi_modal_projector." in name or name.endswith("image_newline")
