"""How models are asked: by their template, their own chat template, or their own processor."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_pdrop.__main__ import main
from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.config.load import RUN_FILE, load_config
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.errors import UserError
from llava_pdrop.eval.answering import answer_all
from llava_pdrop.eval.questions import ask, llava_json
from llava_pdrop.eval.respondent import LlavaRespondent, ProcessorRespondent, open_respondent
from llava_pdrop.eval.subject import is_ours
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.run import train
from tests.messages import says

V1 = (
    "{{ bos_token }}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% else %}ASSISTANT: {{ m['content'][0]['text'] }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def parts(tiny_files):
    torch.manual_seed(0)
    return build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"))


@pytest.fixture
def picture(tiny_files):
    return sorted((tiny_files / "data/images").glob("*.png"))[0]


def test_a_chat_template_gives_the_tokens_of_the_same_conversation_template(parts, picture, tiny_files, monkeypatch):
    """v1 written as a chat template, bos and all."""
    monkeypatch.setattr(parts.tokenizer, "chat_template", V1)
    by_chat, by_name = LlavaRespondent(parts, None), LlavaRespondent(parts, TEMPLATES["v1"])
    for question in (
        ask("one", "What is it?", [picture], "q", "x"),
        ask("none", "Why?", [], "q", "x"),
        *llava_json(tiny_files / "data/eval.json", tiny_files / "data/images")[:2],
    ):
        assert by_chat.text(question) == by_name.text(question)
        one, other = by_chat.prepare(question), by_name.prepare(question)
        assert one.input_ids.tolist() == other.input_ids.tolist() and one.image_spans == other.image_spans


def test_a_chat_template_that_places_no_picture_is_refused(parts, picture, monkeypatch):
    monkeypatch.setattr(parts.tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match=says("question one", "model.template")):
        LlavaRespondent(parts, None).prepare(ask("one", "What?", [picture], "q", "x"))


def test_eval_asks_as_the_checkpoint_says_and_shows_it(tiny_config, tmp_path, capsys):
    """A saved run by its own template; the same without its config by its chat template, or by what its decoder is."""
    config = load_config(tiny_config(), ["eval.limit=2"])
    run = train(config)
    words = [f"data.eval={config.data.eval}", f"data.image_root={config.data.image_root}", "eval.limit=2"]
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns(RUN_FILE, "chat_template*"))
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    assert "USER:" not in capsys.readouterr().out
    assert main(["eval", str(other), *words]) == 0
    assert "USER: <image>" in capsys.readouterr().out
    (other / "chat_template.jinja").write_text(V1.replace("USER", "HUMAN"))
    assert main(["eval", str(other), *words]) == 0
    assert "HUMAN: <image>" in capsys.readouterr().out
    fields = json.loads((other / "config.json").read_text())
    fields["text_config"]["model_type"] = "olmo"
    (other / "config.json").write_text(json.dumps(fields))
    (other / "chat_template.jinja").unlink()
    assert main(["eval", str(other), *words]) == 2
    assert re.search(says("'olmo'", "model.template"), capsys.readouterr().err)


def chat_processor(parts):
    """LLaVA's processor, which VipLlava has too, for pictures of 28 pixels in patches of 14."""
    processor = parts.processor()
    processor.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    return processor


@pytest.fixture
def vip(parts, tmp_path):
    """A whole directory of another family."""
    torch.manual_seed(0)
    config = hf.VipLlavaConfig(
        text_config=parts.hf.config.text_config,
        vision_config=parts.hf.config.vision_config,
        image_token_index=parts.hf.config.image_token_id,
        vision_feature_layers=[-2, -1],
        tie_word_embeddings=False,
    )
    hf.VipLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "vip")
    chat_processor(parts).save_pretrained(tmp_path / "vip")
    return tmp_path / "vip"


def test_weights_that_would_be_random_are_refused(vip):
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    tensors = load_file(vip / "model.safetensors")
    stored = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight") and "language" in key)
    weight = tensors.pop(stored)
    for changed in (tensors, tensors | {stored: weight[:2].clone()}):
        save_file(changed, vip / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=says(str(vip), name)):
            open_respondent(vip)


