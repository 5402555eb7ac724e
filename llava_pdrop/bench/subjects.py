"""What ``bench prefill`` and ``bench generate`` ask to answer: a shape with random weights, or the model in a directory
with its own.

Both come as a `Subject`: the model, its schedule, and what ``generate`` is given for a batch of prompts.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_pdrop.bench.shapes import Shape, make_model
from llava_pdrop.cost.nominal import full_picture, paper_tokens
from llava_pdrop.errors import UserError
from llava_pdrop.eval.evaluate import finished, respondent_in
from llava_pdrop.eval.questions import ask
from llava_pdrop.eval.respondent import LlavaRespondent
from llava_pdrop.eval.subject import subject_config
from llava_pdrop.generate.plugin import noting
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.rankers import check_rankers
from llava_pdrop.model.vision import image_features
from llava_pdrop.runtime.device import has_fast_bfloat16
from llava_pdrop.schedule import Schedule

TEXT_TOKENS = (35, 25)
"""Text tokens before and after the picture: LLaVA's system prompt, and a short question with its marks."""

QUESTION = "What does this picture show?"
"""Asked of a model with weights of its own. What it answers is of no account: every answer has the same length."""

SIDE = 672
"""Pixels of the square picture that a model is shown whose processor alone knows how it is cut."""


@dataclass(frozen=True)
class Noise:
    """A picture of noise, of ``size`` (width, height): an `ImageSource`."""

    size: tuple[int, int]
    seed: int

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        """The picture as a PNG."""
        width, height = self.size
        generator = torch.Generator().manual_seed(self.seed)
        colours = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        file = io.BytesIO()
        Image.fromarray(colours.numpy()).save(file, "PNG")
        file.seek(0)
        return file


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


def noise(case: PrefillCase, geometry: ImageGeometry, device: torch.device, seed: int) -> Tensor:
    """Pixels (prompts * tiles, 3, height, width) of enough tiles for the image tokens of ``case``."""
    tiles = -(-case.image_tokens // geometry.patches)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case.batch * tiles, 3, geometry.tile, geometry.tile, generator=generator).to(device)


@dataclass(frozen=True)
class Given:
    """A batch of prompts of one length.

    Attributes:
        inputs: keyword arguments of the ``generate`` of a model, for as long as it is open.
        image_tokens, text_tokens: of each prompt.
        tower: encodes the pictures, where ``generate`` is given their features; None: it encodes them itself.
    """

    inputs: Callable[[Any], AbstractContextManager[dict[str, Any]]]
    image_tokens: int
    text_tokens: int
    tower: Callable[[], object] | None = None


@dataclass(frozen=True)
class Subject:
    """A model whose answers are timed.

    Attributes:
        hf: the Hugging Face model, on its device.
        schedule: that stands beside vanilla (empty: none).
        give: prompts by (batch, image tokens); image tokens None: those of the subject's own picture.
        geometry: of its pictures, where operations and cache can be predicted by it (a shape); else None.
    """

    hf: Any
    schedule: Schedule
    give: Callable[[int, int | None], Given]
    geometry: ImageGeometry | None = None

    @classmethod
    def of_shape(cls, shape: Shape, device: torch.device, seed: int, attention: str) -> Subject:
        """A model of ``shape`` with random weights. Its pictures are encoded before ``generate``, so that any number of
        image tokens can be measured, and nothing that pools (`refuse_pooling`).

        Raises:
            UserError: an ``attn_implementation`` that is not there.
        """
        hf = ready(make_model(shape, device, seed).hf, attention)
        geometry = shape.geometry

        def give(batch: int, image_tokens: int | None) -> Given:
            wanted = image_tokens or paper_tokens(geometry, full_picture(geometry))
            case = PrefillCase(batch, wanted, 0)
            encode = partial(Prompt.make, hf, case, noise(case, geometry, device, seed), seed)
            return Given(encode().inputs, wanted, sum(TEXT_TOKENS), encode)

        return cls(hf, shape.schedule, give, geometry)

    @classmethod
    def of_directory(
        cls, directory: Path, overrides: list[str], device: torch.device, seed: int, attention: str | None
    ) -> Subject:
        """The model in ``directory``, asked about a picture of noise by its own template or processor.

        Raises:
            ConfigError, UserError: there is none, it cannot be opened, or its schedule is missing or does not fit.
        """
        config = subject_config(directory, overrides, asks=False)
        schedule = checked(config.schedule, str(directory))
        respondent = respondent_in(finished(config, writes=False), config)
        half = device.type == "cuda" and has_fast_bfloat16(device)
        hf = ready(respondent.hf.to(device, torch.bfloat16 if half else torch.float32), attention)
        size = full_picture(respondent.parts.geometry) if isinstance(respondent, LlavaRespondent) else (SIDE, SIDE)
        question = ask("bench", QUESTION, [Noise(size, seed)], "bench generate", "")
        prepared = respondent.prepare(question)

        def give(batch: int, image_tokens: int | None) -> Given:
            inputs, tokens = respondent.inputs([prepared] * batch, schedule)
            there = {
                name: value.to(device, hf.dtype if value.is_floating_point() else None)
                for name, value in inputs.items()
                if isinstance(value, torch.Tensor)
            }
            shown = sum(tokens[0])
            return Given(lambda model: nullcontext(there), shown, there["input_ids"].shape[1] - shown)

        return cls(hf, schedule, give)


def refuse_pooling(schedule: Schedule, bench: str) -> None:
    """Raises a `UserError` at a ``schedule`` of a shape that pools, of which ``bench`` would see nothing."""
    if schedule.downsample:
        raise UserError(
            f"{bench} encodes the pictures of a shape before the clock starts, so that pyramid_drop.downsample cannot "
            "be measured: set it to 0, or give bench generate a directory with weights"
        )


def checked(schedule: Schedule, name: str) -> Schedule:
    """``schedule``, if it can be measured beside vanilla.

    Args:
        name: what has it, for messages.

    Raises:
        UserError: it drops nothing.
    """
    if not schedule.layers:
        raise UserError(
            f"{name} has no schedule to measure beside vanilla: add one, such as "
            "pyramid_drop=configs/schedules/pyramiddrop.yaml"
        )
    check_rankers(schedule)
    return schedule


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


def without_drops(schedule: Schedule) -> Schedule:
    """``schedule`` at ratio 1.0: all that it does, and nothing that it drops."""
    return replace(schedule, ratios=(1.0,) * len(schedule.layers), keep=(), inject=0, merge="none", downsample=0)
