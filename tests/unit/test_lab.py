"""The laboratory of data/lab and data/prepare/chains.py: its pages say what its records do, and the decoder it ships
reads them at the depths its recipe teaches."""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

DATA = Path(__file__).resolve().parents[2] / "data"
SMALL = {"pretrain": 2, "train": 2, "eval": 3}


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules. They import each other by bare names, so these are taken away again afterwards."""
    before, path = set(sys.modules), list(sys.path)
    sys.path[:0] = [str(DATA / folder) for folder in ("prepare", "tiny", "lab")]
    try:
        import chains
        import lab_decoder
        import lab_text

        yield {"chains": chains, "decoder": lab_decoder, "text": lab_text}
    finally:
        sys.path[:] = path
        for name in ("chains", "forms", "lab_decoder", "lab_text", "base_text", "base_training"):
            if name not in before:
                sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DATA / "lab" / "language_model")


@pytest.fixture(scope="module")
def decoder() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(DATA / "lab" / "language_model", dtype=torch.float32)


def words_beside(page, letter: str, words: tuple[str, ...]) -> list[str]:
    """What stands to the right of each place of ``letter`` (in the row, or at the start of the next: reading order)."""
    shown = [words[word] for word in page.words]
    return [shown[i + 1] for i, word in enumerate(shown[:-1]) if word == letter]


def test_every_path_has_two_hops_and_one_end(scripts) -> None:
    """Followed on the finished page, not by the plan: the key stands once, its middle twice, with one digit to its
    right."""
    chains = scripts["chains"]
    forms = chains.forms
    rng = np.random.default_rng(0)
    for clutter in (0.0, 0.5, 1.0):
        for grid, pairs in ((8, 6), (11, 12), (12, 12), (16, 13)):
            page = chains.plan_page(rng, grid, pairs=pairs, clutter=clutter)
            assert len(page.fields) == pairs
            for key, answer in page.fields.items():
                (middle,) = words_beside(page, key, forms.WORDS)
                assert middle in string.ascii_uppercase and middle not in page.fields
                ends = words_beside(page, middle, forms.WORDS)
                assert [end for end in ends if end in string.digits] == [answer]
            assert [forms.WORDS[page.words[tile]] for tile in page.seconds] == list(page.fields.values())
            assert (page.words[page.firsts] == forms.FIRST_LETTER + page.middles).all()


@pytest.mark.parametrize(("grid", "pairs"), [(10, 12), (12, 14), (12, -1)])
def test_a_page_that_cannot_hold_its_paths(scripts, grid: int, pairs: int) -> None:
    with pytest.raises(ValueError, match=f"{pairs} paths"):
        scripts["chains"].plan_page(np.random.default_rng(0), grid, pairs=pairs)


def test_records_ask_what_the_pages_say(scripts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chains = scripts["chains"]
    forms = chains.forms
    counts = [word for split, count in SMALL.items() for word in (f"--{split}", str(count))]
    forms.main(["--out", str(tmp_path), *counts], chains.TASK)
    assert json.loads((tmp_path / "manifest.json").read_text())["task"] == "chains"
    for split, turns in {"pretrain": 12, "train": 8, "eval": 1}.items():
        records = json.loads((tmp_path / f"{split}.json").read_text())
        assert len(records) == SMALL[split]
        for number, record in enumerate(records):
            page, picture, _ = forms.make_page(0, split, number, 12, chains.TASK)
            with Image.open(tmp_path / record["image"]) as image:
                assert np.array_equal(np.asarray(image), picture) and picture.shape == (144, 144, 3)
            human, gpt = record["conversations"][::2], record["conversations"][1::2]
            asked = [turn["value"].split()[-1] for turn in human]
            assert len(set(asked)) == turns
            assert [turn["value"] for turn in gpt] == [page.fields[letter] for letter in asked]
    capsys.readouterr()
    forms.main(["--out", str(tmp_path), *counts], chains.TASK)
    assert "already there" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        forms.main(["--out", str(tmp_path), "--turns", "13"], chains.TASK)
    assert "--turns 13" in capsys.readouterr().err


def test_the_recipe_reads_as_the_shipped_model_does(scripts, tokenizer, decoder) -> None:
    text = scripts["text"].PathTexts(tokenizer, np.random.default_rng(1)).draw(2, 12, 12, 0.5, 3)
    with torch.no_grad():
        reading = scripts["decoder"].read(decoder, text)
        logits = decoder(text.ids).logits[:, text.targets]
    torch.testing.assert_close(reading.logits, logits, rtol=1e-3, atol=1e-3)
    assert (text.ids[:, [query + 1 for query in text.queries]] == text.answers).all()


def test_the_shipped_decoder_reads_at_the_taught_depths(scripts, tokenizer, decoder) -> None:
    """Pages of text: all is answered; before layers 4 and 8 attention chooses far better than chance, from 10 on
    nothing is lost; the heads taught to look at a hop's tile do."""
    recipe = scripts["decoder"]
    text = scripts["text"].PathTexts(tokenizer, np.random.default_rng(2)).draw(60, 12, 12, 0.5, 1, short=False)

    def rate(drop: dict[int, float] | None = None, by_chance: bool = False) -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            logits = recipe.read(decoder, text, 0.0, drop, by_chance).logits[:, :1]
        return (logits.argmax(-1) == text.answers).float().mean().item()

    assert rate() >= 0.95
    for layer in (4, 8):
        assert rate({layer: 0.25}) - rate({layer: 0.25}, by_chance=True) >= 0.4
    assert rate({10: 0.25}, by_chance=True) >= 0.9
    with torch.no_grad():
        looks = recipe.read(decoder, text).looks
    for layers, tiles in ((recipe.FIRST_HOP, text.firsts), (recipe.SECOND_HOP, text.seconds)):
        for layer in layers:
            assert looks[layer][:, 0].exp().gather(2, tiles[..., None]).mean() >= 0.8


@pytest.mark.trains
def test_a_lesson_learns(scripts, tokenizer) -> None:
    """A few steps of the recipe on one small batch: every part of the loss falls."""
    recipe = scripts["decoder"]
    torch.manual_seed(0)
    student, teacher = recipe.new_decoder(tokenizer), recipe.Teacher()
    text = scripts["text"].PathTexts(tokenizer, np.random.default_rng(3)).draw(4, 6, 3, 0.2, 3)
    parameters = [*student.parameters(), *teacher.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    parts = [teacher(text, recipe.read(student, text, noise=0.1))]
    assert set(parts[0]) == set(recipe.WEIGHTS)
    for _ in range(12):
        recipe.descend(optimizer, parameters, sum(recipe.WEIGHTS[name] * part for name, part in parts[-1].items()))
        parts.append(teacher(text, recipe.read(student, text, noise=0.1)))
    assert all(parts[-1][name] < parts[0][name] for name in recipe.WEIGHTS)


def test_what_is_shipped_is_small() -> None:
    """The laboratory costs less than 1 MB of weights: its tower is that of the embedded default."""
    assert sum(file.stat().st_size for file in (DATA / "lab").rglob("*.safetensors")) < 1e6