@pytest.mark.parametrize(
    "chat",
    [
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] | map(attribute='text', default='') | join }}{% endfor %}",
        "{% for m in messages %}<image>{% endfor %}",
        "{% for m in messages %}{{ m['content'] {% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_processor_whose_chat_template_shows_no_picture_is_one_line(vip, chat):
    (vip / "chat_template.jinja").write_text(chat)
    with pytest.raises(UserError, match=says("chat_template.jinja")):
        open_respondent(vip)


def test_a_tokenizer_without_a_pad_token_is_padded_all_the_same(vip, picture, parts, monkeypatch):
    respondent = open_respondent(vip)
    questions = [ask(str(i), "Which " * (1 + i), [picture], f"q[{i}]", "x") for i in range(3)]
    wanted = [a.text for a in answer_all(respondent, questions, max_new_tokens=3).answers]
    fields = json.loads((vip / "tokenizer_config.json").read_text())
    (vip / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in fields.items() if k != "pad_token"}))
    bare = open_respondent(vip)
    assert bare.tokenizer.pad_token == bare.tokenizer.eos_token
    assert [a.text for a in answer_all(bare, questions, max_new_tokens=3).answers] == wanted
    ours = LlavaRespondent(parts, TEMPLATES["qa"])
    wanted = [a.text for a in answer_all(ours, questions, max_new_tokens=3).answers]
    monkeypatch.setattr(parts.tokenizer, "pad_token", None)
    assert [a.text for a in answer_all(ours, questions, max_new_tokens=3).answers] == wanted


def test_what_another_family_cannot_be_given_is_one_line(vip, tiny_files, capsys, monkeypatch):
    words = [f"data.eval={tiny_files / 'data/eval.json'}", f"data.image_root={tiny_files / 'data/images'}"]
    assert main(["eval", str(vip), *words, "model.template=v1"]) == 2
    assert re.search(says("model.template=v1", "processor"), capsys.readouterr().err)

    def lacking(directory):
        raise ImportError("\nQwenVideoProcessor requires the Torchvision library but it was not found.\nMore")

    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", lacking)
    assert main(["eval", str(vip), *words]) == 2
    assert re.search(says(str(vip), "Torchvision"), capsys.readouterr().err)
    base = vip.rename(vip.with_name("base"))
    vip.mkdir()
    (vip / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert main(["eval", str(vip), *words]) == 2
    assert re.search(says(str(vip), "merge"), capsys.readouterr().err)


def test_another_family_is_asked_by_its_own_processor(parts, picture, tmp_path):
    torch.manual_seed(0)
    text, vision = parts.hf.config.text_config, parts.hf.config.vision_config
    config = hf.VipLlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=parts.hf.config.image_token_id,
        vision_feature_layers=[-2, -1],
        tie_word_embeddings=False,
    )
    model = hf.VipLlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    chat_processor(parts).save_pretrained(tmp_path)
    assert not is_ours(tmp_path)
    respondent = open_respondent(tmp_path)
    assert isinstance(respondent, ProcessorRespondent) and isinstance(respondent.processor, hf.LlavaProcessor)
    questions = [ask(str(i), "Which colour " * (1 + i), [picture] if i != 2 else [], f"q[{i}]", "x") for i in range(4)]
    drop = Schedule((1, 2), (0.5, 0.25))
    one, together = (answer_all(respondent, questions, drop, batch_size=size, max_new_tokens=3) for size in (1, 4))
    assert [a.text for a in one.answers] == [a.text for a in together.answers]
    assert [a.image_tokens for a in together.answers] == [(16,), (16,), (), (16,)]
    assert respondent.text(questions[0]) == "<image>Which colour"


def test_a_directory_without_a_chat_template_is_one_line(parts, tmp_path):
    config = hf.VipLlavaConfig(text_config=parts.hf.config.text_config, vision_config=parts.hf.config.vision_config)
    hf.VipLlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    parts.processor().save_pretrained(tmp_path)
    for file in tmp_path.glob("chat_template*"):
        file.unlink()
    with pytest.raises(UserError, match=says("chat template", "chat_template.jinja")):
        open_respondent(tmp_path)


def test_pictures_of_every_size_are_read(parts, tmp_path):
    Image.new("RGB", (64, 20)).save(tmp_path / "wide.png")
    respondent = LlavaRespondent(parts, TEMPLATES["qa"])
    question = ask("q", "What?", [tmp_path / "wide.png"], "q", "x")
    assert respondent.length(question) >= len(respondent.prepare(question).input_ids)
