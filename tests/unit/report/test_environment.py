"""What a report says of where it was made, and where its files go."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from llava_pdrop.errors import UserError
from llava_pdrop.report import environment as module
from llava_pdrop.report.environment import COMMAND, COMMIT, check_out, commit, environment, file_name, package_version
from tests.messages import says


def test_a_name_becomes_the_name_of_a_file() -> None:
    assert file_name("train", "llava-next-7b", "cpu") == "train-llava-next-7b-cpu"
    assert file_name("train", "../my runs/a&b", "cpu") == "train-..-my-runs-a-b-cpu"


@pytest.mark.process  # git
def test_it_names_versions_command_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMAND, "bash scripts/some.sh")
    found = environment(torch.device("cpu"), seed=7)
    assert (found["torch"], found["command"], found["seed"]) == (torch.__version__, "bash scripts/some.sh", 7)
    assert found["device"] and found["driver"] is None and found["device_memory_gib"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", found["date"])
    assert package_version("no-such-package") is None


@pytest.mark.process  # git
def test_a_copy_without_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "environment.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv(COMMIT, raising=False)
    assert commit() is None
    monkeypatch.setenv(COMMIT, "abc1234")
    assert commit() == "abc1234"


@pytest.mark.process  # git
def test_a_checkout_with_files_of_a_later_commit_is_told_it_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "environment.py"))
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    (tmp_path / "file").write_text("one")
    for words in (["init", "-q"], ["add", "file"], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setenv(COMMIT, "abc1234")
    head = commit()
    assert head and re.fullmatch("[0-9a-f]{7,}", head) and head != "abc1234", "what history says, nothing being changed"
    (tmp_path / "file").write_text("two")
    assert commit() == "abc1234"
    monkeypatch.delenv(COMMIT)
    assert commit() == f"{head} with uncommitted changes"


def test_a_place_for_the_files_is_made_or_refused(tmp_path: Path) -> None:
    check_out(tmp_path / "new" / "deeper")
    assert list((tmp_path / "new" / "deeper").iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    for place in (file, file / "below"):
        with pytest.raises(UserError, match=says(f"--out {place}", f"{file} is a file")):
            check_out(place)
