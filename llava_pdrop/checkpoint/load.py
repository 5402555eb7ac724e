"""Weights into a model and out of it: strict loading, the projector file of stage 1, Hugging Face directories.

Loading is strict. A missing, unexpected or mis-shaped key is an error that lists the keys, never a random weight.
How files are read stands in `shards.py`, which names they use in `layouts.py`, and the other way out (original LLaVA
layout, conversion without a model) in `export.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_pdrop.checkpoint.hf_files import write_config, write_processor
from llava_pdrop.checkpoint.layouts import CANONICAL, EMBEDDINGS, MEMORY_TO_HF, is_projector, rename
from llava_pdrop.checkpoint.shards import Stored, open_tensors, write_shards
from llava_pdrop.checkpoint.zero3 import gathered, overwrite, own_tensors, whole_shape
from llava_pdrop.errors import UserError, listed

PROJECTOR_FILE = "projector.safetensors"


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor | Stored], origin: str, kept: Collection[str] = ()
) -> None:
    """Copies ``tensors``, one after the other, into ``module``, whose names they must match one by one.

    A tied parameter (a head that is the embedding) may be missing; where it is there, it must equal its twin. Under
    ZeRO-3 every rank must come here; the first one reads the values.

    Args:
        kept: names that may be missing too: they keep the values they have.

    Raises:
        UserError: lists every missing, unexpected and mis-shaped key of ``origin``.
    """
    check_fit(module, tensors, origin, kept)
    own, twins = own_tensors(module), tied(module)
    done: set[str] = set()
    for name, tensor in tensors.items():
        read = (tensor if isinstance(tensor, Stored) else Stored.of(tensor)).read
        if twins.get(name) not in done:
            overwrite(own[name], read)
        else:
            with gathered(own[name]):
                same = torch.equal(own[name], read().to(own[name]))
            if not same:
                raise UserError(f"{origin}: {name} differs from {twins[name]}, to which the model's config ties it")
        done.add(name)


def check_fit(
    module: nn.Module,
    tensors: Mapping[str, Tensor | Stored],
    origin: str,
    kept: Collection[str] = (),
    rows: int | None = None,
) -> None:
    """Compares names and shapes with those of ``module``, which may be on the meta device or cut up by ZeRO-3.

    Args:
        kept: names that may be missing.
        rows: vocabulary that the checkpoint says it has, where `mean_rows` has given ``module`` a larger one: what an
            embedding or head of another size is told to lack.

    Raises:
        UserError: lists every missing, unexpected and mis-shaped key of ``origin``.
    """
    twins = tied(module)
    wanted = {name: whole_shape(tensor) for name, tensor in own_tensors(module).items()}
    if rows is not None:
        padded = [name for name in EMBEDDINGS if name in wanted and name in tensors]
        wanted |= {n: (rows, *wanted[n][1:]) for n in padded if tuple(tensors[n].shape) != wanted[n]}
    check_shapes(
        wanted,
        tensors,
        f"{origin} does not fit the model",
        {name for name, twin in twins.items() if twin in tensors} | set(kept),
    )


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Tensor | Stored],
    sentence: str,
    optional: Collection[str] = (),
) -> None:
    """Raises `UserError`, ``sentence`` and a list of the keys, unless ``found`` are the ``wanted`` tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wrong = [(name, shape) for name, shape in wanted.items() if shapes.get(name, shape) != shape]
    misshaped = sorted(f"{name} {shapes[name]} instead of {shape}" for name, shape in wrong)
    missing = sorted(wanted.keys() - found.keys() - set(optional))
    unexpected = sorted(found.keys() - wanted.keys())
    if problems := listed({"missing": missing, "unexpected": unexpected, "wrong shape": misshaped}):
        raise UserError(f"{sentence}; {problems}")


