"""Questions about one picture share its features: benchmarks ask up to 32 questions about a picture, and in a batch the
tower need not see it more than once. The picture is known by its `ImageInput`, so nothing is compared on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llava_pdrop.types import ImageInput


@contextmanager
def shared_features(hf: Any, images: Sequence[ImageInput]) -> Iterator[None]:
    """In its block the vision tower and the projector of ``hf``, a LLaVA or LLaVA-NeXT, see equal pictures once.

    Args:
        images: one per picture that the model is given, in its order; the same object stands for the same picture.
    """
    place: dict[int, int] = {}  # of an image's first tile among those kept
    kept: list[int] = []
    rows: list[int] = []
    for image in images:
        tiles = range(len(image.pixels))
        if id(image) not in place:
            place[id(image)] = len(kept)
            kept += [len(rows) + tile for tile in tiles]
        rows += [place[id(image)] + tile for tile in tiles]
    if len(kept) == len(rows):
        yield
        return

    def once(_tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        pixels: Tensor = args[0] if args else kwargs.pop("pixel_values")
        assert len(pixels) == len(rows), "the model is given other pictures"
        return (pixels[torch.tensor(kept).to(pixels.device)], *args[1:]), kwargs

    def to_all(_projector: nn.Module, _args: Any, features: Tensor) -> Tensor:
        return features[torch.tensor(rows).to(features.device)]

    tower, projector = hf.model.vision_tower, hf.model.multi_modal_projector
    with tower.register_forward_pre_hook(once, with_kwargs=True), projector.register_forward_hook(to_all):
        yield
