"""What a test asks of a message: its key, its values, its cause; not its prose, which may be reworded at any time."""

from __future__ import annotations

import re


class Says(str):
    """A pattern that knows its parts: they are what a test is called by."""

    parts: tuple[str, ...]


def says(*parts: str) -> Says:
    """Pattern for ``match=`` and `re.search`: all ``parts`` stand, as whole words, in one line, in any order.

    A part is a file, a config key, a value, a number, or the one word that tells this cause from its siblings.
    """
    pattern = Says("".join(rf"(?=[^\n]*{whole(part)})" for part in parts))
    pattern.parts = parts
    return pattern


def meant(name: str) -> str:
    """The part that proposes ``name``, which alone would also be found among the possible values."""
    return f"did you mean '{name}"


def whole(part: str) -> str:
    """``part``, escaped; `seed` is not found in `data_seed`, nor ``1`` in ``10``."""
    before = r"(?<!\w)" if re.match(r"\w", part) else ""
    after = r"(?!\w)" if re.search(r"\w$", part) else ""
    return f"{before}{re.escape(part)}{after}"
