"""What a launcher says, and what is so where there was none."""

from __future__ import annotations

import os

import pytest

from llava_pdrop.world import environment_kept, is_first, is_first_here, number_of_processes, rank


def test_a_process_that_nobody_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (number_of_processes(), rank(), is_first(), is_first_here()) == (1, 0, True, True)


def test_the_first_process_of_the_second_machine_is_the_first_one_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "4"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert (number_of_processes(), rank(), is_first(), is_first_here()) == (8, 4, False, True)


def test_what_changes_in_the_environment_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_A", "1")
    with environment_kept(("FSDP_",)):
        os.environ.update(FSDP_A="2", FSDP_B="3", OTHER="5")
    assert os.environ["FSDP_A"] == "1" and "FSDP_B" not in os.environ and os.environ.pop("OTHER") == "5"
