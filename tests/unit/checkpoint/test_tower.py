"""Vision towers that the original code, on transformers 4.37, can open where it looks for them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.convert import convert
from llava_pdrop.checkpoint.load import save_pretrained
from llava_pdrop.checkpoint.shards import open_tensors
from llava_pdrop.checkpoint.tower import open_tower, opens_in_transformers_4
from llava_pdrop.files import read_json
from tests.unit.checkpoint.layout_files import TOWER, write_file

TRANSFORMERS_4 = re.compile(
    r"vision_model\.(pre_layrnorm|post_layernorm)\.(weight|bias)"
    r"|vision_model\.embeddings\.(class_embedding|(patch|position)_embedding\.weight)"
    r"|vision_model\.encoder\.layers\.\d+\.(layer_norm[12]|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.(weight|bias)"
)
"""Every parameter of CLIPVisionModel in transformers 4."""


@pytest.fixture
def run(tiny_files, tmp_path) -> Path:
    """A model on a tower that transformers 5 has saved, as Hugging Face's layout."""
    parts = build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"))
    save_pretrained(parts.hf, parts.processor(), tmp_path / "run")
    return tmp_path / "run"


def test_which_towers_the_original_code_opens(tiny_files, tmp_path):
    assert opens_in_transformers_4(str(TOWER), 56) and not opens_in_transformers_4(str(TOWER), 84)
    assert opens_in_transformers_4("openai/clip-vit-large-patch14-336", 336)
    assert not opens_in_transformers_4(str(tiny_files / "tower"), 48)
    shutil.copytree(TOWER, tmp_path / "tower", ignore=shutil.ignore_patterns("preprocessor_config.json"))
    assert not opens_in_transformers_4(str(tmp_path / "tower"), 56)


def test_a_tower_of_transformers_5_goes_along_under_the_old_names(run, tiny_files, tmp_path):
    convert(str(run), tmp_path / "original", "llava")
    inside = tmp_path / "original" / "vision_tower"
    fields = read_json(tmp_path / "original" / "config.json")
    assert fields["mm_vision_tower"] == str(inside) and fields["unfreeze_mm_vision_tower"] is False
    assert all(TRANSFORMERS_4.fullmatch(name) for name in open_tensors(inside))
    assert opens_in_transformers_4(str(inside), 48)
    config, tensors = open_tower(str(inside))
    theirs, before = open_tower(str(tiny_files / "tower"))
    assert config.to_diff_dict() | {"dtype": None} == theirs.to_diff_dict() | {"dtype": None}
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[name].read(), before[name].read()) for name in before)
    assert read_json(inside / "config.json")["torch_dtype"] == "float32"
    assert read_json(inside / "preprocessor_config.json")["image_processor_type"] == "CLIPImageProcessor"


def test_a_checkpoint_with_its_tower_may_be_moved(run, tmp_path):
    convert(str(run), tmp_path / "original", "llava")
    (tmp_path / "original").rename(tmp_path / "moved")
    ours, before = build_parts(str(tmp_path / "moved")).hf.state_dict(), build_parts(str(run)).hf.state_dict()
    tower = [name for name in before if "vision_tower" in name]
    assert tower and all(torch.equal(ours[name], before[name]) for name in tower)


def test_a_trained_tower_is_the_one_inside(run, tmp_path):
    tensors = {name: tensor.read() for name, tensor in open_tensors(run).items()}
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    write_file(run / "model.safetensors", tensors | {name: tensors[name] + 1})
    convert(str(run), tmp_path / "original", "llava")
    assert read_json(tmp_path / "original" / "config.json")["unfreeze_mm_vision_tower"] is True
    inside = open_tensors(tmp_path / "original" / "vision_tower")
    assert torch.equal(inside[name.removeprefix("vision_tower.")].read(), tensors[name] + 1)
