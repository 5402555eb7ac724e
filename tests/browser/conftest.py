"""A running demo of the embedded run, pages to ask about, and a real Chromium (``make test-browser``)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llava_pdrop.__main__ import main
from llava_pdrop.commands.arguments import EMBEDDED
from llava_pdrop.eval.evaluate import EVALUATION_FILE, PREDICTIONS_FILE

ROOT = Path(__file__).parents[2]
PAGES = 8
TRACED = """
import os, socket
_connect = socket.socket.connect
def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        with open(os.environ["DEMO_CONNECTIONS"], "a", encoding="utf-8") as file:
            file.write(f"{address[0]}\\n")
    return _connect(self, address)
socket.socket.connect = connect
_named = socket.getaddrinfo
def named(host, *given, **options):
    with open(os.environ["DEMO_CONNECTIONS"], "a", encoding="utf-8") as file:
        file.write(f"{host}\\n")
    return _named(host, *given, **options)
socket.getaddrinfo = named
"""
"""What the server's Python runs first: it notes every address that it speaks to, and every name that it asks for."""


@dataclass(frozen=True)
class Asked:
    """A page of the embedded task and a question about it."""

    picture: Path
    question: str


@dataclass(frozen=True)
class Served:
    """A running demo. ``log``: what it has written to standard error."""

    address: str
    pid: int
    connections: Path
    log: Path


@pytest.fixture(scope="session")
def run() -> Path:
    """The embedded run, which ``make test-browser`` makes where it is missing."""
    assert (ROOT / EMBEDDED / "config.json").is_file(), "make test-browser, or bash scripts/finetune_pdrop.sh, makes it"
    return ROOT / EMBEDDED


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of pages, as data/tiny has them."""
    home = tmp_path_factory.mktemp("forms")
    counts = ["--pretrain", "1", "--train", "1", "--eval", str(PAGES)]
    make = [sys.executable, str(ROOT / "data/prepare/forms.py"), "--out", str(home), *counts]
    subprocess.run(make, check=True, capture_output=True)
    return home


@pytest.fixture(scope="session")
def questions(forms: Path) -> list[Asked]:
    records = json.loads((forms / "eval.json").read_text(encoding="utf-8"))
    texts = [record["conversations"][0]["value"].replace("<image>", "").strip() for record in records]
    return [Asked(forms / record["image"], text) for record, text in zip(records, texts)]


@pytest.fixture(scope="session")
def evaluated(run: Path, forms: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The answers of ``llava-pdrop eval`` under the schedule of an override, in the order of `questions`."""
    copy = tmp_path_factory.mktemp("run")
    for file in run.iterdir():
        (copy / file.name).symlink_to(file)
    for name in (PREDICTIONS_FILE, EVALUATION_FILE):
        (copy / name).unlink(missing_ok=True)

    def answers(*words: str) -> list[str]:
        given = [f"data.eval={forms}/eval.json", f"data.image_root={forms}", "data.prepare=null", "data.index=null"]
        assert main(["eval", str(copy), *given, *words]) == 0
        lines = (copy / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["answer"] for line in lines]

    return answers


@contextmanager
def served(run: Path, home: Path, *words: str) -> Iterator[Served]:
    """The command, as somebody starts it, until the block ends."""
    (home / "sitecustomize.py").write_text(TRACED, encoding="utf-8")
    connections = home / "connections"
    connections.touch()
    paths = os.pathsep.join(filter(None, [str(home), str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": paths, "DEMO_CONNECTIONS": str(connections), "OMP_NUM_THREADS": "1"}
    env |= {"GRADIO_TEMP_DIR": str(home / "uploads"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "llava_pdrop", "demo", str(run), "--port", "0", *words]
    with (
        (home / "log").open("w") as log,
        subprocess.Popen(command, cwd=home, env=env, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("demo: ")), None)
            assert line is not None, (home / "log").read_text(encoding="utf-8")
            address = re.findall(r"http://127\.0\.0\.1:\d+", line)[0]
            yield Served(address, process.pid, connections, home / "log")
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def demo(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("served")
    with served(run, home, "--most-pixels", "1000000", "--most-bytes", "300000") as found:
        yield found


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser; its pages are opened by ``new_page``."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        path = os.environ.get("LLAVA_PDROP_CHROMIUM") or shutil.which("chromium")
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
