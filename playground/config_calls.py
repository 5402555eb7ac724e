"""How often a command hands its configuration on: Python calls with a `Config`, a section of one, or a `CheckedRun` run
among their arguments. A config that is checked once and handed down as what was checked is handed on less often than
one that every room checks anew, so this number is to fall.

    python playground/config_calls.py CONFIG [section.key=value ...] [--command train|compare|ablate] [--show 15]

runs the command in this process (give it a small run and another ``output_dir``) and prints the calls, the functions
called, and those called most often. Methods that dataclasses generate are not counted, nor are
calls of other packages.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

from llava_pdrop.compare.ablate import ablate, plan
from llava_pdrop.compare.compare import compare
from llava_pdrop.compare.variants import load_ablation
from llava_pdrop.config.load import load_config
from llava_pdrop.config.schema import (
    AblationFile,
    CompareSection,
    Config,
    DataSection,
    EvalSection,
    LoraSection,
    ModelSection,
    TrainSection,
)
from llava_pdrop.train.checks import CheckedRun
from llava_pdrop.train.run import train

SECTIONS = (ModelSection, DataSection, TrainSection, LoraSection, EvalSection, CompareSection)
KINDS = (Config, CheckedRun, AblationFile, *SECTIONS)
COMMANDS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "train": (load_config, train),
    "compare": (load_config, compare),
    "ablate": (load_ablation, lambda ablation: ablate(ablation, plan(ablation))),
}
"""Command -> (what reads its file, what does its work)."""


def counted(function: Callable[[Any], Any], config: Any) -> Counter[str]:
    """Calls within ``function(config)`` by the function called. Threads that it starts are not followed."""
    calls: Counter[str] = Counter()

    def look(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        module = frame.f_globals.get("__name__", "")
        if event != "call" or not module.startswith("llava_pdrop.") or code.co_filename == "<string>":
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any(isinstance(frame.f_locals.get(name), KINDS) for name in names):
            calls[f"{module}.{code.co_name}"] += 1

    sys.setprofile(look)
    try:
        function(config)
    finally:
        sys.setprofile(None)
    return calls


def main() -> None:
    """Command line: see the top of the file."""
    parser = argparse.ArgumentParser(description="Counts the calls that a configuration is handed to.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--command", choices=COMMANDS, default="train")
    parser.add_argument("--show", type=int, default=15, metavar="N", help="functions to name")
    args = parser.parse_args()
    load, work = COMMANDS[args.command]
    calls = counted(work, load(args.config, args.overrides))
    print(f"{args.command}: {sum(calls.values())} calls of {len(calls)} functions")
    for function, count in calls.most_common(args.show):
        print(f"{count:6}  {function}")


if __name__ == "__main__":
    main()
