"""Synthetic training batches with the lengths and picture sizes of the real mixtures; nothing is downloaded.

The numbers of the mixtures, with their sources, stand in llava_pdrop/cost/mixtures.py. ``PROMPT``, ``HUMAN`` and
``ASSISTANT`` are about what the Vicuna prompt adds in LLaMA tokens: our estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llava_pdrop.bench.shapes import Shape
from llava_pdrop.cost.mixtures import LLAVA_15, OPEN_LLAVA_NEXT, Component
from llava_pdrop.cost.nominal import FULL_TEXT_TOKENS, full_picture
from llava_pdrop.errors import check_name
from llava_pdrop.geometry import Size
from llava_pdrop.types import IGNORE_INDEX, ImageInput, PackedBatch, Sample

PROMPT, HUMAN, ASSISTANT = 36, 4, 5
"""Text tokens before the first turn (system prompt and start token), before a question and before an answer."""

SPREAD = 0.4
"""Standard deviation of the logarithm of a question's or answer's length: our estimate."""

IMAGES = ("mixture", "full")


@dataclass(frozen=True)
class Outline:
    """What a sample consists of: the size of its picture (None: text only), the tokens before its first question and
    (question, answer) lengths of every turn, all that a template adds included."""

    picture: Size | None
    prompt: int
    turns: tuple[tuple[int, int], ...]

    @property
    def text_tokens(self) -> int:
        return self.prompt + sum(question + answer for question, answer in self.turns)


@dataclass(frozen=True)
class Workload:
    """The batches of a run: a pure function of the shape, ``images``, ``seed`` and the number of the step.

    Attributes:
        images: ``mixture`` draws every sample from the mixture (where the shape fixes neither picture nor text);
            ``full`` gives all of them a picture that fills the largest canvas, and `FULL_TEXT_TOKENS`.
    """

    shape: Shape
    images: str = "mixture"
    seed: int = 0

    def __post_init__(self) -> None:
        check_name("--images", self.images, IMAGES)

    @property
    def mixture(self) -> tuple[Component, ...]:
        return LLAVA_15 if self.shape.geometry.aspect == "pad" else OPEN_LLAVA_NEXT

    @property
    def source(self) -> str:
        """Where the lengths and picture sizes are from, for the report."""
        if self.shape.picture is not None and self.shape.text_tokens is not None:
            return "every sample as the shape has it"
        if self.images == "full":
            return f"pictures that fill the canvas, {FULL_TEXT_TOKENS} text tokens"
        name = "LLaVA-1.5's 665K" if self.mixture is LLAVA_15 else "Open-LLaVA-NeXT's 1M"
        return f"drawn from {name} samples (numbers and sources: llava_pdrop/cost/mixtures.py)"

    def outlines(self, step: int, samples: int | None = None) -> list[Outline]:
        """The samples of a step's batch; a larger batch starts with those of a smaller one."""
        rng = np.random.default_rng([self.seed, step])
        return [self._outline(rng) for _ in range(samples or self.shape.samples)]

    def batch(self, step: int, device: torch.device, samples: int | None = None) -> PackedBatch:
        """The batch of a step: random ids and labels on the answers, both on the host, where the stream is planned;
        normally distributed pixels on ``device``."""
        rng = np.random.default_rng([self.seed, step, 1])
        vocabulary = self.shape.text_config().vocab_size
        packed = PackedBatch.pack(
            [
                self._sample(outline, rng, vocabulary, f"{step}.{number}")
                for number, outline in enumerate(self.outlines(step, samples))
            ]
        )
        return replace(packed, pixels=self._pixels(packed.image_sizes, step, device))

    def samples(self, count: int) -> list[Sample]:
        """``count`` samples with normally distributed pixels on the CPU, as a data set would give them."""
        rng = np.random.default_rng([self.seed, count, 2])
        generator = torch.Generator().manual_seed(self.seed)
        vocabulary, geometry = self.shape.text_config().vocab_size, self.shape.geometry
        found = []
        for number in range(count):
            sample = self._sample(self._outline(rng), rng, vocabulary, str(number))
            sizes = [image.size for image in sample.images]
            tiles = [
                torch.randn(geometry.num_tiles(s), 3, geometry.tile, geometry.tile, generator=generator) for s in sizes
            ]
            found.append(replace(sample, images=tuple(map(ImageInput, tiles, sizes))))
        return found

    def longest(self, steps: int, samples: int | None = None) -> int:
        """Which of the first ``steps`` batches has the most tokens."""

        def tokens(step: int) -> int:
            outlines = self.outlines(step, samples)
            return sum(
                o.text_tokens + (self.shape.geometry.num_tokens(o.picture) if o.picture else 0) for o in outlines
            )

        return max(range(steps), key=tokens)

    def statistics(self, samples: int = 2000) -> dict[str, float]:
        """Means over ``samples`` samples, for the report."""
        outlines = self.outlines(0, samples)
        pictures = [outline.picture for outline in outlines if outline.picture is not None]
        geometry = self.shape.geometry
        return {
            "samples": samples,
            "text_only_share": 1 - len(pictures) / samples,
            "text_tokens": sum(outline.text_tokens for outline in outlines) / samples,
            "turns": sum(len(outline.turns) for outline in outlines) / samples,
            "answer_tokens": sum(answer for outline in outlines for _, answer in outline.turns) / samples,
            "image_tokens": sum(map(geometry.num_tokens, pictures)) / samples,
            "tiles": sum(map(geometry.num_tiles, pictures)) / samples,
        }

    def _outline(self, rng: np.random.Generator) -> Outline:
        shape, parts = self.shape, self.mixture
        if self.images == "full":
            return _even(shape.picture or full_picture(shape.geometry), shape.text_tokens or FULL_TEXT_TOKENS)
        weights = np.array([part.thousands for part in parts])
        part = parts[rng.choice(len(parts), p=weights / weights.sum())]
        picture = shape.picture
        if picture is None and part.pictures:
            chances = np.array([weight for _, weight in part.pictures])
            picture = part.pictures[rng.choice(len(chances), p=chances / chances.sum())][0]
        if shape.text_tokens is not None:
            return _even(picture, shape.text_tokens)
        turns = [
            (HUMAN + _length(rng, part.question) + ASSISTANT, _length(rng, part.answer) + 1)  # with the end token
            for _ in range(rng.integers(part.turns[0], part.turns[1] + 1))
        ]
        room = shape.max_length - PROMPT - (shape.geometry.num_tokens(picture) if picture else 0)
        return Outline(picture, PROMPT, _cut(turns, room))

    def _sample(self, outline: Outline, rng: np.random.Generator, vocabulary: int, name: str) -> Sample:
        count = self.shape.geometry.num_tokens(outline.picture) if outline.picture else 0
        ids = rng.integers(3, vocabulary - 2, outline.text_tokens + count)  # neither special tokens nor <image>, <pad>
        labels = np.full(len(ids), IGNORE_INDEX)
        ids[outline.prompt : outline.prompt + count] = vocabulary - 2
        place = outline.prompt + count
        for question, answer in outline.turns:
            place += question
            labels[place : place + answer] = ids[place : place + answer]
            place += answer
        images = (ImageInput(torch.empty(0), outline.picture),) if outline.picture else ()
        spans = ((outline.prompt, outline.prompt + count),) if outline.picture else ()
        return Sample(name, torch.from_numpy(ids), torch.from_numpy(labels), images, spans)

    def _pixels(self, sizes: list[Size], step: int, device: torch.device) -> Tensor:
        side = self.shape.geometry.tile
        tiles = sum(map(self.shape.geometry.num_tiles, sizes))
        generator = torch.Generator(device).manual_seed(1_000_003 * self.seed + step)
        return torch.randn(tiles, 3, side, side, device=device, generator=generator)


def _even(picture: Size | None, tokens: int) -> Outline:
    """A sample of exactly ``tokens`` text tokens: two turns, whose questions and answers share what the prompt
    leaves."""
    prompt = min(PROMPT, tokens // 5)
    first = (tokens - prompt) // 2
    turns = ((n - n // 2, n // 2) for n in (first, tokens - prompt - first))
    return Outline(picture, prompt, tuple(turns))


def _length(rng: np.random.Generator, mean: float) -> int:
    return max(1, round(rng.lognormal(math.log(mean) - SPREAD**2 / 2, SPREAD)))


def _cut(turns: list[tuple[int, int]], room: int) -> tuple[tuple[int, int], ...]:
    """The turns that fit into ``room`` tokens, the last one's answer shortened; at least one answer token stays."""
    kept: list[tuple[int, int]] = []
    for question, answer in turns:
        if room <= question and kept:
            break
        kept.append((question, max(1, min(answer, room - question))))
        room -= sum(kept[-1])
    return tuple(kept)
