"""What the data ask of the model, compared when both are known and before the first step."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from llava_pdrop.config.schema import Config
from llava_pdrop.data.dataset import ConversationDataset
from llava_pdrop.errors import ConfigError

log = logging.getLogger(__name__)


def check_fit(config: Config, text_config: Any, dataset: ConversationDataset) -> None:
    """Raises at the first thing that the records ask for and the model cannot do, or the reverse.

    Raises:
        ConfigError: one line with file, key, record and remedy.
    """
    check_positions(config, text_config, dataset)
    warn_of_rates(config)


def positions_of(text_config: Any) -> int | None:
    """Positions that the decoder was made for; where its rotary embeddings are scaled, as many as that says. None where
    its config does not tell."""
    own = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    if own is None or rope.get("rope_type", rope.get("type", "default")) in ("default", None):
        return own
    before = rope.get("original_max_position_embeddings") or own
    return max(own, int(before * float(rope.get("factor") or 1)))


def check_positions(config: Config, text_config: Any, dataset: ConversationDataset) -> None:
    """Raises `ConfigError` if a sample is longer than the decoder has positions. Dropping does not help: the first
    layers have all tokens."""
    limit, lengths = positions_of(text_config), np.asarray(dataset.lengths())
    if limit is None or not len(lengths) or lengths.max() <= limit:
        return
    longest = dataset.records[int(lengths.argmax())]
    line = (
        f"{int((lengths > limit).sum()):,} of {len(lengths):,} records are longer than "
        f"the {limit:,} positions of the decoder, the longest, {longest.origin} (id {longest.id}), has "
        f"{int(lengths.max()):,} tokens"
    )
    if config.model.beyond_positions == "allow":
        log.warning("%s: %s: model.beyond_positions allows it", config.name, line)
        return
    raise ConfigError(
        f"{config.file}: data.max_length: {line}: data.max_length={limit} cuts what can be cut, data.on_invalid=skip "
        "leaves the rest out; or scale the rotary embeddings (rope_parameters in the decoder's config.json), or "
        "model.beyond_positions=allow"
    )


def warn_of_rates(config: Config) -> None:
    """Says that every learning rate is 0, which somebody has given: the loss will be the same from the first step to
    the last."""
    section, trained = config.train, config.model.trainable
    rate = section.arguments.get("learning_rate", 5e-5)
    own = {"projector": section.projector_lr, "vision_tower": section.vision_tower_lr}
    if not any(rate if own.get(part) is None else own[part] for part in trained):
        log.warning("%s: train.learning_rate is 0 for all of %s: nothing will learn", config.name, list(trained))
