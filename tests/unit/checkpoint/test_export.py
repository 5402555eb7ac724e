"""What is written: canonical names whatever is in memory, fields for old and new readers, the original layout."""

from __future__ import annotations

import json
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from llava_pdrop.checkpoint.build import build_parts, load_source
from llava_pdrop.checkpoint.convert import convert
from llava_pdrop.checkpoint.export import save_llava_hf, save_original, tower_name, usual_template
from llava_pdrop.checkpoint.layouts import MEMORY_TO_HF, rename
from llava_pdrop.checkpoint.load import save_pretrained
from llava_pdrop.checkpoint.open import open_llava
from llava_pdrop.checkpoint.shards import open_tensors
from llava_pdrop.config.load import load_config
from llava_pdrop.data.chat import jinja_of
from llava_pdrop.files import read_json
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.run import train
from tests.messages import says
from tests.tiny import ANYRES, DECODERS, make_tiny_hf
from tests.unit.checkpoint.layout_files import TOKENIZER, TOWER, original, with_tokenizer, write

LLAVA15_NAMES = re.compile(
    r"language_model\.lm_head\.weight|language_model\.model\.(embed_tokens|norm)\.weight"
    r"|language_model\.model\.layers\.\d+\.(input_layernorm|post_attention_layernorm)\.weight"
    r"|language_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
    r"|multi_modal_projector\.linear_[12]\.(weight|bias)|image_newline"
    r"|vision_tower\.vision_model\.(pre_layrnorm|post_layernorm)\.(weight|bias)"
    r"|vision_tower\.vision_model\.embeddings\.(class_embedding|(patch|position)_embedding\.weight)"
    r"|vision_tower\.vision_model\.encoder\.layers\.\d+\.layer_norm[12]\.(weight|bias)"
    r"|vision_tower\.vision_model\.encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj\.(weight|bias)"
    r"|vision_tower\.vision_model\.encoder\.layers\.\d+\.mlp\.fc[12]\.(weight|bias)"
)
"""Every key of the llava-hf checkpoints on the hub."""


@pytest.fixture
def whole(tmp_path) -> Path:
    """A reference model of 1000 tokens with a tokenizer, in the original layout."""
    return with_tokenizer(write(tmp_path / "source", *original("e2e_l15")))


def canonical(directory: Path, newline: bool = False) -> bool:
    names = open_tensors(directory).keys()
    return all(LLAVA15_NAMES.fullmatch(name) for name in names) and ("image_newline" in names) == newline


# ---- what training saves ----


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_saved_names_do_not_depend_on_those_in_memory(tmp_path, gathered, nested):
    hf = make_tiny_hf(geometry=ANYRES)
    state = dict(hf.state_dict())
    if nested:  # how ZeRO-3 and transformers 4 files leave them
        state = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in state.items()}
    if gathered or nested:
        save_pretrained(hf, None, tmp_path, state)
    else:
        save_pretrained(hf, None, tmp_path)
    assert canonical(tmp_path, newline=True)
    saved = open_tensors(tmp_path)
    assert len(saved) == len(state)
    for name, tensor in rename(hf.state_dict(), MEMORY_TO_HF).items():
        assert torch.equal(saved[name].read(), tensor), name


def test_a_gathered_state_with_foreign_keys_is_not_written(tmp_path):
    hf = make_tiny_hf()
    state = {f"module.{name}": tensor for name, tensor in hf.state_dict().items()}
    with pytest.raises(ValueError, match=says("keys", "module.lm_head.weight")):
        save_pretrained(hf, None, tmp_path, state)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_training_run_is_canonical_and_brings_its_schedule(tiny_config, tmp_path):
    drop = {"layers": [1, 2], "ratios": [0.5, 0.25]}
    sections = {"train": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "save_steps": 1}, "pyramid_drop": drop}
    run = train(load_config(tiny_config(**sections)))
    for directory in (run, run / "checkpoint-1"):
        assert canonical(directory), directory
        parts = build_parts(str(directory))
        assert parts.schedule == Schedule((1, 2), (0.5, 0.25)).at("renumber")
        assert (directory / "preprocessor_config.json").is_file() and (directory / "tokenizer.json").is_file()
        fields = read_json(directory / "config.json")
        assert fields["image_token_index"] == fields["image_token_id"] == parts.hf.config.image_token_id
    processor = AutoProcessor.from_pretrained(run)
    assert processor.tokenizer.padding_side == "left" and processor.chat_template == jinja_of("qa")
    convert(str(run), tmp_path / "original", "llava")  # the run knows its tower
    assert build_parts(str(tmp_path / "original")).schedule == Schedule((1, 2), (0.5, 0.25)).at("renumber")
    assert not read_json(tmp_path / "original" / "config.json")["unfreeze_mm_vision_tower"]


