"""What lies in a run's output directory already: a finished run to use again, a checkpoint to go on from."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from llava_pdrop.config.load import RUN_FILE, to_yaml
from llava_pdrop.config.places import MODELS, PATHS, absolute, is_hub_id, mapped, relative_to_run
from llava_pdrop.config.schema import Config
from llava_pdrop.data.mixture import data_files
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.files import read_json, write_json
from llava_pdrop.train.bad_samples import BAD_SAMPLES_FILE
from llava_pdrop.train.checkpoints import STAGING, all_checkpoints, newest_whole, read_manifest, what_is_torn
from llava_pdrop.train.metrics import writing
from llava_pdrop.world import number_of_processes

FINISHED_FILE = "run.json"

NOT_PART_OF_A_RUN = (
    "name",
    "output_dir",
    "eval",
    "compare",
    "paper",
    "model.beyond_positions",
    "data.eval",
    "data.prepare",
    "data.cache",
    "train.resume",
)
"""Keys that change nothing about the weights a run ends with."""

MAY_CHANGE_ON_RESUME = (
    "max_steps", "num_train_epochs", "save_strategy", "save_steps", "save_total_limit", "logging_steps",
    "report_to", "disable_tqdm", "dataloader_num_workers", "dataloader_prefetch_factor",
    "dataloader_persistent_workers", "ddp_timeout", "on_bad_sample", "max_bad_samples",
)  # fmt: skip
"""Training arguments a run may be continued with in spite of another value in the checkpoint."""


HARMLESS = tuple(name for name in MAY_CHANGE_ON_RESUME if name not in ("max_steps", "num_train_epochs"))
"""Training arguments that do not change what a complete run ends with."""

HASHED_UP_TO = 64 * 2**20
"""Bytes up to which a file counts by its content, so that a copy is the same; larger ones by size and time."""

PACKAGES = ("llava_pdrop", "torch", "transformers")


def identity(config: Config, by_name: bool = False) -> dict[str, Any]:
    """What makes a run the one that was asked for: its settings and the files it reads. Where these lie is compared
    apart (`is_finished`), since the same place has several names.

    Args:
        by_name: as it was before: paths as they stand in the config.
    """
    values = _plain(to_yaml(config))
    for key in (*NOT_PART_OF_A_RUN, *(f"train.{name}" for name in HARMLESS)):
        *sections, leaf = key.split(".")
        node = values
        for section in sections:
            node = node.get(section, {})
        node.pop(leaf, None)
    if by_name:
        return values | {"files": {name: stamps for _, name, stamps in files_read(config)}}
    values = mapped(values, lambda key, path: path if key in MODELS and is_hub_id(path) else "")
    return values | {"files": [[key, stamps] for key, _, stamps in files_read(config)]}


def files_read(config: Config) -> list[tuple[str, str, Any]]:
    """(key, path, what tells them from others of the same name) of the files and directories of a run."""
    model = config.model
    named: list[tuple[str, str | None]] = [("data.train", str(file)) for file in data_files(config.data.train)]
    named += [("data.index", config.data.index), ("model.projector", model.projector), ("model.path", model.path)]
    named += [("model.language_model", model.language_model), ("model.vision_tower", model.vision_tower)]
    return [(key, name, _stamps(Path(name))) for key, name in named if name is not None]


def surroundings() -> dict[str, str]:
    """Where a run takes place. It changes the weights a little; a finished run is not thrown away for it."""
    versions = {name: str(importlib.import_module(name).__version__) for name in PACKAGES}
    return {"processes": str(number_of_processes()), **versions}


def digest(config: Config, by_name: bool = False) -> str:
    """A short hash of `identity`."""
    return hashlib.sha256(json.dumps(identity(config, by_name), sort_keys=True).encode()).hexdigest()[:16]


def is_finished(config: Config, stamp: str) -> bool:
    """Whether ``output_dir`` holds a finished run with this `digest`, of the same files and directories."""
    before = _finished(Path(config.output_dir))
    if before is None:
        return False
    if "paths" not in before:  # of a version that knew files by the names in the config
        return before.get("digest") == digest(config, by_name=True)
    return before.get("digest") == stamp and not any(
        key in PATHS for key in _differences(Path(config.output_dir) / RUN_FILE, config, HARMLESS)
    )


def made_elsewhere(config: Config) -> str:
    """In what surroundings the finished run in ``output_dir`` was made, as far as they are not those of now: ``" (with
    torch 2.11.0, now 2.13.0)"``, or nothing."""
    before = _finished(Path(config.output_dir)) or {}
    other = [(name, before.get(name), now) for name, now in surroundings().items()]
    lines = [f"{name} {then}, now {now}" for name, then, now in other if then not in (None, now)]
    return f" (with {'; '.join(lines)})" if lines else ""


