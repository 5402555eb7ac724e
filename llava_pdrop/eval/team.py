"""The processes that a launcher has started for an evaluation: who answers which questions, how the answers meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from transformers import TrainingArguments

from llava_pdrop.config.schema import Config
from llava_pdrop.errors import ConfigError, first_line
from llava_pdrop.runtime.ranks import from_every_rank
from llava_pdrop.runtime.watchdog import SHARE_OF_TIMEOUT, Watchdog
from llava_pdrop.train.arguments import on_cpu
from llava_pdrop.world import number_of_processes

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """Some processes and this one's ``rank`` among them. ``at`` tells the others where this one is."""

    rank: int = 0
    ranks: int = 1
    at: Callable[[str], None] = lambda place: None

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def rounds(self, tasks: int) -> int:
        """Rounds in which ``tasks`` are done, one by every process in each; in the last one some may have none."""
        return -(-tasks // self.ranks)

    def task(self, turn: int) -> int:
        """Number of this process's task in round ``turn``, both from 0."""
        return turn * self.ranks + self.rank

    def tasks(self, count: int) -> range:
        """Numbers of this process's tasks among ``count``, round by round."""
        return range(self.rank, count, self.ranks)

    def gather(self, own: T) -> list[T]:
        """What every process has done, in the order of their ranks. All come here."""
        return [own] if self.ranks == 1 else from_every_rank(own)


ALONE = Team()


@contextmanager
def team_of(config: Config, directory: Path) -> Iterator[Team]:
    """The processes of this program, each on its GPU, or on the CPU where there is none or ``train.use_cpu`` says so.
    One that is stuck is named after 0.9 of ``train.ddp_timeout`` (`runtime.watchdog`).

    Args:
        directory: where all of them can write.

    Raises:
        ConfigError: ``WORLD_SIZE`` says that there are others, and no launcher says where.
    """
    if number_of_processes() == 1:
        yield ALONE
        return
    asked = config.train.arguments
    cpu = on_cpu(asked)
    seconds = asked.get("ddp_timeout", TrainingArguments.ddp_timeout)
    backend = asked.get("ddp_backend") or ("gloo" if cpu else "nccl")
    try:
        state = PartialState(cpu=cpu, backend=backend, timeout=timedelta(seconds=seconds))
    except ValueError as error:
        raise ConfigError(
            f"{config.file}: WORLD_SIZE={number_of_processes()}, but the other processes cannot be found: "
            f"{first_line(error)}: start them by scripts/eval.sh or torchrun, or unset WORLD_SIZE"
        ) from error
    watchdog = Watchdog(directory, state.process_index, state.num_processes, SHARE_OF_TIMEOUT * seconds)
    with watchdog.running():
        yield Team(state.process_index, state.num_processes, watchdog.at)
