"""Arguments of ``llava-pdrop serve``."""

from __future__ import annotations

import argparse
import os

from llava_pdrop.commands.arguments import a_place, add_model, add_server, given, model_in

KEY_VARIABLE = "LLAVA_PDROP_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes. (What is not given is as `serve.service.Settings` and `serve.pictures.Limits` have
    it.)"""
    parser.description = (
        f"{parser.description}: /v1/models and /v1/chat/completions, streaming too. Requests are answered together and "
        "may each have a schedule (pyramid_drop). Ctrl-C ends."
    )
    add_model(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value",
        help="override of a config key; pyramid_drop=FILE takes another schedule, pyramid_drop=null none",
    )  # fmt: skip
    add_server(parser, 8000)
    parser.add_argument("--name", help="the model's name in requests (default: that of its directory)")
    parser.add_argument(
        "--key-file", type=a_place, metavar="FILE",
        help=f"holds the key that requests must bring (default: that in {KEY_VARIABLE}, if any)",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, metavar="N", help="answers written at a time (default: 16)")
    parser.add_argument("--queue", type=int, metavar="N", help="further requests that may wait (default: 64)")
    parser.add_argument("--seconds", type=float, metavar="X", help="for a request and its answer (default: 300)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="where a request says nothing (default: 512)")
    parser.add_argument("--most-new-tokens", type=int, metavar="N", help="that may be asked for (default: 4096)")
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="where a request says nothing (default: 1, as the API has it)"
    )
    parser.add_argument(
        "--pictures", type=a_place, dest="directory", metavar="DIR", help="requests may name files in here"
    )
    parser.add_argument(
        "--allow-urls", action="store_true", dest="urls",
        help="fetch pictures from http(s) URLs of public hosts, never private ones",
    )  # fmt: skip
    parser.add_argument("--most-pictures", type=int, dest="pictures", metavar="N", help="of a request (default: 8)")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UserError: there is no model, the packages of the extra ``serve`` are missing, or the address is taken.
    """
    from importlib.util import find_spec

    from llava_pdrop.errors import UserError
    from llava_pdrop.serve.pictures import Limits
    from llava_pdrop.serve.service import Service, Settings

    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise UserError(f"serve needs {' and '.join(missing)}: pip install 'llava_pdrop[serve]'")
    from llava_pdrop.serve.server import serve

    directory, overrides, more = model_in(args.model, args.overrides)
    if more:
        raise UserError(f"{more[0]}: one model is served, {directory}; pictures come with the requests")
    key = args.key_file.read_text(encoding="utf-8").strip() if args.key_file else os.environ.get(KEY_VARIABLE)
    args.name = args.name or directory.resolve().name
    settings = Settings(**given(args, Settings), key=key, limits=Limits(**given(args, Limits)))
    serve(Service.of(directory, overrides, settings), args.host, args.port)
