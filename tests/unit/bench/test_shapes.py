"""The shape of a run's config is the run's: its sizes, geometry, schedule and settings, and what cannot be measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from llava_pdrop.__main__ import main
from llava_pdrop.bench import shapes
from llava_pdrop.bench.shapes import NAMED, chosen_shape, shape_named, shape_of
from llava_pdrop.bench.train_step import BenchArm, BenchTrainer
from llava_pdrop.bench.workload import Workload
from llava_pdrop.checkpoint.hf_models import make_config, make_hf_model
from llava_pdrop.config.load import RUN_FILE, load_config, to_yaml
from llava_pdrop.cost.flops import ALL_LAYERS, Recomputed
from llava_pdrop.cost.nominal import model_of, nominal_batch
from llava_pdrop.geometry import PINPOINTS, ImageGeometry
from llava_pdrop.model.decoder import COVERED
from llava_pdrop.schedule import Schedule
from tests.messages import meant, says

ROOT = Path(__file__).parents[3]
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, "max_position_embeddings": 16384}
VICUNA_7B = LLAMA | dict(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32064,
)  # fmt: skip
VICUNA_13B = VICUNA_7B | dict(
    hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
)
CLIP_L_336 = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
    patch_size=14, projection_dim=768,
)  # fmt: skip
WHOLE = ("projector", "language_model", "vision_tower")
RATIOS = (0.5, 0.25, 0.125)
RECIPE = dict(picture=None, text_tokens=None, recomputed=ALL_LAYERS, half=True, max_length=2048)
NEXT_7B = RECIPE | dict(
    text=VICUNA_7B,
    vision=CLIP_L_336,
    trainable=WHOLE,
    samples=4,
    schedule=Schedule((8, 16, 24), RATIOS, positions="renumber"),
)
CPU_SIZED = dict(trainable=WHOLE, recomputed=Recomputed(), half=False, max_length=2048)
SQUARE = dict(num_attention_heads=2, patch_size=14)
MEASURED: dict[str, dict] = {
    "tiny": CPU_SIZED | dict(
        text=LLAMA | dict(
            hidden_size=128, intermediate_size=344, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=1024,
        ),
        vision=SQUARE | dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, image_size=84, projection_dim=64
        ),
        geometry=ImageGeometry(84, 14, "anyres", "flat", ((168, 168),)), samples=4,
        schedule=Schedule((2, 4, 6), RATIOS, positions="renumber"), picture=(168, 168), text_tokens=40,
    ),
    "small-cpu": CPU_SIZED | dict(
        text=LLAMA | dict(
            hidden_size=512, intermediate_size=1376, num_hidden_layers=16, num_attention_heads=8,
            num_key_value_heads=8, vocab_size=32064,
        ),
        vision=SQUARE | dict(
            hidden_size=128, intermediate_size=512, num_hidden_layers=4, image_size=336, projection_dim=128
        ),
        geometry=ImageGeometry(336, 14, "anyres", "flat", ((672, 672),)), samples=1,
        schedule=Schedule((4, 8, 12), RATIOS, positions="renumber"), picture=(672, 672), text_tokens=150,
    ),
    "llava15-7b": RECIPE | dict(
        text=VICUNA_7B, vision=CLIP_L_336, geometry=ImageGeometry(336, 14), trainable=WHOLE[:2], samples=16,
        schedule=Schedule((8, 16, 24), RATIOS, positions="renumber"),
    ),
    "llava15-13b": RECIPE | dict(
        text=VICUNA_13B, vision=CLIP_L_336, geometry=ImageGeometry(336, 14), trainable=WHOLE[:2], samples=16,
        schedule=Schedule((10, 20, 30), RATIOS, positions="renumber"),
    ),
    "llava-next-7b": NEXT_7B | dict(
        geometry=ImageGeometry(336, 14, "anyres", "spatial_unpad", PINPOINTS["5_tiles"]), max_length=4096
    ),
    "llava-next-7b-p9": NEXT_7B | dict(
        geometry=ImageGeometry(336, 14, "anyres", "spatial_unpad", PINPOINTS["9_tiles"]), max_length=8192
    ),
}  # fmt: skip
"""What each named shape is: published figures were measured on these numbers."""

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


@pytest.mark.parametrize("name", MEASURED)
def test_a_named_shape_keeps_its_numbers(name: str) -> None:
    shape = shape_named(name)
    expected = {"attention": "auto", "kernels": "auto", **MEASURED[name]}
    assert {key: value for key, value in vars(shape).items() if key not in ("text", "vision")} == {
        key: value for key, value in expected.items() if key not in ("text", "vision")
    }
    assert {key: shape.text[key] for key in expected["text"]} == expected["text"]
    assert {key: shape.vision[key] for key in expected["vision"]} == expected["vision"]
    assert shape.text_config().head_dim == shape.text["hidden_size"] // shape.text["num_attention_heads"]


def test_every_named_shape_is_a_config_and_every_config_of_the_bench_has_a_name() -> None:
    assert set(MEASURED) == set(NAMED)
    files = {str(file.relative_to(shapes.CONFIGS)) for file in shapes.CONFIGS.glob("bench/*.yaml")}
    assert files == {file for file in NAMED.values() if file.startswith("bench/")}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tiny", 1_977_600), ("small-cpu", 84_716_288), ("llava15-7b", 7_063_427_072), ("llava15-13b", 13_351_494_656),
        ("llava-next-7b", 7_063_431_168), ("llava-next-7b-p9", 7_063_431_168),
    ],
)  # fmt: skip
def test_a_named_shape_keeps_its_size(name: str, parameters: int) -> None:
    shape = shape_named(name)
    with torch.device("meta"):
        hf = make_hf_model(shape.text_config(), shape.vision_config(), shape.geometry, image_token_id=1)
    assert sum(parameter.numel() for parameter in hf.parameters()) == parameters


def test_a_package_without_configs_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(shapes, "CONFIGS", tmp_path)
    monkeypatch.setattr(shapes, "shape_named", shapes.shape_named.__wrapped__)
    assert main(["bench", "train", "--device", "cpu", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(says("--shape tiny", f"{tmp_path}/bench/tiny.yaml", "CONFIG", "pip install -e ."), error)


def test_what_the_config_says_is_measured() -> None:
    changes = [
        "data.samples_per_batch=null", "data.tokens_per_batch=7000", "data.max_length=6000", "model.attention=sdpa",
        "model.trainable=[projector]", "train.recompute_layers=8", "train.bf16=false", "pyramid_drop=null",
        "model.kernels=eager",
    ]  # fmt: skip
    config = load_config(NEXT, changes)
    shape = shape_of(config)
    assert shape.samples == len(nominal_batch(shape.geometry, config).seq_lens) == 2
    assert (shape.recomputed, shape.attention, shape.half) == (Recomputed(8, True), "sdpa", False)
    assert shape.kernels == "eager"
    assert shape.trainable == ("projector",) and shape.schedule == Schedule()
    assert shape.max_length == shape.text_config().max_position_embeddings == 6000
    assert not shape_of(load_config(NEXT, ["train.gradient_checkpointing=false"])).recomputed


@pytest.mark.parametrize(
    ("kind", "more"),
    [("llama", {}), ("mistral", {"sliding_window": 40}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {})],
)
def test_every_decoder_does_a_step(kind: str, more: dict, tmp_path: Path) -> None:
    shape = shape_of(load_config(parts_file(tmp_path, {"model_type": kind, **more})))
    trainer = BenchTrainer(shape, CPU, Workload(shape), "adamw")
    decoder, head = trainer.model.hf.model.language_model, trainer.model.hf.lm_head
    assert decoder.config.model_type == kind and len(decoder.layers) == 4
    assert getattr(decoder.config, "sliding_window", None) == more.get("sliding_window")
    assert (head.weight is decoder.embed_tokens.weight) == ("tie_word_embeddings" in more)
    output, loss, *_ = trainer.step(BenchArm("", shape.schedule), trainer.workload.batch(0, CPU))
    assert 4 < loss < 8  # ln(384 rows of the vocabulary) = 5.95
    full, half, quarter = output.image_tokens
    assert full > half > quarter > 0


def test_every_decoder_that_is_measured_is_tested() -> None:
    (mark,) = [m for m in test_every_decoder_does_a_step.pytestmark if m.name == "parametrize"]
    assert {kind for kind, _ in mark.args[1]} == set(COVERED)


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
    assert chosen_shape("small-cpu", [], cuda=True) == ("small-cpu", shape_named("small-cpu"))


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
