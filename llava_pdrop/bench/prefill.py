"""Hugging Face's ``generate``, timed: prefill and decoding, vanilla and with a schedule attached.

What is measured is what a user gets: the Hugging Face model, `attach`, greedy ``generate`` with its default cache. The
pictures go through tower and projector before the clock starts, and that is timed apart; so every number of image
tokens can be measured on every shape. Methods take turns run by run, so that a machine that slows down slows down all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_pdrop.bench.shapes import Shape, make_model
from llava_pdrop.errors import UserError
from llava_pdrop.generate.cache import cache_bytes
from llava_pdrop.generate.plugin import attach, detach, noting
from llava_pdrop.generate.prefill import Prefill
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.vision import image_features
from llava_pdrop.runtime.clock import Span, Stopwatch, replaced, timed
from llava_pdrop.runtime.device import peak_flops, release_memory
from llava_pdrop.schedule import Schedule

WARM_UP = 2
"""Runs of every method that are not counted: kernels are chosen and memory is reserved in them."""

TEXT_TOKENS = (35, 25)
"""Text tokens before and after the picture: LLaVA's system prompt, and a short question with its marks."""

FASTV = Schedule((2,), (0.5,), "fastv")
"""FastV as its paper has it (arXiv 2403.06764): after layer K=2 the R=50% least attended image tokens go."""

GREEDY = {"do_sample": False, "return_dict_in_generate": True}
"""How every ``generate`` is called."""

Run = TypeVar("Run")


