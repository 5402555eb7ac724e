"""The command line: ``llava-pdrop COMMAND CONFIG [section.key=value ...]``, the same as ``python -m llava_pdrop``."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent

EPILOG = """\
CONFIG is a YAML file (configs/README.md lists every key); section.key=value changes one key of it, e.g.
  llava-pdrop train configs/llava15_7b/finetune_pdrop.yaml pyramid_drop.layers=[8,16,24] train.learning_rate=1e-5
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 after an error that the user can mend (one line)."""
    parser = _parser()
    args, more = parser.parse_known_args(arguments)
    args.overrides += [word for word in more if not word.startswith("-")]  # overrides that follow an option
    if any(word.startswith("-") for word in more):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        COMMANDS[args.command][0](args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if args.debug or not is_for_the_user(error):
            raise
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # what is wrong may be wrong on one rank only
        rank = f"[rank {os.environ.get('RANK', '0')}] " if several else ""
        print(f"{rank}error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def is_for_the_user(error: BaseException) -> bool:
    """Whether ``error`` was raised by this package on purpose (not somewhere inside a library), or is a missing file:
    its message then says all, and a traceback would only hide it."""
    if isinstance(error, FileNotFoundError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return (
        bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(PACKAGE) and isinstance(error, ValueError)
    )


def _train(args: argparse.Namespace) -> None:
    config = _config(args)
    from llava_pdrop.eval.runner import check_scorer
    from llava_pdrop.train.run import train

    check_scorer(config)  # training does not need it, but what comes after does
    train(config)


def _compare(args: argparse.Namespace) -> None:
    from llava_pdrop.config import check_paths

    config = _config(args)
    check_paths(config)  # before the imports of training: a missing path is then said within seconds
    from llava_pdrop.eval.compare import compare

    compare(config)


def _eval(args: argparse.Namespace) -> None:
    config = _config(args)
    from llava_pdrop.eval.runner import evaluate_config

    evaluate_config(config)


def _plan(args: argparse.Namespace) -> None:
    config = _config(args)
    from llava_pdrop.bench.plan import show_plan

    show_plan(config)


def _config(args: argparse.Namespace) -> Any:
    """The config named on the command line. A directory stands for the run that was saved there, evaluated as it is."""
    from llava_pdrop.config import RUN_FILE, load_config

    path, overrides = Path(args.config), list(args.overrides)
    if path.is_dir():
        whole = [f"model.path={path}", "model.language_model=null", "model.vision_tower=null", "model.projector=null"]
        path, overrides = path / RUN_FILE, whole + overrides
    return load_config(path, overrides)


COMMANDS = {
    "train": (_train, "train one run (stage 1 first where it is missing)"),
    "compare": (_compare, "train and evaluate with and without dropping, and write a report"),
    "eval": (_eval, "evaluate a finished run: its config, or its directory"),
    "plan": (_plan, "show image tokens per stage and the paper's FLOPs of a config; needs no weights"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-pdrop",
        description="LLaVA training and inference whose decoder drops image tokens stage by stage.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("config", metavar="CONFIG", help="YAML file" + (" or run directory" * (name == "eval")))
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _version() -> str:
    from llava_pdrop import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())
