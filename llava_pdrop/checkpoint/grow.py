"""A larger decoder that begins as a smaller one: deeper by layers that do nothing yet, wider by copies of its features.

For machines without a network: the shipped decoder of 4 layers becomes one of a GPU's size, from which training goes
on, without anything to download and within a second.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llava_pdrop.errors import UserError

ADD_TO_STREAM = ("o_proj", "down_proj")
"""The matrices by which a layer adds to the residual stream: zero in a new layer, which then passes everything on."""


@torch.no_grad()
def grow_decoder(decoder: LlamaForCausalLM, layers: int, hidden: int, noise: float, seed: int) -> LlamaForCausalLM:
    """``decoder`` with ``layers`` layers of width ``hidden``, in float32. Without noise its logits stay the same.

    Every old layer is followed by the new ones of its share, so what the old decoder does before a quarter of its
    layers is done before a quarter of the new ones (up to the layers that are passed through). Each feature is there
    ``hidden / old`` times, so there are as many times more heads, of the old size.

    Args:
        noise: standard deviation of what is added to every old matrix, relative to that of the matrix itself. It tells
            the copies of a feature apart, which would learn the same otherwise, and leaves something to learn.

    Raises:
        UserError: ``layers`` or ``hidden`` is no multiple of the old number, or ``noise`` is negative.
    """
    old = decoder.config
    for name, new, before in (
        ("num_hidden_layers", layers, old.num_hidden_layers),
        ("hidden_size", hidden, old.hidden_size),
    ):
        if new < before or new % before:
            raise UserError(f"{name} {new} must be a multiple of the decoder's {before}")
    if noise < 0:
        raise UserError(f"noise must be at least 0, got {noise:g}")
    ways, share = hidden // old.hidden_size, layers // old.num_hidden_layers
    config = copy.deepcopy(old)
    config.update(
        {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": ways * old.intermediate_size,
            "num_attention_heads": ways * old.num_attention_heads,
            "num_key_value_heads": ways * old.num_key_value_heads,
            "head_dim": old.head_dim,
            "initializer_range": hidden**-0.5,
        }
    )
    random = torch.Generator().manual_seed(seed)
    grown = LlamaForCausalLM(config).float()
    grown.generation_config = copy.deepcopy(decoder.generation_config)
    weights = {name: tensor.float() for name, tensor in decoder.state_dict().items()}
    for name, parameter in grown.named_parameters():
        place = name.split(".")
        if "layers" in place:
            number = int(place[2])
            if number % share:
                _begin(name, parameter, random)
                continue
            place[2] = str(number // share)
        whole = weights[".".join(place)]
        if "embed_tokens" in name:
            parameter.copy_(whole.repeat(1, ways))
        else:
            parameter.copy_(widen(whole, ways, 1 if "lm_head" in name else ways))
        if whole.ndim == 2 and noise:
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=noise * float(whole.std()))
    return grown


def grow_projector(tensors: Mapping[str, Tensor], ways: int) -> dict[str, Tensor]:
    """A projector (two linear maps, under whatever names) into a stream of features that are there ``ways`` times."""
    return {
        name: widen(tensor.float(), ways if "linear_2" in name and tensor.ndim == 2 else 1, ways)
        for name, tensor in tensors.items()
    }


def widen(weight: Tensor, ways_in: int, ways_out: int) -> Tensor:
    """A matrix (O, I) between features that are there ``ways_in`` and ``ways_out`` times; or a vector (O,)."""
    if weight.ndim == 1:
        return weight.repeat(ways_out)
    return weight.repeat(ways_out, ways_in) / ways_in


def _begin(name: str, parameter: nn.Parameter, random: torch.Generator) -> None:
    """Weights of a new layer."""
    if parameter.ndim == 1:
        nn.init.ones_(parameter)
    elif any(part in name for part in ADD_TO_STREAM):
        nn.init.zeros_(parameter)
    else:
        nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=random)
