"""The tower runs the layers that lead to the feature layer, in every shape transformers gives it."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from llava_pdrop.model.vision import image_features, pooled, tower_hidden, used_tower_layers
from tests.slow_pooling import slow_pooled
from tests.tiny import make_tiny_hf

LAYERS = 4
CONFIG = CLIPVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=28, patch_size=7
)


@pytest.mark.parametrize("feature", [-1, -2, -LAYERS - 1, 0, 1, LAYERS])
@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPVisionModelWithProjection], ids=["flat", "nested"])
def test_hidden_states_are_those_of_transformers(kind, feature):
    torch.manual_seed(0)
    tower, pixels = kind(CONFIG).eval(), torch.randn(3, 3, 28, 28)
    hf = make_tiny_hf()
    hf.config.vision_config, hf.config.vision_feature_layer = CONFIG, feature
    layers = used_tower_layers(hf.config)
    assert layers == range(LAYERS + 1)[feature]
    with torch.no_grad():
        theirs = tower(pixels, output_hidden_states=True).hidden_states[feature]
        torch.testing.assert_close(tower_hidden(tower, pixels, layers), theirs, atol=0, rtol=0)


def test_layers_beyond_the_feature_layer_do_not_run():
    hf = make_tiny_hf()
    called: list[str] = []
    for name, module in hf.model.vision_tower.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    rows = image_features(hf, torch.randn(2, 3, 28, 28))
    assert rows.shape == (2 * 16, 32)
    assert "encoder.layers.0" in called
    assert not [name for name in called if name.startswith(("encoder.layers.1", "post_layernorm"))]


def test_no_hidden_state_outlives_the_next_layer_without_gradients():
    hf = make_tiny_hf()
    tower = CLIPVisionModel(CONFIG).requires_grad_(False)
    hf.model.vision_tower = tower
    hf.config.vision_config = CONFIG
    alive: list[int] = []
    seen: list = []

    def remember(module, inputs, output):
        seen.append(torch.multiprocessing.reductions.StorageWeakRef(output.untyped_storage()))
        alive.append(sum(not storage.expired() for storage in seen))

    for layer in tower.encoder.layers:
        layer.register_forward_hook(remember)
    image_features(hf, torch.randn(1, 3, 28, 28))
    assert alive == [1, 2, 2]  # its own output, and the input it was computed from


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [1, 2, 4, 5, 6])
def test_a_pooled_feature_is_the_mean_of_its_cell(side, dtype):
    feature_IPW = torch.randn(2, 36, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = pooled(feature_IPW, side)
    expected = slow_pooled(feature_IPW.float(), side)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), expected, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=0)


def test_pooled_features_are_projected():
    hf = make_tiny_hf()
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    hidden = tower_hidden(hf.model.vision_tower, pixels, used_tower_layers(hf.config))[:, 1:]
    expected = hf.model.multi_modal_projector(slow_pooled(hidden, 3)).flatten(0, 1)
    torch.testing.assert_close(image_features(hf, pixels, 3), expected, atol=1e-6, rtol=1e-5)
