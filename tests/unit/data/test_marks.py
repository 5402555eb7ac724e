"""Which marks of a template a tokenizer knows, and what may not stand in a text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llava_pdrop.data.conversation import TEMPLATES, Template
from llava_pdrop.data.marks import control_tokens, end_ids, fitting, split_marks, token_of

LLAMA_3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture
def with_tokens(tokenizer):
    """The byte tokenizer without its own ends, and with other special tokens."""

    def make(*names: str, special: bool = True) -> PreTrainedTokenizerFast:
        content = tokenizer.backend_tokenizer.to_str()
        for name in ("<s>", "</s>"):
            content = content.replace(name, name.upper())
        made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content), unk_token="<unk>")
        made.add_tokens(list(names), special_tokens=special)
        return made

    return make


def test_marks_that_fall_into_several_tokens(tokenizer, with_tokens):
    """v1 on a Llama-3 tokenizer and the reverse."""
    llama_3 = with_tokens(*LLAMA_3)
    assert split_marks(TEMPLATES["v1"], tokenizer) == ([], [])
    assert split_marks(TEMPLATES["llama_3"], llama_3) == ([], [])
    assert split_marks(TEMPLATES["v1"], llama_3) == (["</s>"], [])
    assert split_marks(TEMPLATES["llama_3"], tokenizer)[0] == LLAMA_3[1:]
    assert split_marks(TEMPLATES["qwen_2"], with_tokens("<|im_end|>"))[0] == ["<|im_start|>"]
    assert split_marks(TEMPLATES["gemma"], llama_3)[0] == ["<start_of_turn>", "<end_of_turn>"]
    assert split_marks(TEMPLATES["llama_2"], with_tokens("</s>"))[0] == ["<s>"]


def test_plain_marks_are_told_apart(tokenizer, with_tokens):
    assert split_marks(TEMPLATES["mistral_instruct"], tokenizer) == ([], ["[INST]", "[/INST]"])
    assert split_marks(TEMPLATES["mistral_instruct"], with_tokens("</s>", "[INST]", "[/INST]")) == ([], [])
    assert split_marks(TEMPLATES["llava_llama_2"], tokenizer)[1] == ["[INST]", "<<SYS>>", "<</SYS>>", "[/INST]"]
    assert split_marks(TEMPLATES["llava_v0"], tokenizer) == ([], ["###"])
    assert split_marks(TEMPLATES["qa"], tokenizer) == split_marks(TEMPLATES["plain"], tokenizer) == ([], [])


def test_a_new_template_needs_no_list_of_its_marks(tokenizer):
    row = Template(before_question="<|ask|>", before_answer="<reply>", end="<|done|>")
    assert split_marks(row, tokenizer)[0] == ["<|ask|>", "<reply>", "<|done|>"]


def test_the_unknown_token_is_no_mark():
    from tokenizers import models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_of("</s>", words) is None and split_marks(TEMPLATES["v1"], words)[0] == ["</s>"]


def test_templates_that_fit(tokenizer, with_tokens):
    assert fitting(with_tokens(*LLAMA_3)) == ["llama_3"]
    assert {"v1", "llama_2", "mistral_instruct"} <= set(fitting(tokenizer)) and "qa" not in fitting(tokenizer)


def test_tokens_that_end_an_answer(tokenizer, with_tokens):
    llama_3 = with_tokens(*LLAMA_3)
    assert end_ids(TEMPLATES["llama_3"], llama_3) == [llama_3.convert_tokens_to_ids("<|eot_id|>")]
    assert end_ids(TEMPLATES["v1"], tokenizer) == [2] and end_ids(TEMPLATES["v1"], llama_3) == []
    assert [tokenizer.decode([token]) for token in end_ids(TEMPLATES["qa"], tokenizer)] == ["\n"]
    assert end_ids(TEMPLATES["llava_v0"], tokenizer) == []


def test_what_may_not_stand_in_a_text(tokenizer, with_tokens):
    assert control_tokens(tokenizer).findall("<s> </s> <unk> <|picture|> <image> <|im_end|>") == ["<s>", "</s>"]
    added = with_tokens("<|im_end|>", "<|im_end|>x", "<think>", special=False)
    assert control_tokens(added).findall("<|im_end|>x <think>") == ["<|im_end|>"]  # a mark; the others are words
    assert control_tokens(with_tokens("<|im_end|>", "<|im_end|>x")).findall("<|im_end|>x") == ["<|im_end|>x"]
