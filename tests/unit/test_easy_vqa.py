"""What the easy-vqa runs start from, data/tiny/easy_vqa: its recipe reads the training part alone, and the decoder that
it ships answers about described pictures."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from llava_pdrop.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "data" / "tiny" / "easy_vqa"
FORMS = [
    "is there a {color} shape?", "is there not a {shape}?", "is no {color} shape present?", "what color is the shape?",
    "what is the {color} shape?",
]  # fmt: skip


class Recipe(NamedTuple):
    """The scripts as modules."""

    easy_vqa: ModuleType
    text: ModuleType
    decoder: ModuleType
    kinds: ModuleType
    vision: ModuleType


@pytest.fixture(scope="module")
def recipe() -> Iterator[Recipe]:
    """They import each other by bare names, one of which is also a package's: taken away again afterwards."""
    before, path = dict(sys.modules), list(sys.path)
    sys.path[:0] = [str(ROOT / "data" / folder) for folder in ("prepare", "tiny")]
    try:
        import easy_vqa
        import easy_vqa_decoder
        import easy_vqa_kinds
        import easy_vqa_text
        import easy_vqa_vision

        yield Recipe(easy_vqa, easy_vqa_text, easy_vqa_decoder, easy_vqa_kinds, easy_vqa_vision)
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if name not in before and file and Path(file).parent in (ROOT / "data" / "prepare", ROOT / "data" / "tiny"):
                del sys.modules[name]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SHIPPED / "language_model")


@pytest.mark.parametrize(
    ("form", "answer", "kind"),
    [
        ("what is the {color} shape?", "circle", "what shape"),
        ("what color is the shape?", "teal", "what colour"),
        ("is there a {color} shape?", "no", "yes/no, word absent"),
        ("is there not a {color} shape?", "yes", "yes/no, word absent"),
        ("is a {shape} present?", "yes", "yes/no, word present"),
        ("is no {shape} present?", "no", "yes/no, word present"),
    ],
)
def test_answers_about_a_teal_circle(recipe: Recipe, form: str, answer: str, kind: str) -> None:
    question = form.format(shape="circle", color="red")
    assert recipe.text.form_of(question) == form
    assert recipe.text.answer_to(form, ("circle", "red"), ("circle", "teal")) == answer
    assert recipe.text.kind_of(question, answer) == recipe.text.kind_of(form, answer) == kind


@pytest.mark.skipif(find_spec("easy_vqa") is None, reason="the third-party package easy-vqa is not installed")
def test_the_rules_answer_as_the_package_does(recipe: Recipe) -> None:
    """For each of 300 training pictures there is a shape and a colour that explain all its answers."""
    text, package = recipe.text, recipe.easy_vqa.find_package()
    pictures = recipe.easy_vqa.read_questions(package, "train")
    for number in sorted(pictures)[:300]:
        asked = []
        for question, answer in pictures[number]:
            words = question.rstrip("?").split()
            named = [next((word for word in words if word in those), "") for those in (text.SHAPES, text.COLORS)]
            asked.append((text.form_of(question), named, answer))
        assert any(
            all(text.answer_to(form, named, shown) == answer for form, named, answer in asked)
            for shown in itertools.product(text.SHAPES, text.COLORS)
        ), number


