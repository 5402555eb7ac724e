"""The command line: help, one-line errors, and what reaches the commands."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from llava_pdrop import __main__ as cli
from llava_pdrop.config.load import load_config
from llava_pdrop.cost.plan import make_plan
from llava_pdrop.errors import ConfigError
from tests.messages import meant, says

ROOT = Path(__file__).parents[2]
FULL_SIZE = "configs/llava15_7b/finetune_pdrop.yaml"


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of ``train``, which does nothing else."""
    calls: list[Any] = []
    module = types.ModuleType("llava_pdrop.train.run")
    module.train = calls.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llava_pdrop.train.run", module)
    return calls


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from llava_pdrop.__main__ import _parser; _parser().format_help(); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_overrides_reach_the_command(seen: list[Any]) -> None:
    assert cli.main(["train", FULL_SIZE, "seed=5", "pyramid_drop.layers=[4,16,24]"]) == 0
    assert seen[0].seed == 5 and seen[0].schedule.layers == (4, 16, 24)


def test_options_may_stand_anywhere(seen: list[Any]) -> None:
    assert cli.main(["train", FULL_SIZE, "--debug", "seed=5"]) == 0
    assert seen[0].seed == 5


def test_a_users_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", FULL_SIZE, "seeed=5"]) == 2
    captured = capsys.readouterr()
    assert re.match("error: command line: " + says("'seeed'", meant("seed'")), captured.err)
    assert captured.err.count("\n") == 1 and not captured.out


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ConfigError):
        cli.main(["plan", FULL_SIZE, "seeed=5", "--debug"])


def test_a_missing_file_is_one_line_and_a_fault_of_ours_is_not_hidden(
    seen: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = sys.modules["llava_pdrop.train.run"]

    def missing(config: Any) -> None:
        Path("/nowhere/file.json").read_text()

    def broken(config: Any) -> None:
        int("x")

    monkeypatch.setattr(module, "train", missing)
    assert cli.main(["train", FULL_SIZE]) == 2
    assert "/nowhere/file.json" in capsys.readouterr().err
    monkeypatch.setattr(module, "train", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["train", FULL_SIZE])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), says("/a/b", "Permission denied")),
        (OSError(errno.EROFS, "Read-only file system", "/a/b", None, "/a/c"), says("/a/b", "Read-only file system")),
        (OSError(errno.ENOSPC, "No space left on device"), says("No space left on device", "room")),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded", "/a/b"),
            says("/a/b", "Disk quota exceeded", "room"),
        ),
    ],
)
def test_what_the_system_says_about_a_file_is_one_line(
    seen: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError, line: str
) -> None:
    def fail(config: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["llava_pdrop.train.run"], "train", fail)
    assert cli.main(["train", FULL_SIZE]) == 2
    said = capsys.readouterr().err
    assert re.match("error: " + line, said) and said.count("\n") == 1
    with pytest.raises(OSError, match=error.strerror):
        cli.main(["train", FULL_SIZE, "--debug"])


def test_a_fault_that_names_no_file_is_not_hidden(seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Any) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr(sys.modules["llava_pdrop.train.run"], "train", fail)
    with pytest.raises(ConnectionResetError):
        cli.main(["train", FULL_SIZE])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "{dir}"], ["{dir}", "directory", "YAML"]),
        (["compare", "{tiny}", "data.index={dir}"], ["{tiny}", "data.index", "{dir}", "directory"]),
        (["eval", "{dir}"], ["{dir}", "llava_pdrop.yaml", "config.json"]),
        (["train", "{file}/x.yaml"], ["{file}/x.yaml"]),
        (["plan", "{ablation}"], ["{ablation}", "llava-pdrop ablate"]),
        (["eval", "{ablation}"], ["{ablation}", "llava-pdrop ablate"]),
        (
            ["compare", "{ablation}"],
            ["{ablation}", "llava-pdrop ablate"],
        ),
        (["ablate", "{tiny}"], ["{tiny}", "variants", "grid", "llava-pdrop train {tiny}"]),
    ],
)
def test_a_path_of_the_wrong_kind_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").touch()
    names = {"dir": tmp_path / "dir", "file": tmp_path / "file"}
    names |= {"tiny": Path("configs/tiny/finetune_pdrop.yaml"), "ablation": Path("configs/ablations/tiny.yaml")}
    assert cli.main([word.format(**names) for word in words]) == 2
    said = capsys.readouterr().err
    assert re.match("error: " + says(*(part.format(**names) for part in parts)), said) and said.count("\n") == 1


def test_every_rank_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["plan", FULL_SIZE, "seeed=5"]) == 2
    assert re.match(r"\[rank 1\] error: command line: " + says("'seeed'"), capsys.readouterr().err)


@pytest.mark.parametrize(
    ("content", "reason"), [('[{"id": 1}]', says("list")), ('{"id": ', says("YAML")), ('{"id": 1}\n[2]', says("YAML"))]
)
def test_a_file_of_records_in_place_of_a_config_is_told_from_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, reason: str
) -> None:
    file = tmp_path / "my.json"
    file.write_text(content)
    for command in ("doctor", "eval"):
        assert cli.main([command, str(file)]) == 2
        error = capsys.readouterr().err
        assert re.match(f"error: {file}" + reason + says("config", "data.train", "data.eval"), error)
        assert error.count("\n") == 1


def test_compare_at_full_size_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cli.main(["compare", "configs/llava_next_7b/finetune_pdrop.yaml"]) == 2
    error = capsys.readouterr().err
    assert "lmsys/vicuna-7b-v1.5" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "vanilla", "dropping"),
    [("llava15_7b", 3.82, 1.78), ("llava_next_7b", 20.8, 9.46)],
)
def test_plan_gives_the_papers_figures(path: str, vanilla: float, dropping: float) -> None:
    config = load_config(f"configs/{path}/finetune_pdrop.yaml", ["model.merge=flat"])  # the paper counts 5 x 576
    plan = make_plan(config, [(672, 672)])
    assert plan.rows[0].vanilla == pytest.approx(vanilla, rel=0.002)
    assert plan.rows[0].dropping == pytest.approx(dropping, rel=0.002)
    assert plan.average == pytest.approx(0.46875) and plan.layers == 32


def test_plan_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", FULL_SIZE]) == 0
    out = capsys.readouterr().out
    assert "576" in out and "1.78" in out and "any size" in out


def test_plan_without_numbers_says_what_to_give(tmp_path: Path) -> None:
    config = load_config(FULL_SIZE, ["model.reference_shape=null", "model.language_model=no/where"])
    with pytest.raises(ConfigError, match=r"reference_shape"):
        make_plan(config)
