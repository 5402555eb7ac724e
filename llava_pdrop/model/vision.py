"""The vision tower: how it is loaded, and from pixels to image tokens (tower, feature selection, projector)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.checkpoint import load_strictly


def image_features(host: nn.Module, pixels: Tensor) -> Tensor:
    """(tiles, 3, height, width) -> projected patch features (tiles * patches, D), tile after tile.

    ``host`` is a Hugging Face LLaVA. The hidden layer is its config's ``vision_feature_layer`` (-2 in all of LLaVA);
    the class token is left out.
    """
    tower = host.model.vision_tower
    frozen = not any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        pixels = pixels.to(dtype=next(tower.parameters()).dtype)
        hidden_ITD = tower(pixels, output_hidden_states=True).hidden_states[host.config.vision_feature_layer]
    return host.model.multi_modal_projector(hidden_ITD[:, 1:]).flatten(0, 1)


def pack_by_geometry(host: nn.Module, geometry: ImageGeometry) -> None:
    """Makes a LLaVA-NeXT's own forward and ``generate`` lay out image features by ``geometry``.

    Left alone it merges by ``spatial_unpad`` and rounds sizes its own way, so that a model with other settings could be
    trained here and then not be evaluated. A reopened model without this agrees on all but rare sizes (88x55).
    """
    if geometry.aspect != "anyres":
        return

    def pack(
        image_features: list[Tensor], image_sizes: Tensor, vision_feature_select_strategy: str, image_newline: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        packed = []
        for feature_TPD, (height, width) in zip(image_features, torch.as_tensor(image_sizes).tolist()):
            table_FD = torch.cat([feature_TPD.flatten(0, 1), image_newline[None].to(feature_TPD)])
            index = torch.from_numpy(geometry.merge_index((int(width), int(height))))
            index = index.where(index >= 0, len(table_FD) - 1)
            packed.append(table_FD.index_select(0, index.to(table_FD.device)))
        return packed, torch.tensor([len(feature) for feature in packed], device=packed[0].device)

    host.model.pack_image_features = pack


def dummy_pixels(host: nn.Module, device: torch.device) -> Tensor:
    """One black tile. A batch without images sends it through the tower and multiplies it by nothing, so that all
    ranks run the same modules."""
    side = host.config.vision_config.image_size
    return torch.zeros(1, 3, side, side, device=device)


def load_tower(source: str, image_size: int | None = None, dtype: torch.dtype = torch.float32) -> CLIPVisionModel:
    """A CLIP vision tower, its position embeddings interpolated (bicubic) where ``image_size`` differs from its own."""
    tower = CLIPVisionModel.from_pretrained(source, dtype=dtype)
    if image_size in (None, tower.config.image_size):
        return tower
    config = CLIPVisionConfig(**{**tower.config.to_dict(), "image_size": image_size})
    state = tower.state_dict()
    name = next(name for name in state if name.endswith("position_embedding.weight"))
    state[name] = _interpolate(state[name], image_size // config.patch_size)
    resized = CLIPVisionModel(config).to(dtype)
    load_strictly(resized, {k: v for k, v in state.items() if not k.endswith("position_ids")}, source)
    return resized


def _interpolate(position_PD: Tensor, side: int) -> Tensor:
    token_1D, grid_PD = position_PD[:1], position_PD[1:]
    old = int(len(grid_PD) ** 0.5)
    grid_1Dhw = grid_PD.float().T.reshape(1, -1, old, old)
    grid_1Dhw = F.interpolate(grid_1Dhw, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([token_1D, grid_1Dhw.flatten(2)[0].T.to(position_PD.dtype)])


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
