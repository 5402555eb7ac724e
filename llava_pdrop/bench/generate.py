"""Answers, timed as a user waits for them: the first token, every token behind it, and what the cache holds.

Hugging Face's ``generate``, vanilla and with a schedule attached, run by run in turns. The tokens are timed as they
come out of it (a streamer, which on CUDA reads each of them, as whoever shows them must). What the hooks of `attach`
cost is measured apart: steps of one token, with hooks and without, on caches of the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from llava_pdrop.bench.prefill import GREEDY, in_turns, timing
from llava_pdrop.bench.subjects import Given, Subject, without_drops
from llava_pdrop.generate.cache import cache_bytes
from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.generate.unhook import bare, plugin_of
from llava_pdrop.runtime.clock import Mark, Span, Stopwatch, no_garbage_collection
from llava_pdrop.schedule import Schedule

DROPPING = "PyramidDrop"
"""The name of the schedule in tables; the other method is ``vanilla``."""

OVERHEAD_STEPS = 60
"""Steps of one token with the hooks, and as many without them."""

COLD_STEPS = 4
"""Of each, not counted."""


class TokenClock(BaseStreamer):
    """Notes when ``generate`` hands out the tokens of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Mark] = []

    def put(self, value: Tensor) -> None:
        """Takes the prompt, then the tokens (B,) of every step."""
        self.marks.append(Mark.now(self.device))

    def end(self) -> None:
        """Nothing is held back."""


@dataclass(frozen=True)
class Answer:
    """One ``generate`` of a batch.

    Attributes:
        first: from the call to the first token of every row; pictures that come encoded are encoded in it.
        prefill, ranking: of the first forward, and of this the ranking. (Its tower is in it only where pictures do not
            come encoded.)
        steps: every later token of every row, one span a step.
        tower: of `first`, where pictures come encoded.
        cache_bytes: of keys and values at the end. ``peak_bytes``: most memory of the device (None on a CPU).
    """

    first: Span
    prefill: Span
    ranking: Span
    steps: list[Span]
    tower: Span | None
    cache_bytes: int
    peak_bytes: int | None

    @property
    def whole(self) -> Span:
        """From the call to the last token."""
        return sum(self.steps, self.first)


@dataclass(frozen=True)
class HookCost:
    """Steps of one token: without hooks, and on a cache of the same length with those of a schedule at ratio 1.0."""

    plain: list[Span]
    attached: list[Span]


def answer(hf: Any, given: Given, schedule: Schedule, new_tokens: int, device: torch.device) -> Answer:
    """One `timing`, with the tower where pictures come encoded."""
    watch, clock = Stopwatch(device), TokenClock(device)
    with timing(hf, schedule, given.inputs(hf), watch) as inputs:
        if given.tower is not None:
            with watch.region("tower"):
                given.tower()
        begun = Mark.now(device)
        output = hf.generate(**inputs, **GREEDY, max_new_tokens=new_tokens, streamer=clock)
    found = watch.read(("prefill", "ranking", "decode"))
    written = clock.marks[1:]  # before these, the prompt
    first, tower = begun.until(written[0].reached()), found.get("tower")
    return Answer(
        first if tower is None else first + tower,
        found["prefill"],
        found["ranking"],
        [before.until(after.reached()) for before, after in zip(written, written[1:])],
        tower,
        cache_bytes(output.past_key_values),
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def measure_answers(
    subject: Subject, given: Given, new_tokens: int, runs: int, device: torch.device
) -> dict[str, list[Answer]]:
    """The counted answers of vanilla and of the subject's schedule, in turns; a method that does not fit into memory is
    left out."""
    methods = {"vanilla": Schedule(), DROPPING: subject.schedule}
    return in_turns(methods, runs, lambda schedule: answer(subject.hf, given, schedule, new_tokens, device))


def hook_cost(subject: Subject, given: Given, device: torch.device, steps: int = OVERHEAD_STEPS) -> HookCost | None:
    """What the hooks take of a step: the same token on caches of the same tokens, with them and without, step by step
    in turns. The model without them is a twin with the same weights. None where memory does not suffice for both
    caches."""
    attached = subject.hf
    attach(attached, without_drops(subject.schedule))
    try:
        plain = bare(attached, plugin_of(attached))
        models = {"plain": plain, "attached": attached}
        prefilled = {name: _prefilled(model, given) for name, model in models.items()}
        found: dict[str, list[Span]] = {name: [] for name in models}
        with no_garbage_collection():
            for step in range(COLD_STEPS + steps):
                for name in list(models)[:: 1 if step % 2 else -1]:
                    found[name].append(_step(models[name], *prefilled[name], device))
    except torch.OutOfMemoryError:
        return None
    finally:
        detach(attached)
    return HookCost(**{name: spans[COLD_STEPS:] for name, spans in found.items()})


@torch.inference_mode()
def _prefilled(model: Any, given: Given) -> tuple[Any, Tensor]:
    """The cache that one new token leaves, and the last token of the prompt (B, 1)."""
    with given.inputs(model) as inputs:
        output = model.generate(**inputs, **GREEDY, max_new_tokens=1)
    return output.past_key_values, inputs["input_ids"][:, -1:]


@torch.inference_mode()
def _step(model: nn.Module, cache: Any, token: Tensor, device: torch.device) -> Span:
    """One token for every row, (B, 1), as ``generate`` feeds it: without a mask, since nothing is padded."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = Mark.now(device)
    model(input_ids=token, past_key_values=cache, use_cache=True)
    return begun.until(Mark.now(device).reached())


def paired(cost: HookCost) -> Sequence[float]:
    """The time of every step with hooks less that of the step without them beside it, in seconds."""
    return [with_.cost - without.cost for with_, without in zip(cost.attached, cost.plain)]
