"""Every shipped config whose parts are known builds on the meta device, at full size and for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from llava_pdrop.config import load_config
from llava_pdrop.config_paths import number, part_configs
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.build import make_host
from llava_pdrop.model.vlm import PyramidLlava, geometry_of

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS)
def test_builds_on_meta(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    model = config.model
    decoder, tower = part_configs(model)
    assert decoder and tower, "neither config.json files nor model.reference_shape"
    vision = AutoConfig.for_model(**{**tower, "model_type": "clip_vision_model"})
    vision.image_size = model.image_size or vision.image_size
    geometry = ImageGeometry(
        vision.image_size, vision.patch_size, model.aspect, model.merge, model.pinpoints, model.rounding
    )
    with torch.device("meta"):
        host = make_host(AutoConfig.for_model(**decoder), vision, geometry, image_token_id=decoder["vocab_size"] - 1)
    built = PyramidLlava(host, config.schedule, geometry, model.attention)
    assert len(built.host.model.language_model.layers) == number(decoder, "num_hidden_layers")
    assert geometry_of(built.host.config) == geometry
    if "7b" in path:
        assert sum(p.numel() for p in built.parameters()) == pytest.approx(7.06e9, rel=0.01)
