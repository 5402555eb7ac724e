"""What a model can be built from: LoRA runs, projectors, CLIP as a whole, tied embeddings; and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.convert import convert
from llava_pdrop.checkpoint.load import save_pretrained
from llava_pdrop.checkpoint.original import original_geometry, original_schedule
from llava_pdrop.checkpoint.shards import open_tensors
from llava_pdrop.checkpoint.vocabulary import add_special_tokens
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch
from tests.messages import says
from tests.tiny import make_sample
from tests.unit.checkpoint.layout_files import MODELS, TOKENIZER, TOWER, original, with_tokenizer, write

TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def raw_llm(directory: Path, kind=LlamaForCausalLM, config=LlamaConfig, **options) -> Path:
    """A raw LLM of 1000 tokens with wide weights, and its tokenizer."""
    torch.manual_seed(1)
    model = kind(config(**{**TINY, "vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2, **options}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return with_tokenizer(directory)


# ---- LoRA and projector-only directories ----


def lora_run(tmp_path: Path, **options) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """An original LoRA run and its base (an original LLaVA without projector), and the weights peft itself merges."""
    config, tensors = original()
    base = write(tmp_path / "base", config | {"model_type": "llama"}, {
        name: tensor for name, tensor in tensors.items() if "mm_projector" not in name and "vision_tower" not in name
    })  # fmt: skip
    llama = LlamaForCausalLM.from_pretrained(base)
    settings = dict(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(llama, LoraConfig(**{**settings, **options}))
    run = tmp_path / "run"
    model.save_pretrained(run)
    (run / "config.json").write_text(json.dumps(config))
    non_lora = {f"base_model.model.{name}": tensor + 1 for name, tensor in tensors.items() if "mm_projector" in name}
    torch.save(non_lora, run / "non_lora_trainables.bin")
    return run, base, model.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 5}}],
)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_lora_run_is_merged_as_peft_does(tmp_path, options, kind):
    run, base, merged = lora_run(tmp_path, **options)
    if kind == "bin":
        adapter = {name: tensor.read() for name, tensor in open_tensors(run / "adapter_model.safetensors").items()}
        torch.save(adapter, run / "adapter_model.bin")
        (run / "adapter_model.safetensors").unlink()
    hf = build_parts(path=str(run), language_model=str(base)).hf
    ours = hf.state_dict()
    config, tensors = original()
    for name, tensor in merged.items():
        rows = config["vocab_size"]
        own = ours[name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)]
        torch.testing.assert_close(
            own[:rows] if "embed" in name or "lm_head" in name else own, tensor, rtol=0, atol=1e-6
        )
    projector = ours["model.multi_modal_projector.linear_1.weight"]
    assert torch.equal(projector, tensors["model.mm_projector.0.weight"] + 1)
    changed = merged["model.layers.1.mlp.down_proj.weight"] - tensors["model.layers.1.mlp.down_proj.weight"]
    assert changed.abs().max() > 1e-2


def test_a_lora_run_names_its_base(tmp_path):
    run, base, _ = lora_run(tmp_path)
    adapter = json.loads((run / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(base)
    assert build_parts(str(run)).geometry.patches == 16
    (run / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=says("LoRA")):
        build_parts(str(run))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("partner", r"model\.layers\.0\.\S+.* partner"),
        ("place", r"model\.layers\.99\.\S+.* base model"),
        ("shape", r"model\.layers\.0\.\S+ .*\(\d+, 4\) x \(4, 3\)"),
        ("kind", r"unexpected: model\.layers\.0\.\S+.*LoRA"),
        ("projector", r"missing: model\.multi_modal_projector\.linear_2\.bias"),
    ],
)
def test_a_spoilt_lora_run(tmp_path, spoil, message):
    run, base, _ = lora_run(tmp_path)
    file = run / "adapter_model.safetensors"
    tensors = {name: tensor.read() for name, tensor in open_tensors(file).items()}
    name = next(name for name in tensors if ".layers.0." in name and "lora_A" in name)
    if spoil == "projector":
        rest = torch.load(run / "non_lora_trainables.bin")
        torch.save({k: v for k, v in rest.items() if not k.endswith("2.bias")}, run / "non_lora_trainables.bin")
    elif spoil == "shape":
        tensors[name] = torch.zeros(4, 3)
    else:
        tensor = tensors.pop(name)
        new = {"place": name.replace(".0.", ".99."), "kind": name.replace("lora_A", "lora_magnitude_vector")}
        tensors |= {new[spoil]: tensor} if spoil in new else {}
    torch.save(tensors, run / "adapter_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match=message):
        build_parts(str(run), language_model=str(base))


def test_other_adapters_are_refused_by_name(tmp_path):
    run, base, _ = lora_run(tmp_path, use_dora=True)
    with pytest.raises(ValueError, match=says("adapter_config.json", "use_dora True", "False")):
        build_parts(str(run), language_model=str(base))


def test_a_projector_on_a_base(tmp_path):
    config, tensors = original()
    _, base, _ = lora_run(tmp_path)
    run = tmp_path / "projector"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config))
    torch.save({k: v for k, v in tensors.items() if "mm_projector" in k}, run / "mm_projector.bin")
    hf = build_parts(str(run), language_model=str(base)).hf
    whole = build_parts(str(write(tmp_path / "whole", config, tensors))).hf
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, hf.state_dict()[name]), name
    with pytest.raises(ValueError, match=says("only a projector")):
        build_parts(str(run))
    with pytest.raises(ValueError, match=says("whole", "base model")):
        build_parts(str(tmp_path / "whole"), language_model=str(base))
    (run / "mm_projector.bin").unlink()
    with pytest.raises(FileNotFoundError, match=says("model*.safetensors")):
        build_parts(str(run), language_model=str(base))


# ---- the tower ----


@pytest.mark.parametrize("name", ["llava15", "next_gqa"])
def test_frozen_towers_come_from_beside_and_trained_ones_from_inside(tmp_path, name):
    """golden/README 4.13"""
    config, tensors = original(name)
    weight = "encoder.layers.0.mlp.fc1.weight"
    inside = f"model.vision_tower.vision_tower.vision_model.{weight}"
    tensors[inside] = torch.full_like(tensors[inside], 0.5)
    hf = build_parts(str(write(tmp_path, config, tensors))).hf
    trained = config["unfreeze_mm_vision_tower"]
    assert trained == (name == "next_gqa")
    assert bool((hf.state_dict()[f"model.vision_tower.{weight}"] == 0.5).all()) == trained


def test_the_tower_may_be_half_of_clip(tmp_path):
    config = CLIPConfig(
        vision_config=json.loads((TOWER / "config.json").read_text()),
        text_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
        ),
    )
    clip = CLIPModel(config)
    clip.save_pretrained(tmp_path / "clip")
    shutil.copyfile(TOWER / "preprocessor_config.json", tmp_path / "clip" / "preprocessor_config.json")
    model, tensors = original()
    parts = build_parts(str(write(tmp_path / "model", model, tensors)), vision_tower=str(tmp_path / "clip"))
    ours = parts.hf.model.vision_tower.state_dict()
    theirs = {name.removeprefix("vision_model."): tensor for name, tensor in clip.vision_model.state_dict().items()}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_tower_is_refused_by_name(tmp_path):
    shutil.copytree(TOWER, tmp_path / "siglip", copy_function=shutil.copyfile)
    (tmp_path / "siglip" / "config.json").chmod(0o644)
    (tmp_path / "siglip" / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    config, tensors = original()
    write(tmp_path / "model", config | {"mm_vision_tower": str(tmp_path / "siglip")}, tensors)
    with pytest.raises(ValueError, match=says("'siglip_vision_model'", "vision tower", "CLIP")):
        build_parts(str(tmp_path / "model"))


# ---- config.json of the original layout ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_projector_type": "linear"}, says("mm_projector_type 'linear'", "'mlp2x_gelu'")),
        ({"mm_projector_type": "mlp3x_gelu"}, says("mm_projector_type 'mlp3x_gelu'")),
        ({"mm_projector_type": None}, says("mm_projector_type None")),
        ({"mm_use_im_start_end": True}, says("mm_use_im_start_end")),
        ({"mm_use_im_patch_token": True}, says("mm_use_im_patch_token")),
        ({"model_type": "llava_mpt"}, says("model_type 'llava_mpt'", "llava_llama", "llava_mistral")),
        ({"quantization_config": {"load_in_4bit": True}}, says("quantised weights")),
        (
            {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "(1x1),(6x6)"},
            says("image_grid_pinpoints", "list with entries"),
        ),
        (
            {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [56, 56]},
            says("image_grid_pinpoints", "list", "[56, 56]"),
        ),
        ({"layer_list": [2, 4]}, says("image_token_ratio_list", "missing")),
        ({"layer_list": [2, 40], "image_token_ratio_list": [0.5, 0.2]}, says("pyramid_drop.layers", "40")),
        ({"pyramid_drop": {"layers": [2], "sieve": 1}}, says("pyramid_drop", "sieve")),
        ({"mm_vision_tower": "no/where"}, says("no/where", "directory", "hub")),
    ],
)
def test_unsupported_fields_are_one_line(tmp_path, fields, message):
    config, tensors = original()
    write(tmp_path, config | fields, tensors)
    with pytest.raises((ValueError, FileNotFoundError), match=f"^[^\n]*{message}[^\n]*$"):
        build_parts(str(tmp_path))


def test_a_missing_projector_type_is_linear_as_in_the_original_code(tmp_path):
    config, tensors = original()
    write(tmp_path, {name: value for name, value in config.items() if name != "mm_projector_type"}, tensors)
    with pytest.raises(ValueError, match=says("mm_projector_type 'linear'")):
        build_parts(str(tmp_path))


def test_pinpoints_may_be_text():
    config = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(28, 56), (56, 28)]"}
    vision = LlamaConfig(image_size=28, patch_size=7)
    assert original_geometry(config, vision).pinpoints == ((28, 56), (56, 28))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"layer_list": "[8,16,24]", "image_token_ratio_list": "[0.5,0.25,0.125]"}, ((8, 16, 24), (0.5, 0.25, 0.125))),
        ({"layer_list": [8, 16], "image_token_ratio_list": [1.0, 0.5, 0.25]}, ((8, 16), (0.5, 0.25))),
        ({"pyramid_drop": {"layers": [3], "ratios": [0.5]}}, ((3,), (0.5,))),
        ({"pyramid_drop": Schedule().to_dict()}, ((), ())),
    ],
)
def test_schedules_of_original_configs(fields, expected):
    assert original_schedule(fields) == (None if expected is None else Schedule(*expected).at("renumber"))


def test_schedules_of_the_official_code_are_read_in_its_own_layout_only(tmp_path):
    write(tmp_path / "source", *original())
    parts = build_parts(str(tmp_path / "source"))
    save_pretrained(parts.hf, None, tmp_path / "hf")
    parts.image_processor.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/config.json"
    fields = json.loads(file.read_text(encoding="utf-8")) | {"layer_list": [2]}
    file.write_text(json.dumps(fields), encoding="utf-8")
    assert build_parts(str(tmp_path / "hf")).schedule is None


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}])
def test_rope_comes_from_the_original_config(tmp_path, scaling):
    config, tensors = original()
    write(tmp_path / "source", config | {"rope_theta": 500000.0, "rope_scaling": scaling}, tensors)
    parts = build_parts(str(tmp_path / "source"))
    save_pretrained(parts.hf, None, tmp_path / "hf")
    parts.image_processor.save_pretrained(tmp_path / "hf")
    expected = 500000.0 ** -(torch.arange(0, 16, 2) / 16) / (scaling or {"factor": 1.0})["factor"]
    for hf in (parts.hf, build_parts(str(tmp_path / "hf")).hf):
        torch.testing.assert_close(hf.model.language_model.rotary_emb.inv_freq, expected)
    convert(str(tmp_path / "hf"), tmp_path / "back", "llava")
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (fields["rope_theta"], fields["rope_scaling"]) == (500000.0, scaling)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]
    assert written["rope_theta"] == 500000.0
    assert written["rope_scaling"] == (scaling and {"rope_type": "linear", "factor": 2.0})


# ---- tokens ----


def test_image_and_pad_get_the_rows_behind_the_vocabulary(tmp_path):
    parts = build_parts(language_model=str(raw_llm(tmp_path)), vision_tower=str(TOWER))
    assert parts.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [1000, 1001]
    assert parts.tokenizer.pad_token == "<pad>" and parts.tokenizer.pad_token_id != parts.tokenizer.unk_token_id
    rows = parts.hf.get_input_embeddings().weight
    assert len(rows) == 1024 and torch.equal(rows[1001], rows[:1000].mean(0))


@pytest.mark.parametrize(
    ("pad", "expected", "added"), [("<unk>", "<pad>", 2), ("</s>", "<pad>", 2), ("<s>", "<pad>", 2), ("the", "the", 1)]
)
def test_a_pad_token_of_its_own_is_kept(pad, expected, added):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    before = len(tokenizer)
    tokenizer.pad_token = pad if pad in tokenizer.get_vocab() else tokenizer.convert_ids_to_tokens(500)
    expected = expected if expected == "<pad>" else tokenizer.pad_token
    assert add_special_tokens(tokenizer, before) == before
    assert (tokenizer.pad_token, len(tokenizer)) == (expected, before + added)


def test_32000_tokens_become_32064(tmp_path):
    llm = raw_llm(tmp_path, vocab_size=32000, hidden_size=8, num_attention_heads=2)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.add_tokens([f"filler{i}" for i in range(32000 - len(tokenizer))])
    tokenizer.save_pretrained(llm)
    parts = build_parts(language_model=str(llm), vision_tower=str(TOWER))
    assert parts.hf.config.text_config.vocab_size == len(parts.hf.lm_head.weight) == 32064
    assert parts.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [32000, 32001]


# ---- tied embeddings ----


@pytest.mark.parametrize(("kind", "config"), [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)])
def test_tied_embeddings_stay_tied(tmp_path, kind, config):
    llm = raw_llm(tmp_path / "llm", kind, config, tie_word_embeddings=True)
    assert "lm_head.weight" not in open_tensors(llm)
    parts = build_parts(language_model=str(llm), vision_tower=str(TOWER))
    assert parts.hf.lm_head.weight is parts.hf.get_input_embeddings().weight
    save_pretrained(parts.hf, parts.processor(), tmp_path / "hf")
    assert not any("lm_head" in name for name in open_tensors(tmp_path / "hf"))
    again = build_parts(str(tmp_path / "hf"))
    assert again.hf.lm_head.weight is again.hf.get_input_embeddings().weight
    batch = PackedBatch.pack([make_sample(9, "3")])
    first, second = (PyramidLlava(p.hf).logits(batch) for p in (parts, again))
    assert torch.equal(first, second) and math.isfinite(first.sum().item())


def test_a_head_that_contradicts_its_tie_is_refused(tmp_path):
    llm = raw_llm(tmp_path / "llm", tie_word_embeddings=True)
    tensors = {name: tensor.read() for name, tensor in open_tensors(llm).items()}
    config = json.loads((llm / "config.json").read_text())
    head = tensors["model.embed_tokens.weight"].clone()
    write(llm, config, tensors | {"lm_head.weight": head})
    assert build_parts(language_model=str(llm), vision_tower=str(TOWER)).hf.config.tie_word_embeddings
    write(llm, config, tensors | {"lm_head.weight": head + 1})
    with pytest.raises(ValueError, match=r"(lm_head|embed_tokens)\.weight.* differs"):
        build_parts(language_model=str(llm), vision_tower=str(TOWER))


def test_hub_ids_that_cannot_be_had_are_one_line():
    with pytest.raises(FileNotFoundError, match=says("nobody/nothing", "directory", "hub") + r"[^\n]*\Z"):
        build_parts("nobody/nothing")


def test_what_is_no_llava_is_refused(tmp_path):
    with pytest.raises(ValueError, match=says("model_type 'clip_vision_model'", "llava", "llava_next")):
        build_parts(str(MODELS / "clip56"))
