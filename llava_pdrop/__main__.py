"""The command line: ``llava-pdrop COMMAND CONFIG [section.key=value ...]``, the same as ``python -m llava_pdrop``."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent

EPILOG = """\
CONFIG is a YAML file (configs/README.md lists every key); section.key=value changes one key of it, e.g.
  llava-pdrop train configs/llava15_7b/finetune_pdrop.yaml pyramid_drop.layers=[8,16,24] train.learning_rate=1e-5
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 after an error that the user can mend (one line)."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = _parser(words[0] if words else None)
    args, more = parser.parse_known_args(words)
    if not hasattr(args, "overrides") or any(word.startswith("-") for word in more):
        args, more = parser.parse_args(words), []
    if more:
        args.overrides += more  # overrides that follow an option
    try:
        COMMANDS[args.command].run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if args.debug or not is_for_the_user(error):
            raise
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # what is wrong may be wrong on one rank only
        rank = f"[rank {os.environ.get('RANK', '0')}] " if several else ""
        print(f"{rank}error: {line_of(error)}", file=sys.stderr)
        return 2
    return 0


FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk, or of this user's share of it, that is full."""


def is_for_the_user(error: BaseException) -> bool:
    """Whether the message of ``error`` says all, so that a traceback would only hide it: it was raised by this package
    on purpose (not somewhere inside a library), or is about a file that is missing, cannot be used, or has no room."""
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError) or error.filename is not None or error.errno in FULL
    frames = traceback.extract_tb(error.__traceback__)
    return (
        bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(PACKAGE) and isinstance(error, ValueError)
    )


def line_of(error: BaseException) -> str:
    """The message of ``error`` in one line; what the system says about a file begins with the file."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        if error.errno in FULL:
            text = f"{text}: make room and start the same command again"
    return " ".join(text.split())


def _train(args: argparse.Namespace) -> None:
    from llava_pdrop.config import load_config

    config = load_config(args.config, args.overrides)
    from llava_pdrop.eval.runner import check_scorer
    from llava_pdrop.train.run import train

    check_scorer(config)  # training does not need it, but what comes after does
    train(config)


def _compare(args: argparse.Namespace) -> None:
    if Path(args.config).is_dir():
        from llava_pdrop.eval.runs import compare_runs

        compare_runs([args.config, *args.overrides])
        return
    from llava_pdrop.config import check_paths, load_config

    config = load_config(args.config, args.overrides)
    check_paths(config)  # before the imports of training: a missing path is then said within seconds
    from llava_pdrop.eval.compare import compare

    compare(config)


def _eval(args: argparse.Namespace) -> None:
    config = _config(args)
    from llava_pdrop.eval.runner import evaluate_config

    evaluate_config(config)


def _config(args: argparse.Namespace) -> Any:
    """The config named on the command line. A directory stands for the run that was saved there, evaluated as it is."""
    from llava_pdrop.config import RUN_FILE, ConfigError, load_config

    path, overrides = Path(args.config), list(args.overrides)
    if path.is_dir() and not (path / RUN_FILE).is_file():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} is no run and no model: it has neither {RUN_FILE} nor config.json")
        return _foreign(path, overrides)
    if path.is_dir():
        whole = [f"model.path={path}", "model.language_model=null", "model.vision_tower=null", "model.projector=null"]
        path, overrides = path / RUN_FILE, whole + overrides
    return load_config(path, overrides)


def _take_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")


def _take_run(parser: argparse.ArgumentParser) -> None:
    _take_config(parser)
    parser.description = f"{parser.description}. CONFIG may be a run directory, or any LLaVA with data.eval=FILE."


def _take_runs(parser: argparse.ArgumentParser) -> None:
    _take_config(parser)
    parser.description = (
        f"{parser.description}. With run directories instead (RUN RUN ...): shows finished runs beside "
    )
    parser.description += "each other and beside what the paper reports, as checkpoints/runs.md and runs.png."


def _foreign(directory: Path, overrides: list[str]) -> Any:
    """The config of a LLaVA that was not trained here: it is evaluated with the schedule in its config.json, if any."""
    from llava_pdrop.config import RUN_FILE, ConfigError, config_of
    from llava_pdrop.model.hf_files import reading
    from llava_pdrop.model.original_layout import original_schedule
    from llava_pdrop.model.shards import read_json

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


@dataclass(frozen=True)
class Command:
    """One word of the command line: what it does, the arguments it takes, and the function that runs it."""

    summary: str
    run: Callable[[argparse.Namespace], None]
    add_arguments: Callable[[argparse.ArgumentParser], None] = _take_config


def _module(name: str, summary: str) -> Command:
    """A command whose ``add_arguments`` and ``run`` stand in a module of its own, imported when it is wanted."""
    return Command(
        summary,
        run=lambda args: import_module(name).run(args),
        add_arguments=lambda parser: import_module(name).add_arguments(parser),
    )


COMMANDS = {
    "train": Command("train one run (stage 1 first where it is missing)", _train),
    "compare": Command("train and evaluate with and without dropping, and write a report", _compare, _take_runs),
    "ablate": _module("llava_pdrop.ablate.command", "train, or only evaluate, variants of a config, in one table"),
    "eval": Command("evaluate a finished run: its config, or its directory", _eval, _take_run),
    "plan": _module(
        "llava_pdrop.bench.plan_command",
        "show tokens per stage, operations and memory of a config, or solve for a budget; needs no weights",
    ),
    "bench": _module("llava_pdrop.bench.command", "measure training and inference at a model's real shape"),
    "doctor": _module("llava_pdrop.doctor", "check a data set before training: records, images, lengths, cost"),
    "convert": _module("llava_pdrop.convert", "write a checkpoint in another layout: llava-hf, or original LLaVA"),
}


def _parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the arguments of the command that is wanted are read, since that imports its module."""
    parser = argparse.ArgumentParser(
        prog="llava-pdrop",
        description="LLaVA training and inference whose decoder drops image tokens stage by stage.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.summary, description=command.summary)
        if name == wanted:
            command.add_arguments(own)
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _version() -> str:
    from llava_pdrop import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())
