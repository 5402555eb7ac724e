"""Prompts of the inference bench: random text around the features of random pictures."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_pdrop.bench.inference_report import Case
from llava_pdrop.model.vision import image_features


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts of one length, with the features of their pictures: what ``generate`` is given."""

    input_ids: Tensor
    features: list[Tensor]

    @staticmethod
    def make(host: nn.Module, case: Case, pixels: Tensor, seed: int) -> Prompt:
        """Random text around one picture per prompt, which goes through the tower here.

        Args:
            pixels: (prompts * tiles, 3, height, width), enough tiles for the image tokens of ``case``.
        """
        image, device = host.config.image_token_id, pixels.device
        before, after = case.text_tokens
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, image, (case.batch, before + case.image_tokens + after), generator=generator)
        ids[:, before : before + case.image_tokens] = image
        with torch.inference_mode():
            features = image_features(host, pixels).unflatten(0, (case.batch, -1))[:, : case.image_tokens]
        return Prompt(ids.to(device), list(features))

    @contextmanager
    def inputs(self, host: nn.Module) -> Iterator[dict[str, Any]]:
        """Keyword arguments of ``generate``, for as long as it is open."""
        encoded = BaseModelOutputWithPooling(pooler_output=list(self.features))
        given = {"input_ids": self.input_ids, "attention_mask": torch.ones_like(self.input_ids)}
        if "mm_encoder_outputs" in inspect.signature(host.forward).parameters:
            yield {**given, "mm_encoder_outputs": {"image": encoded}}
            return
        # transformers 5.17 takes pixels only: it is given empty ones, and finds the features where it would make them.
        host.model.get_image_features = lambda *_, **__: encoded
        try:
            yield {**given, "pixel_values": self.features[0].new_empty(len(self.features), 0)}
        finally:
            del host.model.get_image_features
