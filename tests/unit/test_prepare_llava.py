"""data/prepare/llava.py against a server on this machine that can break off in the middle of a file."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.messages import says

SCRIPT = Path(__file__).parents[2] / "data" / "prepare" / "llava.py"
spec = importlib.util.spec_from_file_location("prepare_llava", SCRIPT)
llava = importlib.util.module_from_spec(spec)
spec.loader.exec_module(llava)


def picture(kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("P" if kind == "GIF" else "RGB", (4, 3)).save(out, kind)
    return out.getvalue()


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name, content in files.items():
            target.writestr(name, content)
    return out.getvalue()


class Server:
    """Serves ``files``. ``break_after[name]``: closes the connection once after so many bytes. ``busy[name]``: answers
    so many times that it cannot. ``resumes``: heeds which part of a file is asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.break_after: dict[str, int] = {}
        self.busy: dict[str, int] = {}
        self.resumes = True
        self.requests: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name, wanted = self.path.lstrip("/"), self.headers.get("Range")
                outer.requests.append((name, wanted))
                if name not in outer.files:
                    self.send_error(404)
                    return
                if outer.busy.get(name):
                    outer.busy[name] -= 1
                    self.send_error(503)
                    return
                content = outer.files[name]
                wanted = wanted if outer.resumes else None
                start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
                if wanted and start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.end_headers()
                    return
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                stop = outer.break_after.pop(name, None)
                self.wfile.write(content[start:] if stop is None else content[start : start + stop])

            def log_message(self, *args: Any) -> None:
                """Quiet: the tests look at ``requests``."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(llava.time, "sleep", lambda seconds: None)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


RECORDS = [
    {"id": "0", "image": "coco/train2017/1.jpg", "conversations": []},
    {"id": "1", "image": ["ocr_vqa/images/a.jpg", "ocr_vqa/images/b.jpg"], "conversations": []},
    {"id": "2", "conversations": []},
]


@pytest.fixture
def table(server: Server, tmp_path: Path) -> dict[str, Any]:
    server.files = {
        "records.json": json.dumps(RECORDS).encode(),
        "coco.zip": archive({"train2017/1.jpg": picture(), "train2017/2.jpg": picture(), "readme.txt": b"no"}),
        "ocr.zip": archive({"x/a.gif": picture("GIF"), "y/b.jpg": picture("GIF"), "__MACOSX/c.jpg": b""}),
    }
    return {
        "sets": {"mini": {"records": "records.json", "image_root": ".", "parts": ["records", "coco", "ocr"]}},
        "parts": {
            "records": {"url": server.url + "records.json", "file": "records.json"},
            "coco": {"url": server.url + "coco.zip", "strip": "train2017", "into": "coco/train2017", "files": 2},
            "ocr": {"url": server.url + "ocr.zip", "flatten": True, "into": "ocr_vqa/images", "gif_to_jpg": True},
        },
    }


Run = Callable[..., int]


@pytest.fixture
def run(table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(*words: str) -> int:
        (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
        arguments = ["llava.py", "mini", "--root", str(tmp_path / "data"), "--table", str(tmp_path / "table.yaml")]
        monkeypatch.setattr("sys.argv", [*arguments, *words])
        return llava.main()

    return run


def test_a_whole_set(run: Run, server: Server, tmp_path: Path) -> None:
    assert run() == 0
    found = sorted(str(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*.*") if p.is_file())
    kept = [name for name in found if not name.startswith(".")]
    assert kept == [
        "coco/train2017/1.jpg", "coco/train2017/2.jpg", "ocr_vqa/images/a.jpg", "ocr_vqa/images/b.jpg", "records.json",
    ]  # fmt: skip
    for name in ("a", "b"):
        with Image.open(tmp_path / "data" / "ocr_vqa" / "images" / f"{name}.jpg") as image:
            assert image.format == "JPEG" and image.size == (4, 3)
    server.requests.clear()
    assert run() == 0 and server.requests == []  # a second run asks for nothing


def test_goes_on_where_it_broke_off(run: Run, server: Server, tmp_path: Path) -> None:
    server.break_after["coco.zip"] = 100
    assert run() == 0
    asked = [wanted for name, wanted in server.requests if name == "coco.zip"]
    assert asked == [None, "bytes=100-"]
    assert (tmp_path / "data" / "coco" / "train2017" / "1.jpg").read_bytes() == picture()


def test_a_server_that_cannot_resume(run: Run, server: Server, tmp_path: Path) -> None:
    server.resumes, server.break_after["coco.zip"] = False, 100
    assert run() == 0
    assert (tmp_path / "data" / "coco" / "train2017" / "1.jpg").read_bytes() == picture()


def test_a_busy_server_is_asked_again(run: Run, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.busy["coco.zip"] = llava.TRIES - 1
    assert run() == 0
    server.busy["ocr.zip"] = 100
    assert run() == 0  # what is there is not asked for


def test_a_server_that_stays_busy(run: Run, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.busy["coco.zip"] = 100
    assert run() == 1 and server.busy["coco.zip"] == 100 - llava.TRIES
    assert re.search(says("coco.zip", "503", "coco.zip.part"), capsys.readouterr().err)


def test_a_connection_that_breaks_all_the_time_still_gets_there(run: Run, server: Server) -> None:
    size = len(server.files["coco.zip"])

    class Breaking(dict):
        def pop(self, name: str, default: Any = None) -> Any:
            return size // 20 + 1 if name == "coco.zip" else default

    server.break_after = Breaking()
    assert run() == 0 and len([name for name, _ in server.requests if name == "coco.zip"]) > 2 * llava.TRIES


def test_a_download_that_was_whole_but_not_renamed(run: Run, server: Server, tmp_path: Path) -> None:
    part = tmp_path / "data" / ".downloads" / "coco.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(server.files["coco.zip"])
    assert run() == 0


def test_unpacking_adds_what_is_missing(run: Run, server: Server, tmp_path: Path) -> None:
    assert run("--keep-archives") == 0
    (tmp_path / "data" / "coco" / "train2017" / "2.jpg").write_bytes(b"torn")
    (tmp_path / "data" / ".prepared" / "coco.json").unlink()
    server.requests.clear()
    assert run("--keep-archives") == 0 and server.requests == []
    assert (tmp_path / "data" / "coco" / "train2017" / "2.jpg").read_bytes() == picture()


def test_missing_pictures_are_listed(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    (tmp_path / "data" / "ocr_vqa" / "images" / "b.jpg").unlink()
    assert run("--check") == 1
    assert re.search(says("mini", "1 in ocr_vqa/images", "missing_mini.txt"), capsys.readouterr().out)
    assert (tmp_path / "data" / "missing_mini.txt").read_text() == "ocr_vqa/images/b.jpg\n"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda server, parts: parts["coco"].update(files=3), says("coco.zip", "2 files, 3")),
        (lambda server, parts: server.files.pop("coco.zip"), says("coco.zip", "404")),
        (lambda server, parts: server.files.update({"coco.zip": b"no zip"}), says("coco.zip", "not a zip")),
        (
            lambda server, parts: server.files.update({"coco.zip": archive({"train2017/../../x": b""})}),
            says("coco.zip", "train2017/../../x", "out"),
        ),
        (lambda server, parts: parts["coco"].update(gigabytes=1.5), says("coco.zip.part", "1.59e-06 GB", "1.5")),
        (lambda server, parts: parts["coco"].update(url="no address"), says("no address", "url type")),
        (
            lambda server, parts: parts.update(coco={"manual": "ask the authors", "places": ["x"]}),
            says("coco", "by hand", "ask the authors"),
        ),
    ],
)
def test_what_goes_wrong_is_said_and_the_rest_goes_on(
    run: Run, server: Server, table: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    change: Callable[[Server, dict[str, Any]], None], expected: str,
) -> None:  # fmt: skip
    change(server, table["parts"])
    assert run() == 1
    printed = capsys.readouterr()
    error = printed.err.replace("\r", "\n").strip().splitlines()[-1]  # progress bars end in a carriage return
    assert re.match("error: " + expected, error)
    assert "ocr: complete" in printed.out and (tmp_path / "data" / "ocr_vqa" / "images" / "a.jpg").is_file()


def test_a_damaged_member(run: Run, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(server.files["coco.zip"])
    at = content.index(picture()) + 30
    content[at] ^= 255
    server.files["coco.zip"] = bytes(content)
    assert run() == 1 and re.search(says("coco.zip", "CRC-32"), capsys.readouterr().err)


def test_a_damaged_compressed_member(run: Run, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("train2017/1.jpg", bytes(range(256)) * 20)
    content = bytearray(out.getvalue())
    content[30 + len("train2017/1.jpg")] = 0xFF  # there is no such kind of block
    server.files["coco.zip"] = bytes(content)
    assert run() == 1 and re.search(says("coco.zip", "decompressing"), capsys.readouterr().err)


def test_a_full_disk(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llava.shutil, "disk_usage", lambda directory: SimpleNamespace(free=10))
    assert run() == 1 and re.search(says("needed", "0.0 GB are free"), capsys.readouterr().err)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<html>Sign in</html>", says("records.json", "JSON", "Expecting value")),
        (b"{}", says("records.json", "no list", "records, 3")),
        (b"[{}]", says("records.json", "1 records, 3")),
    ],
)
def test_records_that_are_not_the_published_ones(
    run: Run, server: Server, table: dict[str, Any], capsys: pytest.CaptureFixture[str], content: bytes, expected: str
) -> None:
    table["sets"]["mini"]["count"] = 3
    server.files["records.json"] = content
    assert run() == 1 and re.search(expected, capsys.readouterr().err)


def test_a_broken_gif_is_named_and_stays(run: Run, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.files["ocr.zip"] = archive({"a.gif": picture("GIF"), "b.jpg": picture("GIF")[:20]})
    assert run() == 0
    printed = capsys.readouterr().out
    assert re.search(says("b.jpg", "GIF", "read"), printed) and re.search(says("ocr", "1 GIFs"), printed)


def test_the_table_is_sound() -> None:
    table = yaml.safe_load(llava.TABLE.read_text())
    assert sorted(table["sets"]) == ["lcs558k", "mix665k", "next1m"]
    for entry in table["sets"].values():
        files = [table["parts"][name].get("file") for name in entry["parts"]]
        assert entry["records"] in files
    used = {name for entry in table["sets"].values() for name in entry["parts"]}
    assert used == set(table["parts"])
    for part in table["parts"].values():
        assert ("gigabytes" in part) == ("url" in part)
        assert len({"url", "manual", "link"} & set(part)) == 1
        assert len({"file", "into", "places"} & set(part)) == 1 and ("places" in part) == ("manual" in part)


def test_what_was_fetched_by_hand_is_accepted(run: Run, table: dict[str, Any], tmp_path: Path) -> None:
    table["parts"]["ocr"] = {"manual": "ask the authors", "places": ["ocr_vqa/images"]}
    for name in ("a", "b"):
        file = tmp_path / "data" / "ocr_vqa" / "images" / f"{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture())
    assert run() == 0
