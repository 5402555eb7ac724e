"""The objects that travel through the program, one per arrow, with their shapes.

    Config -> Record -> Sample -> PackedBatch -> stream (T, D) -> loss / tokens

Shape letters used in tensor names everywhere in this package:

    T  tokens of a packed stream (all samples of a micro-batch back to back, no padding)
    S  samples (segments) of a stream         I  images of a stream
    V  image tokens that may be dropped       Q  query tokens that rank them
    K  tokens that survive a drop             D  hidden size
    H  attention heads, G key/value heads, E head size

A *stream position* is an index into T. Everything about the layout of a stream (lengths, spans, positions of
labels) is plain Python integers on the host, so that no step of the forward has to ask the device for a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import BinaryIO, Literal, Protocol

import torch
from torch import Tensor

from llava_pdrop.errors import UserError, clip

IGNORE_INDEX = -100
"""Label of a token that is not supervised (the value of PyTorch's cross entropy and of LLaVA)."""

IMAGE_MARKER = "<image>"
"""Marks the place of an image in the text of a record."""


@dataclass(frozen=True)
class Turn:
    """One utterance; ``text`` holds one ``<image>`` marker per image shown in it. ``learnt`` is False for an answer
    that is shown but not trained on."""

    role: Literal["human", "gpt"]
    text: str
    learnt: bool = True


class ImageSource(Protocol):
    """Where the bytes of a picture lie. A `pathlib.Path` is one; pictures inside tar shards and tables are others
    (`llava_pdrop.data.readers.pictures`). Its text (``str``) names it in error messages; equal sources are one
    picture."""

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        """The bytes as a file that can seek; whoever opens it closes it.

        Raises:
            OSError: it cannot be opened.
        """
        ...


@dataclass(frozen=True)
class Record:
    """One training or evaluation example as it stands in a data file, pixels not yet read.

    ``images`` has one source per ``<image>`` marker of ``turns``, in order. ``origin`` (``file.json[17]``) is what
    error messages name. ``template`` is the name of its own conversation format; None: that of the run. ``system`` is
    its own system prompt; None: that of the format.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...]
    origin: str
    template: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class ImageInput:
    """One image ready for the tower: ``pixels`` (tiles, 3, height, width) float32, ``size`` the (width, height) of
    the picture before any resizing, from which `llava_pdrop.geometry` derives the number of image tokens."""

    pixels: Tensor
    size: tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """A tokenised record: ``input_ids`` (N,) and ``labels`` (N,) int64 with every ``<image>`` expanded to its exact
    number of placeholders. ``image_spans[i] = [start, stop)`` is where image i lies in ``input_ids``. ``in_answer[i]``:
    whether it is shown inside an answer; empty: none is."""

    id: str
    input_ids: Tensor
    labels: Tensor
    images: tuple[ImageInput, ...] = ()
    image_spans: tuple[tuple[int, int], ...] = ()
    in_answer: tuple[bool, ...] = ()

    def answer_starts(self) -> list[int]:
        """Where every answer that is trained on starts: the token before it, of the question, ranks. An image inside an
        answer is part of it, at its beginning too."""
        labelled = (self.labels != IGNORE_INDEX).tolist()
        inside = {stop: start for (start, stop), is_inside in zip(self.image_spans, self.in_answer) if is_inside}
        starts = []
        for place, is_label in enumerate(labelled):
            start = place
            while start in inside:
                start = inside[start]
            if is_label and start and not labelled[start - 1]:
                starts.append(start)
        return starts


@dataclass(frozen=True)
class PackedBatch:
    """Samples back to back as one padding-free stream.

    Tensors: ``input_ids`` (T,), ``labels`` (T,) int64, ``pixels`` (tiles of all images, 3, height, width) float32.
    Host integers: ``seq_lens`` (S), ``image_spans`` (I stream spans), ``image_sizes`` (I, (width, height)),
    ``answer_starts`` (per sample, the stream positions whose predecessor ranks the image tokens: first token of every
    answer in training, one past the last token in inference), ``label_positions`` (stream positions with a label).
    """

    input_ids: Tensor
    labels: Tensor
    pixels: Tensor
    seq_lens: list[int]
    image_spans: list[tuple[int, int]]
    image_sizes: list[tuple[int, int]]
    answer_starts: list[list[int]]
    label_positions: list[int]
    sample_ids: list[str] = field(default_factory=list)

    @staticmethod
    def pack(samples: list[Sample], query: Literal["answers", "last"] = "answers") -> PackedBatch:
        """Lays samples back to back.

        Args:
            query: ``answers`` ranks with the token before every answer (training), ``last`` with the last token of
                each sample (inference; golden/README 4.4 and 4.5).

        Raises:
            UserError: no samples, or the first token of a sample carries a label (nothing could predict it).
        """
        if not samples:
            raise UserError("cannot pack an empty list of samples")
        spans, starts, positions, offset = [], [], [], 0
        for sample in samples:
            labelled = (sample.labels != IGNORE_INDEX).tolist()
            if labelled and labelled[0]:
                raise UserError(
                    f"sample {clip(sample.id)}: its first token is supervised, but no token comes before it"
                )
            spans += [(offset + start, offset + stop) for start, stop in sample.image_spans]
            here = [i for i, is_label in enumerate(labelled) if is_label]
            positions += [offset + i for i in here]
            own = [len(labelled)] if query == "last" else sample.answer_starts()
            starts.append([offset + start for start in own])
            offset += len(labelled)
        images = [image for sample in samples for image in sample.images]
        return PackedBatch(
            input_ids=torch.cat([s.input_ids for s in samples]),
            labels=torch.cat([s.labels for s in samples]),
            pixels=torch.cat([i.pixels for i in images]) if images else torch.empty(0),
            seq_lens=[len(s.input_ids) for s in samples],
            image_spans=spans,
            image_sizes=[i.size for i in images],
            answer_starts=starts,
            label_positions=positions,
            sample_ids=[s.id for s in samples],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its pixels on ``device``; ids and labels travel with the plan (`StreamPlan.build`)."""
        return replace(self, pixels=self.pixels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch, its pixels in page-locked memory (`torch.utils.data.DataLoader` calls this)."""
        return replace(self, pixels=self.pixels.pin_memory())
