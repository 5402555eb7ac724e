"""The command line: ``llava-pdrop COMMAND CONFIG [section.key=value ...]``, the same as ``python -m llava_pdrop``."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any

from llava_pdrop import __version__
from llava_pdrop.errors import UserError, is_about_a_file, line_of
from llava_pdrop.runtime.processes import end_with_launcher
from llava_pdrop.world import number_of_processes, rank

EPILOG = """\
CONFIG is a YAML file (configs/README.md lists every key); section.key=value changes one key of it, e.g.
  llava-pdrop train configs/llava15_7b/finetune_pdrop.yaml pyramid_drop.layers=[8,16,24] train.learning_rate=1e-5
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 after an error that the user can mend, in one line: a
    `UserError`, or what the system says of a file or a full disk (`is_about_a_file`). With ``--debug``, its traceback.

    Raises:
        Exception: any other one, a `UserError` too, is a bug. Python prints the traceback and exits with status 1.
    """
    words = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a letter of an answer is no reason to end
            stream.reconfigure(errors="backslashreplace")
    end_with_launcher()
    parser = _parser(words[0] if words else None)
    args, more = parser.parse_known_args(words)
    if not hasattr(args, "overrides") or any(word.startswith("-") for word in more):
        args, more = parser.parse_args(words), []
    if more:
        args.overrides += more  # overrides that follow an option
    try:
        _module(args.command).run(args)
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        if args.debug or not (isinstance(error, UserError) or is_about_a_file(error)):
            raise
        here = f"[rank {rank()}] " if number_of_processes() > 1 else ""  # what is wrong may be so on one rank only
        print(f"{here}error: {line_of(error)}", file=sys.stderr)
        return 2
    return 0


COMMANDS = {
    "train": "train one run (stage 1 first where it is missing)",
    "compare": "train and evaluate with and without dropping, and write a report",
    "ablate": "train, or only evaluate, variants of a config, in one table",
    "eval": "evaluate a finished run (its config, or its directory) or any other model, also on the paper's benchmarks",
    "benchmarks": "list the benchmarks: files wanted, where they come from, what is there",
    "study": "measure what image tokens are worth at which depth, and find the schedule that loses least for a budget",
    "show": "draw which image tokens survive every drop, for one picture and question",
    "chat": "talk with a model about pictures, and see what every answer took",
    "serve": "answer requests in the form of the OpenAI API, many at a time",
    "demo": "a page in the browser: answers without and with dropping, and what survives of the picture",
    "plan": "show tokens per stage, operations and memory of a config, or solve for a budget; needs no weights",
    "bench": "measure training and inference at a model's real shape",
    "doctor": "check a data set before training: records, images, lengths, cost",
    "families": "list the model classes that attach() has been proved on, and what a picture is in each",
    "convert": "write a checkpoint in another layout: llava-hf, or original LLaVA",
}
"""Word of the command line -> what it does. How stands in the module of that name in ``llava_pdrop/commands``."""


def _module(command: str) -> Any:
    """Where ``add_arguments`` and ``run`` of a command stand."""
    return import_module(f"llava_pdrop.commands.{command}")


def _parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the arguments of the command that is wanted are read, since that imports its module."""
    parser = argparse.ArgumentParser(
        prog="llava-pdrop",
        description="LLaVA training and inference whose decoder drops image tokens stage by stage.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        own = commands.add_parser(name, help=summary, description=summary)
        if name == wanted:
            _module(name).add_arguments(own)
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
