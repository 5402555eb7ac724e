"""Who owns an output directory, and when a lock that lies there is nobody's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llava_pdrop.runtime import lock
from llava_pdrop.runtime.lock import LOCK_FILE, InUse, Owner, owning
from llava_pdrop.runtime.processes import started
from tests.messages import says

ROOT = Path(__file__).resolve().parents[3]

HOLD = """\
import sys, time
from pathlib import Path
from llava_pdrop.runtime.lock import owning
with owning(Path(sys.argv[1]), "first"):
    print("mine", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "ENDING", 0.3)


@pytest.fixture
def holder(tmp_path):
    """Another process that owns the directory."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"mine\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def take(directory: Path) -> bool:
    with owning(directory, "second"):
        return True


def write(directory: Path, owner: Owner, age: float = 0.0) -> Path:
    file = directory / LOCK_FILE
    file.write_text(json.dumps(asdict(owner)))
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_it_says_who_and_is_gone_afterwards(tmp_path):
    with owning(tmp_path / "new", "x"):
        facts = json.loads((tmp_path / "new" / LOCK_FILE).read_text())
        assert facts["process"] == os.getpid() and facts["host"] and facts["since"]
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(KeyError), owning(tmp_path, "x"):
        raise KeyError
    assert take(tmp_path)


def test_a_second_is_refused_while_the_first_lives(tmp_path, holder):
    since = json.loads((tmp_path / LOCK_FILE).read_text())["since"]
    said = says("second", str(tmp_path), "in use", f"process {holder.pid}", os.uname().nodename, since, "output_dir")
    with pytest.raises(InUse, match=said):
        take(tmp_path)
    holder.send_signal(signal.SIGSTOP)  # suspended is not dead
    os.utime(tmp_path / LOCK_FILE, (1, 1))
    with pytest.raises(InUse):
        take(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [LOCK_FILE]


def test_what_a_killed_one_leaves_blocks_nobody(tmp_path, holder):
    holder.kill()  # not waited for: it stays in the table of processes, as with a launcher that is busy
    assert take(tmp_path)


def test_a_process_of_the_same_number_is_another(tmp_path, holder):
    file = tmp_path / LOCK_FILE
    owner = Owner(**json.loads(file.read_text()))
    assert owner.ticks == started(holder.pid)
    write(tmp_path, replace(owner, ticks=owner.ticks - 1))
    assert take(tmp_path)
    write(tmp_path, replace(Owner.me(), token="of what this process was before an exec"))
    assert take(tmp_path)


@pytest.mark.parametrize("elsewhere", [{"host": "node7"}, {"machine": "the same name, another container"}])
def test_on_another_host_the_heartbeat_tells(tmp_path, holder, monkeypatch, elsewhere):
    """There the number means nothing: this process here lives, that one there may not."""
    owner = replace(Owner(**json.loads((tmp_path / LOCK_FILE).read_text())), **elsewhere)
    write(tmp_path, owner, age=lock.DEAD_AFTER + 1)
    assert take(tmp_path)
    monkeypatch.setattr(lock, "DEAD_AFTER", 2.0)
    file, told, over = write(tmp_path, owner), [], threading.Event()
    start = time.monotonic()
    with owning(tmp_path, "second", told.append):  # killed a moment ago: it is waited until that is sure
        assert 1.5 < time.monotonic() - start < 60
    assert len(told) == 1 and re.search(says("second", owner.host, str(owner.process)), told[0])
    write(tmp_path, owner)
    monkeypatch.setattr(lock, "DEAD_AFTER", 60.0)
    beat = threading.Thread(target=lambda: over.wait(0.5) or os.utime(file))
    beat.start()
    with pytest.raises(InUse, match=says(owner.host, str(owner.process))):
        take(tmp_path)
    beat.join()


@pytest.mark.parametrize("text", ["", '{"host": "no', "[]", '{"host": "a", "process": 1, "since": "", "newer": 2}'])
def test_a_lock_that_cannot_be_read_counts_by_its_age(tmp_path, monkeypatch, text):
    file = tmp_path / LOCK_FILE
    file.write_text(text)
    os.utime(file, (1, 1))
    assert take(tmp_path)
    file.write_text(text)
    monkeypatch.setattr(lock, "DEAD_AFTER", 1.0)
    assert take(tmp_path)


def test_it_beats_and_comes_back_if_it_was_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "INTERVAL", 0.05)
    file = tmp_path / LOCK_FILE
    with owning(tmp_path, "x"):
        os.utime(file, (1, 1))
        while file.stat().st_mtime == 1:
            time.sleep(0.01)
        file.unlink()
        while not file.exists():
            time.sleep(0.01)
    assert not file.exists()


def test_who_was_taken_for_dead_writes_no_more(tmp_path, monkeypatch, capsys):
    """Suspended on another host for a minute: the directory is another's by now."""
    ended = threading.Event()
    monkeypatch.setattr(lock, "INTERVAL", 0.05)
    monkeypatch.setattr(lock.os, "_exit", lambda code: ended.set())
    with owning(tmp_path, "x"):
        write(tmp_path, Owner("node7", 12, "now", token="another"))
        assert ended.wait(60)
    assert re.search(says("error", "node7", "without saving"), capsys.readouterr().err)
    assert (tmp_path / LOCK_FILE).exists()  # it is not ours to remove


