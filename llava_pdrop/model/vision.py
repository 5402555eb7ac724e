"""The vision tower: from pixels to image tokens (tower, feature selection, projector)."""

from __future__ import annotations

from itertools import islice
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_pdrop.geometry import ImageGeometry


def image_features(hf: nn.Module, pixels: Tensor, side: int | None = None) -> Tensor:
    """(tiles, 3, height, width) -> projected patch features (tiles * patches, D), tile after tile; pooled ones
    (tiles * side^2, D) where a ``side`` is given.

    ``hf`` is a Hugging Face LLaVA. The hidden layer is its config's ``vision_feature_layer`` (-2 in all of LLaVA);
    the class token is left out.
    """
    tower = hf.model.vision_tower
    frozen = not any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        pixels = pixels.to(dtype=next(tower.parameters()).dtype)
        hidden_ITD = tower_hidden(tower, pixels, used_tower_layers(hf.config))
    feature_IPW = hidden_ITD[:, 1:] if side is None else pooled(hidden_ITD[:, 1:], side)
    return hf.model.multi_modal_projector(feature_IPW).flatten(0, 1)


def pooled(feature_IPW: Tensor, side: int) -> Tensor:
    """The features (tiles, patches, W) of square tiles averaged to a grid, (tiles, side^2, W): PyTorch's adaptive
    average pooling, whose cells overlap by a patch where ``side`` does not divide the patches of a side. Source: DeCo
    (arXiv 2405.20985) pools so, before its projector. (VTC-Bench, arXiv 2510.07143, shrinks the picture instead.)"""
    patches = isqrt(feature_IPW.shape[1])
    grid_IWHH = feature_IPW.transpose(1, 2).unflatten(2, (patches, patches))
    return F.adaptive_avg_pool2d(grid_IWHH, side).flatten(2).transpose(1, 2)


def used_tower_layers(config: Any) -> int:
    """How many layers of the tower lead to ``vision_feature_layer`` of a LLaVA's config: 23 of CLIP-L's 24 for -2."""
    feature, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return layers + 1 + feature if feature < 0 else feature


def tower_hidden(tower: nn.Module, pixels: Tensor, layers: int) -> Tensor:
    """Hidden states (tiles, 1 + patches, width) of a CLIP tower after its first ``layers`` layers.

    The tower's own forward would run all of them and, asked for hidden states, keep every one until it returns.
    """
    inner = getattr(tower, "vision_model", tower)  # transformers before and since it took the inner module away
    hidden_ITD = inner.pre_layrnorm(inner.embeddings(pixels))
    for layer in islice(inner.encoder.layers, layers):
        hidden_ITD = layer(hidden_ITD, attention_mask=None)
    return hidden_ITD


class PackByGeometry:
    """Stands in for ``pack_image_features`` of a LLaVA-NeXT: lays out image features by ``geometry``.

    Left alone the model merges by ``spatial_unpad`` and rounds sizes its own way, so that one with other settings could
    be trained here and then not be evaluated. A reopened model without this agrees on all but rare sizes (88x55).
    `plugin.attach` counts the tokens of a picture by the same ``geometry``.
    """

    def __init__(self, geometry: ImageGeometry) -> None:
        self.geometry = geometry

    def __call__(
        self,
        image_features: list[Tensor],
        image_sizes: Tensor,
        vision_feature_select_strategy: str,
        image_newline: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        packed = []
        for feature_TPD, (height, width) in zip(image_features, torch.as_tensor(image_sizes).tolist()):
            table_FD = torch.cat([feature_TPD.flatten(0, 1), image_newline[None].to(feature_TPD)])
            index = torch.from_numpy(self.geometry.merge_index((int(width), int(height))))
            index = index.where(index >= 0, len(table_FD) - 1)
            packed.append(table_FD.index_select(0, index.to(table_FD.device)))
        return packed, torch.tensor([len(feature) for feature in packed], device=packed[0].device)


def pack_by_geometry(hf: nn.Module, geometry: ImageGeometry) -> None:
    """Makes a LLaVA-NeXT's own forward and ``generate`` lay out image features by ``geometry``."""
    if geometry.aspect == "anyres":
        hf.model.pack_image_features = PackByGeometry(geometry)


def dummy_pixels(hf: nn.Module, device: torch.device) -> Tensor:
    """One black tile. A batch without images sends it through the tower and multiplies it by nothing, so that all
    ranks run the same modules."""
    side = hf.config.vision_config.image_size
    return torch.zeros(1, 3, side, side, device=device)


def load_image_processor(source: str, tile: int) -> CLIPImageProcessorPil:
    """CLIP's processor for one square tile of side ``tile``, from any processor of the CLIP and LLaVA family: always
    the PIL implementation, so that pixels are the same with and without torchvision."""
    settings, _ = CLIPImageProcessorPil.get_image_processor_dict(source)
    return CLIPImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_mean=settings["image_mean"],
        image_std=settings["image_std"],
        resample=settings.get("resample", 3),
    )
