"""The model shapes that are measured, each that of a config: a file of `CONFIGS` by its short name, or any run's.

Weights are random and made where they are used: no download, no host copy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoConfig, CLIPVisionConfig, PretrainedConfig

from llava_pdrop.checkpoint.hf_models import make_hf_model
from llava_pdrop.config.load import RUN_FILE, load_config
from llava_pdrop.config.schema import Config
from llava_pdrop.cost.flops import Recomputed
from llava_pdrop.cost.nominal import full_picture, model_of, recomputed_by, samples_of
from llava_pdrop.errors import ConfigError, UserError, check_name
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.decoder import COVERED
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.report.units import GIB
from llava_pdrop.schedule import Schedule

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

NAMED = {
    "tiny": "bench/tiny.yaml",
    "small-cpu": "bench/small_cpu.yaml",
    "llava15-7b": "llava15_7b/finetune_pdrop.yaml",
    "llava15-13b": "llava15_13b/finetune_pdrop.yaml",
    "llava-next-7b": "llava_next_7b/finetune_pdrop.yaml",
    "llava-next-7b-p9": "llava_next_7b_p9/finetune_pdrop.yaml",
}
"""Names of shapes (``llava-pdrop bench train --shape NAME``) -> their files in `CONFIGS`."""

EVEN = {"tiny": 40, "small-cpu": 150}
"""Shapes whose samples are all alike, a picture that fills the canvas and so many text tokens."""

POSITIONS = 16384
"""Of the decoder of a named shape, so that `bench prefill` measures 9 tiles on all of them."""


@dataclass(frozen=True)
class Shape:
    """A model and how it is trained.

    Attributes:
        text, vision: fields of the decoder's config, ``model_type`` among them, and of CLIPVisionConfig.
        geometry: how pictures become tiles and tokens.
        trainable: parts that learn (see `train.optim.MODEL_PARTS`).
        samples: samples of a micro-batch.
        schedule: the dropping that is compared with vanilla (empty: none is).
        recomputed: by activation checkpointing.
        attention: kernel of packed streams, one of `attention.BACKENDS`.
        kernels: of norms, rotary embedding and gated product, one of `kernels.CHOICES`.
        picture: (width, height) of every picture, or None: drawn from the training mixture.
        text_tokens: text tokens of every sample, or None: drawn from the training mixture.
        max_length: most tokens of a sample, image tokens included (``data.max_length`` of the recipe).
        half: bfloat16 weights where the device is good at it.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    geometry: ImageGeometry
    trainable: tuple[str, ...]
    samples: int
    schedule: Schedule
    recomputed: Recomputed
    max_length: int
    half: bool
    attention: str = "auto"
    kernels: str = "auto"
    picture: tuple[int, int] | None = None
    text_tokens: int | None = None

    def text_config(self) -> Any:
        """The decoder's configuration."""
        return AutoConfig.for_model(**self.text)

    def vision_config(self) -> CLIPVisionConfig:
        """The tower's configuration."""
        return CLIPVisionConfig(**self.vision)


@functools.cache
def shape_named(name: str) -> Shape:
    """The shape called ``name``.

    Raises:
        UserError: there is none, or this package was installed without its configs.
    """
    check_name("--shape", name, NAMED)
    file = CONFIGS / NAMED[name]
    if not file.is_file():
        raise UserError(
            f"--shape {name}: {file} does not exist, since configs are no part of the installed package: give a CONFIG "
            "of your own, or install a checkout (pip install -e .)"
        )
    shape = shape_of(load_config(file))
    shape = replace(shape, text=shape.text | {"max_position_embeddings": POSITIONS})
    return replace(shape, picture=full_picture(shape.geometry), text_tokens=EVEN[name]) if name in EVEN else shape


