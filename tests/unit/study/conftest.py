"""A model of another family, whole in its directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from llava_pdrop.checkpoint.build import build_parts


@pytest.fixture
def vip(tiny_files: Path, tmp_path: Path) -> Path:
    """A VipLlava, which is asked by its own processor: pictures of 48 pixels in patches of 12."""
    torch.manual_seed(0)
    parts = build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"))
    config = transformers.VipLlavaConfig(
        text_config=parts.hf.config.text_config,
        vision_config=parts.hf.config.vision_config,
        image_token_index=parts.hf.config.image_token_id,
        vision_feature_layers=[-2, -1],
        tie_word_embeddings=False,
    )
    transformers.VipLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "vip")
    processor = parts.processor()
    processor.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor.save_pretrained(tmp_path / "vip")
    return tmp_path / "vip"
