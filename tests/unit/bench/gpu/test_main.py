"""The arguments of scripts/gpu_check.sh."""

from __future__ import annotations

import re

import pytest

from llava_pdrop.bench.gpu import runner
from llava_pdrop.bench.gpu.__main__ import main
from tests.messages import says


@pytest.mark.parametrize(("given", "expected"), [([], 275.0), (["--seconds", "99"], 99.0)])
def test_the_limit_that_is_passed_on(given: list[str], expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(runner, "check", lambda names, seconds, *rest: seen.append(seconds) or 0)
    assert main(["--device", "cpu", "--stages", "env,tests,next", *given]) == 0
    assert seen == [expected]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stages", "env,nexst"], says("'nexst'", "env,tests,next")),
        (["--stages", ","], says("stage none")),
        (["--seconds", "0"], says("error", "--seconds", "got 0")),
        (["--device", "tpu"], says("error", "--device", "'tpu'")),
        (["--stages", "env", "--out", __file__], says("--out", __file__)),
        (["--stages", "env", "--out", "/proc/none/there"], says("--out", "/proc/none/there")),
    ],
)
def test_wrong_words_are_said(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cpu", *words])
    assert re.search(said, capsys.readouterr().err)
