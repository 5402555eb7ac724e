"""How a running server does under load: ``python -m llava_pdrop.serve.load http://127.0.0.1:8000 --clients 1 16``.

Clients ask one question after the other about a drawn picture. What is told: tokens per second of all together, and of
``--pid`` the memory, so that figures of a machine can be compared with those in ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import psutil
from PIL import Image

from llava_pdrop.errors import UserError, clip, line_of

QUESTIONS = ("Describe the picture.", "What is shown, and where?", "Which colours are there?", "Name all that you see.")


def asked(address: str, path: str, body: Any = None) -> Any:
    """The JSON that the server at ``address`` answers.

    Raises:
        UserError: it cannot be reached, or refuses.
    """
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=600)
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ.get('LLAVA_PDROP_API_KEY', '')}",
    }
    try:
        connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
        answer = connection.getresponse()
        found = json.loads(answer.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{address}: no server answers there ({line_of(error)})") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise UserError(f"{address}: answers {answer.status}: {clip(found)}")
    return found


def picture(seed: int, side: int) -> str:
    """A drawn picture as a data URI."""
    draw, file = random.Random(seed), BytesIO()
    made = Image.new("RGB", (side, side), tuple(draw.randrange(256) for _ in range(3)))
    for _ in range(8):
        corner = draw.randrange(side), draw.randrange(side)
        made.paste(
            tuple(draw.randrange(256) for _ in range(3)), (*corner, corner[0] + side // 4, corner[1] + side // 4)
        )
    made.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def load(address: str, clients: int, requests: int, body: dict[str, Any], side: int = 336) -> dict[str, Any]:
    """Asks ``requests`` questions from ``clients`` threads, with pictures of ``side`` pixels.

    Args:
        body: what every request says besides its messages.

    Returns:
        seconds, tokens of all answers, and tokens per second.

    Raises:
        UserError: as `asked`.
    """
    pictures = [picture(seed, side) for seed in range(16)]

    def one(number: int) -> int:
        shown = {"type": "image_url", "image_url": {"url": pictures[number % len(pictures)]}}
        content = [shown, {"type": "text", "text": f"{QUESTIONS[number % len(QUESTIONS)]} ({number})"}]
        answer = asked(address, "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": content}]})
        return int(answer["usage"]["completion_tokens"])

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(one, range(requests)))
    seconds = time.perf_counter() - start
    return {"clients": clients, "requests": requests, "seconds": seconds, "tokens": tokens, "rate": tokens / seconds}


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava_pdrop.serve.load", description="Asks a running server.")
    parser.add_argument("address", metavar="URL", help="such as http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16], help="one measurement each (default: 1 16)")
    parser.add_argument("--requests", type=int, default=200, help="of each measurement (default: 200)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0; answers of others end later")
    parser.add_argument("--side", type=int, default=336, help="pixels of a picture's side (default: 336)")
    parser.add_argument("--pid", type=int, help="process of the server, whose memory is told")
    args = parser.parse_args(words)
    try:
        (model,) = asked(args.address, "/v1/models")["data"]
        body = {"model": model["id"], "max_tokens": args.max_tokens, "temperature": args.temperature}
        for clients in args.clients:
            found = load(args.address, clients, args.requests, body, args.side)
            line = "{clients} clients, {requests} requests: {tokens} tokens in {seconds:.1f} s, {rate:.1f} tokens/s"
            time.sleep(1)  # until the server is at rest
            memory = f", {psutil.Process(args.pid).memory_info().rss / 2**20:.1f} MiB" if args.pid else ""
            print(line.format(**found) + memory, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
