"""The stopwatch: named regions of time, in training (`StepClock`) and in the benches.

A region lies between two marks. On CUDA a mark is an event in the stream: marking waits for nothing, reading does.
Nothing of this is in the model: hooks on its modules, listed in `forward_regions`, start and stop the watch.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from llava_pdrop.model.vlm import PyramidLlava

REGIONS = ("step", "forward", "tower", "decoder", "ranking", "head", "backward", "tower_backward", "optimizer")
"""What a bench measures of a training step. ``step`` is forward, backward and optimizer; tower, decoder and head lie in
the forward, ranking (with the dropping) in the decoder, and the tower's backward, from the gradient of its features on,
in the backward."""

STAGE = "stage"
"""Regions ``stage 0``, ``stage 1``, ...: the forward of the decoder layers between two drops, ranking not in it."""

TIME_PARTS = ("tower", "decoder", "ranking", "other_forward", "backward", "optimizer")
"""What is measured in every step of a training run. ``other_forward`` is the rest of the forward: plan, embedding,
projector, head and loss. ``backward`` includes the exchange of gradients between ranks, and under DeepSpeed, which
makes its step there, the optimizer. What a step does besides (see `StepMeter.drain`) is not measured by a hook."""


@dataclass(frozen=True)
class Mark:
    """A point in time: wall clock and CPU time of this process in seconds, and on CUDA an event in the stream."""

    wall: float
    cpu: float
    event: torch.cuda.Event | None

    @staticmethod
    def now(device: torch.device) -> Mark:
        event = None
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
        return Mark(time.perf_counter(), time.process_time(), event)

    def reached(self) -> Mark:
        """This mark, once the device has reached it: waits for nothing else."""
        if self.event is not None:
            self.event.synchronize()
        return self

    def until(self, later: Mark) -> Span:
        """The time between two marks. On CUDA the device must have reached the later one."""
        if self.event is None:
            return Span(later.wall - self.wall, later.cpu - self.cpu)
        return Span(self.event.elapsed_time(later.event) / 1000, None)


@dataclass(frozen=True)
class Span:
    """Seconds on the clock (CUDA: between events in the stream) and, on a CPU, of processor time over all threads."""

    seconds: float
    cpu: float | None

    @property
    def cost(self) -> float:
        """What is compared: processor time where it is known, since other processes take none of it."""
        return self.seconds if self.cpu is None else self.cpu

    def __add__(self, other: Span) -> Span:
        cpu = None if self.cpu is None or other.cpu is None else self.cpu + other.cpu
        return Span(self.seconds + other.seconds, cpu)


class Stopwatch:
    """Measures named regions, which may lie in each other and come again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open: dict[str, Mark] = {}
        self._closed: list[tuple[str, Mark, Mark]] = []

    def clear(self) -> None:
        """Forgets everything, open regions too."""
        self._open.clear()
        self._closed.clear()

    def start(self, name: str) -> None:
        """Opens a region."""
        self._open[name] = Mark.now(self.device)

    def stop(self, name: str) -> None:
        """Closes a region; one that is not open is left alone, so that a hook may close what may have been opened."""
        began = self._open.pop(name, None)
        if began is not None:
            self._closed.append((name, began, Mark.now(self.device)))

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Times what is done in it."""
        self.start(name)
        yield
        self.stop(name)

    def is_open(self, name: str) -> bool:
        """Whether a region has begun and not ended."""
        return name in self._open

    def read(self, names: Iterable[str] = ()) -> dict[str, Span]:
        """The regions closed since the last call, several visits added up; of ``names`` those too that there were none
        of. On CUDA it waits for the end of the last one."""
        total = dict.fromkeys(names, Span(0.0, None if self.device.type == "cuda" else 0.0))
        if self._closed:
            self._closed[-1][2].reached()
        for name, began, ended in self._closed:
            span = began.until(ended)
            total[name] = total[name] + span if name in total else span
        self._closed.clear()
        return total


Place = Callable[[Callable[..., None]], RemovableHandle]
"""Where a region begins or ends: `register_forward_pre_hook` or `register_forward_hook` of a module."""

Region = tuple[str, Place, Place]


def forward_regions(model: PyramidLlava) -> list[Region]:
    """Tower, decoder and ranking in a forward of ``model``, under the schedule that it has now.

    The ranking is from the end of a layer before a drop to the start of the next one: selecting the survivors, their
    position ids and their rotary embeddings are in it, and before layer 0 the merge of pictures and text. The gradient
    of that selection is in the backward.
    """
    hf = model.hf.model
    tower = getattr(hf.vision_tower, "vision_model", hf.vision_tower)  # transformers before and since it took it away
    layers, projector = hf.language_model.layers, hf.multi_modal_projector
    return [
        ("tower", tower.embeddings.register_forward_pre_hook, projector.register_forward_pre_hook),
        ("decoder", layers[0].register_forward_pre_hook, hf.language_model.norm.register_forward_hook),
        *(
            ("ranking", before.register_forward_hook, layers[drop].register_forward_pre_hook)
            for drop in model.schedule.layers
            for before in [layers[drop - 1] if drop else projector]
        ),
    ]


def bench_regions(model: PyramidLlava) -> list[Region]:
    """`forward_regions`, the head with the loss, and every stage of the decoder."""
    decoder = model.hf.model.language_model
    cuts = enumerate(pairwise([0, *model.schedule.layers, len(decoder.layers)]))
    ends = [(number, decoder.layers[first], decoder.layers[end - 1]) for number, (first, end) in cuts if first < end]
    return [
        *forward_regions(model),
        *(
            (f"{STAGE} {number}", first.register_forward_pre_hook, last.register_forward_hook)
            for number, first, last in ends
        ),
        ("head", decoder.norm.register_forward_hook, model.register_forward_hook),
    ]


def watch_forward(watch: Stopwatch, regions: Iterable[Region]) -> list[RemovableHandle]:
    """Hooks that start and stop ``regions`` while the region ``forward`` is open: activation checkpointing runs layers,
    and their hooks, in the backward too."""

    def during_forward(action: Callable[[str], None], name: str) -> Callable[..., None]:
        return lambda *_: action(name) if watch.is_open("forward") else None

    regions = list(regions)  # where one ends and another begins, the end comes first
    ends = [end(during_forward(watch.stop, name)) for name, _, end in regions]
    return ends + [begin(during_forward(watch.start, name)) for name, begin, _ in regions]


@contextmanager
def instrumented(model: PyramidLlava, watch: Stopwatch) -> Iterator[None]:
    """Measures `bench_regions` of a step of ``model``, and the tower's backward, which begins with the gradient of its
    features; whoever runs the backward stops it."""

    def enter_projector(module: Any, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: watch.start("tower_backward"))

    projector = model.hf.model.multi_modal_projector
    with ExitStack() as hooks:
        for hook in watch_forward(watch, bench_regions(model)):
            hooks.enter_context(hook)
        hooks.enter_context(projector.register_forward_pre_hook(enter_projector))
        yield


class StepClock(Stopwatch):
    """Where the time of training steps goes. Whoever runs the step measures ``forward``, ``backward`` and
    ``optimizer``, hooks the rest.

    Args:
        model: its tower, projector, layers and last norm get hooks; wrappers (DDP, DeepSpeed, FSDP) go around them.
    """

    def __init__(self, model: PyramidLlava, device: torch.device) -> None:
        super().__init__(device)
        watch_forward(self, forward_regions(model))

    def drain(self) -> dict[str, float]:
        """Seconds of the `TIME_PARTS` that were measured since the last call; call it where the device is waited for
        anyway."""
        seconds = {name: span.seconds for name, span in self.read().items()}
        if "forward" in seconds:
            tower, decoder, ranking = (seconds.get(name, 0.0) for name in ("tower", "decoder", "ranking"))
            seconds |= {"other_forward": seconds["forward"] - tower - decoder, "decoder": decoder - ranking}
        return {part: seconds[part] for part in TIME_PARTS if part in seconds}


def parts_of(times: dict[str, float]) -> dict[str, float]:
    """The regions of one step as pieces that do not overlap and add up to the step. ``embedding`` is the plan of the
    stream, the text embeddings, the projector, the merge and the first rotary embeddings; ``decoder`` its layers and
    last norm."""
    return {
        "tower": times["tower"],
        "embedding": times["forward"] - times["tower"] - times["decoder"] - times["head"],
        "decoder": times["decoder"] - times["ranking"],
        "ranking": times["ranking"],
        "head": times["head"],
        "backward": times["backward"] - times["tower_backward"],
        "tower_backward": times["tower_backward"],
        "optimizer": times["optimizer"],
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collects once, then not again until the end."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def replaced(module: Any, name: str, substitute: Callable[..., Any]) -> Iterator[None]:
    """Another function under a module's name, as long as it lasts."""
    original = getattr(module, name)
    setattr(module, name, substitute)
    try:
        yield
    finally:
        setattr(module, name, original)


def timed(watch: Stopwatch, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as a region of its own."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with watch.region(name):
            return function(*args, **kwargs)

    return wrapped
