"""Tiny random models and samples for tests."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from llava_pdrop.checkpoint.hf_models import make_hf_model
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.vlm import HfLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import IGNORE_INDEX, ImageInput, Sample

LAYERS, VOCABULARY, IMAGE = 6, 100, 99
PYRAMID = Schedule(layers=(2, 3, 5), ratios=(0.5, 0.25, 0.125))
DECODERS: dict[str, tuple[type, dict]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama_gqa": (LlamaConfig, {"num_key_value_heads": 2}),
    "llama_mqa": (LlamaConfig, {"num_key_value_heads": 1}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
}
PAD = ImageGeometry(28, 7)
ANYRES = ImageGeometry(28, 7, "anyres", "spatial_unpad", ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84)))


def make_tiny_hf(decoder: str = "llama", geometry: ImageGeometry = PAD, seed: int = 0) -> HfLlava:
    """A random LLaVA with 6 layers; wide weights, so that attention is far from uniform."""
    kind, options = DECODERS[decoder]
    text = kind(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    torch.manual_seed(seed)
    hf = make_hf_model(text, vision, geometry, IMAGE)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return hf


def make_sample(*pieces: int | str | tuple[int, int], geometry: ImageGeometry = PAD, seed: int = 0) -> Sample:
    """A sample from pieces: a number is so many random prompt tokens, ``"3"`` an answer of so many, a (width, height)
    an image of that size."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels, images, spans = [1], [IGNORE_INDEX], [], []
    for piece in pieces:
        if isinstance(piece, tuple):
            count = geometry.num_tokens(piece)
            tiles = geometry.num_tiles(piece)
            pixels = torch.randn(tiles, 3, geometry.tile, geometry.tile, generator=generator)
            images.append(ImageInput(pixels, piece))
            spans.append((len(ids), len(ids) + count))
            ids += [IMAGE] * count
            labels += [IGNORE_INDEX] * count
        else:
            tokens = torch.randint(2, IMAGE, (int(piece),), generator=generator).tolist()
            ids += tokens
            labels += tokens if isinstance(piece, str) else [IGNORE_INDEX] * len(tokens)
    return Sample(f"seed {seed}", torch.tensor(ids), torch.tensor(labels), tuple(images), tuple(spans))


def mixed_samples(geometry: ImageGeometry = PAD) -> list[Sample]:
    """One image; two images and two answers; text only; no answer; pictures of other sizes."""
    return [
        make_sample(3, (28, 28), 5, "4", geometry=geometry, seed=1),
        make_sample((50, 20), 4, (20, 60), 6, "3", 2, "2", geometry=geometry, seed=2),
        make_sample(9, "5", geometry=geometry, seed=3),
        make_sample(2, (60, 30), 7, geometry=geometry, seed=4),
        make_sample((28, 28), "6", geometry=geometry, seed=5),
    ]
