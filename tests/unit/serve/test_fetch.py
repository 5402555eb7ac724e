"""URLs lead to public hosts only, whatever they are called, resolve to or redirect to. Nothing leaves this machine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.serve import fetch
from llava_pdrop.serve.fetch import fetched, is_public
from tests.messages import says

PUBLIC = "93.184.215.14"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append(f"{self.headers['Host']}{self.path}")  # type: ignore[attr-defined]
        hops = self.path.removeprefix("/hop")
        if self.path == "/picture?a=b":
            self._answer(200, b"picture")
        elif self.path.startswith("/hop"):
            self._answer(302, b"", "/picture?a=b" if hops == "0" else f"/hop{int(hops) - 1}")
        elif self.path == "/inside":
            self._answer(302, b"", "http://inside.test/secret")
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(50):
                time.sleep(0.1)
                self.wfile.write(b"x")
                self.wfile.flush()
        else:
            self._answer(404, b"gone")

    def _answer(self, status: int, data: bytes, location: str | None = None) -> None:
        self.send_response(status)
        if location is not None:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A host ``public.test`` whose address is public and leads to a server on loopback; ``inside.test`` is private."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    addresses = {"public.test": [PUBLIC], "inside.test": ["10.1.2.3"], "both.test": [PUBLIC, "127.0.0.1"]}
    connecting = socket.create_connection

    def found(name: str, port: int, *given: Any, **named: Any) -> list[Any]:
        if name not in addresses:
            return resolving(name, port, *given, **named)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses[name]]

    def connected(address: tuple[str, int], timeout: float) -> socket.socket:
        assert is_public(address[0]), "nothing else is spoken to"
        return connecting(server.server_address[:2], timeout)

    resolving = socket.getaddrinfo
    monkeypatch.setattr(fetch.socket, "getaddrinfo", found)
    monkeypatch.setattr(fetch.socket, "create_connection", connected)
    yield server
    server.shutdown()
    server.server_close()


def test_a_picture_comes_whole_and_by_the_host_s_name(host: Any) -> None:
    assert fetched("http://public.test/picture?a=b", 7, 5) == b"picture"
    assert fetched("http://public.test:8080/hop2", 7, 5) == b"picture"
    assert host.seen == ["public.test/picture?a=b"] + [
        f"public.test:8080/{path}" for path in ("hop2", "hop1", "hop0", "picture?a=b")
    ]


@pytest.mark.parametrize(
    ("url", "most", "seconds", "message"),
    [
        ("http://public.test/gone", 7, 5, says("public.test", "404")),
        ("http://public.test/picture?a=b", 6, 5, says("6", "bytes")),
        ("http://public.test/hop9", 7, 5, says("3 redirects")),
        ("http://public.test/inside", 7, 5, says("inside.test", "public")),
        ("http://public.test/slow", 999, 0.5, says("too long")),
        ("http://inside.test/", 7, 5, says("inside.test", "public")),
        ("http://both.test/", 7, 5, says("both.test", "public")),
        ("http://nowhere.invalid/", 7, 5, says("nowhere.invalid", "no such host")),
        ("https://public.test/", 7, 5, says("cannot be fetched")),
    ],
)
def test_what_cannot_be_had(host: Any, url: str, most: int, seconds: float, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        fetched(url, most, seconds)
    assert time.monotonic() - start < seconds + 2 and not any("secret" in path for path in host.seen)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/", "http://localhost/", "http://[::1]/", "http://0.0.0.0/", "http://10.0.0.1/",
     "http://192.168.1.1/", "http://172.16.0.1/", "http://169.254.169.254/latest/meta-data/", "http://100.64.0.1/",
     "http://[fd00::1]/", "http://[fe80::1]/", "http://[::ffff:127.0.0.1]/", "http://[::ffff:a00:1]/",
     "http://[64:ff9b::a00:1]/", "http://[2002:a00:1::]/", "http://2130706433/", "http://0x7f.1/", "http://127.1/",
     "http://224.0.0.1/", "http://255.255.255.255/"],
)  # fmt: skip
def test_private_addresses_in_every_spelling(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.socket, "create_connection", lambda *given, **more: pytest.fail("it connects"))
    with pytest.raises(UserError, match=says("public")):
        fetched(url, 7, 5)


@pytest.mark.parametrize(
    "url", ["http:///a", "http://", "https://user@public.test/", "http://a b/", "http://a/\r\nX: y", "http://[/",
            "http://public.test:99999/", "http://bücher.test/"],
)  # fmt: skip
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UserError, match=says("http", "https")):
        fetched(url, 7, 5)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)
