"""The ids at which ``generate`` stops, where a checkpoint's files contradict each other.

A checkpoint says them in up to three places: generation_config.json, the decoder's config and, by the name of a token,
the tokenizer. Programs believe different ones, so one that names an ordinary word, or misses the tokenizer's own end,
lets answers run on or stops them in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

GENERATION_CONFIG = "generation_config.json"


def settle_ends(directory: Path, generation: GenerationConfig, config: Any, tokenizer: Any) -> list[str]:
    """Makes the ids in ``generation`` and in the decoder's part of ``config`` agree with the end-of-sequence token of
    ``tokenizer``: an id that is no special token of it goes, its own end joins. Both are changed in place. Nothing is
    done where the tokenizer's end is among them, or nothing is said at all.

    Args:
        directory: what was opened, for messages.

    Returns:
        a line per file that contradicted the tokenizer: which says what, and what is used.
    """
    end, text = tokenizer.eos_token_id, config.text_config
    said = ids_of(generation.eos_token_id)
    if end is None or not said:
        return []
    lines = []
    if end not in said:
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        used = [index for index in said if index in special] + [end]
        has_own = (directory / GENERATION_CONFIG).is_file()
        lines.append(_line(directory / (GENERATION_CONFIG if has_own else "config.json"), said, used, tokenizer))
        generation.eos_token_id = one_or_all(used)
    settled = ids_of(generation.eos_token_id)
    if (own := ids_of(getattr(text, "eos_token_id", None))) and not set(own) & set(settled):
        if own != said:
            lines.append(_line(directory / "config.json", own, settled, tokenizer))
        text.eos_token_id = one_or_all(settled)
    return lines


def ids_of(value: int | Sequence[int] | None) -> list[int]:
    """``eos_token_id`` of a config, whichever of its forms it has, as a list."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def one_or_all(ids: list[int]) -> int | list[int] | None:
    """The other way round."""
    return ids[0] if len(ids) == 1 else ids or None


def _line(file: Path, said: list[int], used: list[int], tokenizer: Any) -> str:
    def named(ids: list[int]) -> str:
        tokens = (tokenizer.convert_ids_to_tokens(i) if 0 <= i < len(tokenizer) else "no token" for i in ids)
        return ", ".join(f"{index} ({token})" for index, token in zip(ids, tokens))

    return (
        f"{file}: eos_token_id {named(said)} contradicts tokenizer_config.json, whose eos_token is "
        f"{named([tokenizer.eos_token_id])}: answers end at {named(used)}"
    )
