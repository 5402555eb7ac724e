"""A whole run in miniature: untrained model parts, records with pictures, and the YAML that joins them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_pdrop.checkpoint.build import build_parts

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors here are tiny: a second thread only waits for the first, and for whatever else the machine runs."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``llm``, ``tower`` and ``data`` (12 training, 6 evaluation records, pictures of 48 pixels)."""
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    _tokenizer().save_pretrained(root / "llm")
    shape = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=320, num_hidden_layers=4, **shape)).save_pretrained(root / "llm")
    vision = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=3)
    CLIPVisionModel(CLIPVisionConfig(image_size=48, patch_size=12, **vision)).save_pretrained(root / "tower")
    size = dict(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    CLIPImageProcessorPil(**size).save_pretrained(root / "tower")
    (root / "data" / "images").mkdir(parents=True)
    for split, count in (("train", 12), ("eval", 6)):
        records = [_record(root, f"{split}{i}", i, turns=1 + i % 3 if split == "train" else 1) for i in range(count)]
        (root / "data" / f"{split}.json").write_text(json.dumps(records))
    return root


@pytest.fixture
def tiny_config(tiny_files: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the YAML of a run of a few steps below ``tmp_path`` and returns its path; keywords add whole sections."""

    def write(name: str = "run", **sections: object) -> Path:
        content = {
            "name": name,
            "output_dir": str(tmp_path / "out" / name),
            "model": {
                "language_model": str(tiny_files / "llm"),
                "vision_tower": str(tiny_files / "tower"),
                "template": "qa",
            },
            "data": {
                "train": str(tiny_files / "data/train.json"),
                "eval": str(tiny_files / "data/eval.json"),
                "image_root": str(tiny_files / "data/images"),
                "max_length": 256,
                "samples_per_batch": 2,
            },
            "train": {
                "max_steps": 3,
                "learning_rate": 1e-3,
                "use_cpu": True,
                "save_strategy": "no",
                "disable_tqdm": True,
            },
            "eval": {"batch_size": 4, "max_new_tokens": 2},
            **sections,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(content))  # JSON is YAML
        return file

    return write


def _record(root: Path, name: str, number: int, turns: int) -> dict:
    colour = list(COLOURS)[number % 3]
    Image.new("RGB", (48 - 6 * (number % 2), 48), COLOURS[colour]).save(root / "data/images" / f"{name}.png")
    conversation = []
    for turn in range(turns):
        question = "Which colour is it" if turn == 0 else f"And again {turn}"
        conversation += [
            {"from": "human", "value": ("<image>\n" if turn == 0 else "") + question},
            {"from": "gpt", "value": colour},
        ]
    return {"id": name, "image": f"{name}.png", "conversations": conversation}


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and what marks the ends of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def vip(tiny_files: Path, tmp_path: Path) -> Path:
    """A model of another family, asked by its own processor: a VipLlava, pictures of 48 pixels in patches of 12."""
    torch.manual_seed(0)
    parts = build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"))
    config = transformers.VipLlavaConfig(
        text_config=parts.hf.config.text_config,
        vision_config=parts.hf.config.vision_config,
        image_token_index=parts.hf.config.image_token_id,
        vision_feature_layers=[-2, -1],
        tie_word_embeddings=False,
    )
    transformers.VipLlavaForConditionalGeneration(config).save_pretrained(tmp_path / "vip")
    processor = parts.processor()
    processor.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor.save_pretrained(tmp_path / "vip")
    return tmp_path / "vip"
