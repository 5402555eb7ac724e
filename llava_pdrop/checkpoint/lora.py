"""LoRA runs, of the original code, of ours, and of peft on a Hugging Face LLaVA: small matrices, merged into the
weights of their base model.

Merging is done tensor by tensor while weights are read (peft needs the whole model in memory, under its own names). The
arithmetic is that of peft's ``LoraLayer.merge``, which a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_pdrop.checkpoint.layouts import EMBEDDINGS, NameTable, in_memory, rename_one
from llava_pdrop.checkpoint.load import PROJECTOR_FILE
from llava_pdrop.checkpoint.shards import Stored, beside, open_tensors, resolve
from llava_pdrop.errors import MissingFileError, UserError, clip
from llava_pdrop.files import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA = "non_lora_trainables.safetensors"
WHOLE = ("non_lora_trainables.bin", NON_LORA, PROJECTOR_FILE)
"""Files of a LoRA run with whole tensors, in place of the base's own: the first one the original code's, then ours."""

ADAPTER = re.compile(r"\.lora_[AB]\.")
"""What the name of every parameter of an adapter holds, and no other."""

PREFIX = "base_model.model."
"""What peft puts before the names of a model's parameters."""

LORA = re.compile(r"^(.+)\.lora_(A|B)(?:\.default)?\.weight$")

PLAIN = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False,
    "layer_replication": None, "trainable_token_indices": None, "target_parameters": None,
}  # fmt: skip
"""Settings of adapter_config.json that must be as they are by default (an empty list counts as None)."""

FREE = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "init_lora_weights",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", *PLAIN,
}  # fmt: skip
"""Settings that are looked at, or that change nothing of a saved adapter. Any other one that is set may change what the
matrices mean."""

OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of ``init_lora_weights`` by which peft changes the weights of the base itself: the adapters then belong to
a base that was never published. (Converted on saving, as peft can, they say True.)"""


def is_lora(directory: Path) -> bool:
    """Whether ``directory`` holds a LoRA run."""
    return (directory / ADAPTER_CONFIG).is_file()


def find_base(directory: Path) -> str | None:
    """Where the model under the adapters in ``directory`` lies; None where their config names none.

    Raises:
        MissingFileError: it is neither where it was, nor beside the run, nor on the hub.
    """
    named = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if named is None:
        return None
    base = beside(directory, named)
    try:
        resolve(base)
    except MissingFileError as error:
        raise MissingFileError(
            f"{directory / ADAPTER_CONFIG}: base_model_name_or_path: {error}; join the run with a copy of its base: "
            "llava-pdrop convert RUN DIR --to llava-hf --base BASE, and use DIR"
        ) from None
    return base


def config_directory(directory: Path, base: str | None = None) -> Path:
    """Where the config.json of the model in ``directory`` lies: there, or with the base (default: the one that is
    named) of adapters that peft has saved, which writes none.

    Raises:
        UserError: no base is named. MissingFileError: it cannot be had.
    """
    if (directory / "config.json").is_file() or not is_lora(directory):
        return directory
    base = base or find_base(directory)
    if base is None:
        raise UserError(
            f"{directory / ADAPTER_CONFIG}: base_model_name_or_path is missing: name the model under the adapters "
            "(convert: --base DIR)"
        )
    home = resolve(base)
    if home.resolve() == directory.resolve():
        raise UserError(f"{directory}: holds adapters only, so that it cannot be their base model: name that")
    return home


def merged(base: Mapping[str, Stored], directory: Path, table: NameTable = ()) -> dict[str, Stored]:
    """The weights of ``base`` with the LoRA run in ``directory`` merged in, and its whole tensors (of files beside the
    adapters, or peft's ``modules_to_save``) in place of the base's own of those names.

    Args:
        table: from the run's names to those of ``base``. By default they are the same: the original ones for a run of
            the original code.

    Raises:
        MissingFileError: no adapter file. UserError: a kind of adapter that is not supported, a matrix without its
            partner, one for a weight that the base does not have, or of a wrong shape.
    """
    config = read_json(directory / ADAPTER_CONFIG)
    _refuse_unsupported(config, directory / ADAPTER_CONFIG)
    file = next((directory / name for name in ADAPTERS if (directory / name).is_file()), None)
    if file is None:
        raise MissingFileError(f"{directory}: holds neither {ADAPTERS[0]} nor {ADAPTERS[1]}")
    tensors = dict(base)
    for name in WHOLE:
        if (directory / name).is_file():
            tensors |= _plain_names(open_tensors(directory / name))
    pairs: dict[str, dict[str, Stored]] = {}
    problems = []
    for name, tensor in _plain_names(open_tensors(file)).items():
        if (match := LORA.match(name)) is not None:
            pairs.setdefault(match[1], {})[match[2]] = tensor
            continue
        own = _in_base(name, table, base)
        if not _is_saved_whole(name, own, config):
            raise UserError(f"{file}: unexpected: {name}: not a matrix of plain LoRA")
        if own not in tensors:
            problems.append(f"{name} has no weight in the base model")
        elif tensors[own].shape != tensor.shape:
            problems.append(f"{name} {tensor.shape} for a weight {tensors[own].shape}")
        else:
            tensors[own] = tensor.to(tensors[own].dtype)
    for module, pair in sorted(pairs.items()):
        own = _in_base(f"{module}.weight", table, base)
        weight = tensors.get(own)
        if weight is None or len(pair) < 2:
            problems.append(f"{module} has no {'weight in the base model' if weight is None else 'partner matrix'}")
        elif pair["A"].shape[0] != pair["B"].shape[1] or weight.shape != (pair["B"].shape[0], pair["A"].shape[1]):
            problems.append(f"{module} {pair['B'].shape} x {pair['A'].shape} for a weight {weight.shape}")
        else:
            tensors[own] = weight.map(partial(_merge, pair["A"], pair["B"], _scaling(config, module)))
    if problems:
        raise UserError(f"{file} does not fit the base model; " + "; ".join(problems))
    return tensors


def _refuse_unsupported(config: Mapping[str, Any], file: Path) -> None:
    """Raises `UserError`, one line, for adapters that are more than two matrices beside a weight."""
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise UserError(f"{file}: {key} must be a number above 0, got {config.get(key)!r}")
    for key, value in PLAIN.items():
        if (config.get(key, value) or None) != (value or None):
            raise UserError(f"{file}: {key} {config[key]!r} is not supported, only {value!r}")
    if others := [key for key, value in config.items() if value and key not in FREE]:
        raise UserError(f"{file}: {others[0]} {clip(repr(config[others[0]]))} is not supported, only adapters without")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(OTHER_BASE):
        raise UserError(
            f"{file}: init_lora_weights {start!r} is not supported, as it changed the base: save the adapters "
            "converted to plain LoRA (peft: path_initial_model_for_weight_conversion)"
        )


def _in_base(name: str, table: NameTable, base: Mapping[str, Stored]) -> str:
    """``name`` of a run as ``base`` calls it."""
    (own,) = in_memory({rename_one(name, table): None}, base)
    return own


def _is_saved_whole(name: str, own: str, config: Mapping[str, Any]) -> bool:
    """Whether peft has saved a tensor for itself: of ``modules_to_save``, or an embedding or head that was resized."""
    asked = [str(module) for module in config.get("modules_to_save") or ()]
    return own in EMBEDDINGS or any(f".{module}." in f".{name}" for module in asked)


def _merge(down: Stored, up: Stored, scaling: float, weight_OI: Tensor) -> Tensor:
    delta_OI = (up.read().float() @ down.read().float()) * scaling
    return weight_OI + delta_OI.to(weight_OI.dtype)


def _scaling(config: Mapping[str, Any], module: str) -> float:
    """lora_alpha / r, by module where the config says so, or / sqrt(r) for rank-stabilised LoRA."""
    rank = by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def by_pattern(table: Mapping[str, float] | None, module: str, default: float) -> float:
    """The entry of peft's ``rank_pattern`` or ``alpha_pattern`` that fits the name of a module."""
    for pattern, value in (table or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _plain_names(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Without the names of peft's and DeepSpeed's wrappers around the model."""
    return {re.sub(r"^(module\.)?(base_model\.model\.)?", "", name): tensor for name, tensor in tensors.items()}
