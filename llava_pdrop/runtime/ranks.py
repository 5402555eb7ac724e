"""What the processes of a run say to each other besides gradients. With one process it is plain calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import distributed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llava_pdrop.world import environment_kept

T = TypeVar("T")


def number_of_ranks() -> int:
    """Processes of this run."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def from_every_rank(value: T) -> list[T]:
    """The ``value`` of every rank, in their order. No rank goes on before all have come here."""
    if number_of_ranks() == 1:
        return [value]
    values: list[Any] = [None] * number_of_ranks()
    distributed.all_gather_object(values, value)
    return values


def by_first_rank(function: Callable[[], T]) -> T:
    """What ``function`` returns on the first rank, which alone runs it, while the others wait.

    Raises:
        UserError, OSError: the function raised it on the first rank, for the user or not; then every rank does.
    """
    if number_of_ranks() == 1:
        return function()
    answer: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            answer[0] = function()
        except (ValueError, OSError) as error:
            answer[1] = error
    distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


# The engine of one run ends with it: what comes next in the process (stage 2, a vanilla model to compare with, another
# variant, an evaluation) has an engine of its own, or none.

SET_BY_ENGINES = ("ACCELERATE_", "FSDP_")
"""Beginnings of the environment variables by which transformers tells accelerate of DeepSpeed, FSDP and compilation. It
leaves them there, and a later run would take them for its own."""


@contextmanager
def engine_for_one_run() -> Iterator[None]:
    """Takes back what the engine of a run changes in this process: environment variables, and the ZeRO-3 of models that
    are made."""
    with environment_kept(SET_BY_ENGINES):
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
