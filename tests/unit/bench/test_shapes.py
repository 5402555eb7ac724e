"""The shape of a run's config is the run's: its sizes, geometry, schedule and settings, and what cannot be measured."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from llava_pdrop.__main__ import main
from llava_pdrop.bench import shapes
from llava_pdrop.bench.shapes import DECODERS, SHAPES, chosen_shape, shape_of
from llava_pdrop.bench.train_step import Arm, Trainer
from llava_pdrop.bench.workload import Workload
from llava_pdrop.checkpoint.hf_models import make_config, make_hf_model
from llava_pdrop.config.load import RUN_FILE, load_config, to_yaml
from llava_pdrop.cost.nominal import model_of, nominal_batch
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.schedule import Schedule
from tests.messages import meant, says

ROOT = Path(__file__).parents[3]
RECIPES = {
    "llava15-7b": "llava15_7b", "llava15-13b": "llava15_13b", "llava-next-7b": "llava_next_7b",
    "llava-next-7b-p9": "llava_next_7b_p9",
}  # fmt: skip
"""Named shape -> the recipe it stands for."""

TINY, NEXT = "configs/tiny/finetune_pdrop.yaml", "configs/llava_next_7b/finetune_pdrop.yaml"
CPU = torch.device("cpu")
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
)
TEXT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=300, max_position_embeddings=256,
)  # fmt: skip
PARTS = {
    "name": "mine",
    "model": {
        "language_model": "no/decoder",
        "vision_tower": "no/tower",
        "aspect": "anyres",
        "merge": "spatial_unpad",
        "pinpoints": [[64, 128], [128, 128]],
        "trainable": ["projector", "language_model", "vision_tower"],
    },
    "data": {"train": "none.json", "samples_per_batch": 2, "max_length": 512},
    "pyramid_drop": {"layers": [1, 2], "ratios": [0.5, 0.25]},
}


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def parts_file(directory: Path, text: dict | None = None, vision: dict | None = None) -> Path:
    """A config whose parts are nowhere, with the numbers of small ones."""
    reference = {"language_model": TEXT | (text or {}), "vision_tower": VISION | (vision or {})}
    file = directory / "mine.yaml"
    file.write_text(json.dumps(PARTS | {"model": {**PARTS["model"], "reference_shape": reference}}))
    return file


@pytest.mark.parametrize(("name", "recipe"), RECIPES.items())
def test_a_named_shape_is_its_recipe(name: str, recipe: str) -> None:
    named, own = asdict(SHAPES[name]), asdict(shape_of(load_config(f"configs/{recipe}/finetune_pdrop.yaml")))
    for part in ("text", "vision"):
        sizes, whole = named.pop(part), own.pop(part)
        assert {key: whole[key] for key in sizes} == sizes
    assert own == named
    assert own["recompute"] and own["half"]


def test_the_model_is_as_large_as_that_of_the_named_shape() -> None:
    counts = []
    for shape in (SHAPES["llava-next-7b"], shape_of(load_config(NEXT))):
        with torch.device("meta"):
            hf = make_hf_model(shape.text_config(), shape.vision_config(), shape.geometry, image_token_id=32062)
        counts.append(sum(parameter.numel() for parameter in hf.parameters()))
    assert counts[0] == counts[1] > 7e9


def test_what_the_config_says_is_measured() -> None:
    changes = [
        "data.samples_per_batch=null", "data.tokens_per_batch=7000", "data.max_length=6000", "model.attention=sdpa",
        "model.trainable=[projector]", "train.recompute_layers=8", "train.bf16=false", "pyramid_drop=null",
        "model.kernels=eager",
    ]  # fmt: skip
    config = load_config(NEXT, changes)
    shape = shape_of(config)
    assert shape.samples == len(nominal_batch(shape.geometry, config).seq_lens) == 2
    assert (shape.recompute, shape.recompute_layers, shape.attention, shape.half) == (True, 8, "sdpa", False)
    assert shape.kernels == "eager"
    assert shape.trainable == ("projector",) and shape.schedule == Schedule()
    assert shape.max_length == shape.text_config().max_position_embeddings == 6000
    assert not shape_of(load_config(NEXT, ["train.gradient_checkpointing=false"])).recompute


@pytest.mark.parametrize(
    ("kind", "more"),
    [("llama", {}), ("mistral", {"sliding_window": 40}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {})],
)
def test_every_decoder_does_a_step(kind: str, more: dict, tmp_path: Path) -> None:
    shape = shape_of(load_config(parts_file(tmp_path, {"model_type": kind, **more})))
    trainer = Trainer(shape, CPU, Workload(shape), "adamw")
    decoder, head = trainer.model.hf.model.language_model, trainer.model.hf.lm_head
    assert decoder.config.model_type == kind and len(decoder.layers) == 4
    assert getattr(decoder.config, "sliding_window", None) == more.get("sliding_window")
    assert (head.weight is decoder.embed_tokens.weight) == ("tie_word_embeddings" in more)
    output, loss, *_ = trainer.step(Arm("", shape.schedule), trainer.workload.batch(0, CPU))
    assert 4 < loss < 8  # ln(384 rows of the vocabulary) = 5.95
    full, half, quarter = output.image_tokens
    assert full > half > quarter > 0


def test_every_decoder_that_is_measured_is_tested() -> None:
    (mark,) = [m for m in test_every_decoder_does_a_step.pytestmark if m.name == "parametrize"]
    assert {kind for kind, _ in mark.args[1]} == set(DECODERS)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["configs/llava15_7b/finetune_lora_pdrop.yaml"], says("lora", "lora=null")),
        ([NEXT, "train.recompute_layers=33"], says("train.recompute_layers", "32", "33")),
        ([NEXT, "--shape", "tiny"], says("--shape tiny", "configs/llava_next_7b/finetune_pdrop.yaml", "exclude")),
        ([NEXT, "train.learning_rat=1"], says("'train.learning_rat'", meant("train.learning_rate'"))),
        (["nowhere.yaml"], says("nowhere.yaml")),
        (["configs/llava15_7b"], says(f"configs/llava15_7b/{RUN_FILE}")),
        ([TINY, "model.reference_shape=null", "model.language_model=no/where"], says("config.json", "decoder")),
    ],
)
@pytest.mark.parametrize("bench", ["train", "prefill"])
def test_what_cannot_be_measured_is_one_line(
    bench: str, words: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["bench", bench, *words, "--device", "cpu", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(line, error)


@pytest.mark.parametrize(
    ("text", "vision", "line"),
    [
        ({"model_type": "gemma"}, {}, says("mine.yaml", "decoder", "model_type", "'gemma'")),
        ({"model_type": "fooo"}, {}, says("mine.yaml", "model_type", "'fooo'", "transformers")),
        ({"num_attention_heads": 7}, {}, says("mine.yaml", "7")),
        (
            {},
            {"model_type": "siglip_vision_model"},
            says("mine.yaml", "vision tower", "model_type", "'siglip_vision_model'"),
        ),
    ],
)
def test_other_models_are_refused(text: dict, vision: dict, line: str, tmp_path: Path) -> None:
    config = load_config(parts_file(tmp_path, text, vision))
    with pytest.raises(ValueError, match=line) as caught:
        shape_of(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bench", ["train", "prefill"])
def test_a_model_that_the_memory_is_too_small_for_is_one_line(
    bench: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(shapes.psutil, "virtual_memory", lambda: SimpleNamespace(available=16 * 2**30))
    assert main(["bench", bench, NEXT, "--device", "cpu", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.match("error: " + says("weights", "26.3 GiB", "16.0 GiB"), error) and error.count("\n") == 1


def test_a_lora_run_without_its_adapters_is_measured() -> None:
    config = load_config("configs/llava15_7b/finetune_lora_pdrop.yaml", ["lora=null"])
    assert shape_of(config).trainable == ("projector", "language_model")


def test_a_whole_model_cuts_pictures_by_its_own_rules(tmp_path: Path) -> None:
    """As in training, where the image settings of the config are those of new models only."""
    rules = ImageGeometry(64, 16, "anyres", "spatial_unpad", ((64, 128), (128, 64)))
    text, vision = (AutoConfig.for_model(*part) for part in (["llama"], ["clip_vision_model"]))
    for config, sizes in ((text, TEXT), (vision, VISION)):
        config.update(sizes)
    whole = make_config(text, vision, rules, image_token_id=298)
    whole.save_pretrained(tmp_path / "hf")
    original = {
        **TEXT, "model_type": "llava_llama", "mm_vision_tower": str(tmp_path / "tower"), "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[64, 128], [128, 64]],
        "mm_projector_type": "mlp2x_gelu",
    }  # fmt: skip
    for name, fields in (("original", original), ("tower", {"model_type": "clip_vision_model", **VISION})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    for name in ("hf", "original"):
        file = tmp_path / f"{name}.yaml"
        model = {"path": str(tmp_path / name), "aspect": "pad"}
        file.write_text(json.dumps({"model": model, "data": PARTS["data"], "pyramid_drop": PARTS["pyramid_drop"]}))
        config = load_config(file)
        assert model_of(config).geometry == shape_of(config).geometry == rules, name
        assert model_of(config).config.model_type == "llava_next"
        rows = {"hf": 300, "original": 320}  # an original model gets two more, to a multiple of 64
        assert shape_of(config).text["vocab_size"] == rows[name]


def test_the_directory_of_a_run_stands_for_its_config(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text(to_yaml(load_config(NEXT)))
    name, shape = chosen_shape(None, [str(tmp_path), "data.samples_per_batch=3"], cuda=False)
    assert name == "llava_next_7b/finetune_pdrop" and shape.samples == 3


def test_without_config_the_shape_suits_the_device() -> None:
    assert [chosen_shape(None, [], cuda)[0] for cuda in (False, True)] == ["tiny", "llava-next-7b"]
    assert chosen_shape("small-cpu", [], cuda=True) == ("small-cpu", SHAPES["small-cpu"])


@pytest.mark.trains
def test_a_config_is_measured_without_data(tmp_path: Path) -> None:
    """Overrides may follow options; options go before the config."""
    words = ["bench", "train", "--steps", "2", "--warmup", "0", "--device", "cpu", "--out", str(tmp_path), TINY]
    words += ["data.train=nowhere.json", "data.prepare=null", "train.gradient_checkpointing=true", "--samples", "1"]
    words += ["model.kernels=liger", "--kernels", "torch"]
    assert main([*words, "train.recompute_layers=2", "model.attention=sdpa", "--attention", "auto"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"train-tiny-finetune_pdrop-cpu.{end}" for end in ("json", "md", "png")
    ]
    report = json.loads((tmp_path / "train-tiny-finetune_pdrop-cpu.json").read_text())
    assert report["shape"]["name"] == "tiny/finetune_pdrop"
    assert report["shape"]["text"]["num_hidden_layers"] == 4 and report["shape"]["trainable"][-1] == "language_model"
    assert [run["name"] for run in report["runs"]] == ["vanilla", "PyramidDrop"]
    assert {
        (run["recompute"], run["recompute_layers"], run["attention"], run["kernels"]) for run in report["runs"]
    } == {(True, 2, "auto", "torch")}
    assert report["runs"][1]["schedule"]["layers"] == [1, 2, 3]
    assert {tokens[0] for tokens in report["runs"][1]["steps"]["image_tokens"]} <= {0, 256}
    text = (tmp_path / "train-tiny-finetune_pdrop-cpu.md").read_text()
    assert text.startswith("# Training step: tiny/finetune_pdrop\n")
    assert "drawn from LLaVA-1.5's 665K samples" in text and "| kernels | torch |" in text


@pytest.mark.trains
def test_a_vanilla_config_is_measured_alone(tmp_path: Path) -> None:
    words = [TINY, "pyramid_drop=null", "compare=null", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["bench", "train", *words, "--steps", "1", "--warmup", "0", "--samples", "1"]) == 0
    report = json.loads((tmp_path / "train-tiny-finetune_pdrop-cpu.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["vanilla"]
    assert "| median [quartiles] | vanilla |" in (tmp_path / "train-tiny-finetune_pdrop-cpu.md").read_text()


@pytest.mark.parametrize(
    ("changes", "methods"),
    [([], ["vanilla", "PyramidDrop", "FastV"]), (["pyramid_drop=null", "compare=null"], ["vanilla", "FastV"])],
)
@pytest.mark.process
def test_prefill_of_a_config_has_the_tokens_of_its_pictures(
    changes: list[str], methods: list[str], tmp_path: Path
) -> None:
    words = ["--batch", "1", "--runs", "1", "--new-tokens", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["bench", "prefill", TINY, *changes, *words]) == 0
    report = json.loads((tmp_path / "prefill-tiny-finetune_pdrop-cpu.json").read_text())
    assert [(result["image_tokens"], result["method"]) for result in report["results"]] == [(256, m) for m in methods]
    assert report["settings"]["shape"] == "tiny/finetune_pdrop"
