"""A batch of questions for Hugging Face's own ``generate``: what it is given, and what is read from its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llava_pdrop.data.conversation import Template
from llava_pdrop.data.images import load_image, preprocess
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.eval.questions import Question
from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.generate.prefill import ForwardStep
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import Sample


def model_inputs(samples: Sequence[Sample], tokenizer: Any, hf: Any) -> dict[str, Tensor]:
    """Prompts as ``generate`` wants them: ``input_ids`` and ``attention_mask`` (B, N) padded on the left, and where
    there are images ``pixel_values`` ((images, 3, h, w) for LLaVA; (images, tiles, 3, h, w), the missing tiles 0, with
    ``image_sizes`` (images, (height, width)) for LLaVA-NeXT)."""
    longest = max(len(sample.input_ids) for sample in samples)
    ids = torch.full((len(samples), longest), tokenizer.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, longest - len(sample.input_ids) :] = sample.input_ids
        mask[row, longest - len(sample.input_ids) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    images = [image for sample in samples for image in sample.images]
    if not images:
        return inputs
    if hf.config.model_type != "llava_next":
        return inputs | {"pixel_values": torch.cat([image.pixels for image in images])}
    tiles = max(len(image.pixels) for image in images)
    pixels = torch.zeros(len(images), tiles, *images[0].pixels.shape[1:])
    for row, image in enumerate(images):
        pixels[row, : len(image.pixels)] = image.pixels
    sizes = torch.tensor([(image.size[1], image.size[0]) for image in images])
    return inputs | {"pixel_values": pixels, "image_sizes": sizes}


@contextmanager
def generating(hf: Any, schedule: Schedule, trace: list[ForwardStep] | None = None) -> Iterator[None]:
    """``hf`` in evaluation mode with ``schedule`` attached; it and the random numbers afterwards as before."""
    training, device = hf.training, next(hf.parameters()).device
    hf.eval()
    attach(hf, schedule, trace)
    try:  # of all GPUs only its own: a process that looks at another one's random numbers takes memory there
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
            yield
    finally:
        detach(hf)
        hf.train(training)


def prompt_sample(
    question: Question, template: Template, tokenizer: Any, hf: Any, geometry: ImageGeometry, image_processor: Any
) -> Sample:
    """The prompt of ``question`` with its preprocessed images, ready for `model_inputs`."""
    images = [preprocess(load_image(path), geometry, image_processor) for path in question.record.images]
    return Encoder(template, tokenizer, hf.config.image_token_id, geometry).prompt(question.record, images)


def until_stop(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of ``stops`` behind its leading white space, stripped."""
    text = text.lstrip()
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()
