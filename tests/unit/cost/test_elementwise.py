"""Bytes of element-wise kernels against every operation of a traced module that is neither a view nor a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_pdrop.cost.elementwise import (
    KERNELS,
    layer_bytes,
    loss_bytes,
    norm_bytes,
    optimizer_bytes,
    projector_bytes,
    tower_layer_bytes,
)
from llava_pdrop.model import attention
from tests.messages import says

TOKENS = 384

NOT_ELEMENTWISE = ("mm", "attention", "convolution", "empty", "view")
"""Parts of the names of products and attention, of allocations, and of views that say they are copies."""


class Bytes(TorchDispatchMode):
    """Adds up what operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        is_view = any(found.alias_info and not found.alias_info.is_write for found in function._schema.returns)
        if not is_view and not any(word in name for word in NOT_ELEMENTWISE):
            read = () if "nll_loss" in name else (args, kwargs or {})  # it gathers one number of a row
            tensors = [t for t in tree_flatten((read, out))[0] if isinstance(t, Tensor)]
            self.total += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
        return out


def traced(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, int]:
    """Bytes of the forward and of the backward of ``function``, whose weights have no gradient yet: what a leaf gets
    first is not added to anything."""
    with Bytes() as forward:
        y = function(x)
    gradient = torch.ones_like(y)
    with Bytes() as backward:
        y.backward(gradient)
    return forward.total, backward.total


def decoder_layer(text: LlamaConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    attention.register()
    text._attn_implementation = attention.NAME
    layer = LlamaDecoderLayer(text, 0).to(torch.bfloat16)
    position_1T = torch.arange(TOKENS)[None]
    rope = LlamaRotaryEmbedding(text)(torch.zeros(1, 1, dtype=torch.bfloat16), position_1T)
    segments = attention.Segments([TOKENS], torch.tensor([0, TOKENS], dtype=torch.int32))
    return layer, lambda x_TD: layer(
        x_TD[None], attention_mask=None, position_ids=position_1T, past_key_values=None, use_cache=False,
        position_embeddings=rope, segments=segments,
    ).squeeze(0)  # fmt: skip


def stream(width: int) -> Tensor:
    return torch.randn(TOKENS, width, dtype=torch.bfloat16).requires_grad_()


TEXTS = [
    dict(hidden_size=128, intermediate_size=344, num_attention_heads=4),
    dict(hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2),
    dict(hidden_size=128, intermediate_size=344, num_attention_heads=4, head_dim=16),
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("learns", [True, False])
def test_a_decoder_layer(text: dict[str, Any], learns: bool) -> None:
    config = LlamaConfig(**text)
    layer, run = decoder_layer(config)
    layer.requires_grad_(learns)
    forward, backward = traced(run, stream(128))
    moved = layer_bytes(config, TOKENS, learns)
    assert moved.forward == pytest.approx(forward, rel=0.01)
    assert moved.backward == pytest.approx(backward, rel=0.02)
    assert moved.again == moved.forward - 3 * 2 * TOKENS * 128, "the last residual add is not made again"


def test_a_layer_of_the_tower() -> None:
    config = CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_attention_heads=4)
    config._attn_implementation = "sdpa"
    layer = CLIPEncoderLayer(config).to(torch.bfloat16)
    forward, backward = traced(lambda x_TD: layer(x_TD[None], attention_mask=None), stream(128))
    moved = tower_layer_bytes(config, TOKENS)
    assert moved.forward == pytest.approx(forward, rel=0.01)
    assert moved.backward == pytest.approx(backward, rel=0.02)


def test_norm_loss_and_projector() -> None:
    norm = LlamaRMSNorm(128).to(torch.bfloat16)
    forward, backward = traced(norm, stream(128))
    moved = norm_bytes(128, TOKENS)
    assert (moved.forward, moved.backward) == (pytest.approx(forward, rel=0.01), pytest.approx(backward, rel=0.01))

    label_L = torch.randint(0, 500, (TOKENS,))
    forward, backward = traced(
        lambda logits_LV: F.cross_entropy(logits_LV.float(), label_L, reduction="sum"), stream(500)
    )
    moved = loss_bytes(500, TOKENS)
    assert (moved.forward, moved.backward) == (pytest.approx(forward, rel=0.02), pytest.approx(backward, rel=0.02))

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=64, num_attention_heads=4), text_config=LlamaConfig(hidden_size=128)
    )
    projector = LlavaMultiModalProjector(config).to(torch.bfloat16)
    forward, backward = traced(projector, stream(64))
    moved = projector_bytes(128, TOKENS)
    assert (moved.forward, moved.backward) == (pytest.approx(forward, rel=0.02), pytest.approx(backward, rel=0.02))


def test_a_fused_norm_is_what_torch_has_as_one_kernel() -> None:
    """Each number once: what `F.rms_norm` cannot do without, and an eighth of eager kernels at most."""
    fused, eager = (norm_bytes(128, TOKENS, kernels=kernels) for kernels in ("fused", "eager"))
    assert fused.forward == 2 * 2 * TOKENS * 128 and fused.backward == 5 * 2 * TOKENS * 128
    assert fused.forward < eager.forward / 8 and fused.backward < eager.backward / 8


def test_fused_kernels_move_less_and_twice_the_tokens_twice_as_much() -> None:
    config = LlamaConfig(**TEXTS[0])
    eager, fused = (layer_bytes(config, TOKENS, kernels=kernels) for kernels in KERNELS)
    assert fused.forward < eager.forward / 3 and fused.backward < eager.backward / 3
    double = layer_bytes(config, 2 * TOKENS)
    assert (double.forward, double.backward, double.again) == (2 * eager.forward, 2 * eager.backward, 2 * eager.again)
    with pytest.raises(ValueError, match=says("kernels", "'triton'", "eager", "fused")):
        layer_bytes(config, TOKENS, kernels="triton")


def test_the_optimizer_moves_bytes_by_parameter() -> None:
    assert optimizer_bytes(10.0) == 10 * 52 and optimizer_bytes(10.0, master=False) == 10 * 40
