"""Arguments of ``llava-pdrop chat``."""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_pdrop.commands.arguments import a_path, add_model, given, model_in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes. (What is not given is as `serve.conversation.Settings` has it.)"""
    parser.description = (
        f"{parser.description}. Every question prefills the whole conversation, so that the new question ranks its "
        "image tokens. /help lists what can be typed."
    )
    add_model(parser)
    parser.add_argument(
        "words", nargs="*", metavar="PICTURE",
        help="pictures for the first question; section.key=value changes a key, pyramid_drop=FILE the schedule",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: 512)")
    parser.add_argument("--temperature", type=float, metavar="X", help="0, the default: the likeliest token")
    parser.add_argument("--seed", type=int, metavar="N", help="of tokens that are drawn (default: 0)")
    parser.add_argument(
        "--reuse-cache", action="store_true", default=None,
        help="later questions go on with the cache: faster, but what the first question dropped is lost to them",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UserError: there is no model, or a picture cannot be read.
    """
    from llava_pdrop.serve.chat import Chat
    from llava_pdrop.serve.conversation import Conversation, Settings

    directory, overrides, pictures = model_in(args.model, args.words)
    conversation = Conversation.of(directory, overrides, Settings(**given(args, Settings)))
    for picture in pictures:
        conversation.show(Path(a_path(picture)))
    Chat(conversation).run()
