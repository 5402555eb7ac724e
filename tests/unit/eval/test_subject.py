"""How a model from elsewhere is asked."""

from __future__ import annotations

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.subject import CHAT, asked_by
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
