"""A rank that does not come is named by those that wait for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from llava_pdrop.config.load import load_config
from llava_pdrop.runtime.watchdog import ALARM, DIRECTORY, NAMED, STUCK_EXIT, Place, Watchdog, diagnose
from tests.faults.processes import Fault, run_ranks
from tests.messages import says


def place(rank: int, number: int, beat: int = 1) -> Place:
    return Place(rank, number, f"place {number}", where=f"host {rank}, process 7", beat=beat)


def later(places: list[Place], silent: tuple[int, ...] = ()) -> list[Place]:
    return [replace(p, beat=p.beat + (p.rank not in silent)) for p in places]


def test_who_is_behind_is_named_with_its_place():
    places = [place(0, 5), place(1, 4), place(2, 5)]
    line, own_fault = diagnose(places[0], places, later(places), 3)
    assert re.search(says("at place 5", "rank 1 (host 1, process 7), place 4", "arrived"), line) and not own_fault
    assert "rank 2" not in line
    assert diagnose(places[1], places, later(places), 3)[1]


def test_a_silent_process_and_one_that_never_started():
    places = [place(0, 5), place(1, 5)]
    line, own_fault = diagnose(places[0], places, later(places, silent=(1,)), 3)
    silent, missing = line.split(";")
    assert re.search(says("rank 1 (host 1, process 7), place 5", "silent"), silent)
    assert re.search(says("rank 2", "never started"), missing)
    assert not own_fault


def test_all_at_one_place():
    places = [place(0, 5), place(1, 5)]
    line, own_fault = diagnose(places[0], places, later(places), 2)
    assert re.search(says("all ranks", "(place 5)"), line) and own_fault


def test_who_has_said_all_and_left_is_not_silent():
    places = [replace(place(0, 5), left=True), place(1, 4)]
    line, own_fault = diagnose(places[1], places, later(places, silent=(0,)), 2)
    assert re.search(says("rank 1 (host 1, process 7), place 4", "arrived"), line)
    assert "silent" not in line and own_fault


def test_hundreds_of_ranks_are_one_readable_line():
    places = [place(0, 5), *(place(rank, 4) for rank in range(1, 100))]
    line, _ = diagnose(places[0], places, later(places), 120)
    assert line.count("arrived") == NAMED and re.search(says(f"{99 + 20 - NAMED} more"), line)


def test_a_single_process_leaves_no_files(tmp_path):
    watchdog = Watchdog(tmp_path, 0, 1, 100)
    with watchdog.running():
        watchdog.at("somewhere")
    assert not (tmp_path / DIRECTORY).exists()


def test_a_single_process_that_hangs_shows_where_and_ends(tmp_path):
    program = f"""
        import time
        from pathlib import Path
        from llava_pdrop.runtime.watchdog import Watchdog
        def stuck_here():
            time.sleep(600)
        watchdog = Watchdog(Path({str(tmp_path)!r}), 0, 1, 1)
        with watchdog.running():
            watchdog.at("fetching")
            stuck_here()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == STUCK_EXIT
    assert re.search(r"\[rank 0\] error: " + says("1 s", "fetching", "this process"), done.stderr)
    assert "in stuck_here" in done.stderr


def test_files_of_an_earlier_run_count_for_nothing(tmp_path):
    """They are older than this run, or of ranks that it does not have."""
    directory = tmp_path / DIRECTORY
    directory.mkdir()
    earlier = Watchdog(tmp_path, 1, 6, 100)
    earlier.at("somewhere")
    earlier._write()
    (directory / "rank_1.json").rename(directory / "rank_5.json")
    earlier._write()
    (directory / ALARM).touch()
    for name in ("rank_1.json", ALARM):
        os.utime(directory / name, (1.0, 1.0))
    watchdog, other = Watchdog(tmp_path, 0, 2, 100), Watchdog(tmp_path, 1, 2, 100)
    with watchdog.running():
        assert watchdog._read() == [] and not watchdog._alarm()
        with other.running():
            assert [found.rank for found in watchdog._read()] == [1]
            (directory / "rank_1.json").write_text("half of")
            assert watchdog._read() == []
        assert directory.exists()  # this rank has not left
    assert not directory.exists()