def why_outdated(config: Config) -> str | None:
    """In what the finished run in ``output_dir``, with another `digest`, differs from this one beyond its settings;
    None where there is none, where ``train.resume=never`` replaces it, or where a checkpoint of it goes on.

    Raises:
        ConfigError: its settings differ, so it must not be overwritten silently.
    """
    output = Path(config.output_dir)
    before = _finished(output)
    if config.train.resume == "never" or before is None:
        return None
    changed = _differences(output / RUN_FILE, config, HARMLESS)
    if changed and all_checkpoints(output) and not _differences(output / RUN_FILE, config):
        return None  # only longer or shorter: that is going on, not replacing
    if changed:
        raise ConfigError(
            f"{config.file}: output_dir: {output} holds a finished run with another {', '.join(changed)}: give another "
            "output_dir, or train.resume=never to replace it"
        )
    return "other files"


def clear(output: Path) -> None:
    """Removes what a new run in ``output`` could be mistaken for: checkpoints, and the mark of a finished run."""
    for old in (*all_checkpoints(output), output / STAGING):
        shutil.rmtree(old, ignore_errors=True)
    for name in (FINISHED_FILE, BAD_SAMPLES_FILE):
        (output / name).unlink(missing_ok=True)


def mark_finished(config: Config, stamp: str, facts: Mapping[str, Any]) -> None:
    """Notes that the run of `digest` ``stamp`` is complete.

    Raises:
        UserError: that could not be written.
    """
    facts = {"digest": stamp, "paths": "apart", "finished": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
    facts |= surroundings()
    file = Path(config.output_dir) / FINISHED_FILE
    with writing(file):
        write_json(file, facts)


def _finished(output: Path) -> dict[str, Any] | None:
    """What `mark_finished` noted in ``output``; None where it did not, or not to the end (a full disk)."""
    try:
        return read_json(output / FINISHED_FILE)
    except UserError:
        return None


def checkpoint_to_resume(config: Config, say: Callable[[str], None] = print) -> str | None:
    """The checkpoint that ``train.resume`` asks for: the newest whole one in ``output_dir`` (auto), a given one, none.

    Args:
        say: is told of torn checkpoints that are passed over, and of another number of processes.

    Raises:
        UserError: the given one is torn, it comes from a run with other settings, or it cannot go on with this number
            of processes.
    """
    if config.train.resume == "never":
        return None
    if config.train.resume == "auto":
        checkpoint = newest_whole(Path(config.output_dir), say)
    else:
        checkpoint = Path(config.train.resume)
        reason = what_is_torn(checkpoint)
        if reason is not None:
            raise UserError(f"{config.file}: train.resume: {checkpoint} is torn: {reason}; choose another, or auto")
    if checkpoint is None:
        return None
    if config.train.arguments.get("save_only_model"):
        raise UserError(
            f"{checkpoint} cannot be continued: train.save_only_model leaves the optimizer out; start over from its "
            "weights (model.path, train.resume=never)"
        )
    same_step = _check_processes(checkpoint, config, say)
    changed = _differences(checkpoint / RUN_FILE, config)
    if same_step:
        changed = [key for key in changed if key != "train.gradient_accumulation_steps"]
    if config.lora is not None:  # its base may lie elsewhere by now: the trainer knows it by its weights
        changed = [key for key in changed if key not in ("model.language_model", "model.path")]
    if changed:
        raise UserError(
            f"{checkpoint} was written with another {', '.join(changed)}: give the settings back, choose another "
            "output_dir, or start over with train.resume=never"
        )
    return str(checkpoint)


def check_steps(config: Config, checkpoint: str, steps: int) -> None:
    """Raises `UserError` if ``checkpoint`` is from behind the ``steps`` of this run, which would be called finished
    with the weights of a longer one."""
    done = read_json(Path(checkpoint) / "trainer_state.json")["global_step"]
    if done > steps:
        raise UserError(
            f"{config.file}: train.max_steps, train.num_train_epochs: this run has {steps:,} steps, and {checkpoint} "
            f"is from step {done:,}: raise them, name an earlier one (train.resume), choose another output_dir, or "
            "start over with train.resume=never"
        )


def _check_processes(checkpoint: Path, config: Config, say: Callable[[str], None]) -> bool:
    """Whether this run shares a step's micro-batches out to another number of processes than the one that wrote
    ``checkpoint``, which is possible where their number stays the same and nothing was sharded.
    """
    manifest = read_manifest(checkpoint) or {}
    before = manifest["world_size"], manifest["gradient_accumulation"]
    now = number_of_processes(), config.train.arguments.get("gradient_accumulation_steps", 1)
    if before[0] == now[0]:
        return False
    written = f"{checkpoint} was written by {before[0]} processes x {before[1]} micro-batches a step, this run has "
    written += f"{now[0]} x {now[1]}"
    if manifest["sharded"]:
        raise UserError(
            f"{written}: its optimizer is sharded over the processes, so it goes on with {before[0]} only (or start "
            "over from its weights: model.path and train.resume=never)"
        )
    if before[0] * before[1] != now[0] * now[1]:
        whole, rest = divmod(before[0] * before[1], now[0])
        remedy = f"train.gradient_accumulation_steps={whole}" if not rest else f"{before[0]} processes"
        raise UserError(f"{written}: the steps would hold other samples; give {remedy}")
    say(
        f"{written}: same samples in every step, in the same order; sums are added up in another order and random "
        "rankers draw other numbers, so the results are close to those of the first run, not equal"
    )
    return True


def _differences(file: Path, config: Config, arguments: Sequence[str] = MAY_CHANGE_ON_RESUME) -> list[str]:
    """Dotted keys in which a saved run differs from ``config``, beyond those that may change; ``arguments``: training
    arguments among these. A path is the same if it is the same place, or has moved together with the run."""
    if not file.is_file():
        return []
    saved = mapped(_plain(file.read_text(encoding="utf-8")), absolute)  # an older one has them as they were given
    asked = _plain(to_yaml(config, from_anywhere=True))
    before, now = _flat(saved), _flat(asked)
    moved_before, moved_now = _flat(relative_to_run(saved)), _flat(relative_to_run(asked))
    free = (*NOT_PART_OF_A_RUN, *(f"train.{name}" for name in arguments))
    keys = sorted(
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key) and moved_before.get(key) != moved_now.get(key)
    )
    return [key for key in keys if not any(key == name or key.startswith(f"{name}.") for name in free)]


def _plain(text: str) -> dict[str, Any]:
    """What a saved run says. ``model.kernels: auto`` is left out: runs of before the key are the same runs."""
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(text))  # type: ignore[assignment]
    if isinstance(section := values.get("model"), dict) and section.get("kernels") == "auto":
        del section["kernels"]
    return values


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for key, part in values.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else key).items()}


def _stamps(path: Path) -> list[list[Any]]:
    """(name, size, content hash or time of change) of a file or of the files of a directory; nothing for a hub id."""
    files = sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, _content(file)] for file in files if file.is_file()]


def _content(file: Path) -> str | int:
    if file.stat().st_size > HASHED_UP_TO:
        return file.stat().st_mtime_ns
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
