"""Freezing and parameter groups: nothing lost, nothing twice, everything at its own rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, Qwen3Config

from llava_pdrop.checkpoint.hf_models import make_hf_model
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.train.optim import MODEL_PARTS, freeze, parameter_groups, part_of, trainable_table
from llava_pdrop.types import ImageInput, PackedBatch, Sample

RATES = {"language_model": 1e-5, "projector": 2e-5, "vision_tower": 2e-6}
GEOMETRIES = {
    "llava": ImageGeometry(24, 12),
    "llava_next": ImageGeometry(24, 12, "anyres", "spatial_unpad", ((24, 48), (48, 24), (48, 48))),
}


def model(kind: str = "llava", decoder: type = LlamaConfig) -> PyramidLlava:
    text = decoder(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=12
    )
    return PyramidLlava(make_hf_model(text, vision, GEOMETRIES[kind], 63))


@pytest.mark.parametrize("kind", GEOMETRIES)
@pytest.mark.parametrize("decoder", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("trainable", [("projector",), ("projector", "language_model"), tuple(MODEL_PARTS)])
def test_groups_hold_every_trainable_parameter_once(kind, decoder, trainable):
    net = model(kind, decoder)
    freeze(net, trainable)
    groups = parameter_groups(net, RATES, weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    wanted = [id(parameter) for parameter in net.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(wanted) and len(set(grouped)) == len(grouped)
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        group = group_of[id(parameter)]
        assert group["lr"] == RATES[part_of(name)]
        is_norm_or_bias = name.endswith("bias") or "norm" in name or "layrnorm" in name
        assert group["weight_decay"] == (0.0 if is_norm_or_bias else 0.1), name
    assert groups[0]["lr"] == RATES["language_model" if "language_model" in trainable else "projector"]


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_every_trainable_parameter_of_a_whole_model_gets_a_gradient(kind):
    net = model(kind)
    freeze(net, tuple(MODEL_PARTS))
    size = (40, 24)
    count, tiles = net.geometry.num_tokens(size), net.geometry.num_tiles(size)
    labels = torch.full((count + 3,), -100)
    labels[-1] = 5
    image = ImageInput(torch.randn(tiles, 3, 24, 24), size)
    sample = Sample("s", torch.tensor([1, *[63] * count, 4, 5]), labels, (image,), ((1, 1 + count),))
    net(PackedBatch.pack([sample])).loss.backward()
    without = [name for name, parameter in net.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not without
    frozen = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    assert frozen and all("layers.1." in name or "post_layernorm" in name for name in frozen)


def test_parts_cover_the_model_and_unknown_names_are_refused():
    assert {part_of(name) for name, _ in model("llava_next").named_parameters()} == set(MODEL_PARTS)
    assert part_of("module.host.model.image_newline") == "projector"
    assert part_of("host.model.language_model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight") == "language_model"
    with pytest.raises(AssertionError, match="belongs to none"):
        part_of("host.adapter.weight")
    with pytest.raises(ValueError, match="model.trainable"):
        freeze(model(), ("projektor",))


def test_table_counts():
    net = model()
    freeze(net, ("projector",))
    rows = {part: cells for part, *cells in trainable_table(net, RATES).rows}
    projector = sum(parameter.numel() for parameter in net.hf.model.multi_modal_projector.parameters())
    assert rows["projector"] == [f"{projector:,}", f"{projector:,}", "2e-05"]
    assert rows["vision_tower"][1:] == ["0", "frozen"]
    assert rows["all"][:2] == [f"{sum(p.numel() for p in net.parameters()):,}", f"{projector:,}"]


def test_batch_norm_free():
    """The rule "norms by name" would miss a norm called otherwise; none of the parts has one."""
    for decoder in (LlamaConfig, Qwen3Config):
        for name, module in model(decoder=decoder).named_modules():
            if "Norm" in type(module).__name__ and not isinstance(module, nn.LayerNorm):
                assert "norm" in name
