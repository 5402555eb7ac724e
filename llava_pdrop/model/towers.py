"""Opens CLIP vision towers without reading their weights."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_pdrop.model.checkpoint import check_shapes
from llava_pdrop.model.hf_files import reading
from llava_pdrop.model.layouts import TEXT_HALF, TOWER, TOWER_TO_HOST, rename
from llava_pdrop.model.shards import Stored, open_tensors, read_json, resolve


def open_tower(source: str, image_size: int | None = None) -> tuple[CLIPVisionConfig, dict[str, Stored]]:
    """A CLIP vision tower, alone or as a half of CLIP: its config, and its tensors under host names.

    Args:
        image_size: side of a picture in pixels if not its own (position embeddings are interpolated, bicubic).

    Raises:
        ValueError: not CLIP, or keys that are missing, unexpected or mis-shaped.
    """
    directory = resolve(source)
    kind = read_json(directory / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"{source}: a {kind!r} vision tower is not supported, only CLIP's")
    with reading(directory / "config.json"):
        config = CLIPVisionConfig.from_pretrained(directory)
    stored = {name: tensor for name, tensor in open_tensors(directory).items() if not TEXT_HALF.match(name)}
    tensors = rename(stored, TOWER_TO_HOST)
    with torch.device("meta"):
        own = rename(CLIPVisionModel(config).state_dict(), TOWER_TO_HOST)
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check_shapes(wanted, found, f"{source} does not fit a CLIP tower")
    if image_size not in (None, config.image_size):
        name = f"{TOWER}embeddings.position_embedding.weight"
        side = image_size // config.patch_size
        shape = (side**2 + 1, config.hidden_size)
        tensors[name] = tensors[name].map(lambda old_PD: _interpolate(old_PD, side), shape)
        config.image_size = image_size
    return config, tensors


def _interpolate(position_PD: Tensor, side: int) -> Tensor:
    """Position embeddings (class token first) for a grid of ``side`` x ``side`` patches."""
    token_1D, grid_PD = position_PD[:1], position_PD[1:]
    old = int(len(grid_PD) ** 0.5)
    grid_1Dhw = grid_PD.float().T.reshape(1, -1, old, old)
    grid_1Dhw = F.interpolate(grid_1Dhw, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([token_1D, grid_1Dhw.flatten(2)[0].T.to(position_PD.dtype)])


def beside(directory: Path, tower: str) -> str:
    """The tower named in an original config: as it stands, or relative to the checkpoint or one of its parents."""
    for parent in (Path(), directory, *directory.resolve().parents[:3]):
        if (parent / tower).is_dir():
            return str(parent / tower)
    return tower