def test_a_run_with_pooled_pictures_opens_as_one_and_as_its_vanilla_self(tiny_config, tmp_path):
    drop = {"layers": [2], "ratios": [0.5], "downsample": 9}
    sections = {"train": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True}, "pyramid_drop": drop}
    run = train(load_config(tiny_config(**sections)))
    schedule = Schedule((2,), (0.5,), downsample=9).at("renumber")
    for layout in ("llava-hf", "llava"):
        convert(str(run), tmp_path / layout, layout)
        assert build_parts(str(tmp_path / layout)).schedule == schedule
    original = read_json(tmp_path / "llava" / "config.json")
    assert "layer_list" not in original, "official code would drop and not pool"
    fields = read_json(run / "config.json")
    assert fields["pyramid_drop"]["downsample"] == 9
    assert fields["image_seq_length"] == 16, "the processor's placeholders: those of the vanilla model"


def test_a_vanilla_run_says_so(tmp_path):
    model = PyramidLlava(make_tiny_hf(), Schedule())
    save_pretrained(model.hf, None, tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((TOWER / "preprocessor_config.json").read_bytes())
    assert build_parts(str(tmp_path)).schedule == Schedule().at("renumber")


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_goes_there_and_back(tmp_path, decoder):
    hf = make_tiny_hf(decoder)
    save_pretrained(hf, None, tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((TOWER / "preprocessor_config.json").read_bytes())
    again = build_parts(str(tmp_path)).hf.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in hf.state_dict().items())


# ---- canonical llava-hf ----


def test_llava_hf_has_what_every_reader_looks_for(whole, tmp_path):
    save_llava_hf(open_llava(str(whole)), tmp_path / "hf", shard_size="300KB")
    assert canonical(tmp_path / "hf") and (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    fields = read_json(tmp_path / "hf" / "config.json")
    assert fields["architectures"] == ["LlavaForConditionalGeneration"] and fields["model_type"] == "llava"
    assert fields["image_token_index"] == fields["image_token_id"] == 1000
    assert fields["torch_dtype"] == fields["dtype"] == "float32"
    assert fields["text_config"]["vocab_size"] == 1024 and fields["text_config"]["rope_theta"] == 10000.0
    assert fields["vision_feature_layer"] == -2 and fields["projector_hidden_act"] == "gelu"
    images = read_json(tmp_path / "hf" / "preprocessor_config.json")
    assert images["image_processor_type"] == "LlavaImageProcessor" and images["do_pad"] is True
    assert "image_processor" not in read_json(tmp_path / "hf" / "processor_config.json")
    tokens = read_json(tmp_path / "hf" / "tokenizer_config.json")
    assert tokens["tokenizer_class"] == "LlamaTokenizer" and tokens["legacy"] is False
    assert tokens["added_tokens_decoder"]["1001"]["content"] == tokens["pad_token"] == "<pad>"
    assert tokens["additional_special_tokens"] == ["<image>"] and "extra_special_tokens" not in tokens
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == (TOKENIZER / "tokenizer.model").read_bytes()
    assert read_json(tmp_path / "hf" / "generation_config.json")["pad_token_id"] == 1001


def test_tokenizer_files_stay_readable_after_a_second_save(whole, tmp_path):
    convert(str(whole), tmp_path / "one", "llava-hf")
    parts = build_parts(str(tmp_path / "one"))
    save_pretrained(parts.hf, parts.processor(), tmp_path / "two")
    first, second = (read_json(tmp_path / name / "tokenizer_config.json") for name in ("one", "two"))
    assert first == second
    text = "USER: <image>\nWhat is this? ASSISTANT: A cat.</s>"
    ids = [AutoTokenizer.from_pretrained(tmp_path / name)(text)["input_ids"] for name in ("one", "two")]
    assert ids[0] == ids[1] and 1000 in ids[0]


def test_precision(whole, tmp_path):
    convert(str(whole), tmp_path / "half", "llava-hf", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in open_tensors(tmp_path / "half").values()} == {torch.bfloat16}
    assert read_json(tmp_path / "half" / "config.json")["torch_dtype"] == "bfloat16"
    convert(str(tmp_path / "half"), tmp_path / "kept", "llava")
    assert {tensor.dtype for tensor in open_tensors(tmp_path / "kept").values()} == {torch.bfloat16}
    assert not read_json(tmp_path / "kept" / "config.json")["unfreeze_mm_vision_tower"]  # bfloat16 of the frozen one


@pytest.mark.parametrize("aspect", ["pad", "anyres"])
def test_the_processor_expands_images_as_we_do(tmp_path, aspect):
    """And pads on the left, whatever the tokenizer of the source did."""
    name = {"pad": "e2e_l15", "anyres": "e2e_next"}[aspect]
    config, tensors = original("e2e_l15")
    if aspect == "anyres":
        pinpoints = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
        config |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints}
        config |= {"mm_patch_merge_type": "spatial_unpad"}
        tensors["model.image_newline"] = torch.zeros(48)
    convert(str(with_tokenizer(write(tmp_path / name, config, tensors))), tmp_path / "hf", "llava-hf")
    processor, parts = AutoProcessor.from_pretrained(tmp_path / "hf"), build_parts(str(tmp_path / "hf"))
    assert parts.geometry.aspect == aspect and processor.image_token == "<image>"
    assert (processor.patch_size, processor.num_additional_image_tokens) == (14, 1)
    assert processor.vision_feature_select_strategy == "default"
    assert processor.tokenizer.padding_side == "left"
    sizes = [(56, 56), (200, 30), (31, 207), (90, 61), (113, 112)]
    for size in sizes:
        ids = processor(images=Image.new("RGB", size), text="<image>\nWhat?").input_ids[0]
        assert ids.count(1000) == parts.geometry.num_tokens(size), size
    short_and_long = processor(images=[Image.new("RGB", (56, 56))] * 2, text=["<image>", "<image> and"], padding=True)
    assert short_and_long.input_ids[0][0] == 1001 and short_and_long.input_ids[0][-1] == 1000


def with_rows(tmp_path: Path, rows: int, **fields) -> Path:
    """An original checkpoint of so many tokens, by name alone."""
    config, tensors = original("e2e_l15")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(rows, 8).repeat(1, 6)
    return with_tokenizer(write(tmp_path / f"source{rows}", config | {"vocab_size": rows, **fields}, tensors))


@pytest.mark.parametrize(
    ("rows", "fields", "template"),
    [
        (32000, {}, "v1"),
        (32000, {"model_type": "llava_mistral"}, "mistral_instruct"),
        (32064, {}, None),  # a LLaVA of its own vocabulary: nobody knows how it talks
    ],
)
def test_published_models_talk_as_they_were_trained(tmp_path, rows, fields, template):
    assert usual_template(open_llava(str(with_rows(tmp_path, rows, **fields))).config) == template
    assert usual_template(make_tiny_hf().config) is None


def test_a_chat_template_of_a_processor_is_read(whole, tmp_path):
    """On the hub it lies beside another one of the tokenizer, which may know no images."""
    convert(str(whole), tmp_path / "hf", "llava-hf")
    (tmp_path / "hf" / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'of the processor' }}"}))
    convert(str(tmp_path / "hf"), tmp_path / "again", "llava-hf")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ 'of the processor' }}"
    for kind in (AutoProcessor, AutoTokenizer):
        assert kind.from_pretrained(tmp_path / "again").chat_template == "{{ 'of the processor' }}"