def test_a_long_last_place_that_ends_after_all_is_no_fault(tmp_path, monkeypatch):
    """It ends while the watchdog listens to the others."""
    ended, listening = [], threading.Event()
    monkeypatch.setattr("llava_pdrop.runtime.watchdog.os._exit", ended.append)
    watchdog = Watchdog(tmp_path, 0, 2, 0.1)

    def listen():
        listening.set()
        watchdog._stop.wait()
        return [], []

    monkeypatch.setattr(watchdog, "_listen", listen)
    with watchdog.running():
        assert listening.wait(300)
    assert ended == []


def test_an_alarm_ends_a_rank_that_fails_because_of_it(tmp_path):
    """Here the other rank has ended already, and its end was an error before this rank's thread looked."""
    program = f"""
        import time
        from pathlib import Path
        from llava_pdrop.runtime.watchdog import ALARM, Watchdog
        other = Watchdog(Path({str(tmp_path)!r}), 1, 2, 100)
        watchdog = Watchdog(Path({str(tmp_path)!r}), 0, 2, 100)
        with watchdog.running():
            for number in range(3):
                watchdog.at(f"place {{number}}")
            other.at("place 0")
            other._place = other._place.__class__(**(vars(other._place) | {{"left": True}}))
            other._write()
            (other.directory / ALARM).touch()
            raise RuntimeError("connection closed by peer")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == STUCK_EXIT
    assert re.search(says("at place 2", "rank 1", "place 0", "arrived"), done.stderr)
    assert "RuntimeError: connection closed by peer" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_sleeping_rank_ends_the_run_with_its_name(tiny_config, stuck):
    """The timeout is far above what a step takes on a machine that runs other things too."""
    train = {"max_steps": 4, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "ddp_timeout": 15}
    config = tiny_config(train=train)
    ended = run_ranks(config, ranks=2, fault=Fault("sleep", 3, rank=stuck), limit=300)
    waiting = 1 - stuck
    assert ended.codes == [STUCK_EXIT, STUCK_EXIT], ended.texts
    who_is_where = says("counting", "labels", f"rank {stuck} (", "fetching", "step 3", "arrived")
    assert re.search(rf"\[rank {waiting}\] error: " + who_is_where, ended.texts[waiting])
    assert "in get_batch_samples" in ended.texts[stuck]  # the stack of the rank that is stuck
    assert "in get_batch_samples" not in ended.texts[waiting]


@pytest.mark.parametrize(("kind", "stuck", "place"), [
    ("sleep_loading", 1, "loading the model"),
    ("sleep_counting", 0, "counting tokens"),
    ("sleep_reporting", 0, "writing the report"),
])  # fmt: skip
def test_a_rank_that_is_stuck_before_or_after_the_training_is_named_too(tiny_config, kind, stuck, place):
    train = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "ddp_timeout": 15}
    ended = run_ranks(tiny_config(train=train), ranks=2, fault=Fault(kind, 1, rank=stuck), limit=300)
    assert ended.codes == [STUCK_EXIT, STUCK_EXIT], ended.texts
    (line,) = [line for line in ended.texts[1 - stuck].splitlines() if f"[rank {1 - stuck}] error: " in line]
    assert re.search(says(f"rank {stuck} (", f"), {place}", "arrived"), line)
    assert "in train_watched" in ended.texts[stuck]  # the stack of the rank that is stuck


def test_a_single_process_may_load_and_count_for_as_long_as_it_takes(tmp_path, monkeypatch):
    """Nobody waits for it, and a million records take long; in the training it is watched."""
    ended = []
    monkeypatch.setattr("llava_pdrop.runtime.watchdog.os._exit", ended.append)
    watchdog, spoken = Watchdog(tmp_path, 0, 1, 0.1), threading.Event()
    monkeypatch.setattr(watchdog, "_speak", spoken.set)
    with watchdog.running():
        assert not spoken.wait(0.5)
        with watchdog.led_by(True, "counting tokens"):
            assert not spoken.wait(0.5)
        watchdog.at("training")
        assert spoken.wait(300)


def test_the_first_is_behind_until_it_is_done(tmp_path):
    first, other = (Watchdog(tmp_path, rank, 2, 100) for rank in (0, 1))
    with first.led_by(True, "counting"), other.led_by(False, "counting"):
        assert (first._place.name, other._place.name) == ("counting", "the end of counting")
        assert first._place.number < other._place.number
    assert first._place.number == other._place.number and first._place.name == other._place.name


def test_nothing_is_left_of_it(tiny_config):
    train = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    config = tiny_config(train=train)
    assert run_ranks(config, ranks=2).codes == [0, 0]
    assert not (Path(load_config(config).output_dir) / DIRECTORY).exists()
