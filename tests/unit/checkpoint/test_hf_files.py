"""The small files of a Hugging Face directory."""

from __future__ import annotations

import json

from llava_pdrop.checkpoint.hf_files import chat_template_in


def test_where_a_chat_template_stands(tmp_path):
    """That of the processor, which knows of pictures, comes before that of the tokenizer."""
    assert chat_template_in(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "t"}))
    assert chat_template_in(tmp_path) == "t"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "p"}))
    assert chat_template_in(tmp_path) == "p"
    (tmp_path / "chat_template.jinja").write_text("own")
    assert chat_template_in(tmp_path) == "own"
