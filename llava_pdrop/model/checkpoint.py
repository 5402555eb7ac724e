"""Weights in and out: the original LLaVA layout, the projector file of stage 1, ordinary Hugging Face directories.

Loading is strict. A missing, unexpected or mis-shaped key is an error that lists the keys, never a random weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ORIGINAL_TO_HOST: tuple[tuple[str, str], ...] = (
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.image_newline$", "model.image_newline"),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
)
"""Names of the original LLaVA layout -> names in a Hugging Face LLaVA in memory."""

OBSOLETE = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
"""Buffers that old checkpoints carry and that are computed today."""

PROJECTOR_FILE = "projector.safetensors"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory (sharded or not) or of one .safetensors / .bin file.

    Raises:
        FileNotFoundError: nothing readable there. ValueError: a tensor stands in two files. Torch pickles are opened
            with ``weights_only=True``.
    """
    if path.is_file():
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin"):
        tensors: dict[str, Tensor] = {}
        for file in sorted(path.glob(pattern)):
            more = read_tensors(file)
            if twice := sorted(tensors.keys() & more.keys()):
                raise ValueError(
                    f"{file}: holds {twice[0]} again, which another file of {path} has: remove one of them"
                )
            tensors |= more
        if tensors:
            return tensors
    raise FileNotFoundError(f"{path}: no *.safetensors and no pytorch_model*.bin file in it")


def rename(tensors: Mapping[str, Tensor], table: tuple[tuple[str, str], ...] = ORIGINAL_TO_HOST) -> dict[str, Tensor]:
    """Every tensor under its new name; obsolete buffers are left out."""
    renamed = {}
    for name, tensor in tensors.items():
        if OBSOLETE.search(name):
            continue
        for pattern, replacement in table:
            name, hits = re.subn(pattern, replacement, name)
            if hits:
                break
        renamed[name] = tensor
    return renamed


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copies ``tensors`` into ``module``, whose names they must match one by one.

    Raises:
        ValueError: lists every missing, unexpected and mis-shaped key of ``origin``.
    """
    own = module.state_dict()
    tied = getattr(module, "_tied_weights_keys", None) or {}
    missing = sorted(name for name in own.keys() - tensors.keys() if not (name in tied and tied_to(own, name)))
    unexpected = sorted(tensors.keys() - own.keys())
    misshaped = sorted(
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    )
    problems = [
        f"{kind}: {', '.join(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshaped))
        if names
    ]
    if problems:
        raise ValueError(f"{origin} does not fit the model; " + "; ".join(problems))
    module.load_state_dict(dict(tensors), strict=False)


def tied_to(own: Mapping[str, Tensor], name: str) -> bool:
    """Whether parameter ``name`` shares its memory with another one, which then brings its value."""
    return any(other != name and own[other].data_ptr() == own[name].data_ptr() for other in own)


def mean_rows(tensors: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Embedding and head with ``rows`` rows; new rows are the mean of the old ones, as their own average is what an
    untrained token should look like to a trained model."""
    padded = dict(tensors)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if name in padded and len(padded[name]) < rows:
            mean_D = padded[name].float().mean(0).to(padded[name].dtype)
            padded[name] = torch.cat([padded[name], mean_D.expand(rows - len(padded[name]), -1)])
    return padded


def save_projector(host: nn.Module, directory: Path, state_dict: Mapping[str, Tensor] | None = None) -> Path:
    """Writes projector (and newline) as ``projector.safetensors``: what stage 1 hands to stage 2."""
    state = host.state_dict() if state_dict is None else state_dict
    wanted = {name: tensor for name, tensor in state.items() if _is_projector(name)}
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / PROJECTOR_FILE
    save_file({name: tensor.contiguous().cpu() for name, tensor in wanted.items()}, file)
    return file


def load_projector(host: nn.Module, file: Path) -> None:
    """Reads a projector of ours or an original ``mm_projector.bin`` into ``host``.

    Raises:
        ValueError: its keys or shapes do not fit (see `load_strictly`).
    """
    tensors = rename(read_tensors(file))
    own = {name: tensor for name, tensor in host.state_dict().items() if _is_projector(name)}
    if "model.image_newline" in own and "model.image_newline" not in tensors:
        own.pop("model.image_newline")  # a projector pretrained on plain pictures has no newline yet
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"{file} does not fit the projector: it holds {found}, the model needs {shapes}")
    host.load_state_dict(tensors, strict=False)


def _is_projector(name: str) -> bool:
    return ".multi_modal_projector." in name or name.endswith("image_newline")


def save_pretrained(
    host: nn.Module, processor: Any, directory: Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes an ordinary Hugging Face LLaVA directory: weights, config (with ``pyramid_drop`` section), processor."""
    directory.mkdir(parents=True, exist_ok=True)
    host.save_pretrained(directory, state_dict=dict(state_dict) if state_dict is not None else None)
    if processor is not None:
        processor.save_pretrained(directory)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from ``file``.

    Raises:
        FileNotFoundError: no such file. ValueError: it is not JSON.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not a JSON file ({error})") from None
