"""Hugging Face's ``generate``, timed: prefill and decoding, vanilla and with a schedule attached.

What is measured is what a user gets: the Hugging Face model, `attach`, greedy ``generate`` with its default cache. The
pictures go through tower and projector before the clock starts, and that is timed apart; so every number of image
tokens can be measured on every shape. Methods take turns run by run, so that a machine that slows down slows down all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from llava_pdrop.bench.subjects import Given, PrefillCase, Prompt, Subject
from llava_pdrop.generate.cache import cache_bytes
from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.generate.prefill import Prefill
from llava_pdrop.runtime.clock import Span, Stopwatch, replaced, timed
from llava_pdrop.runtime.device import release_memory
from llava_pdrop.schedule import Schedule

WARM_UP = 2
"""Runs of every method that are not counted: kernels are chosen and memory is reserved in them."""

FASTV = Schedule((2,), (0.5,), "fastv")
"""FastV as its paper has it (arXiv 2403.06764): after layer K=2 the R=50% least attended image tokens go."""

GREEDY = {"do_sample": False, "return_dict_in_generate": True}
"""How every ``generate`` is called."""

Run = TypeVar("Run")


@dataclass(frozen=True)
class PrefillRun:
    """One ``generate``: time until the first logits, of which ranking; time from there to the end of the answer.

    ``answers`` are the new tokens (B, new) as lists; ``cache_bytes`` what the cache holds at the end, ``peak_bytes``
    the most memory the device had allocated (None on a CPU).
    """

    prefill: Span
    ranking: Span
    decode: Span
    answers: list[list[int]]
    cache_bytes: int
    peak_bytes: int | None


@contextmanager
def timing(
    hf: nn.Module, schedule: Schedule, given: AbstractContextManager[dict[str, Any]], watch: Stopwatch
) -> Iterator[dict[str, Any]]:
    """One ``generate`` of what is ``given``, with ``schedule`` attached (an empty one: the plain Hugging Face model),
    which leaves the model as it was. ``prefill`` is its first forward, ``ranking`` every ranking (`Prefill.rank`, which
    no hook sees), and ``decode`` all behind that forward."""

    def begin(*_: Any) -> None:
        entering.remove()
        watch.start("prefill")

    def end(*_: Any) -> None:
        leaving.remove()
        watch.stop("prefill")
        watch.start("decode")

    if schedule.layers:
        attach(hf, schedule)
    entering, leaving = hf.register_forward_pre_hook(begin), hf.register_forward_hook(end)
    try:
        with entering, leaving, replaced(Prefill, "rank", timed(watch, "ranking", Prefill.rank)), given as inputs:
            if watch.device.type == "cuda":
                torch.cuda.synchronize(watch.device)
                torch.cuda.reset_peak_memory_stats(watch.device)
            yield inputs
            watch.stop("decode")
    finally:
        detach(hf)


def in_turns(methods: Mapping[str, Schedule], runs: int, measure: Callable[[Schedule], Run]) -> dict[str, list[Run]]:
    """What ``measure`` finds of every method, ``runs`` times in turns, after `WARM_UP` times that are not counted. A
    method that does not fit into memory is left out."""
    taken: dict[str, list[Run]] = {method: [] for method in methods}
    for _ in range(WARM_UP + runs):
        for method in list(taken):
            try:
                taken[method].append(measure(methods[method]))
            except torch.OutOfMemoryError:
                del taken[method]
            if method not in taken:
                release_memory()  # not in the handler: the error still holds the tensors of its frames there
    return {method: found[WARM_UP:] for method, found in taken.items()}


def measure_prefill(
    subject: Subject, methods: Mapping[str, Schedule], case: PrefillCase, runs: int, device: torch.device
) -> tuple[list[Span], dict[str, list[PrefillRun]]]:
    """Times of the tower of a shape, and the counted runs of every method that fits into memory."""
    watch, tower = Stopwatch(device), list[Span]()
    try:
        given = subject.give(case.batch, case.image_tokens)
        assert given.tower is not None, "the pictures of a shape come encoded"
        for _ in range(WARM_UP + runs):
            with watch.region("tower"):
                given.tower()
            tower.append(watch.read()["tower"])
    except torch.OutOfMemoryError:
        return [], {}

    def measure(schedule: Schedule) -> PrefillRun:
        return generate(subject.hf, given, schedule, case.new_tokens, device)

    return tower[WARM_UP:], in_turns(methods, runs, measure)


def generate(
    hf: nn.Module, given: Given | Prompt, schedule: Schedule, new_tokens: int, device: torch.device
) -> PrefillRun:
    """One `timing`."""
    watch = Stopwatch(device)
    with timing(hf, schedule, given.inputs(hf), watch) as inputs:
        output = hf.generate(**inputs, **GREEDY, max_new_tokens=new_tokens)
    return PrefillRun(
        **watch.read(("prefill", "ranking", "decode")),
        answers=output.sequences[:, inputs["input_ids"].shape[1] :].tolist(),
        cache_bytes=cache_bytes(output.past_key_values),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )
