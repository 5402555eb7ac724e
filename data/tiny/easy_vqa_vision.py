"""The tower and the projector of the easy-vqa runs: coloured shapes, learnt from the training pictures alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import easy_vqa
import numpy as np
import torch
import torch.nn.functional as F
from base_text import COLORS, SHAPES
from base_training import Log, descend, half_cosine, set_lr
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

WIDTH, PATCH, SIZE = 64, 8, 96
"""Width of the tower; side of a patch and of a picture in pixels: 12 x 12 patches."""

GRID = SIZE // PATCH
IMAGE_MEAN, IMAGE_STD = 0.85, 0.2
SHARE = 0.25
"""A patch shows the shape if it covers this share of the patch."""


@dataclass(frozen=True)
class Pictures:
    """Pictures ``pixels`` (N, 64, 64, 3) in bytes, with the numbers of their shape (N,) and colour (N,) in `SHAPES` and
    `COLORS`."""

    pixels: np.ndarray
    shapes: np.ndarray
    colors: np.ndarray


def read_pictures(package: Path) -> Pictures:
    """The training pictures whose questions and answers name both shape and colour; the test part is never opened."""
    found: list[tuple[np.ndarray, int, int]] = []
    for number, asked in sorted(easy_vqa.read_questions(package, "train").items()):
        said = dict(asked)
        answers = set(said.values())
        answers |= {word for question in said if question.startswith("what") for word in question.rstrip("?").split()}
        for question, answer in asked:  # "is there a teal shape?": yes; "is no circle present?": no
            if answer == ("no" if {"no", "not"} & set(question.split()) else "yes"):
                answers |= set(question.rstrip("?").split())
        shapes, colors = answers & set(SHAPES), answers & set(COLORS)
        if len(shapes) == 1 and len(colors) == 1:
            with Image.open(package / "data" / "train" / "images" / f"{number}.png") as picture:
                pixels = np.asarray(picture.convert("RGB"))
            found.append((pixels, SHAPES.index(*shapes), COLORS.index(*colors)))
    pixels, shapes, colors = zip(*found, strict=True)
    return Pictures(np.stack(pixels), np.array(shapes), np.array(colors))


def move_shape(pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The picture with its shape at another place, mirrored or not, and where the shape is (64, 64)."""
    colors, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    background = colors[counts.argmax()]
    rows, columns = np.nonzero((pixels != background).any(-1))
    cut = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    if rng.random() < 0.5:
        cut = cut[:, ::-1]
    moved = np.broadcast_to(background, pixels.shape).copy()
    top, left = (int(rng.integers(0, 65 - side)) for side in cut.shape[:2])
    moved[top : top + len(cut), left : left + cut.shape[1]] = cut
    return moved, (moved != background).any(-1)


