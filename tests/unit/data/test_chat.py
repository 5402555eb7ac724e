"""Chat templates say what our own prompts say, letter by letter, for every template and every form of content."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from llava_pdrop.data.chat import add_ends, give_chat, jinja_of, shows_images
from llava_pdrop.data.conversation import TEMPLATES, Template
from llava_pdrop.data.entries import parse_entry
from tests.messages import says

IMAGE = {"type": "image"}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def turn(role: str, *content) -> dict:
    """Of texts alone a string, as people write it."""
    plain = len(content) == 1 and isinstance(content[0], str)
    parts = [words(part) if isinstance(part, str) else part for part in content]
    return {"role": role, "content": content[0] if plain else parts}


CONVERSATIONS = {
    "a text": [turn("user", "Where?")],
    "a marker in a text": [turn("user", "<image>\nWhere?")],
    "a marker behind a text": [turn("user", "  Where is <image> ?  ")],
    "an image and a text": [turn("user", IMAGE, "Where?")],
    "a text and an image": [turn("user", "Where?", IMAGE)],
    "an image between texts": [turn("user", "Is", IMAGE, "\nin", "", "side?")],
    "an image alone": [turn("user", IMAGE)],
    "several images": [turn("user", IMAGE, "", "and", IMAGE, IMAGE, "differ how?\n", IMAGE)],
    "rounds": [turn("user", IMAGE, "Where?"), turn("assistant", "Here."), turn("user", "And\nnow?")],
    "whole rounds": [turn("user", IMAGE, "Where?"), turn("assistant", words("'Here' \\n {{ x }} {% y %}"))],
    "images in two rounds": [turn("user", IMAGE, "A"), turn("assistant", "b"), turn("user", "C", IMAGE)],
    "an empty answer": [turn("user", IMAGE, "A"), turn("assistant", ""), turn("user", "C")],
    "an image in an answer": [turn("user", "A"), turn("assistant", "b", IMAGE), turn("user", "C")],
    "a greeting": [turn("assistant", "Hello."), turn("user", IMAGE, "A")],
    "a system turn": [turn("system", "Be brief, it's late."), turn("user", IMAGE, "A")],
    "a system turn of parts": [turn("system", words("Be "), words("FIRST")), turn("user", "A"), turn("assistant", "b")],
    "an empty system turn": [turn("system", ""), turn("user", IMAGE, "A")],
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Knows the marks of LLaMA and of ChatML."""
    names = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "a"]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(names[:-1])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def expected(template: Template, messages: list[dict], prompt: bool) -> str:
    """What training and evaluation here write, of a record as the readers of data read it.

    Raises:
        ValueError: the template, or the reader, has no way to write it.
    """
    shown = [f"{i}.png" for i in range(str(messages).count("'image'") + str(messages).count("<image>"))]
    record = parse_entry({"messages": messages, "images": shown}, Path(), "test")
    template = template.with_system(record.system)
    rounds = template.rounds(record.turns)
    if prompt and rounds[-1].answer is None:
        pieces = template.generation_prompt(rounds)
    else:
        pieces = (template.prompt_as or template).pieces(rounds)
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_says_what_ours_says(tokenizer, name):
    """Or refuses what ours refuses."""
    chat, compared = jinja_of(name), 0
    for kind, messages in CONVERSATIONS.items():
        for prompt in (True, False):
            options = dict(tokenize=False, chat_template=chat, add_generation_prompt=prompt)
            try:
                text = expected(TEMPLATES[name], messages, prompt)
            except ValueError:
                with pytest.raises(TemplateError):
                    tokenizer.apply_chat_template(messages, **options)
                continue
            assert tokenizer.apply_chat_template(messages, **options) == text, kind
            compared += 1
    refuses = {"plain": 14, "v0_plain": 14, "mistral_instruct": 4, "gemma": 4}
    assert compared == 2 * len(CONVERSATIONS) - refuses.get(name, 0)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([turn("user", "A"), turn("user", "B")], says("two questions", "alternate")),
        ([turn("user", "A"), turn("assistant", "B"), turn("assistant", "C")], says("answer", "alternate")),
        ([turn("assistant", "A"), turn("assistant", "B"), turn("user", "C")], says("answer", "alternate")),
        ([turn("assistant", IMAGE), turn("user", "C")], says("answer without a question")),
        ([turn("user", "A"), turn("system", "B")], says("system turn", "in front")),
        ([turn("system", IMAGE), turn("user", "B")], says("question", "system turn")),
        ([turn("system", "A")], says("no question")),
        ([turn("tool", "A"), turn("user", "B")], says("role", "tool")),
        ([turn("user", {"type": "video"})], says("text or an image")),
    ],
)
def test_what_cannot_be_written_is_an_error(tokenizer, messages, message):
    with pytest.raises(TemplateError, match=message):
        tokenizer.apply_chat_template(messages, chat_template=jinja_of("v1"), tokenize=False)


# ---- which one a checkpoint gets ----

TEXT_ONLY = "{% for m in messages %}{{ m['role'] + ': ' ~ m['content'] }}{% endfor %}"
FAILS = "{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"
DEAF = "{% for m in messages %}{{ '<image>' }}{% endfor %}"
OWN = (
    "{% for m in messages %}{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}"
    "{% endfor %}{% endfor %}"
)


def test_a_chat_template_that_shows_images_is_known(tokenizer):
    for chat, good in ((OWN, True), (TEXT_ONLY, False), (FAILS, False), (DEAF, False), ("{{ oops(", False)):
        tokenizer.chat_template = chat
        assert shows_images(tokenizer) == good, chat
    assert "{'type': 'image'}" in tokenizer.apply_chat_template(
        [turn("user", IMAGE)], chat_template=TEXT_ONLY, tokenize=False
    )


@pytest.mark.parametrize(
    ("own", "asked", "known", "given", "line"),
    [
        (OWN, None, "v1", OWN, says("own")),
        (OWN, "mpt", "v1", jinja_of("mpt"), says("mpt", "--template")),
        (TEXT_ONLY, None, "v1", jinja_of("v1"), says("v1", "of a test", "no images")),
        (None, None, "v1", jinja_of("v1"), says("v1", "of a test")),
        (None, None, None, None, says("none", "--template")),
        (TEXT_ONLY, None, None, None, says("none", "no images", "--template")),
        (None, None, "llama_3", None, says("none", "<|eot_id|>", "llama_3")),
    ],
)
def test_which_chat_template_is_given(tokenizer, own, asked, known, given, line):
    tokenizer.chat_template = own
    said = give_chat(tokenizer, GenerationConfig(), asked, known, "of a test")
    assert tokenizer.chat_template == given
    assert re.search(line, said) and "\n" not in said


@pytest.mark.parametrize(
    ("asked", "message"),
    [("v2", says("--template", "v2", "did you mean")), ("llama_3", says("llama_3", "<|eot_id|>", "v1", "mpt"))],
)
def test_a_template_that_cannot_be_given_is_refused(tokenizer, asked, message):
    with pytest.raises(ValueError, match=message):
        give_chat(tokenizer, GenerationConfig(), asked)


def test_generate_stops_where_the_template_ends(tokenizer):
    generation = GenerationConfig(eos_token_id=2)
    add_ends(generation, "v1", tokenizer)
    assert generation.eos_token_id == 2
    tokenizer.chat_template = None
    give_chat(tokenizer, generation, "mpt")
    assert generation.eos_token_id == [2, 4]
    nothing = GenerationConfig()
    add_ends(nothing, "qa", tokenizer)
    assert nothing.eos_token_id is None
