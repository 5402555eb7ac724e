"""Weight files, read and written tensor by tensor: a checkpoint is never in memory as a whole."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava_pdrop.errors import MissingFileError, UserError, listed
from llava_pdrop.files import read_json, write_json

SHARD_SIZE = "5GB"
WEIGHT_FILES = (("model", "safetensors"), ("pytorch_model", "bin"))
"""(stem, suffix) of weight files, in order of preference where a directory has both."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WANTED = ["*.json", "*.txt", "*.model", "*.jinja"]
"""Small files of a hub repository; its weights come as safetensors where it has them."""

PARENTS = 6
"""Directories above a checkpoint in which what it names by a relative path is looked for: a checkpoint of a variant of
a comparison lies that deep below the checkout that it was started in."""

NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.")


@dataclass(frozen=True)
class Stored:
    """A tensor that lies on a disk (or is made from such ones) until ``read`` is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> Stored:
        """A tensor that is in memory already."""
        return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def map(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> Stored:
        """What ``change`` makes of it, computed when it is read; its dtype stays."""
        return Stored(shape or self.shape, self.dtype, lambda: change(self.read()).to(self.dtype))

    def to(self, dtype: torch.dtype | None) -> Stored:
        """In another floating-point precision; None and integers: unchanged."""
        if dtype in (None, self.dtype) or not self.dtype.is_floating_point:
            return self
        return Stored(self.shape, dtype, lambda: self.read().to(dtype))

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def resolve(source: str) -> Path:
    """The directory of a checkpoint: ``source`` itself, or the local copy of a hub id (downloaded where allowed).

    Raises:
        MissingFileError: neither a directory nor a hub id that can be had.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise MissingFileError(f"{source} is a file; a checkpoint is a directory: name the one that holds it")
    try:
        directory = Path(snapshot_download(source, allow_patterns=[*WANTED, "model*.safetensors", "adapter_model*"]))
        if not weight_files(directory):
            directory = Path(snapshot_download(source, allow_patterns=[*WANTED, "*.bin"]))
    except Exception as error:  # noqa: BLE001  every HTTP client has its own kinds, with one meaning here
        reason = (str(error).strip().splitlines() or [""])[0]
        raise MissingFileError(
            f"{source} is no directory, and not to be had from the hub ({type(error).__name__}: {reason})"
        ) from None
    return directory


def beside(directory: Path, name: str) -> str:
    """The directory that a file of the checkpoint in ``directory`` calls ``name``: as it stands, or relative to the
    checkpoint or one of its parents; else the name, which may be one on the hub."""
    for parent in (Path(), directory, *directory.resolve().parents[:PARENTS]):
        if (parent / name).is_dir():
            return str(parent / name)
    return name


def weight_files(directory: Path) -> list[Path]:
    """The weight files of ``directory``, checked against its index; empty where there are none.

    Raises:
        UserError: files and index contradict each other, or a shard of a numbered set is missing.
    """
    for stem, suffix in WEIGHT_FILES:
        files = sorted(directory.glob(f"{stem}-*.{suffix}"))
        index = directory / f"{stem}.{suffix}.index.json"
        single = directory / f"{stem}.{suffix}"
        if index.is_file():
            return _indexed(index, files)
        if single.is_file():
            return [single]
        if files:
            counts = {int(match[2]) for match in map(NUMBERED.search, (file.name for file in files)) if match}
            if counts and counts != {len(files)}:
                raise UserError(f"{directory}: has {len(files)} of {max(counts)} *.{suffix} shards: copy the others")
            return files
    return []


def _indexed(index: Path, files: list[Path]) -> list[Path]:
    named = set(_weight_map(index).values())
    lacking = sorted(named - {file.name for file in files})
    if lacking:
        raise UserError(f"{index}: names shards that are not there: {', '.join(lacking)}")
    extra = sorted({file.name for file in files} - named)
    if extra:
        raise UserError(f"{index}: does not name {', '.join(extra)}: remove the file, or mend the index")
    return [index.parent / name for name in sorted(named)]


