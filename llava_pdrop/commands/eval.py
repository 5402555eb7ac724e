"""``llava-pdrop eval``.

Exit status: 0; 1 more pictures of a benchmark than ``eval.max_unread`` cannot be read; 2 a user's error.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_pdrop.commands.arguments import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_config(parser)
    parser.description = (
        f"{parser.description}. CONFIG may be a run directory, or any vision-language model that attach() knows, with "
        "data.eval=FILE or benchmarks=NAME,NAME (`llava-pdrop benchmarks` lists them; benchmarks=paper: the paper's). "
        "training_free=NAME,NAME adds schedules to the table: vanilla, or names in compare.training_free."
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        SystemExit: with status 1, after all is written, where too many pictures cannot be read.
    """
    config = _config(args)
    from llava_pdrop.errors import ConfigError
    from llava_pdrop.eval.evaluate import evaluate_config
    from llava_pdrop.eval.measure import measure_config
    from llava_pdrop.eval.scores import refuse_unread

    if not config.eval.benchmarks:
        if config.eval.training_free:
            raise ConfigError(f"{config.file}: eval.training_free: is for benchmarks: add benchmarks=NAME,NAME")
        evaluate_config(config)
        return
    if any(word.startswith("data.eval=") for word in args.overrides):
        evaluate_config(config)
    refuse_unread(measure_config(config), config.eval.max_unread)


def _config(args: argparse.Namespace) -> Any:
    """The config named on the command line. A directory stands for the run that was saved there, evaluated as it is."""
    from llava_pdrop.checkpoint.lora import is_lora
    from llava_pdrop.config.load import RUN_FILE, load_config, runs_in
    from llava_pdrop.errors import ConfigError

    path, overrides = Path(args.config), list(args.overrides)
    if path.is_dir() and not (path / RUN_FILE).is_file():
        if not (path / "config.json").is_file() and not is_lora(path):
            raise ConfigError(
                f"{path} is no run and no model: it has neither {RUN_FILE} nor config.json{runs_in(path)}"
            )
        return _foreign(path, overrides)
    if not path.is_dir():
        return load_config(path, overrides)
    whole = [f"model.path={path}", "model.language_model=null", "model.vision_tower=null", "model.projector=null"]
    config = load_config(path / RUN_FILE, whole + overrides)
    return replace(config, paper=load_config(path / RUN_FILE, overrides).paper)  # it is about this very run


def _foreign(directory: Path, overrides: list[str]) -> Any:
    """The config of a model that was not trained here: it is evaluated with the schedule in its config.json, if any,
    and asked as its files say."""
    from llava_pdrop.checkpoint.hf_files import reading
    from llava_pdrop.checkpoint.lora import config_directory
    from llava_pdrop.checkpoint.original import original_schedule
    from llava_pdrop.config.load import RUN_FILE, config_of
    from llava_pdrop.errors import ConfigError
    from llava_pdrop.eval.respondent import CHAT, chat_template_in, is_ours, template_of
    from llava_pdrop.files import read_json

    names = {word.split("=", 1)[0] for word in overrides}
    if not names & {"data.eval", "benchmarks", "eval.benchmarks"}:
        raise ConfigError(
            f"{directory} has no {RUN_FILE} that names questions: add data.eval=FILE data.image_root=DIR, or "
            "benchmarks=NAME"
        )
    home = config_directory(directory)  # of adapters that peft has saved: their base
    fields = read_json(home / "config.json")
    with reading(home / "config.json"):
        schedule = original_schedule(fields)
    model = {"path": str(directory)}
    if "model.template" not in names:
        chat = chat_template_in(directory) or chat_template_in(home)
        model["template"] = template_of(home, fields, chat) if is_ours(home) else CHAT
    data = "${data.eval}" if "data.eval" in names else str(directory)  # required keys, which evaluation does not read
    values = {
        "name": directory.name,
        "output_dir": str(directory),
        "model": model,
        "data": {"train": data, "samples_per_batch": 1},
        "pyramid_drop": schedule.to_dict() if schedule else None,
    }
    return config_of(values, overrides, directory / RUN_FILE)
