"""A picture behind a URL, fetched without being led into the server's own network.

The host is resolved once, every address of it must be public, and the connection goes to one of these very addresses:
what is checked is what is spoken to, whatever a second look-up would say. Every redirect is checked anew.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import suppress
from urllib.parse import SplitResult, urljoin, urlsplit

from llava_pdrop.errors import UserError, clip

REDIRECTS = 3
"""Redirects that are followed."""


def fetched(url: str, most: int, seconds: float) -> bytes:
    """The bytes behind ``url``.

    Args:
        most: bytes that are taken.
        seconds: until all of them have to be there, redirects included.

    Raises:
        UserError: it is no http(s) URL, its host has an address that is not public, it is too large or too late, or
            the answer is not 200.
    """
    end = time.monotonic() + seconds
    for _ in range(REDIRECTS + 1):
        parts = _split(url)
        try:
            data, location = _one(parts, most, end)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{_short(url)}: cannot be fetched ({type(error).__name__})") from None
        if location is None:
            return data
        url = urljoin(url, location)
    raise UserError(f"{_short(url)}: more than {REDIRECTS} redirects")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public network, and so is the one that it may stand for."""
    found = ipaddress.ip_address(address.split("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is not None and not is_public(str(inner)):
            return False
        if found.ipv4_mapped is not None:
            return True
        if found.is_site_local:
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.username is None and parts.port != 0
    except ValueError:
        fits = False
    if not fits or any(ord(letter) <= 32 or ord(letter) > 126 for letter in url):
        raise UserError(f"{_short(url)}: is no http or https URL that can be fetched")
    return parts


def _address(host: str, port: int) -> str:
    """The first address of ``host``; a `UserError` where it has none, or any that is not public."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise UserError(f"{clip(host, 100)}: there is no such host")
    if not all(map(is_public, found)):
        raise UserError(f"{clip(host, 100)}: its address is not a public one, and none other is fetched from")
    return found[0]


def _one(parts: SplitResult, most: int, end: float) -> tuple[bytes, str | None]:
    """The bytes of one answer, or where it redirects to."""
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connection = http.client.HTTPConnection(host, port)
    cut = None
    try:
        kept = socket.create_connection((_address(host, port), port), timeout=_left(end, host))
        connection.sock = kept
        if parts.scheme == "https":
            connection.sock = kept = ssl.create_default_context().wrap_socket(kept, server_hostname=host)
        cut = threading.Timer(_left(end, host), _shut, [kept])  # for a host that sends a byte now and then
        cut.start()
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Host": parts.netloc, "Accept": "image/*", "Connection": "close"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and (location := answer.getheader("Location")):
            return b"", location
        if answer.status != 200:
            raise UserError(f"{clip(host, 100)}: answers {answer.status}")
        data = answer.read(most + 1)
        _left(end, host)
        if len(data) > most:
            raise UserError(f"the picture has more than {most:,} bytes: make it smaller")
        return data, None
    except (OSError, http.client.HTTPException):
        _left(end, host)
        raise
    finally:
        if cut is not None:
            cut.cancel()
        connection.close()


def _shut(kept: socket.socket) -> None:
    with suppress(OSError):  # closed by now
        kept.shutdown(socket.SHUT_RDWR)


def _left(end: float, host: str) -> float:
    """Seconds that are left; a `UserError` where there are none."""
    left = end - time.monotonic()
    if left <= 0:
        raise UserError(f"{clip(host, 100)}: takes too long")
    return left


def _short(url: str) -> str:
    return repr(clip(url, 100))
