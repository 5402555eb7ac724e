"""A rank that does not come is named by those that wait for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_pdrop.config import load_config
from llava_pdrop.train.watchdog import DIRECTORY, EXIT_CODE, Place, Watchdog, diagnose
from tests.faults.processes import Fault, run_ranks


def place(rank: int, number: int, beat: int = 1) -> Place:
    return Place(rank, number, f"place {number}", since=0.0, where=f"host {rank}, process 7", beat=beat)


def later(places: list[Place], silent: tuple[int, ...] = ()) -> list[Place]:
    return [place(p.rank, p.number, p.beat + (p.rank not in silent)) for p in places]


def test_who_is_behind_is_named_with_its_place():
    places = [place(0, 5), place(1, 4), place(2, 5)]
    line, own_fault = diagnose(places[0], places, later(places), 3)
    assert "waiting at place 5: rank 1 (host 1, process 7), place 4 has not arrived." in line and not own_fault
    assert diagnose(places[1], places, later(places), 3)[1]


def test_a_silent_process_and_one_that_never_started():
    places = [place(0, 5), place(1, 5)]
    line, own_fault = diagnose(places[0], places, later(places, silent=(1,)), 3)
    assert "rank 1 (host 1, process 7), place 5 is silent" in line and "rank 2 has ended or never started" in line
    assert not own_fault


def test_all_at_one_place():
    places = [place(0, 5), place(1, 5)]
    line, own_fault = diagnose(places[0], places, later(places), 2)
    assert "all ranks have come to the same place (place 5)" in line and own_fault


def test_a_single_process_is_not_watched(tmp_path):
    watchdog = Watchdog(tmp_path, 0, 1, 0.01)
    with watchdog.running():
        watchdog.at("somewhere")
    assert not (tmp_path / DIRECTORY).exists()


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_sleeping_rank_ends_the_run_with_its_name(tiny_config, stuck):
    train = {"max_steps": 4, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "ddp_timeout": 6}
    config = tiny_config(train=train)
    ended = run_ranks(config, ranks=2, fault=Fault("sleep", 3, rank=stuck), limit=60)
    waiting = 1 - stuck
    assert ended.codes == [EXIT_CODE, EXIT_CODE], ended.texts
    assert f"[rank {waiting}] error: no progress for" in ended.texts[waiting]
    assert "waiting at counting the labels of step 3" in ended.texts[waiting]
    assert (
        f"rank {stuck} (" in ended.texts[waiting]
        and "fetching the batches of step 3 has not arrived" in ended.texts[waiting]
    )
    assert "in get_batch_samples" in ended.texts[stuck]  # the stack of the rank that is stuck
    assert "in get_batch_samples" not in ended.texts[waiting]


def test_nothing_is_left_of_it(tiny_config):
    train = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    config = tiny_config(train=train)
    assert run_ranks(config, ranks=2).codes == [0, 0]
    assert not (Path(load_config(config).output_dir) / DIRECTORY).exists()
