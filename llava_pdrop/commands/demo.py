"""Arguments of ``llava-pdrop demo``."""

from __future__ import annotations

import argparse

from llava_pdrop.commands.arguments import add_model, add_server, given, model_in

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
    add_server(parser, 7860)
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: 512)")


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

    directory, overrides, more = model_in(args.model, args.overrides)
    if more:
        raise UserError(f"{more[0]}: one model is shown, {directory}; pictures are chosen on the page")
    limits = Limits(**given(args, Limits))
    if find_spec("gradio") is None:
        raise UserError(NEEDED)
    from llava_pdrop.serve.page import serve

    conversation = Conversation.of(directory, overrides, Settings(**given(args, Settings)))
    serve(Demo(conversation, limits), f"llava-pdrop demo: {directory.resolve().name}", args.host, args.port)
