"""Hugging Face's ``generate``, timed: prefill and decoding, vanilla and with a schedule attached.

What is measured is what a user gets: the Hugging Face model, `attach`, greedy ``generate`` with its default cache. The
pictures go through tower and projector before the clock starts, and that is timed apart; so every number of image
tokens can be measured on every shape. Methods take turns run by run, so that a machine that slows down slows down all.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llava_pdrop.bench.inference_prompt import Prompt
from llava_pdrop.bench.inference_report import TIMES, Case, entry
from llava_pdrop.bench.report import environment
from llava_pdrop.bench.shapes import Shape, make_model
from llava_pdrop.model.cache import cache_bytes
from llava_pdrop.model.hardware import peak_flops
from llava_pdrop.model.plugin import attach, detach
from llava_pdrop.model.prefill import Prefill
from llava_pdrop.model.schedule import Schedule

WARM_UP = 2
"""Runs of every method that are not counted: kernels are chosen and memory is reserved in them."""

TEXT_TOKENS = (35, 25)
"""Text tokens before and after the picture: LLaVA's system prompt, and a short question with its marks."""

FASTV = Schedule((2,), (0.5,), "fastv")
"""FastV as its paper has it (arXiv 2403.06764): after layer K=2 the R=50% least attended image tokens go."""


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


@dataclass(frozen=True)
class Run:
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


@dataclass
class Watch:
    """Marks of one ``generate``: start and end of its first forward, and of every ranking."""

    device: torch.device
    prefill: list[Mark] = field(default_factory=list)
    rankings: list[tuple[Mark, Mark]] = field(default_factory=list)

    @contextmanager
    def watching(self, host: nn.Module) -> Iterator[None]:
        """Takes the marks while it is open."""
        rank = Prefill.rank

        def timed_rank(*args: Any) -> Tensor:
            start = Mark.now(self.device)
            index_K = rank(*args)
            self.rankings.append((start, Mark.now(self.device)))
            return index_K

        def mark_first(*_: Any) -> None:
            if len(self.prefill) < 2:
                self.prefill.append(Mark.now(self.device))

        hooks = [host.register_forward_pre_hook(mark_first), host.register_forward_hook(mark_first)]
        Prefill.rank = timed_rank  # type: ignore[method-assign]
        try:
            yield
        finally:
            Prefill.rank = rank  # type: ignore[method-assign]
            for hook in hooks:
                hook.remove()


def bench_prefill(
    name: str,
    shape: Shape,
    device: torch.device,
    batches: Sequence[int],
    image_tokens: Sequence[int],
    new_tokens: int = 32,
    runs: int = 10,
    seed: int = 0,
    attention: str = "sdpa",
) -> dict[str, Any]:
    """Measures every batch size with every number of image tokens, vanilla, PyramidDrop (unless the shape's schedule is
    empty) and FastV.

    Args:
        attention: ``attn_implementation`` of the Hugging Face model.

    Returns:
        ``environment``, ``settings`` and ``results``, one entry per case and method (see `inference_report.entry`).

    Raises:
        ValueError: an attention implementation that is not there.
    """
    dtype = torch.bfloat16 if shape.half and device.type == "cuda" else torch.float32
    host = make_model(shape, device, dtype, seed=seed).host.eval()
    try:
        host.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        raise ValueError(f"--attention {attention!r} does not work here: {error}") from error
    host.generation_config.eos_token_id = None  # every answer has the same length
    host.generation_config.pad_token_id = 0
    dropping = {"PyramidDrop": shape.schedule} if shape.schedule.layers else {}
    methods = {"vanilla": Schedule(), **dropping, "FastV": FASTV}
    cases = [Case(batch, tokens, TEXT_TOKENS, new_tokens) for tokens in image_tokens for batch in batches]
    peak, peak_source = peak_flops(device, dtype)
    results: list[dict[str, Any]] = []
    for case in tqdm(cases, desc=f"prefill {name}", unit="case", leave=False):
        tower, counted = measure(host, case, methods, shape, runs, seed, device)
        for method, schedule in methods.items():
            taken, vanilla = counted.get(method), counted.get("vanilla")
            results.append(
                entry(host.config, case, method, schedule, shape.geometry, dtype, peak, tower, taken, vanilla)
            )
    settings = {
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "runs": runs,
        "warm_up": WARM_UP,
        "new_tokens": new_tokens,
        "text_tokens": list(TEXT_TOKENS),
        "weights_bytes": sum(parameter.nbytes for parameter in host.parameters()),
        "peak_flops": peak,
        "peak_flops_source": peak_source,
        "timer": "CUDA events" if device.type == "cuda" else "wall clock; speed-ups by CPU time",
        "times": TIMES[device.type],
        "schedules": {method: schedule.to_dict() for method, schedule in methods.items()},
    }
    return {"environment": environment(device, seed), "settings": settings, "results": results}


def measure(
    host: nn.Module,
    case: Case,
    methods: dict[str, Schedule],
    shape: Shape,
    runs: int,
    seed: int,
    device: torch.device,
) -> tuple[list[Span], dict[str, list[Run]]]:
    """Times of the tower, and the counted runs of every method that fits into memory."""
    tower: list[Span] = []
    counted: dict[str, list[Run]] = {method: [] for method in methods}
    tiles = -(-case.image_tokens // shape.geometry.patches)
    side = shape.geometry.tile
    try:
        pixels = torch.randn(case.batch * tiles, 3, side, side, device=device)
        for turn in range(WARM_UP + runs):
            start = Mark.now(device)
            prompt = Prompt.make(host, case, pixels, seed)
            stop = Mark.now(device)
            _synchronize(device)
            if turn >= WARM_UP:
                tower.append(start.until(stop))
    except torch.OutOfMemoryError:
        return [], {}
    for turn in range(WARM_UP + runs):
        for method in list(counted):
            try:
                run = generate(host, prompt, methods[method], case.new_tokens, device)
            except torch.OutOfMemoryError:
                del counted[method]
            else:
                if turn >= WARM_UP:
                    counted[method].append(run)
            if method not in counted:
                _free(device)  # not in the handler: the error still holds the tensors of its frames there
    return tower, counted


def generate(host: nn.Module, prompt: Prompt, schedule: Schedule, new_tokens: int, device: torch.device) -> Run:
    """One timed ``generate``; the host is left as it was. An empty schedule is the plain Hugging Face model."""
    watch = Watch(device)
    if schedule.layers:
        attach(host, schedule)
    try:
        with watch.watching(host), prompt.inputs(host) as inputs:
            _synchronize(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            output = host.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True)
            end = Mark.now(device)
            _synchronize(device)
    finally:
        detach(host)
    start, first = watch.prefill
    rankings = [begin.until(stop) for begin, stop in watch.rankings]
    return Run(
        prefill=start.until(first),
        ranking=Span(
            sum(span.seconds for span in rankings),
            None if start.event else sum(span.cost for span in rankings),
        ),
        decode=first.until(end),
        answers=output.sequences[:, prompt.input_ids.shape[1] :].tolist(),
        cache_bytes=cache_bytes(output.past_key_values),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
