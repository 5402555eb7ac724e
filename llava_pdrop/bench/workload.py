"""Synthetic training batches with the lengths and picture sizes of the real mixtures; nothing is downloaded.

Sources of the numbers below:

- Samples per component of `LLAVA_15`: as its author counted them in the released file (github.com/haotian-liu/LLaVA,
  issue 702; the paper's Table 7 was corrected by it). The 158K LLaVA samples are 58K conversations, 23K descriptions
  and 77K of reasoning by the file names of liuhaotian/LLaVA-Instruct-150K.
- `OPEN_LLAVA_NEXT` adds what Open-LLaVA-NeXT's docs/Data.md names: 200K of ALLaVA-Instruct-VFLAN-4V and six sets whose
  sizes are those of InternVL's fine-tuning files (AI2D 12K, ChartQA 18K, DocVQA 10K, GeoQA+ 72K, SynthDoG-EN 30K). For
  DVQA we take the 10K that lead to the documented total of 1M: our estimate.
- Turns follow from questions per picture of the original sets (VQAv2: 444K questions on 83K pictures, GQA balanced:
  943K on 72K) and from the paper's limit of 10 for RefCOCO and Visual Genome; where a set has no such count they are
  our estimate.
- Tokens per question and answer, and sizes with their weights, are our estimates: COCO and Visual Genome pictures
  mostly have a longer side of 640 and 500 to 1024 pixels, OpenImages 1024, book covers about 330x500, scanned pages
  about 1700x2200, SynthDoG, charts and diagrams as their authors render them.
- ``PROMPT``, ``HUMAN`` and ``ASSISTANT`` are about what the Vicuna prompt adds in LLaMA tokens: our estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llava_pdrop.bench.shapes import Shape
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.types import IGNORE_INDEX, ImageInput, PackedBatch, Sample

Size = tuple[int, int]

COCO = (((640, 480), 0.45), ((640, 427), 0.25), ((480, 640), 0.2), ((427, 640), 0.1))
VISUAL_GENOME = (((500, 375), 0.35), ((640, 480), 0.25), ((1024, 768), 0.2), ((800, 600), 0.1), ((375, 500), 0.1))
OPEN_IMAGES = (((1024, 768), 0.45), ((1024, 683), 0.3), ((768, 1024), 0.25))
BOOKS = (((330, 500), 0.6), ((375, 500), 0.3), ((500, 500), 0.1))
PAGES = (((1700, 2200), 0.8), ((2200, 1700), 0.2))
RENDERED = (((850, 600), 0.5), ((600, 850), 0.25), ((1000, 700), 0.25))
FIGURES = (((448, 448), 0.4), ((600, 450), 0.4), ((250, 180), 0.2))


@dataclass(frozen=True)
class Component:
    """One data set of a mixture.

    Attributes:
        thousands: samples, in thousands.
        pictures: ((width, height), weight) of its pictures; empty: text only.
        turns: least and most questions of a sample, all counts between being equally likely.
        question, answer: mean text tokens of each.
    """

    name: str
    thousands: float
    pictures: tuple[tuple[Size, float], ...]
    turns: tuple[int, int]
    question: float
    answer: float


LLAVA_15 = (
    Component("LLaVA conversation", 58, COCO, (3, 6), 15, 40),
    Component("LLaVA description", 23, COCO, (1, 1), 15, 130),
    Component("LLaVA reasoning", 77, COCO, (1, 1), 20, 130),
    Component("ShareGPT", 40.7, (), (2, 8), 60, 250),
    Component("VQAv2", 82.8, COCO, (3, 8), 10, 2),
    Component("GQA", 72.1, VISUAL_GENOME, (8, 18), 12, 2),
    Component("OKVQA", 9, COCO, (1, 1), 22, 2),
    Component("OCRVQA", 80, BOOKS, (4, 6), 12, 8),
    Component("A-OKVQA", 66.2, COCO, (1, 1), 60, 1),
    Component("TextCaps", 22, OPEN_IMAGES, (1, 1), 60, 15),
    Component("RefCOCO", 48.4, COCO, (4, 10), 25, 18),
    Component("Visual Genome", 86.4, VISUAL_GENOME, (8, 10), 28, 22),
)
"""The 665K samples that LLaVA-1.5 is tuned on."""

OPEN_LLAVA_NEXT = (
    *LLAVA_15,
    Component("ALLaVA-VFLAN", 200, (*COCO, *OPEN_IMAGES), (1, 2), 30, 180),
    Component("AI2D", 12, FIGURES, (1, 1), 50, 1),
    Component("ChartQA", 18, RENDERED, (1, 1), 25, 3),
    Component("DocVQA", 10, PAGES, (2, 6), 15, 6),
    Component("DVQA", 10, FIGURES, (1, 1), 25, 2),
    Component("GeoQA+", 72, FIGURES, (1, 1), 80, 60),
    Component("SynthDoG-EN", 30, RENDERED, (1, 1), 10, 250),
)
"""The 1M samples that Open-LLaVA-NeXT is tuned on."""

PROMPT, HUMAN, ASSISTANT = 36, 4, 5
"""Text tokens before the first turn (system prompt and start token), before a question and before an answer."""

SPREAD = 0.4
"""Standard deviation of the logarithm of a question's or answer's length: our estimate."""

FULL_TEXT_TOKENS = 200
"""Text tokens of a sample in the nominal case (``images="full"``): our estimate of the mixture's typical sample."""

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
        if self.images not in IMAGES:
            raise ValueError(f"unknown images {self.images!r}: choose one of {list(IMAGES)}")

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
        return f"drawn from {name} samples (numbers and sources: llava_pdrop/bench/workload.py)"

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


def full_picture(geometry: ImageGeometry) -> Size:
    """(width, height) of a picture that fills the largest canvas, the squarest one of several: all tiles, nothing
    padded."""
    canvases = geometry.pinpoints if geometry.aspect == "anyres" else ((geometry.tile, geometry.tile),)
    return max(canvases, key=lambda size: (size[0] * size[1], -abs(size[0] - size[1]), size))


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
