"""Arguments of ``llava-pdrop demo``."""

from __future__ import annotations

import argparse

from llava_pdrop.commands.arguments import add_model, model_in

NEEDED = (
    "demo needs gradio, which needs pillow below 13: put PYTHONPATH=$(bash scripts/beside.sh demo) before the command "
    "(it installs both beside the environment), or pip install 'llava_pdrop[demo]' into an environment of its own"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.description = (
        f"{parser.description}: a picture and a question, answered without and with dropping, and what is left of the "
        "picture at every stage. Ctrl-C ends."
    )
    add_model(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value",
        help="override of a config key; pyramid_drop=FILE takes another schedule to begin with",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one (default: 7860)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: 512)")
    parser.add_argument("--most-pixels", type=int, metavar="N", help="of a picture (default: 25 million)")
    parser.add_argument("--most-bytes", type=int, metavar="N", help="of a picture (default: 10 MiB)")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UserError: there is no model, gradio is missing, or the address is taken.
    """
    from importlib.util import find_spec

    from llava_pdrop.errors import UserError
    from llava_pdrop.serve.conversation import Conversation, Settings
    from llava_pdrop.serve.demo import Demo
    from llava_pdrop.serve.pictures import Limits

    directory, overrides, more = model_in([*([args.directory] if args.directory else []), *args.overrides])
    if more:
        raise UserError(f"{more[0]}: one model is shown, {directory}; pictures are chosen on the page")
    limits = {"pixels": args.most_pixels, "picture_bytes": args.most_bytes}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise UserError(f"--most-{name.removeprefix('picture_')} must be at least 1, got {value}")
    if find_spec("gradio") is None:
        raise UserError(NEEDED)
    from llava_pdrop.serve.page import serve

    settings = Settings() if args.max_new_tokens is None else Settings(max_new_tokens=args.max_new_tokens)
    conversation = Conversation.of(directory, overrides, settings)
    given = {name: value for name, value in limits.items() if value is not None}
    serve(Demo(conversation, Limits(**given)), f"llava-pdrop demo: {directory.resolve().name}", args.host, args.port)
