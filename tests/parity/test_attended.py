"""Weights recorded over a finished answer are those that eager attention had while it was written, in every family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationMixin

from llava_pdrop.errors import UserError
from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.generate.prefill import ForwardStep
from llava_pdrop.schedule import Schedule
from llava_pdrop.study.attended import AnswerAttention, recorded
from tests.families import FAMILIES, SPECIAL, collate, make_row
from tests.messages import says
from tests.parity.test_families import ALL, NEW, fresh, model_of, pieces_of, schedule_of


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Attention that returns its weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def written(model: Any, inputs: dict[str, Tensor], schedule: Schedule) -> tuple[list[int], list[Tensor], ForwardStep]:
    """The answer, and of every layer the weights (tokens of the answer, what is left of the prompt) that wrote it."""
    trace = list[ForwardStep]()
    with eager(model):
        attach(model, schedule, trace)
        output = model.generate(
            **fresh(model, inputs), max_new_tokens=NEW, do_sample=False, suppress_tokens=SPECIAL,
            return_dict_in_generate=True, output_attentions=True,
        )  # fmt: skip
        detach(model)
    ids = output.sequences[0, -NEW:].tolist()
    layers = []
    for layer in range(len(output.attentions[0])):
        steps = [step[layer][0].float().mean(0)[-1] for step in output.attentions]
        prompt = len(steps[0])  # a sliding cache then holds the last tokens only
        whole = [functional.pad(step, (prompt + number - len(step), 0)) for number, step in enumerate(steps)]
        layers.append(torch.stack([step[:prompt] for step in whole]))
    return ids, layers, trace[0]


def compare(found: AnswerAttention, layers: list[Tensor], step: ForwardStep, schedule: Schedule, places: Any) -> None:
    for layer, weight_QK in enumerate(layers):
        drops = schedule.stage(layer)
        stream = step.survivors[drops - 1] if drops else list(range(weight_QK.shape[1]))
        columns = [column for column, place in enumerate(stream) if place in places]
        alive = [places.index(stream[column]) for column in columns]
        assert found.alive_LN[layer].nonzero()[:, 0].tolist() == alive
        torch.testing.assert_close(found.weight_QLN[:, layer, alive], weight_QK[:, columns], atol=2e-5, rtol=0)
        gone = [number for number in range(len(places)) if number not in alive]
        assert not found.weight_QLN[:, layer, gone].any(), "dropped tokens have no weight"


@pytest.mark.parametrize("drops", [True, False], ids=["dropping", "vanilla"])
@pytest.mark.parametrize(("name", "decoder"), ALL)
def test_weights_are_those_with_which_the_answer_was_written(name: str, decoder: str, drops: bool) -> None:
    model = model_of(name, decoder)
    row = make_row(FAMILIES[name], model, *pieces_of(name, "one"))
    inputs = collate(FAMILIES[name], row)
    schedule = schedule_of(name) if drops else Schedule()
    ids, layers, step = written(model, inputs, schedule)
    if name == "paligemma" and "_update_model_kwargs_for_generation" not in vars(type(model)):  # older ones
        with pytest.raises(UserError, match=says("no attention is shown", "before it is written")):
            recorded(model, fresh(model, inputs), ids, schedule, suppress_tokens=SPECIAL)
        return
    found = recorded(model, fresh(model, inputs), ids, schedule, suppress_tokens=SPECIAL)
    assert len(layers) == found.weight_QLN.shape[1] and found.weight_QLN.shape[0] == NEW
    compare(found, layers, step, schedule, row.pictures[0])


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_what_the_model_would_not_write_is_refused(name: str) -> None:
    model = model_of(name)
    inputs = collate(FAMILIES[name], make_row(FAMILIES[name], model, *pieces_of(name, "one")))
    ids, _, _ = written(model, inputs, schedule_of(name))
    with pytest.raises(UserError, match=says("no attention is shown", "given at once")):
        recorded(model, fresh(model, inputs), [*ids[:-1], (ids[-1] + 1) % 50], schedule_of(name))


def test_a_mask_that_looks_ahead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """PaliGemma's, where an answer is not told from the prompt."""
    model = model_of("paligemma")
    inputs = collate(FAMILIES["paligemma"], make_row(FAMILIES["paligemma"], model, *pieces_of("paligemma", "one")))
    ids, _, _ = written(model, inputs, schedule_of("paligemma"))
    generic = GenerationMixin._update_model_kwargs_for_generation
    monkeypatch.setattr(type(model), "_update_model_kwargs_for_generation", generic)
    with pytest.raises(UserError, match=says("no attention is shown", "before it is written")):
        recorded(model, fresh(model, inputs), ids, schedule_of("paligemma"), suppress_tokens=SPECIAL)


@pytest.mark.parametrize("schedule", [
    Schedule((2, 4), (0.5, 0.25), inject=2), Schedule((3,), (0.5,), downsample=4), Schedule(downsample=4),
    Schedule((0, 3), (0.5, 0.0)),
], ids=["inject", "pool and drop", "pool", "from layer 0 to none"])  # fmt: skip
def test_weights_under_other_schedules(schedule: Schedule) -> None:
    """Every layer's image tokens are those that `ForwardStep` names, and weights are those of eager attention."""
    model = model_of("llava")
    row = make_row(FAMILIES["llava"], model, *pieces_of("llava", "one"))
    inputs = collate(FAMILIES["llava"], row)
    ids, layers, step = written(model, inputs, schedule)
    found = recorded(model, fresh(model, inputs), ids, schedule, suppress_tokens=SPECIAL)
    entering, text = step.entering()[0], inputs["input_ids"].shape[1] - len(row.pictures[0])
    for layer, weight_QK in enumerate(layers):
        drops = schedule.stage(layer)
        alive = [] if layer < schedule.inject else step.kept(drops - 1)[0] if drops else entering
        assert found.alive_LN[layer].nonzero()[:, 0].tolist() == alive and weight_QK.shape[1] == text + len(alive)
        first = row.pictures[0][0]
        torch.testing.assert_close(
            found.weight_QLN[:, layer, alive], weight_QK[:, first : first + len(alive)], atol=2e-5, rtol=0
        )
