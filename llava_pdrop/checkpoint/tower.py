"""CLIP vision towers: opened without reading their weights, and written so that the original code opens them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_pdrop.checkpoint.hf_files import reading, write_image_processor
from llava_pdrop.checkpoint.layouts import TEXT_HALF, TOWER, TOWER_TO_MEMORY, rename
from llava_pdrop.checkpoint.load import check_shapes
from llava_pdrop.checkpoint.original import dtype_of
from llava_pdrop.checkpoint.shards import Stored, open_tensors, resolve, write_shards
from llava_pdrop.errors import UserError
from llava_pdrop.files import read_json, write_json

TOWER_FOLDER = "vision_tower"
"""Folder of an original checkpoint of ours with a tower that the original code cannot open where it lies."""


def open_tower(source: str, image_size: int | None = None) -> tuple[CLIPVisionConfig, dict[str, Stored]]:
    """A CLIP vision tower, alone or as a half of CLIP: its config, and its tensors under names in memory.

    Args:
        image_size: side of a picture in pixels if not its own (position embeddings are interpolated, bicubic).

    Raises:
        UserError: not CLIP, or keys that are missing, unexpected or mis-shaped.
    """
    directory = resolve(source)
    kind = read_json(directory / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise UserError(f"{source}: a {kind!r} vision tower is not supported, only CLIP's")
    with reading(directory / "config.json"):
        config = CLIPVisionConfig.from_pretrained(directory)
    stored = {name: tensor for name, tensor in open_tensors(directory).items() if not TEXT_HALF.match(name)}
    tensors = rename(stored, TOWER_TO_MEMORY)
    with reading(directory / "config.json"), torch.device("meta"):
        own = rename(CLIPVisionModel(config).state_dict(), TOWER_TO_MEMORY)
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    check_shapes(wanted, tensors, f"{source} does not fit a CLIP tower")
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


def is_that_tower(tensors: Mapping[str, Stored], tower: str) -> bool:
    """Whether the tower among ``tensors`` is, bit by bit, the one that lies at ``tower``: then it was not trained. A
    tower that is not at hand counts as another one, since the weights inside are right in any case."""
    try:
        _, theirs = open_tower(tower)
    except FileNotFoundError:
        return False
    plain = {name.replace(f"{TOWER}vision_model.", TOWER): tensor for name, tensor in tensors.items()}
    ours = {name: tensor for name, tensor in plain.items() if name.startswith(TOWER)}
    return ours.keys() == theirs.keys() and all(
        tensor.shape == theirs[name].shape and torch.equal(tensor.read(), theirs[name].to(tensor.dtype).read())
        for name, tensor in ours.items()
    )


def opens_in_transformers_4(tower: str, side: int) -> bool:
    """Whether the original code, on transformers 4.37, finds what it looks for in the directory ``tower``: pictures of
    ``side`` pixels, weights under ``vision_model.`` (of others it would say a warning, and go on with random ones) and
    the image processor in a file of its own. What is no directory here is one on the hub, whose CLIPs have all that."""
    directory = Path(tower)
    if not directory.is_dir():
        return True
    fields = read_json(directory / "config.json")
    own_side = (fields.get("vision_config") or fields).get("image_size", side)
    names = [name for name in open_tensors(directory) if not TEXT_HALF.match(name)]
    named = all(name.startswith("vision_model.") for name in names)
    return named and own_side == side and (directory / "preprocessor_config.json").is_file()


def write_tower(tensors: Mapping[str, Stored], config: CLIPVisionConfig, image_processor: Any, directory: Path) -> None:
    """Writes the CLIP tower among ``tensors`` (names in memory) as transformers 4 opens it, with its image processor.

    Args:
        config: of the tower.
    """
    own = {name.removeprefix(TOWER): tensor for name, tensor in tensors.items() if name.startswith(TOWER)}
    named = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in own.items()}
    write_shards(directory, named)
    fields = json.loads(config.to_json_string())
    fields.pop("dtype", None)
    precision = str(dtype_of(named)).removeprefix("torch.")
    write_json(directory / "config.json", fields | {"architectures": ["CLIPVisionModel"], "torch_dtype": precision})
    write_image_processor(image_processor, directory)
