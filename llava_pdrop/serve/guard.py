"""What a visitor of the demo may send, looked at before anything is done with it: which file, which token, how many
bytes; and what is told when something goes wrong. A program may send anything that the page never would."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_pdrop.errors import UserError, clip, line_of
from llava_pdrop.serve.protocol import MISTAKE, Refusal

T = TypeVar("T")
log = logging.getLogger(__name__)

NOT_UPLOADED = "the picture was not uploaded to this server, or is deleted by now: upload it"
MOST_CHARACTERS = 500
"""Of a line that is told."""


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The whole body of a request.

    Raises:
        Refusal: it has more than ``most`` bytes, takes more than ``seconds``, or the client has left.
    """
    read = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                read += part
                if len(read) > most:
                    raise Refusal(f"the body has more than {most:,} bytes", None, 413)
    except TimeoutError:
        raise Refusal(f"the body took more than {seconds:g} s", None, 408, "timeout") from None
    except ClientDisconnect:
        raise Refusal("the client has left", None, 408) from None
    return bytes(read)


@dataclass(frozen=True)
class BodyLimit:
    """An ASGI application around ``app``, which is given bodies of at most ``most`` bytes that came within ``seconds``;
    for paths that end in a key of ``others``, of as many bytes as stand there. All other requests get the status of
    `read_body`'s refusal and its line as ``detail``, in FastAPI's form."""

    app: ASGIApp
    most: int
    others: dict[str, int]
    seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, as ASGI has it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):  # of which nobody reads a body
            await self.app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        most = next((own for end, own in self.others.items() if path.endswith(end)), self.most)
        try:
            body = await read_body(Request(scope, receive), most, self.seconds)
        except Refusal as error:
            await JSONResponse({"detail": line_of(error)}, error.status)(scope, receive, send)
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, again, send)


def uploaded(sent: Any, folder: str | Path) -> Path | None:
    """The file that ``sent`` names, None where nothing is sent. Links are followed before it is looked at.

    Args:
        sent: what a request has in the place of a picture, of any type. folder: where uploads lie.

    Raises:
        UserError: it is no regular file inside of ``folder``. Whether there is such a file is not told.
    """
    if sent is None:
        return None
    refused = UserError(NOT_UPLOADED)
    name = sent.get("path") if isinstance(sent, dict) else None
    if not isinstance(name, str) or not name:
        raise refused
    try:
        path = Path(name).resolve(strict=True)
        path.relative_to(Path(folder).resolve(strict=True))
        regular = path.is_file()  # a pipe or a device may never end
    except (OSError, ValueError, RuntimeError):
        raise refused from None
    if not regular:
        raise refused
    return path


def clicked_token(event: Any) -> int | None:
    """The number of the token that was clicked on, None where ``event``, of any type, has none."""
    index = event.get("index") if isinstance(event, dict) else None
    return index if type(index) is int else None


def padded(sent: Sequence[Any], count: int) -> list[Any]:
    """``count`` values: those that were sent, then None; what was sent beyond them is left out."""
    return [*sent[:count], *[None] * (count - len(sent))]


def attempted(act: Callable[..., T], *given: Any) -> tuple[T | None, str]:
    """What ``act`` returns and "", or None and the line to be told: a `UserError`'s own. All other errors are bugs:
    the log has their traceback, and of what they say, which may name files, nothing is told."""
    try:
        return act(*given), ""
    except UserError as error:
        return None, clip(line_of(error), MOST_CHARACTERS)
    except Exception:
        log.exception("the page could not do what was asked")
        return None, MISTAKE
