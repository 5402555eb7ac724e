"""From pixels to image tokens: tower, feature selection, projector."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def image_features(host: nn.Module, pixels: Tensor) -> Tensor:
    """(tiles, 3, height, width) -> projected patch features (tiles * patches, D), tile after tile.

    ``host`` is a Hugging Face LLaVA; which hidden layer is used and whether the class token counts stand in its config
    (``vision_feature_layer``, ``vision_feature_select_strategy``), -2 and "default" (patches only) in all of LLaVA.
    """
    tower = host.model.vision_tower
    frozen = not any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        pixels = pixels.to(dtype=next(tower.parameters()).dtype)
        hidden_ITD = tower(pixels, output_hidden_states=True).hidden_states[host.config.vision_feature_layer]
    if host.config.vision_feature_select_strategy == "default":
        hidden_ITD = hidden_ITD[:, 1:]
    return host.model.multi_modal_projector(hidden_ITD).flatten(0, 1)


def dummy_pixels(host: nn.Module, device: torch.device) -> Tensor:
    """One black tile. A batch without images sends it through the tower and multiplies it by nothing, so that all
    ranks run the same modules."""
    side = host.config.vision_config.image_size
    return torch.zeros(1, 3, side, side, device=device)