# ---- original layout ----


def test_the_original_tokenizer_and_rows_come_back(whole, tmp_path):
    convert(str(whole), tmp_path / "hf", "llava-hf")
    convert(str(tmp_path / "hf"), tmp_path / "original", "llava")
    before, after = (AutoTokenizer.from_pretrained(d) for d in (whole, tmp_path / "original"))
    assert after.get_vocab() == before.get_vocab() and after.pad_token == before.pad_token == "<unk>"
    assert (tmp_path / "original" / "tokenizer.model").is_file()
    assert "<image>" not in (tmp_path / "original" / "tokenizer_config.json").read_text()
    assert not (tmp_path / "original" / "chat_template.jinja").exists()
    fields = read_json(tmp_path / "original" / "config.json")
    assert fields["vocab_size"] == 1000 and fields["model_type"] == "llava_llama" and fields["pad_token_id"] == 0
    assert fields["architectures"] == ["LlavaLlamaForCausalLM"]
    assert open_tensors(tmp_path / "original")["lm_head.weight"].shape[0] == 1000


def test_rows_are_cut_by_the_tokenizer_where_no_config_of_ours_says_how_many(whole, tmp_path):
    """A checkpoint of the hub has no section ``original_llava``."""
    convert(str(whole), tmp_path / "hf", "llava-hf")
    fields = read_json(tmp_path / "hf" / "config.json")
    fields.pop("original_llava")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=says("CLIP", "vision tower", "name")):
        convert(str(tmp_path / "hf"), tmp_path / "original", "llava")
    convert(str(tmp_path / "hf"), tmp_path / "original", "llava", vision_tower=str(TOWER))
    again, before = open_tensors(tmp_path / "original"), original("e2e_l15")[1]
    assert all(torch.equal(again[name].read(), tensor) for name, tensor in before.items())