@dataclass(frozen=True)
class PrefillCase:
    """One point of the bench: ``batch`` prompts with ``image_tokens`` each between `TEXT_TOKENS`, answered with
    ``new_tokens``."""

    batch: int
    image_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts of one length, with the features of their pictures: what ``generate`` is given."""

    input_ids: Tensor
    features: list[Tensor]

    @staticmethod
    def make(hf: nn.Module, case: PrefillCase, pixels: Tensor, seed: int) -> Prompt:
        """Random text around one picture per prompt, whose ``pixels`` (those of `noise`) go through the tower here."""
        image, device = hf.config.image_token_id, pixels.device
        before, after = TEXT_TOKENS
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, image, (case.batch, before + case.image_tokens + after), generator=generator)
        ids[:, before : before + case.image_tokens] = image
        with torch.inference_mode():
            features = image_features(hf, pixels).unflatten(0, (case.batch, -1))[:, : case.image_tokens]
        return Prompt(ids.to(device), list(features))

    @contextmanager
    def inputs(self, hf: nn.Module) -> Iterator[dict[str, Any]]:
        """Keyword arguments of ``generate``, for as long as it is open; `attach` and `detach` go outside of it."""
        encoded = BaseModelOutputWithPooling(pooler_output=list(self.features))
        given = {"input_ids": self.input_ids, "attention_mask": torch.ones_like(self.input_ids)}
        if "mm_encoder_outputs" in inspect.signature(hf.forward).parameters:
            yield {**given, "mm_encoder_outputs": {"image": encoded}}
            return
        # transformers 5.17 takes pixels only: it is given empty ones, and finds the features where it would make them.
        attached = vars(hf.model).get("get_image_features")  # by `attach`, which must see the features here too
        hf.model.get_image_features = noting("image", lambda *_, **__: encoded)
        try:
            yield {**given, "pixel_values": self.features[0].new_empty(len(self.features), 0)}
        finally:
            del hf.model.get_image_features
            if attached is not None:
                hf.model.get_image_features = attached


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


def noise(case: PrefillCase, geometry: ImageGeometry, device: torch.device, seed: int) -> Tensor:
    """Pixels (prompts * tiles, 3, height, width) of enough tiles for the image tokens of ``case``."""
    tiles = -(-case.image_tokens // geometry.patches)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case.batch * tiles, 3, geometry.tile, geometry.tile, generator=generator).to(device)


@contextmanager
def watched(hf: nn.Module, watch: Stopwatch) -> Iterator[None]:
    """Measures the first forward in it as ``prefill``, every ranking (`Prefill.rank`, which no hook sees) as
    ``ranking``, and opens ``decode`` behind that forward."""

    def begin(*_: Any) -> None:
        entering.remove()
        watch.start("prefill")

    def end(*_: Any) -> None:
        leaving.remove()
        watch.stop("prefill")
        watch.start("decode")

    entering, leaving = hf.register_forward_pre_hook(begin), hf.register_forward_hook(end)
    try:
        with replaced(Prefill, "rank", timed(watch, "ranking", Prefill.rank)):
            yield
    finally:
        entering.remove()
        leaving.remove()


@contextmanager
def timing(
    hf: nn.Module, schedule: Schedule, given: AbstractContextManager[dict[str, Any]], watch: Stopwatch
) -> Iterator[dict[str, Any]]:
    """One ``generate`` of what is ``given``, `watched` to its end, with ``schedule`` attached (an empty one: the plain
    Hugging Face model). The model is left as it was."""
    if schedule.layers:
        attach(hf, schedule)
    try:
        with watched(hf, watch), given as inputs:
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


def ready(hf: Any, attention: str | None) -> Any:
    """``hf`` in evaluation mode, with its answers as long as they may be.

    Raises:
        UserError: an ``attn_implementation`` that is not there.
    """
    hf = hf.eval()
    if attention is not None:
        try:
            hf.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            raise UserError(f"--attention {attention!r} does not work here: {error}") from error
    hf.generation_config.eos_token_id = None  # every answer has the same length
    hf.generation_config.pad_token_id = 0
    return hf


@dataclass(frozen=True)
class PrefillBench:
    """What all cases are measured with.

    Attributes:
        hf: the Hugging Face model, of ``shape`` and on ``device``.
        methods: by name; an empty schedule is the plain model.
        runs: counted ones of every method.
        attention: ``attn_implementation`` of the model.
        peak, peak_source: operations a second that the device can reach, and where the number is from.
    """

    hf: Any
    shape: Shape
    device: torch.device
    methods: dict[str, Schedule]
    runs: int
    seed: int
    attention: str
    peak: float
    peak_source: str

    @classmethod
    def make(
        cls, shape: Shape, device: torch.device, runs: int = 10, seed: int = 0, attention: str = "sdpa"
    ) -> PrefillBench:
        """Vanilla, PyramidDrop (unless the schedule of ``shape`` is empty) and FastV on a model with random weights.

        Raises:
            UserError: an ``attn_implementation`` that is not there.
        """
        hf = ready(make_model(shape, device, seed).hf, attention)
        if shape.schedule.downsample:
            raise UserError(
                "bench prefill encodes its pictures before the clock starts, so that pyramid_drop.downsample cannot be "
                "measured: set it to 0"
            )
        dropping = {"PyramidDrop": shape.schedule} if shape.schedule.layers else {}
        methods = {"vanilla": Schedule(), **dropping, "FastV": FASTV}
        return cls(hf, shape, device, methods, runs, seed, attention, *peak_flops(device, hf.dtype))


def measure_prefill(bench: PrefillBench, case: PrefillCase) -> tuple[list[Span], dict[str, list[PrefillRun]]]:
    """Times of the tower, and the counted runs of every method that fits into memory."""
    hf, device, watch, tower = bench.hf, bench.device, Stopwatch(bench.device), list[Span]()
    try:
        pixels = noise(case, bench.shape.geometry, device, bench.seed)
        for _ in range(WARM_UP + bench.runs):
            with watch.region("tower"):
                prompt = Prompt.make(hf, case, pixels, bench.seed)
            tower.append(watch.read()["tower"])
    except torch.OutOfMemoryError:
        return [], {}

    def measure(schedule: Schedule) -> PrefillRun:
        return generate(hf, prompt, schedule, case.new_tokens, device)

    return tower[WARM_UP:], in_turns(bench.methods, bench.runs, measure)


def generate(hf: nn.Module, prompt: Prompt, schedule: Schedule, new_tokens: int, device: torch.device) -> PrefillRun:
    """One `timing`."""
    watch = Stopwatch(device)
    with timing(hf, schedule, prompt.inputs(hf), watch) as inputs:
        output = hf.generate(**inputs, **GREEDY, max_new_tokens=new_tokens)
    return PrefillRun(
        **watch.read(("prefill", "ranking", "decode")),
        answers=output.sequences[:, prompt.input_ids.shape[1] :].tolist(),
        cache_bytes=cache_bytes(output.past_key_values),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )
