"""The HTTP of the server: FastAPI's routes over a `Service`, errors in OpenAI's form, and answers as events."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from llava_pdrop.errors import UserError, clip, line_of
from llava_pdrop.report.console import say
from llava_pdrop.serve import protocol
from llava_pdrop.serve.chat import described
from llava_pdrop.serve.guard import read_body
from llava_pdrop.serve.loop import Finish
from llava_pdrop.serve.protocol import Refusal
from llava_pdrop.serve.service import Answering, Service

T = TypeVar("T")


def app_of(service: Service) -> FastAPI:
    """The application, which starts and stops ``service`` with itself. It has no pages of its own."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    app = FastAPI(title="llava-pdrop", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {clip(request.url.path, 100)}: {error.detail}"
        return _error(Refusal(message, None, error.status_code, "not_found" if error.status_code == 404 else None))

    @app.exception_handler(UserError)
    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _error(error)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.check_key(request.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": [service.model()]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        service.check_key(request.headers.get("authorization"))
        if name != service.settings.name:
            raise Refusal(f"there is no model {clip(name, 100)!r} here", "model", 404, "model_not_found")
        return JSONResponse(service.model())

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        service.check_key(request.headers.get("authorization"))
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":  # which no page of another origin can send unasked
            raise Refusal("the body must be of Content-Type application/json", None, 415)
        return await _chat(service, request)

    return app


async def _chat(service: Service, request: Request) -> Response:
    """Answers a request whose head is right; its place and its row are free again once the answer is out, or nobody
    waits for it."""
    arrived = time.monotonic()
    async with AsyncExitStack() as stack:
        stack.enter_context(service.place())
        own = service.settings
        body = protocol.read_json_body(await read_body(request, own.limits.body_bytes, own.limits.body_seconds))
        asked = protocol.read_request(body, own.name, service.schedule, service.depth, own.temperature)
        try:
            answering = await _unless_left(request, service.answer(asked, arrived))
            stack.callback(answering.leave)
            first = await _unless_left(request, answering.next())  # what is wrong shows before it: still a status
            head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": own.name}
            if asked.stream:
                return _Events(_written(head, answering, first, asked.with_usage), stack.pop_all())
            while not isinstance(first, Finish):
                first = await _unless_left(request, answering.next())
        except _Left:
            return Response(status_code=499)  # for the log: nobody reads it
        return JSONResponse(protocol.completion(head, answering.prompt, first))


class _Left(UserError):
    """The client has closed the connection."""


async def _unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves: then `_Left`."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(leaving())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Left("the client has left")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class _Events(StreamingResponse):
    """A stream of events that gives back what ``stack`` holds, whatever becomes of the connection."""

    def __init__(self, events: AsyncIterator[str], stack: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self.stack:
            await super().__call__(scope, receive, send)


async def _written(
    head: dict[str, Any], answering: Answering, event: str | Finish, with_usage: bool
) -> AsyncIterator[str]:
    """The answer as server-sent events, from its first ``event`` on. What goes wrong on the way is an event too."""
    yield _event(protocol.chunk(head, {"role": "assistant", "content": ""}))
    try:
        while not isinstance(event, Finish):
            yield _event(protocol.chunk(head, {"content": event}))
            event = await answering.next()
    except UserError as error:
        yield _event(protocol.error_body(error)[1])
        return
    yield _event(protocol.chunk(head, {}, event.reason))
    if with_usage:
        yield _event(protocol.last_chunk(head, answering.prompt, event))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _error(error: Exception) -> JSONResponse:
    status, body = protocol.error_body(error)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(body, status, headers)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one.

    Raises:
        UserError: it cannot be had.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port must be from 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {line_of(error)}: name another one") from None
    return made


def serve(service: Service, host: str, port: int) -> None:
    """Serves until it is told to end (Ctrl-C, SIGTERM); then what is being written may go on for some seconds.

    Raises:
        UserError: the address cannot be had.
    """
    listening = bound(host, port)
    shown = f"[{host}]" if ":" in host else host
    for line in told(service, f"http://{shown}:{listening.getsockname()[1]}/v1"):
        say(line)
    server_of(service).run([listening])


def server_of(service: Service) -> uvicorn.Server:
    """The server, which starts and stops ``service`` with itself."""
    config = uvicorn.Config(
        app_of(service), log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=10
    )
    return uvicorn.Server(config)


def told(service: Service, address: str) -> list[str]:
    """What is served, a line each."""
    own, limits = service.settings, service.settings.limits
    alone = service.loop.alone
    rows = f"one request at a time: {alone}" if alone else f"{service.loop.rows} requests at a time"
    files = f"files of {limits.directory}" if limits.directory else "no files"
    urls = "URLs of public hosts" if limits.urls else "no URLs"
    lines = [
        f"{own.name} at {address} ({described(service.schedule)}, unless a request says otherwise)",
        f"{rows}; {own.queue} more may wait, {own.seconds:g} s each; pictures: data URIs, {files}, {urls}",
    ]
    if own.key is None and not _is_loopback(address):
        lines.append(
            "this address can be reached from elsewhere, and no key is asked for: --key-file FILE asks for one"
        )
    return lines


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
