"""Small checkpoints on a disk, in every layout and file format, to be read or to be spoilt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_pdrop.checkpoint.layouts import MEMORY_TO_HF, OBSOLETE, rename

MODELS = Path(__file__).parents[2] / "golden" / "reference" / "models"
TOKENIZER = MODELS.parent / "tokenizers" / "sp_legacy_false"
TOWER = MODELS / "clip56"
LAYOUTS = {
    "hf4": MEMORY_TO_HF,
    "hf5": (
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^model\.image_newline$", "image_newline"),
    ),
    "memory": (),
}
"""Hugging Face layout -> table from names in memory. hf5 has no ``vision_model.``, memory is a state_dict as it is."""

CANONICAL_TO_MEMORY = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^image_newline$", "model.image_newline"),
)

FORMATS = ("safetensors", "safetensors-shards", "bin", "bin-shards")


def original(name: str = "llava15") -> tuple[dict, dict[str, Tensor]]:
    """Config (its tower as an absolute path) and tensors of a reference model."""
    config = json.loads((MODELS / name / "config.json").read_text()) | {"mm_vision_tower": str(TOWER)}
    tensors = {k: v for k, v in load_file(MODELS / name / "model.safetensors").items() if not OBSOLETE.search(k)}
    return config, tensors


def write(directory: Path, config: dict, tensors: dict[str, Tensor], kind: str = "safetensors") -> Path:
    """A checkpoint directory in one of `FORMATS`; shards go by turns."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if "text_config" in config:
        shutil.copyfile(TOWER / "preprocessor_config.json", directory / "preprocessor_config.json")
    suffix = kind.split("-")[0]
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if not kind.endswith("shards"):
        write_file(directory / f"{stem}.{suffix}", tensors)
        return directory
    names = [f"{stem}-0000{i}-of-00003.{suffix}" for i in (1, 2, 3)]
    place = {name: names[i % 3] for i, name in enumerate(tensors)}
    for file in names:
        write_file(directory / file, {name: tensor for name, tensor in tensors.items() if place[name] == file})
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return directory


def write_file(file: Path, tensors: dict[str, Tensor]) -> None:
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def in_layout(layout: str, hf: Path) -> tuple[dict, dict[str, Tensor]]:
    """The reference model in ``layout``; ``hf`` is its converted directory."""
    if layout == "original":
        return original()
    config = json.loads((hf / "config.json").read_text())
    return config, rename(rename(load_file(hf / "model.safetensors"), CANONICAL_TO_MEMORY), LAYOUTS[layout])


def with_tokenizer(directory: Path) -> Path:
    """Adds a LLaMA tokenizer."""
    for file in TOKENIZER.iterdir():
        shutil.copyfile(file, directory / file.name)
    return directory
