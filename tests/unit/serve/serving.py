"""A server on loopback, in this process, and the official client of it."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from llava_pdrop.serve.server import bound, server_of
from llava_pdrop.serve.service import Service, Settings
from tests.unit.serve.conftest import DROP

NAME = "tiny"


@contextmanager
def served(respondent: Any, schedule: Any = DROP, **settings: Any) -> Iterator[tuple[Service, str]]:
    """A started server and its address."""
    service = Service(respondent, Settings(NAME, **settings), schedule)
    listening = bound("127.0.0.1", 0)
    server = server_of(service)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield service, f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def client_of(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120)


def shown(picture: Path) -> dict[str, Any]:
    """A picture as a part of a message."""
    data = base64.b64encode(picture.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def message(text: str, *pictures: Path) -> dict[str, Any]:
    return {"role": "user", "content": [*map(shown, pictures), {"type": "text", "text": text}]}


def at_rest(service: Service) -> bool:
    """Whether all places and rows become free."""
    for _ in range(6000):
        if not service.inside and not service.loop.running and not service.loop.waiting:
            return True
        time.sleep(0.01)
    return False
