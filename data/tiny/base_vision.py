"""The tower of the embedded default, which names what a tile shows, and the projector that joins it to the decoder."""

from __future__ import annotations

from pathlib import Path

import forms
import numpy as np
import torch
import torch.nn.functional as F
from base_training import HIDDEN, Log, descend, half_cosine, set_lr
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

IMAGE_MEAN, IMAGE_STD = 0.85, 0.2
"""Brightness of the pages and its spread, the same for all colours."""


def new_tower() -> CLIPVisionModel:
    """An untrained tower. LLaVA reads the last hidden layer but one, so the last layer is dead weight kept for form.

    Position embeddings are zero and stay so: a tile looks the same wherever it lies, and the table can be resized to
    any number of tiles. Attention starts as doing nothing, because neighbours do not help to read a tile.
    """
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            patch_size=forms.TILE,
            image_size=16 * forms.TILE,
            projection_dim=HIDDEN,
        )
    )
    for name, parameter in tower.named_parameters():
        if "position_embedding" in name:
            nn.init.zeros_(parameter).requires_grad_(False)
        elif "patch_embedding" in name:
            nn.init.normal_(parameter, std=(3 * forms.TILE**2) ** -0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.0 if "out_proj" in name else parameter.shape[1] ** -0.5)
    return tower


def tile_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """(pictures, 3, height, width) -> (pictures, tiles, HIDDEN): what LLaVA takes from a tower."""
    return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def tower_batch(
    rng: np.random.Generator, split: str, pages: int, clutter: float | None = None
) -> tuple[Tensor, Tensor]:
    """Pixels (pages, 3, 192, 192) and words (pages, 256) of random pages, dense unless ``clutter`` is given."""
    plans = [forms.plan_page(rng, 16, split, clutter=clutter or float(rng.uniform(0.4, 1))) for _ in range(pages)]
    pictures = np.stack([forms.draw_page(plan, rng) for plan in plans])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return (pixels - IMAGE_MEAN) / IMAGE_STD, torch.from_numpy(np.stack([plan.words for plan in plans]))


def train_tower(seed: int, log: Log, steps: int = 800, pages: int = 4, lr: float = 1e-3) -> CLIPVisionModel:
    """Teaches a tower to name what each tile shows, with a linear head that is thrown away. Training scans only."""
    torch.manual_seed(seed)
    rng, eval_rng = np.random.default_rng([seed, 10]), np.random.default_rng([seed, 11])
    tower, head = new_tower(), nn.Linear(HIDDEN, len(forms.WORDS))
    parameters = [p for p in (*tower.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        set_lr(optimizer, lr * min(1, (step + 1) / 50) * half_cosine(step / steps))
        pixels, words = tower_batch(rng, "train", pages)
        loss = F.cross_entropy(head(tile_features(tower, pixels)).flatten(0, 1), words.flatten())
        descend(optimizer, parameters, loss)
        if step % 100 == 0:
            log(f"tower step {step}: loss {loss.item():.4f}")
    with torch.no_grad():
        pixels, words = tower_batch(eval_rng, "eval", 40, clutter=0.5)
        right = torch.cat([head(tile_features(tower, part)).argmax(-1) for part in pixels.split(10)]) == words
    for name, first, last in (("digit", forms.FIRST_DIGIT, forms.FIRST_LETTER - 1),
                              ("letter", forms.FIRST_LETTER, forms.MARK - 1), ("tile", 0, forms.MARK)):  # fmt: skip
        here = (words >= first) & (words <= last)
        log(f"tower: {right[here].float().mean():.1%} of {int(here.sum())} held-out {name}s named correctly")
    return tower


def train_projector(
    tower: CLIPVisionModel, words_VD: Tensor, seed: int, log: Log, steps: int = 200, lr: float = 3e-3
) -> LlavaMultiModalProjector:
    """Maps what the tower says of a tile to the decoder's embedding of its word, ``words_VD`` (words, D).

    This stands in for CLIP's alignment with text, and stops early: the rest is for stage 1 to learn. No page is read
    and no question answered here, because the decoder does not take part, only its embedding table.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 30])
    projector = LlavaMultiModalProjector(
        LlavaConfig(
            vision_config=tower.config,
            text_config=LlamaConfig(hidden_size=words_VD.shape[1], num_attention_heads=1),
            projector_hidden_act="gelu",
        )
    )
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    parameters = list(projector.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    scale = words_VD.square().mean()
    for step in range(steps):
        set_lr(optimizer, lr * half_cosine(step / steps))
        pixels, words = tower_batch(rng, "train", 2)
        with torch.no_grad():
            features = tile_features(tower, pixels)
        projected = projector(features).flatten(0, 1)
        error = F.mse_loss(projected, words_VD[words.flatten()]) / scale
        descend(optimizer, parameters, error + 0.1 * F.cross_entropy(projected @ words_VD.T, words.flatten()))
        if step % 50 == 0 or step == steps - 1:
            log(f"projector step {step}: {error.item():.3f} of the embeddings' variance unexplained")
    return projector


def save_projector(projector: LlavaMultiModalProjector, path: Path) -> None:
    """Writes the projector under the names it has inside a LLaVA."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.multi_modal_projector.{name}": tensor.to(torch.bfloat16).contiguous()
        for name, tensor in projector.state_dict().items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def save_tower(tower: CLIPVisionModel, path: Path) -> None:
    """Writes the tower and an image processor for square pictures."""
    size = tower.config.image_size
    tower.to(torch.bfloat16).save_pretrained(path)
    CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[IMAGE_MEAN] * 3,
        image_std=[IMAGE_STD] * 3,
    ).save_pretrained(path)
