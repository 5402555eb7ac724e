"""Adapters that peft itself saves on a Hugging Face LLaVA are merged as peft merges them, or refused in one line.

Runs of the original code are in `test_build.py`, ours in `tests/unit/train/test_adapters.py`.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from llava_pdrop.__main__ import main
from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.convert import convert
from llava_pdrop.eval.subject import CHAT, foreign_config
from tests.messages import says
from tests.unit.checkpoint.layout_files import original, with_tokenizer, write

EVERYWHERE = ["q_proj", "fc1", "linear_1"]
"""In the decoder, in the tower and in the projector."""

OLD_NAMES = (
    ("base_model.model.model.language_model.", "base_model.model.language_model.model."),
    ("base_model.model.model.vision_tower.", "base_model.model.vision_tower.vision_model."),
    ("base_model.model.model.multi_modal_projector.", "base_model.model.multi_modal_projector."),
    ("base_model.model.lm_head.", "base_model.model.language_model.lm_head."),
)
"""transformers 5 -> transformers before 4.52, under which adapters were trained as well."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The reference LLaVA-1.5 of 1000 tokens in Hugging Face's layout."""
    folder = tmp_path_factory.mktemp("base")
    convert(str(with_tokenizer(write(folder / "source", *original("e2e_l15")))), folder / "hf", "llava-hf")
    return folder / "hf"


