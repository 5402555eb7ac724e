"""How property tests draw their cases."""

from __future__ import annotations

import os

import hypothesis

EXAMPLES = int(os.environ.get("LLAVA_PDROP_EXAMPLES", "200"))
"""Cases of every property test; ``make test-long`` asks for 10,000."""

cases = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="LLAVA_PDROP_EXAMPLES" not in os.environ,
    suppress_health_check=list(hypothesis.HealthCheck),
)
"""The same cases in every ordinary run; other ones, and many, where the number is given."""


def one_line(error: Exception, *parts: str) -> None:
    """Fails unless what the user is told is one line, of a length that can be read, with all ``parts`` in it."""
    said = str(error)
    assert said and "\n" not in said and len(said) < 2000
    assert all(part in said for part in parts)
