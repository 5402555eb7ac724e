"""What measures a server counts what the server says, and says what is wrong in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llava_pdrop.eval.respondent import LlavaRespondent
from llava_pdrop.serve.load import load, main, picture
from llava_pdrop.serve.service import Service
from tests.messages import says
from tests.unit.serve.serving import NAME, at_rest, served


@pytest.fixture(scope="module")
def server(respondent: LlavaRespondent) -> Iterator[tuple[Service, str]]:
    with served(respondent) as made:
        made[0].loop.ends, made[0].loop.stops = [], ()
        yield made


def test_tokens_are_counted(server: tuple[Service, str]) -> None:
    found = load(server[1], 3, 7, {"model": NAME, "max_tokens": 5, "temperature": 0}, side=48)
    assert (found["clients"], found["requests"], found["tokens"]) == (3, 7, 35)
    assert found["rate"] == pytest.approx(35 / found["seconds"]) and at_rest(server[0])
    assert picture(1, 48) == picture(1, 48) != picture(2, 48)


def test_a_line_for_every_number_of_clients(server: tuple[Service, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--clients", "1", "2", "--requests", "4", "--max-tokens", "3", "--side", "48", "--pid", str(os.getpid())]
    assert main([server[1], *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["1 clients, 4 requests", "2 clients, 4 requests"]
    assert all(re.search(r": 12 tokens in .* tokens/s, \d.* MiB$", line) for line in lines)


@pytest.mark.parametrize(
    ("address", "words", "message"),
    [
        ("http://127.0.0.1:1", [], says("127.0.0.1:1", "no server")),
        (None, ["--max-tokens", "0"], says("400", "max_tokens")),
    ],
)
def test_what_is_wrong_is_one_line(
    server: tuple[Service, str], address: str | None, words: list[str], message: str
) -> None:
    """In a process of its own: this one is the server's too, whose log goes to the same place."""
    command = [sys.executable, "-m", "llava_pdrop.serve.load", address or server[1], *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert re.search(message, line)
