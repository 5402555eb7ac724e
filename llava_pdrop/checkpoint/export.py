"""Opened checkpoints onto a disk: canonical llava-hf, and the original LLaVA layout. No model is built for it, and at
most one shard is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava_pdrop.checkpoint.build import make_image_processor, make_processor
from llava_pdrop.checkpoint.hf_files import write_config, write_image_processor, write_processor
from llava_pdrop.checkpoint.layouts import EMBEDDINGS, MEMORY_TO_HF, MEMORY_TO_ORIGINAL, rename
from llava_pdrop.checkpoint.load import cut_rows
from llava_pdrop.checkpoint.old_tokenizers import write_original_tokenizer
from llava_pdrop.checkpoint.open import Source
from llava_pdrop.checkpoint.original import carried_by, dtype_of, original_config
from llava_pdrop.checkpoint.shards import SHARD_SIZE, Stored, beside, write_shards
from llava_pdrop.checkpoint.tower import TOWER_FOLDER, is_that_tower, opens_in_transformers_4, write_tower
from llava_pdrop.checkpoint.vocabulary import original_rows
from llava_pdrop.errors import UserError
from llava_pdrop.files import write_json

CLIP_L_336 = "openai/clip-vit-large-patch14-336"
"""The tower of all published LLaVA-1.5 and LLaVA-NeXT models, assumed where a checkpoint of its shape names none."""


def save_llava_hf(
    source: Source, directory: Path, dtype: torch.dtype | None = None, shard_size: str = SHARD_SIZE
) -> None:
    """Writes ``source`` as a Hugging Face LLaVA, with the key and field names that transformers 4, transformers 5 and
    vLLM read.

    Args:
        dtype: precision of all weights; None: each as it is stored.
    """
    tensors = _prepared(source, source.tensors, dtype)
    write_shards(directory, rename(tensors, MEMORY_TO_HF), shard_size)
    write_config(source.config, directory, dtype_of(tensors))
    source.generation.save_pretrained(directory)
    if source.tokenizer is None:
        write_image_processor(make_image_processor(source.image_processor, source.geometry), directory)
    else:
        write_processor(make_processor(source.tokenizer, source.image_processor, source.geometry), directory)


def usual_template(config: Any) -> str | None:
    """The conversation template of the published models of this kind, as no original config names one: LLaVA-1.5,
    LLaVA-NeXT-Vicuna and what was trained like them (32000 tokens of LLaMA) talk by ``v1``, LLaVA-NeXT-Mistral by
    ``mistral_instruct``. None for any other, and for what was no original LLaVA."""
    section = carried_by(config)
    if "tune_mm_mlp_adapter" not in section or section["vocab_size"] != 32000:
        return None
    return template_on(config.text_config.model_type, section["vocab_size"])


def template_on(decoder: str, rows: int) -> str | None:
    """The conversation template of the published LLaVAs on a ``decoder`` (its ``model_type``) with so many rows."""
    return "llama_3" if decoder == "llama" and rows >= LLAMA_3_ROWS else BY_DECODER.get(decoder)


BY_DECODER = {"llama": "v1", "mistral": "mistral_instruct", "qwen2": "qwen_2", "qwen": "qwen_2", "mpt": "mpt"}
LLAMA_3_ROWS = 128_000  # words of its vocabulary; Llama 1 and 2 and Vicuna have 32,000


def save_original(
    source: Source,
    directory: Path,
    dtype: torch.dtype | None = None,
    vision_tower: str | None = None,
    home: Path | None = None,
) -> list[str]:
    """Writes ``source`` as the original LLaVA code, on transformers 4.37, reads it: without the rows and tokens that
    Hugging Face's layout adds, the vision tower inside. That code also opens the tower where it comes from; where it
    cannot, because transformers 5 wrote that one, a copy for it lies in the folder ``vision_tower``.

    Args:
        dtype: precision of all weights; None: each as it is stored.
        vision_tower: ``mm_vision_tower``, the CLIP directory or hub id that the original code will open for the tower's
            shape and its image processor; default: what the checkpoint was made from.
        home: where ``directory`` will lie in the end; default: where it is.

    Returns:
        lines for the user on what is not the same in the old environment.

    Raises:
        UserError: the original code has no such model, or no vision tower is known.
    """
    tower = vision_tower or tower_name(source.config)
    if tower is None:
        raise UserError(f"{source.origin}: does not say which CLIP its vision tower is: name it (--vision-tower DIR)")
    vision, lies_at = source.config.vision_config, beside(Path(source.origin), tower)
    rows = original_rows(source.config, source.tokenizer)
    tensors = _prepared(source, cut_rows(source.tensors, rows), dtype)
    recorded = carried_by(source.config).get("unfreeze_mm_vision_tower")
    trained = bool(recorded) or not is_that_tower(tensors, lies_at)
    if not opens_in_transformers_4(lies_at, vision.image_size):
        write_tower(tensors, vision, source.image_processor, directory / TOWER_FOLDER)
        tower = str((home or directory).resolve() / TOWER_FOLDER)
    config = original_config(
        source.config,
        source.geometry,
        source.schedule,
        rows,
        tower,
        trained,
        dtype_of(tensors),
    )
    write_shards(directory, rename(tensors, MEMORY_TO_ORIGINAL))
    write_json(directory / "config.json", config)
    ends = source.generation.eos_token_id  # of a run also those of its template, which no config.json has
    ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids |= {} if ends is None else {"eos_token_id": ends}
    write_json(directory / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    if source.tokenizer is None:
        return []
    return write_original_tokenizer(source.tokenizer, directory, source.config.text_config)


def _prepared(source: Source, tensors: Mapping[str, Stored], dtype: torch.dtype | None) -> dict[str, Stored]:
    """The weights in ``dtype``, a head that is the embedding left out, under names without ``vision_model.``."""
    tied = source.config.tie_word_embeddings
    return {name: t.to(dtype) for name, t in tensors.items() if not (tied and name == EMBEDDINGS[1])}


def tower_name(config: Any) -> str | None:
    """The CLIP directory or hub id that a model's tower comes from, None if nothing says so."""
    recorded = carried_by(config).get("mm_vision_tower")
    vision = config.vision_config
    shape = (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size)
    return recorded or (CLIP_L_336 if shape == (1024, 24, 336, 14) else None)
