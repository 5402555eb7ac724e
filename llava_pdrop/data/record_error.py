"""The error that names a record."""

from __future__ import annotations

from typing import Any


class RecordError(ValueError):
    """A record that cannot be used: where it stands, its id (where that could be read) and why, in one line."""

    def __init__(self, origin: str, id: str | None, reason: str) -> None:
        super().__init__(f"{origin} (id {id}): {reason}" if id is not None else f"{origin}: {reason}")
        self.origin, self.id, self.reason = origin, id, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordError, (self.origin, self.id, self.reason)