def tied(module: nn.Module) -> dict[str, str]:
    """Parameters that are one and the same: name -> the other name."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    pairs = [same for same in names.values() if len(same) > 1]
    return {name: next(other for other in same if other != name) for same in pairs for name in same}


def mean_rows(tensors: Mapping[str, Stored], old_rows: int, rows: int) -> dict[str, Stored]:
    """Embedding and head of ``old_rows`` rows with ``rows``; new rows are the mean of the old ones, as their own
    average is what an untrained token should look like to a trained model. Computed in float32 and the same for the
    same old rows, so that rows taken off by `cut_rows` come back bit by bit. A tensor with another number of rows than
    ``old_rows`` stays, to be refused by `check_fit`."""

    def pad(old_VD: Tensor) -> Tensor:
        mean_D = old_VD.float().mean(0).to(old_VD.dtype)
        return torch.cat([old_VD, mean_D.expand(rows - old_rows, -1)])

    padded = dict(tensors)
    for name in EMBEDDINGS:
        old = padded.get(name)
        if old is not None and old.shape[0] == old_rows < rows:
            padded[name] = old.map(pad, (rows, *old.shape[1:]))
    return padded


def cut_rows(tensors: Mapping[str, Stored], rows: int) -> dict[str, Stored]:
    """Embedding and head with their first ``rows`` rows only."""
    cut = dict(tensors)
    for name in EMBEDDINGS:
        old = cut.get(name)
        if old is not None and old.shape[0] > rows:
            cut[name] = old.map(lambda tensor: tensor[:rows].clone(), (rows, *old.shape[1:]))
    return cut


def save_projector(hf: nn.Module, directory: Path, state_dict: Mapping[str, Tensor] | None = None) -> Path:
    """Writes projector (and newline) as ``projector.safetensors``: what stage 1 hands to stage 2."""
    state = hf.state_dict() if state_dict is None else state_dict
    wanted = {name: tensor for name, tensor in state.items() if is_projector(name)}
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / PROJECTOR_FILE
    save_file({name: tensor.contiguous().cpu() for name, tensor in wanted.items()}, file)
    file.chmod(0o644)  # safetensors leaves it to its owner alone
    return file


def load_projector(hf: nn.Module, file: Path) -> None:
    """Reads a projector of ours or an original ``mm_projector.bin`` into ``hf``.

    Raises:
        UserError: its keys or shapes do not fit (see `load_strictly`).
    """
    tensors = rename(open_tensors(file))
    own = {name: tensor for name, tensor in own_tensors(hf).items() if is_projector(name)}
    check_shapes(
        {name: whole_shape(tensor) for name, tensor in own.items()},
        tensors,
        f"{file} does not fit the projector",
        {"model.image_newline"},  # a projector pretrained on plain pictures has no newline yet
    )
    for name, tensor in tensors.items():
        overwrite(own[name], tensor.read)


def save_pretrained(
    hf: nn.Module, processor: Any, directory: Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes an ordinary Hugging Face LLaVA directory: weights under the names of the hub's llava-hf checkpoints
    (`layouts.MEMORY_TO_HF`, whatever names this transformers version has in memory), config (with ``pyramid_drop``
    section), processor.

    Args:
        state_dict: gathered weights (DeepSpeed, FSDP); default: the model's own.

    Raises:
        UserError: ``state_dict`` holds keys that no LLaVA has; they are listed.
    """
    state = hf.state_dict() if state_dict is None else state_dict
    if hf.config.tie_word_embeddings and EMBEDDINGS[0] in state:
        state = {name: tensor for name, tensor in state.items() if name != EMBEDDINGS[1]}  # the same, as in llava-hf
    renamed = rename(state, MEMORY_TO_HF)
    foreign = sorted(name for name in renamed if not CANONICAL.match(name))
    if foreign:
        raise UserError(f"{directory}: not written, because these are no keys of a LLaVA: {', '.join(foreign)}")
    write_shards(directory, {name: Stored.of(tensor.detach()) for name, tensor in renamed.items()})
    write_config(hf.config, directory, hf.dtype)
    hf.generation_config.save_pretrained(directory)
    if processor is not None:
        write_processor(processor, directory)