def test_who_comes_back_when_another_has_been_there_writes_no_more(tmp_path, monkeypatch, capsys):
    """Silent for longer than a lock lives, and the lock is gone: another run took it, wrote, and has left."""
    ended = threading.Event()
    monkeypatch.setattr(lock, "INTERVAL", 0.2)
    monkeypatch.setattr(lock, "DEAD_AFTER", 0.1)
    monkeypatch.setattr(lock.os, "_exit", lambda code: ended.set())
    with owning(tmp_path, "x"):
        (tmp_path / LOCK_FILE).unlink()
        assert ended.wait(60)
    assert re.search(says("error", str(tmp_path), "without saving"), capsys.readouterr().err)
    assert not (tmp_path / LOCK_FILE).exists()


def test_without_links_it_works_too(tmp_path, monkeypatch, holder):
    def no_links(*paths):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(lock.os, "link", no_links)
    with pytest.raises(InUse):
        take(tmp_path)
    holder.kill()
    assert take(tmp_path)


@pytest.mark.parametrize("turn", range(5))
def test_of_many_that_start_at_once_over_a_dead_lock_one_wins(tmp_path, monkeypatch, turn):
    monkeypatch.setattr(lock, "ENDING", 0.05)
    write(tmp_path, Owner("node7", 12, "then"), age=3600)
    inside, most, refused, go = [], [], [], threading.Barrier(8)

    def start(number: int) -> None:
        go.wait()
        try:
            with owning(tmp_path, str(number)):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.3)
                inside.remove(number)
        except InUse:
            refused.append(number)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) + len(refused) == 8


DEAD = Owner("node7", 12, "then", token="dead")


def found_dead(directory: Path, text: str | None = None) -> lock.Found:
    """What a start has seen that is about to take the lock of a dead owner away."""
    file = write(directory, DEAD, age=3600)
    if text is not None:
        file.write_text(text)
        os.utime(file, (1, 1))
    return lock._read(file)


@pytest.mark.parametrize("text", [None, ""], ids=["an owner's", "unreadable"])
def test_who_looked_before_a_faster_one_took_it_removes_nothing(tmp_path, monkeypatch, text):
    file, seen, read = tmp_path / LOCK_FILE, found_dead(tmp_path, text), lock._read
    file.unlink()  # a faster one has taken it away ...

    def slowly(path: Path) -> lock.Found | None:
        found = read(path)
        if path == file:
            write(tmp_path, Owner.me())  # ... and owns it, when this one has just looked
        return found

    monkeypatch.setattr(lock, "_read", slowly)
    lock._take_away(file, Owner.me(), seen)
    assert file.exists() and [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    file.write_text("")  # of one that is just writing it, without links
    lock._take_away(file, Owner.me(), seen)
    assert file.exists()


def claim_of(directory: Path, owner: Owner, age: float) -> Path:
    claim = directory / f"{LOCK_FILE}.{DEAD.token}.claim"
    write(directory, owner, age).rename(claim)
    return claim


def test_the_claim_of_a_slow_start_stays_its_own(tmp_path, monkeypatch):
    """However slow: its process lives."""
    slow = Owner.me()
    monkeypatch.setattr(lock, "_held", {slow.token})
    claim = claim_of(tmp_path, slow, age=3600)
    lock._take_away(tmp_path / LOCK_FILE, Owner.me(), found_dead(tmp_path))
    assert claim.exists() and (tmp_path / LOCK_FILE).exists()


def test_the_claim_of_a_dead_start_is_taken_away(tmp_path):
    claim = claim_of(tmp_path, replace(DEAD, token="died over it"), age=3600)
    seen = found_dead(tmp_path)
    lock._take_away(tmp_path / LOCK_FILE, Owner.me(), seen)
    assert not claim.exists()
    assert take(tmp_path) and list(tmp_path.iterdir()) == []


def test_who_has_lost_its_claim_removes_nothing(tmp_path, monkeypatch):
    """Suspended on another host for a minute, between the claim and the deed."""
    file, seen, read = tmp_path / LOCK_FILE, found_dead(tmp_path), lock._read

    def suspended(path: Path) -> lock.Found | None:
        if path == file:
            claim_of(tmp_path, replace(DEAD, token="another start"), age=0)
            write(tmp_path, DEAD)
            os.utime(file, (seen[1], seen[1]))
        return read(path)

    monkeypatch.setattr(lock, "_read", suspended)
    lock._take_away(file, Owner.me(), seen)
    assert file.exists() and len(list(tmp_path.iterdir())) == 2  # the claim is the other's too


def test_a_link_that_is_answered_twice_is_ours(tmp_path, monkeypatch):
    """Network file systems ask again where the answer was lost, and are told that the link is there."""
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(lock.os, "link", twice)
    assert take(tmp_path)


def test_a_lock_of_the_future_is_dead_when_nobody_touches_it(tmp_path, monkeypatch):
    """Its host's clock, or that of the file system, was wrong."""
    monkeypatch.setattr(lock, "DEAD_AFTER", 1.0)
    write(tmp_path, DEAD, age=-3600)
    assert take(tmp_path)
