"""What the fast set leaves out: found where it can be seen, and refused where it cannot."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing import Process

import pytest
import torch
from torch.utils.data import DataLoader

from llava_pdrop.train import run
from llava_pdrop.train.trainer import PyramidTrainer
from tests.faults.processes import run_ranks
from tests.kinds import kinds_of, neither_process_nor_training


def through_a_helper() -> None:
    run_ranks(None)


def in_a_closure() -> None:
    def inner() -> None:
        subprocess.run(["true"], check=True)

    inner()


def through_a_module() -> None:
    run.train(None)


def through_the_trainer() -> None:
    PyramidTrainer(None)


def only_looking() -> None:
    assert subprocess.CompletedProcess and torch.ones(1).sum()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (through_a_helper, "process"),
        (in_a_closure, "process"),
        (through_a_module, "trains"),
        (through_the_trainer, "trains"),
    ],
)
def test_it_is_seen_in_the_code(function, expected):
    assert expected in kinds_of(function)
    assert not kinds_of(only_looking)


def a_process() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


def a_forked_process() -> None:
    Process(target=print).start()


def a_data_worker() -> None:
    next(iter(DataLoader([1], num_workers=1)))


def a_step() -> None:
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1).step()


@pytest.mark.parametrize(
    ("action", "word"),
    [(a_process, "process"), (a_forked_process, "process"), (a_data_worker, "process"), (a_step, "trains")],
)
def test_it_fails_where_it_was_not_seen(action, word):
    with neither_process_nor_training(), pytest.raises(pytest.fail.Exception, match=f"pytest.mark.{word}"):
        action()
    a_step()