def test_spare_rows_that_are_not_ours_stay(tmp_path):
    """The model has 1024 rows for 1000 tokens: <image> and <pad> take spare ones, and nothing is added or cut."""
    config, tensors = original("e2e_l15")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.randn(24, tensors[name].shape[1])])
    source = with_tokenizer(write(tmp_path / "source", config | {"vocab_size": 1024}, tensors))
    convert(str(source), tmp_path / "hf", "llava-hf")
    assert read_json(tmp_path / "hf" / "config.json")["image_token_index"] == 1000
    convert(str(tmp_path / "hf"), tmp_path / "original", "llava")
    again = open_tensors(tmp_path / "original")
    assert all(torch.equal(again[name].read(), tensor) for name, tensor in tensors.items())


def test_a_trained_tower_is_marked(whole, tmp_path):
    source = open_llava(str(whole))
    name = next(name for name in source.tensors if "vision_tower" in name and name.endswith("fc1.weight"))
    changed = source.tensors | {name: source.tensors[name].map(lambda tensor: tensor + 1)}
    save_original(replace(source, tensors=changed), tmp_path / "original")
    assert read_json(tmp_path / "original" / "config.json")["unfreeze_mm_vision_tower"] is True
    theirs = load_source(source).hf.state_dict()[name]
    assert torch.equal(build_parts(str(tmp_path / "original")).hf.state_dict()[name], theirs + 1)


def test_clip_l_is_known_by_its_shape():
    config = make_tiny_hf().config
    assert tower_name(config) is None
    vision = config.vision_config
    vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size = 1024, 24, 336, 14
    assert tower_name(config) == "openai/clip-vit-large-patch14-336"


def test_what_the_original_code_cannot_open_is_refused(tmp_path):
    save_pretrained(make_tiny_hf("qwen2"), None, tmp_path / "qwen")
    (tmp_path / "qwen" / "preprocessor_config.json").write_bytes((TOWER / "preprocessor_config.json").read_bytes())
    with pytest.raises(ValueError, match=says("qwen2", "decoder", "llama", "mistral")):
        convert(str(tmp_path / "qwen"), tmp_path / "out", "llava", vision_tower=str(TOWER))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen"]  # nothing half-written


def test_what_has_no_room_is_named_and_not_kept(whole, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))  # bytes a file may have: as good as a full disk
    try:
        with pytest.raises(ValueError, match=f"^{tmp_path}/hf " + says("written", "nothing")):
            convert(str(whole), tmp_path / "hf", "llava-hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]
