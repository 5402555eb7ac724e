"""What the tests of the plug-in share: prompts, generation with logits, and the packed model as reference."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from llava_pdrop.generate.plugin import detach
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model import attention
from llava_pdrop.model.vlm import HfLlava, PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import IGNORE_INDEX, PackedBatch, Sample
from tests.tiny import PAD, make_sample, make_tiny_hf

NEW = 6
DECODERS = ("llama", "llama_gqa", "llama_mqa", "mistral", "mistral_window", "qwen2", "qwen3")
# Older transformers repeat the pictures of a row one by one for its beams (A A B B), which mixes up rows with several.
REPEATS_ROWS = Version(transformers.__version__) >= Version("5.19")

SQUARE = (28, 28)
ONE = (1, SQUARE, 3)
TWO = (SQUARE, SQUARE, 2)  # two images without text between them
NONE = (3,)


def make_hf_model(decoder: str = "llama_gqa", geometry: ImageGeometry = PAD, implementation: str = "sdpa") -> HfLlava:
    """A tiny random LLaVA for generation; ``mistral_window`` has a sliding window shorter than the prompts."""
    hf = make_tiny_hf(decoder.removesuffix("_window"), geometry).eval()
    if decoder.endswith("_window"):
        hf.config.text_config.sliding_window = 9
    attention.register()
    hf.set_attn_implementation(implementation)
    return hf


def rows_of_all_kinds(geometry: ImageGeometry = PAD) -> list[Sample]:
    """One image, two, none, and an image that opens the prompt: prompts of different lengths."""
    wide, tall = ((50, 30), (28, 80)) if geometry.aspect == "anyres" else (SQUARE, SQUARE)
    pieces = [(1, wide, 3), (SQUARE, tall, 2), NONE, (tall, 1)]
    return [make_sample(*row, geometry=geometry, seed=seed) for seed, row in enumerate(pieces)]


def inputs(hf: HfLlava, *rows: Sample) -> dict[str, Tensor]:
    """Rows -> keyword arguments of the model, padded on the left."""
    longest = max(len(row.input_ids) for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row.input_ids) :] = row.input_ids
        mask[index, longest - len(row.input_ids) :] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    images = [image for row in rows for image in row.images]
    if not images:
        return batch
    if hf.config.model_type == "llava":
        return {**batch, "pixel_values": torch.cat([image.pixels for image in images])}
    tiles = max(len(image.pixels) for image in images)
    pixels = [torch.cat([i.pixels, torch.zeros(tiles - len(i.pixels), 3, 28, 28)]) for i in images]
    sizes = torch.tensor([[height, width] for width, height in (image.size for image in images)])
    return {**batch, "pixel_values": torch.stack(pixels), "image_sizes": sizes}


def generate(hf: HfLlava, *rows: Sample, **options):
    """Greedy generation of `NEW` tokens; the output has ``sequences``, ``logits`` and ``past_key_values``."""
    return run(hf, **inputs(hf, *rows), **options)


def run(hf: HfLlava, **options):
    common = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return hf.generate(**common | options, return_dict_in_generate=True, output_logits=True, output_scores=True)


def answers(output, new: int = NEW) -> list[list[int]]:
    return output.sequences[:, -new:].tolist()


def recompute(hf: HfLlava, row: Sample, answer: list[int], schedule: Schedule, geometry: ImageGeometry = PAD) -> Tensor:
    """Logits (answer tokens, vocabulary) of the packed model over prompt and answer at once. The ranking token stays at
    the end of the prompt: the first label comes after it."""
    ids = torch.cat([row.input_ids, torch.tensor(answer)])
    labels = torch.cat([torch.full_like(row.input_ids, IGNORE_INDEX), torch.tensor(answer)])
    pyramid = PyramidLlava(detach(copy.deepcopy(hf)), schedule, geometry)
    batch = PackedBatch.pack([replace(row, input_ids=ids, labels=labels)])
    return pyramid.logits(batch)[-len(answer) - 1 : -1]


def same(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    difference = (got - expected).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.2e}"
