"""Where the time of a training step goes, measured in every step by hooks on modules: on CUDA with events, so that
nothing waits for the device before the log line is written."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

from llava_pdrop.model.vlm import PyramidLlava

PARTS = ("tower", "decoder", "ranking", "other_forward", "backward", "optimizer")
"""``ranking`` is from the end of a layer before a drop to the start of the next one. ``other_forward`` is the rest of
the forward: plan, embedding, projector, head and loss. ``backward`` includes the exchange of gradients between ranks,
and under DeepSpeed, which makes its step there, the optimizer. What a step does besides (see `StepMeter.drain`) is not
measured by a hook."""


class StepClock:
    """Adds up the seconds of every part since the last `drain`.

    Args:
        model: its tower, projector, layers and last norm get hooks; wrappers (DDP, DeepSpeed, FSDP) go around them.
    """

    def __init__(self, model: PyramidLlava, device: torch.device) -> None:
        self.device = device
        self.in_forward = False  # activation checkpointing runs layers, and their hooks, in the backward too
        self._open: dict[str, Any] = {}
        self._closed: list[tuple[str, Any, Any]] = []
        decoder = model.host.model.language_model
        tower = model.host.model.vision_tower
        tower = getattr(tower, "vision_model", tower)  # transformers before and since it took the inner module away
        tower.embeddings.register_forward_pre_hook(lambda *_: self._start("tower"))
        model.host.model.multi_modal_projector.register_forward_pre_hook(lambda *_: self._stop("tower"))
        decoder.layers[0].register_forward_pre_hook(lambda *_: self._start("decoder"))
        decoder.norm.register_forward_hook(lambda *_: self._stop("decoder"))
        for layer in model.schedule.layers:
            decoder.layers[layer - 1].register_forward_hook(lambda *_: self._start("ranking"))
            decoder.layers[layer].register_forward_pre_hook(lambda *_: self._stop("ranking"))

    def forward_begins(self) -> None:
        self.in_forward = True
        self._start("forward")

    def forward_ends(self) -> None:
        self._stop("forward")
        self.in_forward = False

    def begins(self, part: str) -> None:
        """``backward`` or ``optimizer`` begins now."""
        self._open[part] = self._mark()

    def ends(self, part: str) -> None:
        """``backward`` or ``optimizer`` ends now."""
        began = self._open.pop(part, None)
        if began is not None:
            self._closed.append((part, began, self._mark()))

    def drain(self) -> dict[str, float]:
        """Seconds of the `PARTS` that were measured; call it where the device is waited for anyway."""
        seconds: dict[str, float] = defaultdict(float)
        if self._closed and self.device.type == "cuda":
            self._closed[-1][2].synchronize()
        for name, began, ended in self._closed:
            seconds[name] += began.elapsed_time(ended) / 1000 if self.device.type == "cuda" else ended - began
        self._closed.clear()
        if "forward" in seconds:
            seconds["other_forward"] = seconds["forward"] - seconds["tower"] - seconds["decoder"]
            seconds["decoder"] -= seconds["ranking"]
        return {part: seconds[part] for part in PARTS if part in seconds}

    def _start(self, name: str) -> None:
        if self.in_forward:
            self.begins(name)

    def _stop(self, name: str) -> None:
        if self.in_forward:
            self.ends(name)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