def _weight_map(index: Path) -> dict[str, str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise UserError(f"{index}: has no weight_map of names and files")
    return table


def open_tensors(path: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint directory (sharded or not) or of one .safetensors / .bin file, not yet read.

    Raises:
        MissingFileError: nothing readable there. UserError: a broken file, a tensor in two files, an index that does
            not say what the shards hold. Torch pickles are opened with ``weights_only=True``.
    """
    if path.is_file():
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
    files = weight_files(path)
    if not files:
        raise MissingFileError(f"{path}: no model*.safetensors and no pytorch_model*.bin file in it")
    tensors: dict[str, Stored] = {}
    place: dict[str, str] = {}
    for file in files:
        more = open_tensors(file)
        if twice := sorted(tensors.keys() & more.keys()):
            raise UserError(f"{file}: holds {twice[0]} again, which another file of {path} has: remove one of them")
        tensors |= more
        place |= dict.fromkeys(more, file.name)
    index = next((path / f"{s}.{x}.index.json" for s, x in WEIGHT_FILES if files[0].suffix == f".{x}"), path)
    if index.is_file():
        _check_index(index, place)
    return tensors


def _check_index(index: Path, place: Mapping[str, str]) -> None:
    table = _weight_map(index)
    lacking = sorted(f"{name} ({file})" for name, file in table.items() if place.get(name) != file)
    surplus = sorted(f"{name} ({file})" for name, file in place.items() if name not in table)
    if problems := listed({"missing from the shard it names": lacking, "in a shard but not in it": surplus}):
        raise UserError(f"{index}: does not fit its shards; {problems}")


def _open_safetensors(file: Path) -> dict[str, Stored]:
    try:
        handle = safe_open(file, "pt")
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}): copy it again") from None
    tensors = {}
    for name in handle.keys():  # noqa: SIM118  it is no dictionary
        entry = handle.get_slice(name)
        kind = entry.get_dtype()
        if kind not in DTYPES:
            raise UserError(f"{file}: {name} has dtype {kind}: quantised weights are not supported")
        tensors[name] = Stored(
            tuple(entry.get_shape()),
            DTYPES[kind],
            lambda name=name: handle.get_tensor(name),  # type: ignore[misc]
        )
    return tensors


def _open_pickle(file: Path) -> dict[str, Stored]:
    try:
        mapped = zipfile.is_zipfile(file)  # files from before torch 1.6 cannot be mapped: they are read as a whole
        loaded = torch.load(file, "cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError):  # torch's own words advise to run whatever is in the file
        raise UserError(f"{file}: not a whole file of plain tensors (nothing else is read from a pickle)") from None
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise UserError(f"{file}: is not a dictionary of tensors")
    return {name: Stored.of(tensor) for name, tensor in loaded.items()}


def write_shards(directory: Path, tensors: Mapping[str, Stored], shard_size: str = SHARD_SIZE) -> list[Path]:
    """Writes ``model.safetensors``, or numbered shards of at most ``shard_size`` and their index; older weight files
    in ``directory`` go. At most one shard is in memory."""
    directory.mkdir(parents=True, exist_ok=True)
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.bytes,
        filename_pattern="model{suffix}.safetensors",
        get_storage_id=lambda tensor: None,
        max_shard_size=shard_size,
    )
    remove_weights(directory)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: tensors[name].read().contiguous().cpu() for name in names}
        save_file(shard, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors leaves it to its owner alone
        del shard
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(directory / "model.safetensors.index.json", index)
    return [directory / file for file in plan.filename_to_tensors]


def remove_weights(directory: Path) -> None:
    """Removes the weight files of a whole model in ``directory``."""
    for stem, suffix in WEIGHT_FILES:
        for pattern in (f"{stem}.{suffix}", f"{stem}-*-of-*.{suffix}", f"{stem}.{suffix}.index.json"):
            for file in directory.glob(pattern):
                file.unlink()
