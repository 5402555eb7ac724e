"""Rows that join and leave at any step are decoded as each of them alone, whatever was dropped from them."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_pdrop.generate.cache import cached_tokens
from llava_pdrop.generate.families import ATTACHABLE
from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.model.attention import is_older
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve.batch import ROOM, RowBatch, why_alone
from tests.families import FAMILIES, collate, make_row

NEW = 6
SCHEDULES = {
    "vanilla": Schedule(),
    "dropping": Schedule((2, 3, 5), (0.55, 0.3, 0.13)),
    "keep": Schedule((2, 3, 5), (0.55, 0.3, 0.13), positions="keep"),
    "from the start": Schedule((1,), (0.25,)),
    "to numbers": Schedule((1, 4), keep=(9, 3)),
    "late": Schedule((3, 5), (0.5, 0.2), inject=2),
    "merged": Schedule((2, 4), (0.5, 0.2), merge="nearest"),
}
TABLE = {name: ATTACHABLE["llava" if name == "pixtral" else name] for name in FAMILIES}
NAMES = [name for name, family in TABLE.items() if not is_older(family.since)]
JOINED = [name for name in NAMES if TABLE[name].positions == "renumber" and TABLE[name].causal and name != "aria"]


@functools.cache
def model_of(name: str, decoder: str | None = None) -> Any:
    return FAMILIES[name].make(decoder)


def prompts_of(name: str, model: Any) -> list[dict[str, Tensor]]:
    """Prompts of different lengths: pictures of all sizes, two of them, none."""
    small, large = FAMILIES[name].sizes[0], FAMILIES[name].sizes[-1]
    pieces = [(1, small, 4), (2, large, 3), (6,), (small, 2, large, 5), (1, large, 9), (small, 1)]
    return [collate(FAMILIES[name], make_row(FAMILIES[name], model, *row, seed=n)) for n, row in enumerate(pieces)]


def prefilled(model: Any, inputs: dict[str, Tensor]) -> tuple[Any, Tensor]:
    output = model(**inputs, use_cache=True)
    return output.past_key_values, output.logits[0, -1]


def alone(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits (NEW, vocabulary) of a greedy answer, by ``generate``."""
    output = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    return torch.cat(output.logits)


def together(model: Any, prompts: list[dict[str, Tensor]], starts: list[int]) -> list[Tensor]:
    """The same of all ``prompts``, row r joining before step ``starts[r]`` and leaving with its last token."""
    batch, rows, logits = RowBatch(model), list[int](), [list[Tensor]() for _ in prompts]
    for step in range(max(starts) + NEW):
        for row, inputs in enumerate(prompts):
            if starts[row] == step:
                cache, first = prefilled(model, inputs)
                batch.join(cache, inputs["input_ids"].shape[1])
                rows.append(row)
                logits[row].append(first)
        if rows:
            for row, own in zip(rows, batch.step([int(logits[row][-1].argmax()) for row in rows])):
                logits[row].append(own)
        ended = [place for place, row in enumerate(rows) if len(logits[row]) == NEW]
        if ended:
            batch.leave(ended)
            rows = [row for row in rows if len(logits[row]) < NEW]
    assert not rows and not batch.rows
    return [torch.stack(own) for own in logits]


def check(name: str, schedule: Schedule, starts: list[int], decoder: str | None = None) -> None:
    model = model_of(name, decoder)
    prompts = prompts_of(name, model)
    attach(model, schedule)
    try:
        with torch.inference_mode():
            expected = [alone(model, inputs) for inputs in prompts]
            got = together(model, prompts, starts)
    finally:
        detach(model)
    for own, wanted in zip(got, expected):
        assert own.argmax(-1).tolist() == wanted.argmax(-1).tolist()
        assert (own - wanted).abs().max() <= 1e-4


def starts_of(seed: int) -> list[int]:
    return [random.Random(seed * 10 + row).randrange(NEW + 2) for row in range(6)]


@pytest.mark.parametrize("name", NAMES)
def test_which_families_are_joined(name: str) -> None:
    assert (why_alone(model_of(name)) is None) == (name in JOINED)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("seed", range(2))
def test_a_joined_row_has_the_logits_of_the_row_alone(schedule: Schedule, seed: int) -> None:
    check("llava", schedule, starts_of(seed))


@pytest.mark.parametrize("starts", [[0] * 6, [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 7, 14, 21, 28, 35]])
def test_all_at_once_one_by_one_and_one_after_the_other(starts: list[int]) -> None:
    check("llava", SCHEDULES["dropping"], starts)


@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize("kind", ["dropping", "keep"])
def test_families(name: str, kind: str) -> None:
    check(name, SCHEDULES[kind], starts_of(7))


@pytest.mark.parametrize("decoder", [name for name in FAMILIES["llava"].decoders if "window" not in name])
def test_decoders(decoder: str) -> None:
    if why_alone(model_of("llava", decoder)) is None:
        check("llava", SCHEDULES["late"], starts_of(3), decoder)


def test_pooled_pictures() -> None:
    check("llava_next", Schedule((2, 4), (0.5, 0.2), downsample=2), starts_of(1))


def test_every_reason_to_stay_alone() -> None:
    assert "outside of the cache" in str(why_alone(model_of("qwen2_vl")))
    assert "own way" in str(why_alone(model_of("paligemma")))
    assert "window" in str(why_alone(model_of("llava", "mistral_window")))
    assert "not proved" in str(why_alone(model_of("llava", "gpt_oss")))
    model = FAMILIES["llava"].make()
    model.generation_config.repetition_penalty = 1.1
    assert "repetition_penalty" in str(why_alone(model))


def test_a_cache_holds_what_its_longest_row_needs() -> None:
    model = model_of("llava")
    attach(model, SCHEDULES["dropping"])
    batch = RowBatch(model)
    with torch.inference_mode():
        for inputs in prompts_of("llava", model)[3:5]:
            cache, _ = prefilled(model, inputs)
            batch.join(cache, inputs["input_ids"].shape[1])
        long, short = batch.rows
        assert cached_tokens(batch._cache) == [max(pair) for pair in zip(long.held, short.held)] != short.held
        batch.leave([0])
        assert cached_tokens(batch._cache) == short.held == batch.rows[0].held
        for _ in range(2 * ROOM):  # beyond its room
            batch.step([5])
        assert cached_tokens(batch._cache) == short.held and short.held[0] == short.whole
    detach(model)