def make_model(shape: Shape, device: torch.device, seed: int = 0) -> PyramidLlava:
    """A vanilla `PyramidLlava` of ``shape`` with random weights, made on ``device``: in bfloat16 on a GPU where
    the shape is of half precision, else in float32.

    Raises:
        UserError: more weights than the free memory of a CPU, where the system would end the process without a word.
    """
    with torch.device("meta"):
        vocabulary = shape.text_config().vocab_size
        hf = make_hf_model(shape.text_config(), shape.vision_config(), shape.geometry, image_token_id=vocabulary - 2)
    hf = hf.to(torch.bfloat16 if shape.half and device.type == "cuda" else torch.float32)
    needed, free = sum(p.nbytes for p in hf.parameters()), psutil.virtual_memory().available
    if device.type == "cpu" and needed > free:
        raise UserError(
            f"the weights take {needed / GIB:.1f} GiB and {free / GIB:.1f} GiB of memory are free: take a GPU, or "
            "a smaller model"
        )
    hf = hf.to_empty(device=device)
    hf.tie_weights()  # `to_empty` has parted what a small decoder shares: its embedding and its head
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for module in hf.modules():
            _fill(module, generator)
    return PyramidLlava(hf, geometry=shape.geometry)


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Weights of a fresh Hugging Face model: normal(0, 0.02) matrices, ones in norms, zeros in biases. Buffers that
    the modules compute themselves (rotary frequencies, position ids) are computed again, since meta has no values."""
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias":
            parameter.zero_()
        elif "norm" in type(module).__name__.lower():
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    buffers: dict[str, Any] = dict(module.named_buffers(recurse=False))
    if "inv_freq" in buffers:
        fresh = type(module)(module.config)
        for name in buffers:  # in float32 whatever the weights are, as `build` keeps them
            setattr(module, name, fresh.get_buffer(name).to(buffers[name].device))
    elif "position_ids" in buffers:
        buffers["position_ids"].copy_(torch.arange(buffers["position_ids"].shape[-1]))
    elif buffers:
        raise AssertionError(f"buffers {list(buffers)} of {type(module).__name__} have no known values")


# Which shape a bench measures: a named one, or that of a run's config, without its weights and data.


def chosen_shape(shape: str | None, words: Sequence[str], cuda: bool) -> tuple[str, Shape]:
    """(name, shape) that a bench is asked for: by ``--shape``, or by ``words``, which are CONFIG (a YAML file, or the
    directory of a run) and its overrides; by default the shape that suits the device.

    Raises:
        UserError: both are given, there is no such shape, or the config cannot be measured.
    """
    if not words:
        name = shape or ("llava-next-7b" if cuda else "tiny")
        return name, shape_named(name)
    if shape is not None:
        raise UserError(f"--shape {shape} and CONFIG ({words[0]}) exclude each other: give one of them")
    path = Path(words[0])
    config = load_config(path / RUN_FILE if path.is_dir() else path, words[1:])
    return config.name, shape_of(config)


def shape_of(config: Config) -> Shape:
    """What the benches measure of a run: its model and how it is trained. Its data are not asked for.

    The decoder gets positions for ``data.max_length`` where its config.json has fewer, since training does not stop at
    its limit either (rotary embeddings go on). ``fp16`` is measured in bfloat16, as fast on GPUs that have both.

    Raises:
        ConfigError: the numbers are not on this machine (`model_of`), a decoder or tower that cannot be trained here,
            or LoRA, whose steps the benches do not do.
    """
    if config.lora is not None:
        raise ConfigError(
            f"{config.file}: lora: the benches have no adapters: add lora=null to measure the model trained whole, or "
            "train some steps (train.max_steps=20) and read metrics.jsonl"
        )
    model = model_of(config)
    text, vision = model.config.text_config, model.config.vision_config
    for part, kind, known in (
        ("decoder", text.model_type, COVERED),
        ("vision tower", vision.model_type, ("clip_vision_model",)),
    ):
        if kind not in known:
            raise ConfigError(
                f"{config.file}: the {part} is of model_type {kind!r}, which cannot be trained here: choose "
                f"{' or '.join(known)}"
            )
    arguments = config.train.arguments
    return Shape(
        text={
            **_own_fields(text),
            "model_type": text.model_type,
            "tie_word_embeddings": model.config.tie_word_embeddings,
            "max_position_embeddings": max(text.max_position_embeddings, config.data.max_length),
        },
        vision=_own_fields(vision),
        geometry=model.geometry,
        trainable=config.model.trainable,
        samples=samples_of(config, model.geometry),
        schedule=config.schedule.check(model.layers),
        recomputed=recomputed_by(config, model.layers),
        attention=config.model.attention,
        kernels=config.model.kernels,
        max_length=config.data.max_length,
        half=bool(arguments.get("bf16") or arguments.get("fp16")),
    )


def _own_fields(config: Any) -> dict[str, Any]:
    """The fields of a Hugging Face config that are about its kind of model and not about models in general."""
    general = PretrainedConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if name not in general}
