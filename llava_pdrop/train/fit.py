"""Do the parts of a run fit each other? Its templates and the tokenizer, its data, what of the model may learn, and the
positions that it has: each can be right alone, and a run of both still teach nothing, or the wrong thing, without an
error. All is compared before the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from llava_pdrop.config.schema import Config
from llava_pdrop.data.chat import add_ends, jinja_of
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.dataset import ConversationDataset
from llava_pdrop.data.images import image_size
from llava_pdrop.data.marks import fitting, split_marks
from llava_pdrop.data.records import Records
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.errors import ConfigError
from llava_pdrop.types import IGNORE_INDEX, ImageInput, Record

log = logging.getLogger(__name__)

FEW = 0.01
"""Share of records without a label from which on it is said."""

SEE_PICTURES = {"projector", "vision_tower"}
"""Parts of the model that learn from pictures only."""


def templates_of(template: str, records: Records) -> list[str]:
    """Names of the conversation templates that the records of a run are written in: where they name none, its own
    ``template``."""
    return list(dict.fromkeys(part.template or template for part in records.parts))


def check_templates(config: Config, records: Records, tokenizer: Any) -> list[str]:
    """Compares the templates of a run with its tokenizer.

    Returns:
        lines for the user on marks of plain-text templates.

    Raises:
        ConfigError: a mark that must be one token is several: the model would learn to write its letters.
    """
    lines = []
    for name in templates_of(config.model.template, records):
        key = f"{config.file}: {'model.template' if name == config.model.template else 'data.train: template'}"
        split, plain = split_marks(TEMPLATES[name], tokenizer)
        if split:
            known = ", ".join(fitting(tokenizer))
            remedy = f"take a template that the tokenizer knows ({known})" if known else "take a plain one (qa)"
            raise ConfigError(
                f"{key} {name}: {', '.join(split)} must each be one token and fall into several with the tokenizer of "
                f"{config.model.path or config.model.language_model}: {remedy}, or add them to the tokenizer"
            )
        if plain:
            marks = ", ".join(map(repr, plain))
            lines.append(f"{key} {name}: {marks} are several tokens with this tokenizer, so they are trained as text")
    return lines


def check_learning(config: Config, dataset: ConversationDataset) -> list[str]:
    """Compares what may learn with the usable records.

    Returns:
        lines for the user on records that teach nothing.

    Raises:
        ConfigError: there are none, or none teaches anything (`nothing_learnt`).
    """
    found, total = dataset.survey, len(dataset)
    if not total:
        raise ConfigError(
            f"{config.file}: none of the records of {config.data.train} can be used (data.on_invalid: skip)"
            ": mend them, llava-pdrop doctor lists why"
        )
    empty = len(found.unlabelled)
    pictured = np.setdiff1d(np.flatnonzero(found.images), found.unlabelled).tolist()
    reason = nothing_learnt(config, total, empty, (dataset.records[i] for i in pictured), dataset.encoder)
    if reason is not None:
        raise ConfigError(f"{config.file}: {reason}")
    if empty > FEW * total:
        share = f"{empty:,} of {total:,} records ({empty / total:.1%})"
        return [f"{share} have no label: none at all, or only behind the cut at {_cut(config)}"]
    return []


def nothing_learnt(
    config: Config, total: int, unlabelled: int, pictured: Iterable[Record], encoder: Encoder | None
) -> str | None:
    """Why no record of a run teaches anything, though each can be used; None where one does.

    Args:
        total: records that are used, ``unlabelled`` of them without a label.
        pictured: those that have pictures and a label.
        encoder: None: nobody can tell whether a picture stands in front of the label, so it is taken to.
    """
    if unlabelled == total:
        return (
            f"none of the {total:,} records has a label left: its answers are missing, empty or not trained on (loss: "
            f"false), or lie behind the cut at {_cut(config)}: raise it, or data.truncation=turns"
        )
    learning = set(config.model.trainable)
    if learning <= SEE_PICTURES and not any(encoder is None or shows_before_a_label(encoder, r) for r in pictured):
        return (
            f"model.trainable: {', '.join(sorted(learning))} learn from pictures only, and none of the {total:,} "
            f"records of {config.data.train} shows one before what it trains on: add language_model, or data with "
            "pictures"
        )
    return None


def _cut(config: Config) -> str:
    return f"data.max_length={config.data.max_length} (data.truncation=tokens)"


def shows_before_a_label(encoder: Encoder, record: Record) -> bool:
    """Whether a picture of a record can change the loss: it is left, and in front of a token that is trained on."""
    sample = encoder.train(record, [ImageInput(torch.empty(0), image_size(source)) for source in record.images])
    return any((sample.labels[stop:] != IGNORE_INDEX).any() for _, stop in sample.image_spans)


def make_servable(generation: Any, template: str, records: Records, tokenizer: Any) -> None:
    """What is saved of a run is served as it was trained: ``tokenizer`` gets the run's ``template`` as chat template,
    and the tokens that end an answer in any of its templates are among those at which ``generate`` stops; the base may
    know others only."""
    for name in templates_of(template, records):
        add_ends(generation, name, tokenizer)
    tokenizer.chat_template = jinja_of(template)


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
    """Raises `ConfigError` if a sample is longer than the decoder has positions (`beyond_positions`)."""
    reason = beyond_positions(config, text_config, np.asarray(dataset.lengths()), dataset.records)
    if reason is not None:
        raise ConfigError(f"{config.file}: {reason}")


def beyond_positions(
    config: Config, text_config: Any, lengths: np.ndarray, records: Sequence[Record] | Records
) -> str | None:
    """Why ``records`` of these ``lengths`` (N,) are too long for the decoder, which dropping does not help: its first
    layers have all tokens. None where they are not, or ``model.beyond_positions`` allows it, which is then said."""
    limit = positions_of(text_config)
    if limit is None or not len(lengths) or lengths.max() <= limit:
        return None
    longest = records[int(lengths.argmax())]
    line = (
        f"{int((lengths > limit).sum()):,} of {len(lengths):,} records are longer than "
        f"the {limit:,} positions of the decoder, the longest, {longest.origin} (id {longest.id}), has "
        f"{int(lengths.max()):,} tokens"
    )
    if config.model.beyond_positions == "allow":
        log.warning("%s: %s: model.beyond_positions allows it", config.name, line)
        return None
    return (
        f"data.max_length: {line}: data.max_length={limit} cuts what can be cut, data.on_invalid=skip leaves the rest "
        "out; or scale the rotary embeddings (rope_parameters in the decoder's config.json), or "
        "model.beyond_positions=allow"
    )


def warn_of_rates(config: Config, rates: Mapping[str, float]) -> None:
    """Says that every learning rate is 0, which somebody has given: the loss will be the same from the first step to
    the last. ``rates``: of every part of the model."""
    trained = list(config.model.trainable)
    if not any(rates[part] for part in trained):
        log.warning("%s: train.learning_rate is 0 for all of %s: nothing will learn", config.name, trained)
