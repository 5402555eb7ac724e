"""How a model from elsewhere is asked."""

from __future__ import annotations

import json

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.subject import CHAT, asked_by, foreign_config
from tests.messages import says


@pytest.mark.parametrize(
    ("fields", "chat", "name"),
    [
        ({"text_config": {"model_type": "llama", "vocab_size": 32064}}, None, "v1"),
        ({"text_config": {"model_type": "llama", "vocab_size": 128320}}, None, "llama_3"),
        ({"text_config": {"model_type": "mistral", "vocab_size": 32064}}, None, "mistral_instruct"),
        ({"text_config": {"model_type": "qwen2", "vocab_size": 151936}}, None, "qwen_2"),
        ({"model_type": "llava_llama", "vocab_size": 32000}, None, "v1"),
        ({"model_type": "llava_mistral", "vocab_size": 32000}, None, "mistral_instruct"),
        ({"text_config": {"model_type": "mistral"}}, "{% if c.type == 'image' %}<image>{% endif %}", CHAT),
        ({"text_config": {"model_type": "mistral"}}, "{{ m.content }}", "mistral_instruct"),
    ],
)
def test_how_a_checkpoint_from_elsewhere_is_asked(tmp_path, fields, chat, name):
    assert asked_by(tmp_path, fields, chat) == name


def test_a_decoder_that_nobody_knows_is_one_line(tmp_path):
    with pytest.raises(UserError, match=says("'granite'", "model.template", "v1")):
        asked_by(tmp_path, {"text_config": {"model_type": "granite"}}, None)


@pytest.mark.parametrize(
    ("word", "positions"),
    [
        ("pyramid_drop=configs/schedules/pyramiddrop.yaml", "keep"),
        ("pyramid_drop={layers: [1], ratios: [0.5]}", "keep"),
        ("pyramid_drop={layers: [1], ratios: [0.5], positions: renumber}", "renumber"),  # which attach refuses
    ],
)
def test_positions_that_a_schedule_leaves_open_are_the_familys(tmp_path, word, positions):
    fields = {"model_type": "qwen2_5_vl", "text_config": {"num_hidden_layers": 4}}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert foreign_config(tmp_path, [word], asks=False).schedule.positions == positions