def draw_batch(pictures: Pictures, chosen: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, 96, 96), normalised, and for each the share of every patch (B, 144) that the shape covers."""
    drawn, shares = [], []
    for number in chosen:
        moved, mask = move_shape(pictures.pixels[number], rng)
        drawn.append(np.asarray(Image.fromarray(moved).resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
        share = Image.fromarray(mask.astype(np.uint8) * 255).resize((GRID, GRID), Image.Resampling.BOX)
        shares.append(np.asarray(share).reshape(-1) / 255)
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255
    return (pixels - IMAGE_MEAN) / IMAGE_STD, torch.from_numpy(np.stack(shares)).float()


def new_tower() -> CLIPVisionModel:
    """An untrained tower. LLaVA reads the last hidden layer but one, so the last layer is dead weight kept for form."""
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            patch_size=PATCH,
            image_size=SIZE,
            projection_dim=WIDTH,
        )
    )
    for name, parameter in tower.named_parameters():
        if "position_embedding" in name:
            nn.init.normal_(parameter, std=0.1)
        elif "patch_embedding" in name:
            nn.init.normal_(parameter, std=(3 * PATCH**2) ** -0.5)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return tower


def patch_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """(pictures, 3, 96, 96) -> (pictures, 144, WIDTH): what LLaVA takes from a tower."""
    return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def train_tower(
    pictures: Pictures, seed: int, log: Log, steps: int = 400, batch: int = 32, held_out: int = 400, lr: float = 2e-3
) -> CLIPVisionModel:
    """Teaches a tower to say of each patch whether it shows the shape, and if so which and in which colour.

    Two linear heads do the naming and are thrown away. The last ``held_out`` training pictures only measure.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 40])
    tower, head = new_tower(), nn.Linear(WIDTH, len(SHAPES) + len(COLORS) + 2)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    sizes = (len(SHAPES) + 1, len(COLORS) + 1)
    shapes, colors = torch.from_numpy(pictures.shapes), torch.from_numpy(pictures.colors)
    trained = len(pictures.pixels) - held_out

    def name_patches(chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pixels, share = draw_batch(pictures, chosen, rng)
        shape, color = head(patch_features(tower, pixels)).split(sizes, -1)
        shown = share >= SHARE
        shape_is = torch.where(shown, shapes[chosen][:, None], len(SHAPES))
        color_is = torch.where(shown, colors[chosen][:, None], len(COLORS))
        return shape, color, shape_is, color_is

    for step in range(steps):
        set_lr(optimizer, lr * min(1, (step + 1) / 50) * half_cosine(step / steps))
        shape, color, shape_is, color_is = name_patches(rng.integers(0, trained, batch))
        loss = F.cross_entropy(shape.flatten(0, 1), shape_is.flatten())
        loss = loss + F.cross_entropy(color.flatten(0, 1), color_is.flatten())
        descend(optimizer, parameters, loss)
        if step % 100 == 0:
            log(f"tower step {step}: loss {loss.item():.4f}")
    with torch.no_grad():
        shape, color, shape_is, color_is = name_patches(np.arange(trained, len(pictures.pixels)))
    shown = shape_is < len(SHAPES)
    log(
        f"tower: {held_out} training pictures kept apart; of patches with the shape "
        f"{(shape.argmax(-1) == shape_is)[shown].float().mean():.1%} name it, "
        f"{(color.argmax(-1) == color_is)[shown].float().mean():.1%} its colour; "
        f"{(shape.argmax(-1) == shape_is)[~shown].float().mean():.1%} of the others say there is none"
    )
    return tower


def train_projector(
    tower: CLIPVisionModel,
    pictures: Pictures,
    shapes_VD: Tensor,
    colors_VD: Tensor,
    blank_D: Tensor,
    seed: int,
    log: Log,
    steps: int = 150,
    batch: int = 16,
    lr: float = 3e-3,
) -> LlavaMultiModalProjector:
    """Maps what the tower says of a patch to the sum of the decoder's embeddings of shape and colour, or ``blank_D``.

    This stands in for stage 1: the decoder does not take part, only its embedding table.

    Args:
        shapes_VD: embeddings (3, D) of the words `SHAPES`; ``colors_VD`` (8, D) of `COLORS`.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 50])
    projector = LlavaMultiModalProjector(
        LlavaConfig(
            vision_config=tower.config,
            text_config=LlamaConfig(hidden_size=shapes_VD.shape[1], num_attention_heads=1),
            projector_hidden_act="gelu",
        )
    )
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    parameters = list(projector.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    words_ND = shapes_VD[pictures.shapes] + colors_VD[pictures.colors]
    scale = words_ND.square().mean()
    for step in range(steps):
        set_lr(optimizer, lr * half_cosine(step / steps))
        chosen = rng.integers(0, len(pictures.pixels), batch)
        pixels, share = draw_batch(pictures, chosen, rng)
        with torch.no_grad():
            features = patch_features(tower, pixels)
        shown = share >= SHARE
        wanted = torch.where(shown[..., None], words_ND[chosen][:, None], blank_D)
        error = (projector(features) - wanted).square().mean(-1) / scale
        here, elsewhere = error[shown].mean(), error[~shown].mean()
        descend(optimizer, parameters, here + elsewhere)  # few patches show the shape: weigh both kinds alike
        if step % 50 == 0 or step == steps - 1:
            log(f"projector step {step}: of the embeddings' variance {here.item():.3f} unexplained at the shape, "
                f"{elsewhere.item():.3f} elsewhere")  # fmt: skip
    return projector
