"""What lies in a run's output directory already: a finished run to use again, a checkpoint to go on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers.trainer_utils import get_last_checkpoint

from llava_pdrop.config import RUN_FILE, Config, to_yaml

FINISHED_FILE = "run.json"

NOT_PART_OF_A_RUN = ("name", "output_dir", "eval", "compare", "data.eval", "data.prepare", "train.resume")
"""Keys that change nothing about the weights a run ends with."""

MAY_CHANGE_ON_RESUME = (
    "max_steps", "num_train_epochs", "save_strategy", "save_steps", "save_total_limit", "logging_steps",
    "report_to", "disable_tqdm", "dataloader_num_workers", "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
)  # fmt: skip
"""Training arguments a run may be continued with in spite of another value in the checkpoint."""


def identity(config: Config) -> dict[str, Any]:
    """What decides the weights of a run: its settings, and size and time of the files it reads."""
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))  # type: ignore[assignment]
    for key in NOT_PART_OF_A_RUN:
        *sections, leaf = key.split(".")
        node = values
        for section in sections:
            node = node.get(section, {})
        node.pop(leaf, None)
    model = config.model
    files = [config.data.train, model.projector, model.path, model.language_model, model.vision_tower]
    values["files"] = {name: _stamps(Path(name)) for name in files if name is not None}
    return values


def digest(config: Config) -> str:
    """A short hash of `identity`."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]


def is_finished(config: Config, stamp: str) -> bool:
    """Whether ``output_dir`` holds a finished run with this `digest`."""
    file = Path(config.output_dir) / FINISHED_FILE
    return file.is_file() and json.loads(file.read_text()).get("digest") == stamp


def mark_finished(config: Config, stamp: str, facts: Mapping[str, Any]) -> None:
    """Notes that the run of `digest` ``stamp`` is complete."""
    facts = {"digest": stamp, "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"), **facts}
    (Path(config.output_dir) / FINISHED_FILE).write_text(json.dumps(facts, indent=1) + "\n")


def checkpoint_to_resume(config: Config) -> str | None:
    """The checkpoint that ``train.resume`` asks for: the newest one in ``output_dir`` (auto), a given one, or none.

    Raises:
        ValueError: with ``auto``, the newest checkpoint comes from a run with other settings.
    """
    if config.train.resume == "never":
        return None
    if config.train.resume != "auto":
        return config.train.resume
    output = Path(config.output_dir)
    checkpoint = get_last_checkpoint(str(output)) if output.is_dir() else None
    if checkpoint is None:
        return None
    changed = _differences(Path(checkpoint) / RUN_FILE, config)
    if changed:
        raise ValueError(
            f"{checkpoint} was written with another {', '.join(changed)}: give the settings back, choose another "
            "output_dir, or start over with train.resume=never"
        )
    return checkpoint


def _differences(file: Path, config: Config) -> list[str]:
    """Dotted keys in which a saved run differs from ``config``, beyond those that may change."""
    if not file.is_file():
        return []
    before = _flat(OmegaConf.to_container(OmegaConf.load(file)))
    now = _flat(OmegaConf.to_container(OmegaConf.create(to_yaml(config))))
    free = (*NOT_PART_OF_A_RUN, *(f"train.{name}" for name in MAY_CHANGE_ON_RESUME))
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return [key for key in keys if not any(key == name or key.startswith(f"{name}.") for name in free)]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for key, part in values.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else key).items()}


def _stamps(path: Path) -> list[list[Any]]:
    """(name, size, time of change) of a file or of the files of a directory; nothing for a hub id."""
    files = sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
