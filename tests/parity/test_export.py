"""What we save is an ordinary Hugging Face LLaVA: it reopens without us and generates the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.load import load_strictly, save_pretrained, save_projector
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.images import load_image, preprocess
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch, Record, Turn
from tests.golden.cases import directories
from tests.messages import says

SCHEDULE = Schedule(layers=(1, 2, 3), ratios=(0.5, 0.25, 0.125), positions="renumber")
PINPOINTS = ((28, 56), (56, 28), (56, 56))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """A raw LLM with a tokenizer and a raw CLIP tower, as they lie on a disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = AutoTokenizer.from_pretrained(directories()[0] / "tokenizers" / "sp_legacy_false")
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
        )
    )
    for model in (llm, tower):
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    tower.save_pretrained(folder / "tower")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder / "tower"
    )
    return {"language_model": str(folder / "llm"), "vision_tower": str(folder / "tower")}


@pytest.fixture(params=["pad", "anyres"])
def parts(request, sources):
    anyres = {"aspect": "anyres", "merge": "spatial_unpad", "pinpoints": PINPOINTS} if request.param == "anyres" else {}
    return build_parts(**sources, **anyres)


@pytest.fixture
def picture(tmp_path) -> Path:
    file = tmp_path / "picture.png"
    Image.effect_noise((60, 36), 90).convert("RGB").save(file)
    return file


def test_reopens_in_plain_transformers_and_generates_the_same(parts, picture, tmp_path):
    model = PyramidLlava(parts.hf, SCHEDULE, parts.geometry)
    save_pretrained(model.hf, parts.processor(), tmp_path / "saved")
    reopened, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    assert type(reopened) is type(parts.hf)
    assert Schedule.from_dict(reopened.config.pyramid_drop) == SCHEDULE
    for name, tensor in parts.hf.state_dict().items():
        assert torch.equal(tensor, reopened.state_dict()[name]), name

    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    text = "What is this? <image>"  # behind an image, sentencepiece text gets a space in LLaVA but not in the processor
    inputs = processor(images=Image.open(picture), text=text, return_tensors="pt")
    theirs = reopened.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]

    record = Record("r", (Turn("human", text),), (picture,), "test")
    image = preprocess(load_image(picture), parts.geometry, parts.image_processor)
    torch.testing.assert_close(image.pixels, inputs["pixel_values"].reshape(image.pixels.shape), atol=1e-5, rtol=0)
    token = parts.hf.config.image_token_id
    sample = Encoder(TEMPLATES["qa"], parts.tokenizer, token, parts.geometry).prompt(record, [image])
    assert sample.input_ids.tolist() == inputs["input_ids"][0].tolist()
    vanilla = PyramidLlava(parts.hf, Schedule(), parts.geometry)
    for expected in theirs.tolist():
        logits = vanilla.logits(PackedBatch.pack([sample], query="last"))
        assert logits[-1].argmax().item() == expected
        ids = torch.cat([sample.input_ids, torch.tensor([expected])])
        sample = type(sample)("r", ids, torch.full_like(ids, -100), sample.images, sample.image_spans)


def test_saved_directory_is_a_source_again(parts, tmp_path):
    save_pretrained(parts.hf, parts.processor(), tmp_path)
    again = build_parts(path=str(tmp_path))
    assert again.geometry == parts.geometry
    assert again.tokenizer.get_vocab() == parts.tokenizer.get_vocab()
    assert again.image_processor.to_dict() == parts.image_processor.to_dict()


def test_bfloat16_weights_stay_bfloat16(sources, tmp_path):
    parts = build_parts(**sources, dtype=torch.bfloat16)
    save_pretrained(parts.hf, None, tmp_path)
    reopened = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert {p.dtype for p in reopened.parameters()} == {torch.bfloat16}


def test_projector_travels_from_stage_one_to_stage_two(sources, tmp_path):
    first = build_parts(**sources)
    file = save_projector(first.hf, tmp_path)
    fresh = build_parts(**sources)
    second = build_parts(**sources, projector=str(file))
    weight = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(first.hf.state_dict()[weight], fresh.hf.state_dict()[weight])
    assert torch.equal(first.hf.state_dict()[weight], second.hf.state_dict()[weight])


def test_a_projector_that_does_not_fit_is_an_error(sources, tmp_path):
    from safetensors.torch import save_file

    save_file({"model.mm_projector.0.weight": torch.zeros(3, 3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=says("wrong.safetensors", "fit", "projector")):
        build_parts(**sources, projector=str(tmp_path / "wrong.safetensors"))


def test_weights_are_loaded_strictly(parts):
    state = parts.hf.state_dict()
    state["model.surplus"] = state.pop("lm_head.weight")
    state["model.language_model.norm.weight"] = torch.zeros(3)
    norm = "model.language_model.norm.weight"
    listed = says("a file", "missing: lm_head.weight", "unexpected: model.surplus", f"wrong shape: {norm}")
    with pytest.raises(ValueError, match=listed):
        load_strictly(parts.hf, state, "a file")


def test_a_larger_picture_interpolates_the_tower(sources):
    parts = build_parts(**sources, image_size=42)
    assert parts.geometry.patches == 36
    assert parts.hf.model.vision_tower(torch.zeros(1, 3, 42, 42)).last_hidden_state.shape == (1, 37, 16)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(ValueError, match=says("path", "language_model", "vision_tower")):
        build_parts(language_model=str(tmp_path))
    (tmp_path / "config.json").write_text('{"mm_vision_tower": "nowhere", "model_type": "llava_llama"')
    with pytest.raises(ValueError, match=says("config.json", "JSON")):
        build_parts(path=str(tmp_path))