def adapters(base: Path, directory: Path, **options) -> dict[str, torch.Tensor]:
    """What peft saves in ``directory`` of a LLaVA it has changed; returns the weights that peft itself merges, under
    names in memory."""
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration.from_pretrained(base)
    settings = dict(r=4, lora_alpha=12, target_modules=EVERYWHERE, init_lora_weights=False)
    adapted = get_peft_model(model, LoraConfig(**{**settings, **options}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(directory)
    return {name: tensor.clone() for name, tensor in adapted.merge_and_unload().state_dict().items()}


def renamed(directory: Path) -> Path:
    """``directory`` with the names that older transformers gave."""
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    for new, old in OLD_NAMES:
        tensors = {name.replace(new, old, 1): tensor for name, tensor in tensors.items()}
    assert any(name.startswith(OLD_NAMES[0][1]) for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def edited(directory: Path, **fields) -> Path:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return directory


@pytest.mark.parametrize("names", ["transformers 5", "transformers 4"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["multi_modal_projector"], "target_modules": ["q_proj", "down_proj"]},
        {"modules_to_save": ["linear_2", "lm_head"], "use_rslora": True},
        {
            "rank_pattern": {"fc1": 2, r"language_model.*q_proj": 3},
            "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 5},
        },
    ],
    ids=["decoder, tower and projector", "projector whole", "parts whole", "patterns"],
)
def test_what_peft_saves_is_merged_as_peft_does(base, tmp_path, options, names):
    merged = adapters(base, tmp_path / "adapters", **options)
    assert not (tmp_path / "adapters" / "config.json").exists()
    directory = renamed(tmp_path / "adapters") if names == "transformers 4" else tmp_path / "adapters"
    parts = build_parts(str(directory))
    before, own = build_parts(str(base)).hf.state_dict(), parts.hf.state_dict()
    assert own.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(own[name], tensor, rtol=0, atol=1e-6, msg=name)
    changed = [name for name in own if not torch.equal(own[name], before[name])]
    assert any("q_proj" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert parts.tokenizer is not None and parts.geometry == build_parts(str(base)).geometry


@pytest.mark.parametrize("layout", ["llava-hf", "llava"])
def test_the_command_writes_them_as_a_whole_checkpoint(base, tmp_path, capsys, layout):
    merged = adapters(base, tmp_path / "adapters")
    shutil.copytree(base, tmp_path / "moved")
    edited(tmp_path / "adapters", base_model_name_or_path=None)
    words = ["convert", str(tmp_path / "adapters"), str(tmp_path / "out"), "--to", layout]
    assert main(words) == 2
    assert re.search(says("adapter_config.json", "base_model_name_or_path", "--base"), capsys.readouterr().err)
    assert main([*words, "--base", str(tmp_path / "adapters")]) == 2
    assert re.search(says("adapters only", "base model"), capsys.readouterr().err)
    assert main([*words, "--base", str(tmp_path / "moved")]) == 0
    own = build_parts(str(tmp_path / "out")).hf.state_dict()
    rows = 1000  # the original layout has no <image> and <pad>
    for name in ("model.language_model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):
        torch.testing.assert_close(own[name][:rows], merged[name][:rows], rtol=0, atol=1e-6)


def test_a_base_that_is_not_there_is_named(base, tmp_path):
    adapters(base, tmp_path / "adapters")
    edited(tmp_path / "adapters", base_model_name_or_path="no/where")
    with pytest.raises(FileNotFoundError, match=says("adapter_config.json", "no/where", "--base")):
        build_parts(str(tmp_path / "adapters"))


def test_a_tokenizer_beside_the_adapters_is_theirs(base, tmp_path):
    adapters(base, tmp_path / "adapters")
    for file in base.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "adapters")
    (tmp_path / "adapters" / "chat_template.jinja").write_text("{{ 'their own' }}")
    assert build_parts(str(tmp_path / "adapters")).tokenizer.chat_template == "{{ 'their own' }}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, says("use_dora True", "False")),
        ({"bias": "all"}, says("bias 'all'", "'none'")),
        ({"lora_bias": True}, says("lora_bias")),
        ({"trainable_token_indices": [3]}, says("trainable_token_indices")),
        ({"target_parameters": ["a.b"]}, says("target_parameters")),
        ({"use_qalora": True}, says("use_qalora")),
        ({"something_of_tomorrow": {"a": 1}}, says("something_of_tomorrow")),
        (
            {"init_lora_weights": "pissa_niter_4"},
            says("init_lora_weights 'pissa_niter_4'", "path_initial_model_for_weight_conversion"),
        ),
        ({"peft_type": "IA3"}, says("peft_type 'IA3'", "'LORA'")),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(base, tmp_path, fields, message):
    adapters(base, tmp_path / "adapters", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=f"adapter_config.json: {message}"):
        build_parts(str(edited(tmp_path / "adapters", **fields)))


def test_a_chat_template_is_found_beside_the_adapters_or_their_base(base, tmp_path):
    """A trainer saves the tokenizer with its adapters, often without the processor's chat template."""
    chat = "{% for m in messages %}<image>{% endfor %}"
    home, run = tmp_path / "base", tmp_path / "adapters"
    shutil.copytree(base, home)
    (home / "chat_template.jinja").write_text(chat)
    adapters(home, run)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(run)
    assert build_parts(str(run)).tokenizer.chat_template == chat
    assert foreign_config(run, ["benchmarks=pope"]).model.template == CHAT
    (home / "chat_template.jinja").unlink()
    assert foreign_config(run, ["benchmarks=pope"]).model.template != CHAT
    (run / "chat_template.jinja").write_text(chat)
    assert build_parts(str(run)).tokenizer.chat_template == chat
    assert foreign_config(run, ["benchmarks=pope"]).model.template == CHAT


def test_what_peft_really_makes_of_dora_is_refused(base, tmp_path):
    adapters(base, tmp_path / "adapters", use_dora=True, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=says("use_dora")):
        build_parts(str(tmp_path / "adapters"))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.multi_modal_projector.linear_2.weight", (3, 3), says("linear_2.weight (3, 3)", "(48, 48)")),
        ("model.language_model.embed_tokens.weight", (1030, 48), says("embed_tokens.weight (1030, 48)", "(1024, 48)")),
        ("model.multi_modal_projector.linear_3.weight", (3, 3), says("linear_3.weight", "base model")),
        ("model.language_model.norm.weight", (48,), says("unexpected", "norm.weight")),
    ],
)
def test_whole_tensors_that_do_not_fit_are_listed(base, tmp_path, name, shape, message):
    adapters(base, tmp_path / "adapters", modules_to_save=["multi_modal_projector"], target_modules=["q_proj"])
    file = tmp_path / "adapters" / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{name}": torch.zeros(shape)}, file)
    with pytest.raises(ValueError, match=message):
        build_parts(str(tmp_path / "adapters"))