def test_described_pictures_are_asked_about_rightly(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    text = recipe.text
    drawn = text.DescribedPictures(tokenizer, FORMS, np.random.default_rng(0)).draw(200, 24, turns=3)
    assert drawn.shown.shape == (200, 24) and drawn.shown.any(1).all() and not drawn.shown.all(1).any()
    counts = torch.bincount(drawn.kinds.flatten(), minlength=4) / drawn.kinds.numel()
    assert counts[:2].sum() == pytest.approx(0.25, abs=0.06), "a quarter asks what"
    assert counts[2] == pytest.approx(counts[3].item(), abs=0.08), "as many words are there as are not"
    for ids, words, next_ids in zip(drawn.ids, drawn.words, drawn.next_ids, strict=True):
        start, *turns = tokenizer.decode(ids[25:]).replace("<pad>", "").splitlines()
        shown = tuple(tokenizer.decode(word).strip() for word in words)
        assert start == "" and len(turns) == 3
        for turn, answer_id in zip(turns, next_ids[::2], strict=True):
            question, answer = turn.split("? ")
            named = [
                next((word for word in question.split() if word in those), "") for those in (text.SHAPES, text.COLORS)
            ]
            assert answer == text.answer_to(text.form_of(question), named, shown) == tokenizer.decode(answer_id).strip()
        assert {tokenizer.decode(token) for token in next_ids[1::2]} == {"\n"}


def test_first_lessons_have_no_negation(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    pictures = recipe.text.DescribedPictures(tokenizer, FORMS, np.random.default_rng(0))
    for negation in (False, True):
        words = tokenizer.decode(pictures.draw(50, 4, 3, negation).ids.flatten()).replace("?", "").split()
        assert ("not" in words) == negation


def test_a_shape_is_the_sum_of_two_words(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    decoder = recipe.decoder.new_decoder(tokenizer, 16, 16, tied=True)
    text = recipe.text.DescribedPictures(tokenizer, FORMS, np.random.default_rng(1)).draw(2, 6, turns=2)
    with torch.no_grad():
        table = decoder.model.embed_tokens.weight
        for row, logits in enumerate(recipe.decoder.read(decoder, text)):
            x_ND = table[text.ids[row]].clone()
            for place in text.shown[row].nonzero()[:, 0]:
                x_ND[1 + place] = table[text.words[row, 0]] + table[text.words[row, 1]]
            wanted = decoder(inputs_embeds=x_ND[None]).logits[0, text.targets[row]]
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_shipped_decoder_answers_every_kind_of_question(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pictures of 144 places, as many as there are image tokens."""
    decoder = LlamaForCausalLM.from_pretrained(SHIPPED / "language_model", dtype=torch.float32)
    text = recipe.text.DescribedPictures(tokenizer, FORMS, np.random.default_rng(3)).draw(200, 144, turns=1)
    with torch.no_grad():
        right = recipe.decoder.read(decoder, text).argmax(-1) == text.next_ids
    for number, kind in enumerate(recipe.text.KINDS):
        asked = text.kinds[:, 0] == number
        assert asked.sum() >= 10 and right[asked].float().mean() >= 0.95, kind


@pytest.mark.trains
def test_a_lesson_learns(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    student = recipe.decoder.new_decoder(tokenizer, 32, 64, tied=True)
    text = recipe.text.DescribedPictures(tokenizer, FORMS, np.random.default_rng(4)).draw(8, 6, turns=3)
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for _ in range(20):
        logits = recipe.decoder.read(student, text, noise=0.1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text.next_ids.flatten())
        recipe.decoder.descend(optimizer, parameters, loss)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["pretrain", "finetune_pdrop", "single_pdrop"])
def test_the_configs_start_from_what_is_shipped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model = load_config(f"configs/tiny/easy_vqa_{name}.yaml").model
    parts = [Path(str(part)).resolve() for part in (model.language_model, model.vision_tower, model.projector)]
    assert parts == [SHIPPED / "language_model", SHIPPED / "tower", SHIPPED / "projector" / "model.safetensors"]


def test_accuracy_by_kind_is_the_mean_over_seeds(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "predictions").mkdir()
    asked = [("what shape is present?", "circle"), ("is there a circle?", "yes"), ("is no circle present?", "no"),
             ("is there a red shape?", "no")]  # fmt: skip
    for name, scores in {
        "vanilla": (1, 1, 0, 1),
        "vanilla-seed_1": (1, 0, 0, 1),
        "vanilla_on_random": (0, 1, 1, 1),
    }.items():
        rows = [{"question": q, "gold": gold, "score": score} for (q, gold), score in zip(asked, scores, strict=True)]
        (tmp_path / "predictions" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    recipe.kinds.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        "| variant | all 4 | what shape 1 | yes/no, word absent 1 | yes/no, word present 2 |",
        "|---|---:|---:|---:|---:|",
        "| vanilla | 62.5 % ± 12.5 | 100.0 % ± 0.0 | 100.0 % ± 0.0 | 25.0 % ± 25.0 |",
        "| vanilla + random | 75.0 % | 0.0 % | 100.0 % | 100.0 % |",
    ]
    (tmp_path / "ablation.json").write_text(
        json.dumps({"variants": [{"name": "vanilla"}], "training_free": [{"name": "vanilla + random"}]})
    )
    said = [{"from": "human", "value": "<image>\nis there a circle?"}, {"from": "gpt", "value": "no"},
            {"from": "human", "value": "is no circle present?"}, {"from": "gpt", "value": "no"}]  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps([{"conversations": said}]))
    recipe.kinds.main([str(tmp_path), "--train", str(tmp_path / "train.json")])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| blind | 25.0 % | 0.0 % | 0.0 % | 50.0 % |",
        "| vanilla | 75.0 % | 100.0 % | 100.0 % | 50.0 % |",
        "| vanilla + random | 75.0 % | 0.0 % | 100.0 % | 100.0 % |",
    ], "the run of seed 1 was taken out of the ablation"
    with pytest.raises(SystemExit, match="has no answers"):
        recipe.kinds.main([str(tmp_path / "predictions")])


def test_the_easy_vqa_tower_is_made_of_training_pictures(recipe: Recipe, tmp_path: Path) -> None:
    """The package has no test part here, and a picture whose questions leave its colour open is left out."""
    folder = tmp_path / "data" / "train"
    (folder / "images").mkdir(parents=True)
    questions = [
        ["what is the teal shape?", "circle", 0],
        ["is there a red shape?", "yes", 1],
        ["is no triangle present?", "no", 1],
        ["is there not a rectangle?", "no", 2],
        ["is there a brown shape?", "no", 2],
        ["is there not a blue shape?", "yes", 2],
    ]
    (folder / "questions.json").write_text(json.dumps(questions))
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / "images" / f"{number}.png")
    pictures = recipe.vision.read_pictures(tmp_path)
    assert [recipe.vision.SHAPES[number] for number in pictures.shapes] == ["circle", "triangle"]
    assert [recipe.vision.COLORS[number] for number in pictures.colors] == ["teal", "red"]
    assert pictures.pixels[:, 0, 0, 0].tolist() == [0, 1]


def test_a_moved_shape_is_whole_and_its_patches_are_those_that_show_it(recipe: Recipe) -> None:
    pixels = np.full((64, 64, 3), 240, np.uint8)
    pixels[5:21, 30:62] = (0, 0, 255)
    pictures = recipe.vision.Pictures(pixels[None], np.array([1]), np.array([2]))
    for seed in range(5):
        moved, mask = recipe.vision.move_shape(pixels, np.random.default_rng(seed))
        assert mask.sum() == 16 * 32 and (moved[mask] == (0, 0, 255)).all() and (moved[~mask] == 240).all()
        batch, share = recipe.vision.draw_batch(pictures, np.array([0]), np.random.default_rng(seed))
        assert batch.shape == (1, 3, 96, 96) and share.shape == (1, 144)
        assert share.sum().item() == pytest.approx(16 * 32 / 64**2 * 144, rel=0.05)
        blue_minus_red = (batch[0, 2] - batch[0, 0]).unfold(0, 8, 8).unfold(1, 8, 8).mean((2, 3)).flatten()
        assert torch.corrcoef(torch.stack([blue_minus_red, share[0]]))[0, 1] > 0.98


def test_the_shipped_easy_vqa_weights_are_small() -> None:
    """Under 1 MB, all in bfloat16."""
    found = sorted(SHIPPED.rglob("*.safetensors"))
    assert [path.parent.name for path in found] == ["language_model", "projector", "tower"]
    assert sum(path.stat().st_size for path in found) < 1e6
    assert {tensor.dtype for path in found for tensor in load_file(path).values()} == {torch.bfloat16}
