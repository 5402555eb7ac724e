"""``llava-pdrop eval``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llava_pdrop.commands.arguments import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_config(parser)
    parser.description = f"{parser.description}. CONFIG may be a run directory, or any LLaVA with data.eval=FILE."


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    config = _config(args)
    from llava_pdrop.eval.evaluate import evaluate_config

    evaluate_config(config)


def _config(args: argparse.Namespace) -> Any:
    """The config named on the command line. A directory stands for the run that was saved there, evaluated as it is."""
    from llava_pdrop.config.load import RUN_FILE, load_config, runs_in
    from llava_pdrop.errors import ConfigError

    path, overrides = Path(args.config), list(args.overrides)
    if path.is_dir() and not (path / RUN_FILE).is_file():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"{path} is no run and no model: it has neither {RUN_FILE} nor config.json{runs_in(path)}"
            )
        return _foreign(path, overrides)
    if path.is_dir():
        whole = [f"model.path={path}", "model.language_model=null", "model.vision_tower=null", "model.projector=null"]
        path, overrides = path / RUN_FILE, whole + overrides
    return load_config(path, overrides)


def _foreign(directory: Path, overrides: list[str]) -> Any:
    """The config of a LLaVA that was not trained here: it is evaluated with the schedule in its config.json, if any."""
    from llava_pdrop.checkpoint.hf_files import reading
    from llava_pdrop.checkpoint.original import original_schedule
    from llava_pdrop.checkpoint.shards import read_json
    from llava_pdrop.config.load import RUN_FILE, config_of
    from llava_pdrop.errors import ConfigError

    if not any(word.startswith("data.eval=") for word in overrides):
        raise ConfigError(f"{directory} has no {RUN_FILE} that names questions: add data.eval=FILE data.image_root=DIR")
    with reading(directory / "config.json"):
        schedule = original_schedule(read_json(directory / "config.json"))
    values = {
        "name": directory.name,
        "output_dir": str(directory),
        "model": {"path": str(directory)},
        "data": {"train": "${data.eval}", "samples_per_batch": 1},  # required keys, which evaluation does not read
        "pyramid_drop": schedule.to_dict() if schedule else None,
    }
    return config_of(values, overrides, directory / RUN_FILE)
