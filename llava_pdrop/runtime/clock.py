"""Clocks: where the time of a step goes, in training (`StepClock`) and in the benches (`Recorder`, `Mark`).

Nothing of this is in the model: `instrumented` puts marks around its functions for as long as a bench runs, and takes
them away again.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_pdrop.model import decoder, vlm
from llava_pdrop.model.vlm import PyramidLlava

REGIONS = ("step", "forward", "tower", "decoder", "ranking", "head", "backward", "tower_backward", "optimizer")
"""What is measured. ``step`` is forward, backward and optimizer; tower, decoder and head lie in the forward, ranking
(with the dropping) in the decoder, and the tower's backward, from the gradient of its features on, in the backward."""

STAGE = "stage"
"""Regions ``stage 0``, ``stage 1``, ...: the forward of the decoder layers between two drops, ranking not in it."""

PIECES = ("tower", "embedding", "decoder", "ranking", "head", "backward", "tower_backward", "optimizer")
"""A step in pieces that do not overlap, see `parts_of`."""


@dataclass(frozen=True)
class Seconds:
    """``cpu`` is the time all cores of this process were busy; 0 on CUDA, where ``wall`` comes from events."""

    wall: float
    cpu: float


class Recorder:
    """Marks the beginnings and ends of regions. On CUDA a mark is an event: marking waits for nothing, `read` does."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open: dict[str, Any] = {}
        self._closed: list[tuple[str, Any, Any]] = []

    def clear(self) -> None:
        """Forgets everything, open regions too."""
        self._open.clear()
        self._closed.clear()

    def start(self, name: str) -> None:
        """Opens a region."""
        self._open[name] = self._mark()

    def stop(self, name: str) -> None:
        """Closes a region; one that is not open is left alone, so that a hook may close what may have been opened."""
        began = self._open.pop(name, None)
        if began is not None:
            self._closed.append((name, began, self._mark()))

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Times what is done in it."""
        self.start(name)
        yield
        self.stop(name)

    def read(self) -> dict[str, Seconds]:
        """Seconds of every region of `REGIONS`, and of every `STAGE` there was; several visits are added up. Waits for
        the device once."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total = {name: Seconds(0.0, 0.0) for name in REGIONS}
        for name, began, ended in self._closed:
            if self.device.type == "cuda":
                wall, cpu = began.elapsed_time(ended) / 1000, 0.0
            else:
                wall, cpu = ended[0] - began[0], ended[1] - began[1]
            before = total.get(name, Seconds(0.0, 0.0))
            total[name] = Seconds(before.wall + wall, before.cpu + cpu)
        return total

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter(), time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


@contextmanager
def instrumented(model: PyramidLlava, recorder: Recorder) -> Iterator[None]:
    """Marks tower, decoder, its stages and ranking of every forward of ``model``, and the tower's backward.

    The ranking begins with the scores and ends where the next layer is entered: selecting the survivors, their position
    ids and their rotary embeddings are in it. The gradient of that selection is in the backward.
    """

    def enter_projector(module: Any, inputs: tuple[Tensor, ...]) -> None:
        recorder.stop("tower")
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: recorder.start("tower_backward"))

    def enter_layer(index: int) -> Callable[..., None]:
        def enter(module: Any, inputs: Any) -> None:
            recorder.stop("ranking")
            if index == 0 or index in model.schedule.layers:
                recorder.start(f"{STAGE} {sum(index >= layer for layer in model.schedule.layers)}")

        return enter

    def leave_layer(index: int) -> Callable[..., None]:
        def leave(module: Any, inputs: Any, output: Any) -> None:
            if index + 1 in (*model.schedule.layers, len(hf.language_model.layers)):
                recorder.stop(f"{STAGE} {sum(index >= layer for layer in model.schedule.layers)}")

        return leave

    hf = model.hf.model
    with ExitStack() as undo:
        undo.enter_context(replaced(vlm, "image_features", _opening(recorder, "tower", vlm.image_features)))
        undo.enter_context(replaced(vlm, "run_decoder", timed(recorder, "decoder", vlm.run_decoder)))
        undo.enter_context(replaced(decoder, "_rank", _opening(recorder, "ranking", decoder._rank)))
        undo.callback(hf.multi_modal_projector.register_forward_pre_hook(enter_projector).remove)
        for index, layer in enumerate(hf.language_model.layers):
            undo.callback(layer.register_forward_pre_hook(enter_layer(index)).remove)
            undo.callback(layer.register_forward_hook(leave_layer(index)).remove)
        yield


def parts_of(times: dict[str, float]) -> dict[str, float]:
    """The regions of one step as pieces that do not overlap and add up to the step. ``embedding`` is the plan of the
    stream, the text embeddings, the projector and the merge; ``decoder`` its layers and last norm."""
    parts = {
        "tower": times["tower"],
        "embedding": times["forward"] - times["tower"] - times["decoder"] - times["head"],
        "decoder": times["decoder"] - times["ranking"],
        "ranking": times["ranking"],
        "head": times["head"],
        "backward": times["backward"] - times["tower_backward"],
        "tower_backward": times["tower_backward"],
        "optimizer": times["optimizer"],
    }
    return {name: parts[name] for name in PIECES}


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


def _opening(recorder: Recorder, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, opening a region that a hook closes."""

    def opened(*args: Any, **kwargs: Any) -> Any:
        recorder.start(name)
        return function(*args, **kwargs)

    return opened


def timed(recorder: Recorder, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as a region of its own."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with recorder.region(name):
            return function(*args, **kwargs)

    return wrapped


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


# Where the time of a training step goes, measured in every step by hooks on modules: on CUDA with events, so that
# nothing waits for the device before the log line is written.

TIME_PARTS = ("tower", "decoder", "ranking", "other_forward", "backward", "optimizer")
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
        decoder = model.hf.model.language_model
        tower = model.hf.model.vision_tower
        tower = getattr(tower, "vision_model", tower)  # transformers before and since it took the inner module away
        tower.embeddings.register_forward_pre_hook(lambda *_: self._start("tower"))
        model.hf.model.multi_modal_projector.register_forward_pre_hook(lambda *_: self._stop("tower"))
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
        """Seconds of the `TIME_PARTS` that were measured; call it where the device is waited for anyway."""
        seconds: dict[str, float] = defaultdict(float)
        if self._closed and self.device.type == "cuda":
            self._closed[-1][2].synchronize()
        for name, began, ended in self._closed:
            seconds[name] += began.elapsed_time(ended) / 1000 if self.device.type == "cuda" else ended - began
        self._closed.clear()
        if "forward" in seconds:
            seconds["other_forward"] = seconds["forward"] - seconds["tower"] - seconds["decoder"]
            seconds["decoder"] -= seconds["ranking"]
        return {part: seconds[part] for part in TIME_PARTS if part in seconds}

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
