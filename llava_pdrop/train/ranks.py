"""What the processes of a run say to each other besides gradients. With one process it is plain calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

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
        ValueError, OSError: the function raised it on the first rank; then every rank does.
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
