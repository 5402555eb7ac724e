"""Pooled features (``pyramid_drop.downsample``) in Hugging Face's own forward.

The prompt keeps the placeholders of the vanilla model, so that one processor serves all schedules. Before the projector
features are averaged; behind it every patch is given the feature of its cell, so that the model finds as many as it
expects and lays them out as ever. Before the first layer that sees them, one token of each cell stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pdrop.errors import UserError
from llava_pdrop.generate.forward import Call, Generation
from llava_pdrop.geometry import ImageGeometry, Size
from llava_pdrop.model.vision import PackByGeometry, pooled
from llava_pdrop.model.vlm import geometry_of

POOLABLE = ("llava", "llava_next")
"""Classes (``model_type``) whose projector takes the patches of a square tile, one after the other."""


@dataclass(frozen=True)
class Pooling:
    """How the features of a model are pooled: to at most ``budget`` a tile."""

    geometry: ImageGeometry
    budget: int

    @classmethod
    def of(cls, model: nn.Module, base: nn.Module, budget: int, unchecked: bool) -> Pooling:
        """For ``model``, whose tower, projector and decoder are in ``base``.

        Raises:
            UserError: a class, or settings of it, whose patches are not known.
        """
        config: Any = model.config
        if config.model_type not in POOLABLE or unchecked:
            raise UserError(
                f"pyramid_drop.downsample pools the square tiles of {' and '.join(POOLABLE)}, not the features of "
                f"{type(model).__name__}: leave it out"
            )
        try:
            geometry = geometry_of(config)
        except UserError as error:
            raise UserError(f"pyramid_drop.downsample: {error}: leave it out") from None
        if geometry.aspect == "anyres":
            packs: Any = base.pack_image_features
            own = replace(geometry, merge="spatial_unpad", rounding="hf")  # what transformers does, left alone
            geometry = packs.geometry if isinstance(packs, PackByGeometry) else own
        return cls(geometry, budget)

    def pool(self, feature_IPW: Tensor) -> Tensor:
        """The features (tiles, patches, W) of the tower, averaged cell by cell: (tiles, cells, W)."""
        if feature_IPW.ndim != 3 or feature_IPW.shape[1] != self.geometry.patches:
            raise UserError(
                f"pyramid_drop.downsample: the tower gives features {tuple(feature_IPW.shape)} for tiles of "
                f"{self.geometry.patches} patches: leave it out"
            )
        return pooled(feature_IPW, self.geometry.side(self.budget))

    def spread(self, feature_ICD: Tensor) -> Tensor:
        """The features (tiles, cells, D) of the projector, that of its cell for every patch: (tiles, patches, D)."""
        cell_P = torch.from_numpy(self.geometry.cell_of_patch(self.geometry.side(self.budget)))
        return feature_ICD.index_select(1, cell_P.to(feature_ICD.device))

    def hooks(self, projector: nn.Module, encoding: Callable[[], Call | Generation | None]) -> list[RemovableHandle]:
        """Hooks before and behind ``projector``, which pool where ``encoding`` says whose prompt is to be pruned."""

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            asking = encoding()
            if asking is None:
                return None
            asking.pooled = True
            return self.pool(args[0]), *args[1:]

        def behind(_: nn.Module, args: tuple[Any, ...], feature_ICD: Tensor) -> Tensor:
            return feature_ICD if encoding() is None else self.spread(feature_ICD)

        return [projector.register_forward_pre_hook(before), projector.register_forward_hook(behind)]

    def staying(self, call: Call, prompt: Generation, totals: Sequence[int], rows: np.ndarray) -> list[np.ndarray]:
        """Which tokens of every picture of a prompt stay.

        Args:
            call, prompt: the forward, and the ``generate`` around it.
            totals, rows: tokens of every picture, and the row that it is in.

        Raises:
            UserError: the pictures came encoded, or one has other tokens than its size gives it.
        """
        if not (call.pooled or prompt.pooled):
            raise UserError(
                "attach() pools features before the projector (pyramid_drop.downsample), but the pictures of this "
                "prompt came encoded: give pixel_values"
            )
        found, shapes = [], [(1, 1)] * len(totals)
        if self.geometry.aspect == "anyres":
            given = [place.get("image_sizes") for place in (call.given, prompt.given)]
            known = next(torch.as_tensor(sizes) for sizes in given if sizes is not None)
            sizes = [(int(width), int(height)) for height, width in known.tolist()]
            shapes = _repeated(sizes, rows)
        for total, shape in zip(totals, shapes, strict=True):
            if self.geometry.num_tokens(shape) != total:
                raise UserError(
                    f"pyramid_drop.downsample: a picture has {total} image tokens, where its size gives it "
                    f"{self.geometry.num_tokens(shape)}: leave it out"
                )
            found.append(self.geometry.pooled_index(shape, self.budget)[0])
        return found


def _repeated(sizes: list[Size], rows: np.ndarray) -> list[Size]:
    """``sizes`` for every picture of a prompt whose ``rows`` may have been repeated, each so many times in a row, for
    beams and samples."""
    found, first, times = list[Size](), 0, len(rows) // len(sizes)
    for count in np.bincount(rows)[::times].tolist():
        found += sizes[first : first + count] * times
        first += count
    return found
