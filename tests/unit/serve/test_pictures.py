"""What a picture of a request may be: limits, formats, and a directory that no path leaves."""

from __future__ import annotations

import base64
import os
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from llava_pdrop.data.images import load_image
from llava_pdrop.errors import UserError
from llava_pdrop.serve import pictures
from llava_pdrop.serve.pictures import FORMATS, Limits, picture_of
from tests.messages import says


def encoded(kind: str = "PNG", size: tuple[int, int] = (6, 4)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, kind)
    return file.getvalue()


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A directory with pictures, links and other things, and a secret beside it."""
    (tmp_path / "secret.png").write_bytes(encoded())
    (tmp_path / "shelf-2").mkdir()
    (tmp_path / "shelf-2" / "a.png").write_bytes(encoded())
    shelf = tmp_path / "shelf"
    (shelf / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png", "with space.png", "100%.png"):
        (shelf / name).write_bytes(encoded())
    (shelf / "inside.png").symlink_to("deep/b.png")
    (shelf / "outside.png").symlink_to(tmp_path / "secret.png")
    (shelf / "out").symlink_to(tmp_path)
    (shelf / "loop.png").symlink_to("loop.png")
    os.mkfifo(shelf / "pipe.png")
    return shelf


@pytest.mark.parametrize("kind", FORMATS)
def test_data_uris_of_every_format(kind: str) -> None:
    found = picture_of(data_uri(encoded(kind), kind.lower()), "here", Limits())
    assert load_image(found).size == (6, 4) and str(found) == "here"
    again = picture_of(data_uri(encoded(kind)), "there", Limits())
    assert found == again and hash(found) == hash(again)
    assert found != picture_of(data_uri(encoded(kind, (4, 6))), "here", Limits()) != "here"


@pytest.mark.parametrize(
    ("url", "limits", "message"),
    [
        ("data:image/png;base64,", {}, says("no picture", "PNG")),
        ("data:image/png;base64,!!!!", {}, says("base64")),
        ("data:image/png;base64,YWJj", {}, says("no picture")),
        ("data:image/png,abc", {}, says("data:image/png;base64,")),
        ("data:text/html;base64,YWJj", {}, says("data:image/png;base64,")),
        (data_uri(encoded()[:20]), {}, says("no picture")),
        (data_uri(encoded()), {"pixels": 23}, says("6 x 4", "23")),
        (data_uri(encoded("PNG", (20_000, 20_000))), {}, says("25,000,000", "smaller")),
        (data_uri(encoded()), {"picture_bytes": len(encoded()) - 1}, says(f"{len(encoded()) - 1}", "bytes")),
        (data_uri(b"x" * 1000), {"picture_bytes": 100}, says("100", "bytes")),
        (data_uri(encoded("TIFF"), "tiff"), {}, says("no picture")),
        (data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), {}, says("no picture")),
        (data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), {}, says("no picture")),
        ("https://example.org/a.png", {}, says("--allow-urls")),
        ("HTTP://example.org/a.png", {}, says("--allow-urls")),
        ("ftp://example.org/a.png", {"urls": True}, says("data URI", "https")),
        ("gopher:a", {}, says("data URI", "https")),
        ("a.png", {}, says("--pictures")),
        ("file:///etc/passwd", {}, says("--pictures")),
    ],
)  # fmt: skip
def test_what_is_no_picture(url: str, limits: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        picture_of(url, "here", Limits(**limits))
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "name",
    ["a.png", "./a.png", "deep/b.png", "deep/../a.png", "file:a.png", "{shelf}/a.png", "file://{shelf}/deep/b.png",
     "file://localhost{shelf}/a.png", "FILE:deep/b.png", "with%20space.png", "with space.png", "100%25.png",
     "inside.png", "out/shelf/a.png"],
)  # fmt: skip
def test_files_of_the_directory(shelf: Path, name: str) -> None:
    found = picture_of(name.replace("{shelf}", str(shelf)), "here", Limits(directory=shelf))
    assert found.data == encoded()


@pytest.mark.parametrize(
    "name",
    ["", ".", "/", "gone.png", "deep", "deep/", "../secret.png", "deep/../../secret.png", "..%2Fsecret.png",
     "%2e%2e/secret.png", "{shelf}/../secret.png", "file://{shelf}/../secret.png", "file:///etc/passwd", "/etc/passwd",
     "outside.png", "out/secret.png", "../shelf-2/a.png", "{shelf}-2/a.png", "loop.png", "pipe.png", "a.png%00", "a\0",
     "a.png/", "a.png/b", "x" * 5000, "//etc/passwd", "file:////etc/passwd", "~/a.png", "/proc/self/environ"],
)  # fmt: skip
def test_no_path_leaves_the_directory(shelf: Path, name: str) -> None:
    for directory in (shelf, Path(os.path.relpath(shelf))):
        if name == "a.png/":  # as the system takes it
            continue
        with pytest.raises(UserError, match=says("no such file", "pictures of this server")):
            picture_of(name.replace("{shelf}", str(shelf)), "here", Limits(directory=directory))


def test_a_directory_that_is_changed_in_between_leads_nowhere(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was looked at, and is a link when it is opened."""
    opening = os.open

    def changed(path: object, *args: object, **kwargs: object) -> int:
        if path == "a.png":
            (shelf / "a.png").unlink()
            (shelf / "a.png").symlink_to(tmp_path / "secret.png")
        return opening(path, *args, **kwargs)

    monkeypatch.setattr(pictures.os, "open", changed)
    with pytest.raises(UserError, match=says("no such file")):
        picture_of("a.png", "here", Limits(directory=shelf))


def test_files_have_the_limits_too(shelf: Path) -> None:
    with pytest.raises(UserError, match=says("bytes")):
        picture_of("a.png", "here", Limits(directory=shelf, picture_bytes=10))
    with pytest.raises(UserError, match=says("6 x 4", "5")):
        picture_of("a.png", "here", Limits(directory=shelf, pixels=5))


def test_urls_are_fetched_where_they_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[object, ...]]()

    def fetched(*given: object) -> bytes:
        asked.append(given)
        return encoded()

    monkeypatch.setattr(pictures, "fetched", fetched)
    found = picture_of("https://example.org/a.png", "here", Limits(urls=True, picture_bytes=5000, fetch_seconds=2))
    assert found.data == encoded() and asked == [("https://example.org/a.png", 5000, 2)]
