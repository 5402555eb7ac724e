"""Hugging Face's own ``generate`` with a schedule attached, and what is read from its answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.generate.prefill import ForwardStep
from llava_pdrop.schedule import Schedule


@contextmanager
def generating(
    hf: Any, schedule: Schedule, trace: list[ForwardStep] | None = None, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """``hf`` in evaluation mode with ``schedule`` attached, in the half precision ``dtype``, if any; it and the random
    numbers afterwards as before."""
    device = next(hf.parameters()).device
    half = torch.autocast(device.type, dtype, dtype is not None)  # refused where the device has no such precision
    attach(hf, schedule, trace)
    modes = [(module, module.training) for module in hf.modules()]  # a frozen tower may be in another than the rest
    hf.eval()
    own = [device] if device.type == "cuda" else []  # looking at the random numbers of another GPU takes memory there
    try:
        with torch.random.fork_rng(own), torch.inference_mode(), half:
            yield
    finally:
        detach(hf)
        for module, training in modes:
            module.training = training


def answer_text(ids: Sequence[int], tokenizer: Any, ends: Sequence[int], stops: Sequence[str]) -> str:
    """The answer in what a model has written: up to the first token that ends one, and then up to the first text that
    does. Tokens first: a decoder leaves special ones out, and what follows them would be taken for the answer."""
    return until_stop(written_text(ids, tokenizer, ends), stops)


def written_text(ids: Sequence[int], tokenizer: Any, ends: Sequence[int]) -> str:
    """What a model has written, up to the first token that ends an answer."""
    answer = itertools.takewhile(lambda token: token not in ends, ids)
    return tokenizer.decode(list(answer), skip_special_tokens=True)


def until_stop(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of ``stops`` behind its leading white space, stripped."""
    text = text.lstrip()
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()
