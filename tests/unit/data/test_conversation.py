"""Templates: the text of a conversation and which of it is trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava_pdrop.data.conversation import TEMPLATES, Round, Template, image_to_front
from llava_pdrop.types import Turn
from tests.messages import says


def turns(*texts):
    return [Turn("gpt" if i % 2 else "human", text) for i, text in enumerate(texts)]


def written(name, *texts):
    """The whole text, and the trained parts of it."""
    template = TEMPLATES[name]
    pieces = template.pieces(template.rounds(turns(*texts)))
    return "".join(p.text for p in pieces), [p.text for p in pieces if p.is_target]


def test_v1():
    text, targets = written("v1", "<image>\nWhat?", "A cat.", "Sure?", "Yes.", "And now?")
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT: A cat.</s>"
        "USER: Sure? ASSISTANT: Yes.</s>USER: And now? "
    )
    assert targets == [" A cat.</s>", " Yes.</s>"]


def test_plain_keeps_only_the_images_of_the_question():
    assert written("plain", "Describe <image> briefly.", "A cat.") == ("<image>A cat.\n", ["A cat.\n"])
    assert written("plain", "<image><image>", "Cats.")[0] == "<image><image>Cats.\n"


def test_qa():
    assert written("qa", "<image>\nWhich?", "7", "And?", "8") == ("<image>\nWhich? 7\nAnd? 8\n", [" 7\n", " 8\n"])


def test_llama_2_and_mistral():
    text, targets = written("llava_llama_2", "<image>\nWhat?", "A cat.", "Sure?", "Yes.")
    assert text.startswith("[INST] <<SYS>>\nYou are a helpful language and vision assistant.")
    assert text.endswith("\n<</SYS>>\n\n<image>\nWhat? [/INST] A cat. </s><s>[INST] Sure? [/INST] Yes. </s>")
    assert targets == [" A cat. </s>", " Yes. </s>"]
    assert written("mistral_instruct", "a", "b", "c")[0] == "[INST] a [/INST] b </s>[INST] c [/INST]"


def test_v0():
    text, targets = written("llava_v0", "<image>\nWhat?", "A cat.", "Sure?", "Yes.")
    assert text.endswith(
        ".\n\n### Human: <image>\nWhat?\n### Assistant: A cat.\n### Human: Sure?\n### Assistant: Yes.\n### "
    )
    assert targets == [" A cat.\n###", " Yes.\n###"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "mpt",
            "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The assistant gives "
            "helpful and honest answers.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|><|im_start|>assistant\n"
            "[A cat.<|im_end|>]<|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n[Yes.<|im_end|>]",
        ),
        (
            "qwen_2",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
            "<|im_start|>assistant\n[A cat.<|im_end|>]\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
            "[Yes.<|im_end|>]\n",
        ),
        (
            "llama_3",
            "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are "
            "able to understand the visual content that the user provides, and assist the user with a variety of tasks "
            "using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[A cat.<|eot_id|>]<|start_header_id|>user"
            "<|end_header_id|>\n\nSure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[Yes.<|eot_id|>]",
        ),
        (
            "gemma",
            "<start_of_turn>user\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\n[A cat.<end_of_turn>]\n"
            "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n[Yes.<end_of_turn>]\n",
        ),
    ],
)
def test_formats_with_turn_tokens(name, expected):
    """What stands in brackets is trained on."""
    template = TEMPLATES[name]
    rounds = template.rounds(turns("<image>\nWhat?", "A cat.", "Sure?", "Yes."))
    assert "".join(f"[{p.text}]" if p.is_target else p.text for p in template.pieces(rounds)) == expected


def test_empty_answers():
    assert written("v1", "What?", "", "Again?", "Yes.") == (
        f"{TEMPLATES['v1'].system}USER: What? ASSISTANT:USER: Again? ASSISTANT: Yes.</s>",
        [" Yes.</s>"],
    )
    assert written("plain", "<image>", "") == ("<image>\n", ["\n"])
    text, targets = written("gemma", "What?", "")
    assert text.endswith("<start_of_turn>model\n<end_of_turn>\n") and not targets


def test_a_template_is_one_row():
    row = Template(
        system="Be brief.\n",
        before_question="Q: ",
        after_question="\n",
        before_answer="A:",
        answer_lead=" ",
        end="\n",
    )
    rounds = row.rounds(turns("<image> What?", "A cat.", "Sure?"))
    assert "".join(p.text for p in row.pieces(rounds)) == "Be brief.\nQ: <image> What?\nA: A cat.\nQ: Sure?\n"
    assert [p.text for p in row.pieces(rounds) if p.is_target] == [" A cat.\n"]
    assert "".join(p.text for p in row.generation_prompt(rounds)).endswith("Q: Sure?\nA:")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_stands_before_the_answer_in_training(name):
    template = replace(TEMPLATES[name], prompt_as=None)
    conversation = turns("<image>\nWhat?", "A cat.") + ([] if template.question_only_images else turns("Sure?", "Yes."))
    rounds = template.rounds(conversation)
    prompt = "".join(p.text for p in template.generation_prompt(rounds))
    pieces = template.pieces(rounds)
    last = max(i for i, piece in enumerate(pieces) if piece.is_target)
    assert prompt == "".join(p.text for p in pieces[:last])
    assert "".join(p.text for p in template.generation_prompt(template.rounds(conversation[:-1]))) == prompt
    assert template.stop and pieces[last].text.endswith(template.stop)


def test_a_prompt_in_another_format_than_training():
    rounds = TEMPLATES["plain"].rounds(turns("<image>\nWhat?"))
    assert "".join(p.text for p in TEMPLATES["plain"].generation_prompt(rounds)) == "<image>\nWhat?\n"
    prompt = "".join(p.text for p in TEMPLATES["v0"].generation_prompt(rounds))
    assert prompt.endswith("instability.\n###Human: <image>\nWhat?###Assistant:")


@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces_by_round_are_the_pieces(name):
    template = TEMPLATES[name]
    texts = ("<image>", "a") if template.question_only_images else ("<image>", "a", "b", "", "c", "d", "e")
    rounds = template.rounds(turns(*texts))
    by_round = template.pieces_by_round(rounds)
    for count in range(1, len(rounds) + 1):
        assert [p for pieces in by_round[:count] for p in pieces] == template.pieces(rounds[:count])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Look at <image> now. ", "<image>\nLook at  now."),
        ("Describe it.\n<image>", "<image>\nDescribe it."),
        ("<image>", "<image>"),
        (" no image ", " no image "),
        ("First <image>, then <image>?", "First <image>, then <image>?"),
    ],
)
def test_image_to_front(text, expected):
    assert image_to_front(text) == expected


@pytest.mark.parametrize(
    ("name", "conversation", "message"),
    [
        ("v1", [], says("no question")),
        ("v1", [Turn("gpt", "Hi")], says("no question")),
        ("v1", [Turn("gpt", "<image>"), *turns("What?", "A cat.")], says("answer", "shows an image")),
        ("v1", [Turn("human", "a"), Turn("human", "b")], says("two", "'human'")),
        ("v1", [*turns("a", "b"), Turn("gpt", "c")], says("two", "'gpt'")),
        ("plain", turns("What?", "A cat."), says("one question", "image")),
        ("plain", turns("<image>", "a", "b", "c"), says("one question", "image")),
    ],
)
def test_conversations_a_template_cannot_write(name, conversation, message):
    with pytest.raises(ValueError, match=message):
        TEMPLATES[name].rounds(conversation)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_record_may_bring_its_own_system_prompt(name):
    """In training and in prompts it stands where the template's own does, marks and all."""
    template = TEMPLATES[name]
    assert template.with_system(None) is template
    if name in ("plain", "v0_plain", "mistral_instruct", "gemma"):
        with pytest.raises(ValueError, match=says("no place", "system prompt", "model.template", "qwen_2")):
            template.with_system("Be {brief}.")
        return
    own = template.with_system("Be {brief}.")
    rounds = own.rounds(turns("<image>\nWhat?", "A cat."))
    for before, after in ((template.pieces(rounds), own.pieces(rounds)), *[
        (each.generation_prompt(rounds), mine.generation_prompt(rounds))
        for each, mine in ((template, own), (replace(template, prompt_as=None), replace(own, prompt_as=None)))
    ]):  # fmt: skip
        before, after = ("".join(piece.text for piece in pieces) for pieces in (before, after))
        assert after.count("Be {brief}.") == 1 and "curious" not in after and "helpful" not in after
        start, _, rest = after.partition("Be {brief}.")
        assert before.startswith(start) and before.endswith(rest if template.system else rest.removeprefix("\n"))


def test_an_answer_that_is_not_learnt_is_written():
    conversation = [*turns("What?", "A dog."), *turns("Sure?", "A cat.")]
    conversation[1] = replace(conversation[1], learnt=False)
    for template in TEMPLATES.values():
        if template.question_only_images:
            continue
        pieces, whole = (
            template.pieces(template.rounds(t)) for t in (conversation, turns("What?", "A dog.", "Sure?", "A cat."))
        )
        assert "".join(p.text for p in pieces) == "".join(p.text for p in whole)
        assert [p.text for p in pieces if p.is_target] == [p.text for p in whole if p.is_target][1:]
    plain = TEMPLATES["plain"]
    (answer,) = plain.pieces(plain.rounds([Turn("human", "<image>"), Turn("gpt", "", learnt=False)]))[1:]
    assert answer.text == "\n" and not answer.is_target


def test_a_greeting_is_left_out():
    assert TEMPLATES["v1"].rounds([Turn("gpt", "Welcome!"), *turns("What?", "A cat.")]) == [Round("What?", "A cat.")]
