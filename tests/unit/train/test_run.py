"""`train` end to end on a miniature: what it leaves on disk, reuse, resuming, stage 1, records that cannot be used, and
parts of the model that cannot be read."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_pdrop.checkpoint import build
from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.load import save_pretrained
from llava_pdrop.config.load import RUN_FILE, load_config
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.train.checks import checked, stage1_config
from llava_pdrop.train.history import digest
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from llava_pdrop.train.run import build_dataset, kernels_in_use, load_parts, train
from tests.messages import meant, says

DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_a_run_leaves_an_ordinary_hugging_face_directory(tiny_config):
    config = load_config(tiny_config(pyramid_drop=DROP))
    output = train(config)
    model, report = AutoModelForImageTextToText.from_pretrained(output, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.pyramid_drop["layers"] == [1, 2, 3]
    AutoProcessor.from_pretrained(output)
    assert (output / "projector.safetensors").is_file()
    assert load_config(output / RUN_FILE) == config


def test_metrics_file_has_a_row_per_step(tiny_config):
    output = train(load_config(tiny_config(pyramid_drop=DROP)))
    rows = [row for row in read_metrics(output / METRICS_FILE) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert [row[f"image_tokens_{k}"] for k in range(4)] == [16, 8, 4, 2]
        for key in ("learning_rate", "grad_norm", "tokens_per_second", "step_seconds", "step_cpu_seconds"):
            assert row[key] >= 0
        assert row["tokens_0"] - row["image_tokens_0"] == pytest.approx(row["tokens_3"] - row["image_tokens_3"])
        assert row["peak_rss_mib"] > 10 and row["samples"] == 2


def test_a_finished_run_is_used_again_and_a_changed_one_is_not(tiny_config):
    file = tiny_config()
    output = train(load_config(file))
    before = (output / "model.safetensors").stat().st_mtime_ns
    train(load_config(file, ["eval.batch_size=1"]))
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    train(load_config(file, ["train.logging_steps=2"]))
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=says("finished", "train.learning_rate", "never")):
        train(load_config(file, ["train.learning_rate=0.002"]))
    train(load_config(file, ["train.learning_rate=0.002", "train.resume=never"]))
    assert (output / "model.safetensors").stat().st_mtime_ns != before


def test_a_finished_run_of_other_data_is_trained_again_one_of_other_versions_is_used(
    tiny_config, tiny_files, tmp_path, capsys, monkeypatch
):
    records = tmp_path / "train.json"
    records.write_text((tiny_files / "data/train.json").read_text())
    steps = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "use_cpu": True, "disable_tqdm": True}
    config = load_config(tiny_config(train=steps), [f"data.train={records}"])
    output = train(config)
    os.utime(records, (1, 1))
    assert re.search(says("model.kernels", "eager", "auto", "cpu"), capsys.readouterr().out)
    train(config)
    assert "finished before" in capsys.readouterr().out
    records.write_text(json.dumps(json.loads(records.read_text())[:10]))
    train(config)
    assert re.search(says("trained again", str(output), "other files"), capsys.readouterr().out)
    assert json.loads((output / "run.json").read_text())["resumed_from"] is None
    trained = (output / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("llava_pdrop.__version__", "another")
    monkeypatch.setenv("WORLD_SIZE", "8")
    train(config)  # it cost GPU hours, and started by mistake with one process it must not be lost
    said = capsys.readouterr().out
    assert re.search(says("finished", "processes 1", "8", "llava_pdrop"), said)
    assert (output / "model.safetensors").stat().st_mtime_ns == trained


@pytest.mark.parametrize(("asked", "compiled", "said"), [
    ("eager", False, "eager"),
    ("torch", False, "torch"),
    ("auto", False, "eager (auto, on cpu)"),
    ("torch", True, "eager (torch, under train.torch_compile)"),
    ("eager", True, "eager"),
])  # fmt: skip
def test_the_kernels_that_a_run_says(asked, compiled, said):
    """Where transformers compiles the whole model, ours step back."""
    args = SimpleNamespace(device=torch.device("cpu"), torch_compile=compiled)
    assert kernels_in_use(asked, args) == said


def test_kernels_that_cannot_run_here_are_one_line(tiny_config):
    with pytest.raises(UserError, match=says("model.kernels", "liger", "CUDA", "'eager'")):
        train(load_config(tiny_config(), ["model.kernels=liger"]))


def test_same_seed_same_weights_other_seed_other_weights(tiny_config):
    first, second, third = (
        train(load_config(tiny_config(name), [f"seed={seed}"])) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    one, two, three = weights(first), weights(second), weights(third)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


def test_resuming_equals_never_having_stopped(tiny_config):
    schedule = {**DROP, "ranker": "random"}  # draws random numbers, so these must be restored too
    steps = {"max_steps": 8, "save_steps": 3, "save_strategy": "steps", "use_cpu": True, "disable_tqdm": True}
    whole = train(load_config(tiny_config("whole", train=steps, pyramid_drop=schedule)))
    file = tiny_config("parts", train=steps, pyramid_drop=schedule)
    stopped = train(load_config(file))
    for name in ("model.safetensors", "run.json", "checkpoint-6", "checkpoint-8"):  # as if killed after step 5
        target = stopped / name
        if target.is_dir():
            target.rename(stopped.parent / f"gone-{name}")
        elif target.exists():
            target.unlink()
    resumed = train(load_config(file))
    one, two = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [[r["loss"] for r in read_metrics(d / METRICS_FILE) if "loss" in r] for d in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert json.loads((resumed / "run.json").read_text())["resumed_from"].endswith("checkpoint-3")


def test_a_checkpoint_of_other_settings_is_refused_in_one_line(tiny_config):
    steps = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "use_cpu": True, "disable_tqdm": True}
    file = tiny_config(train=steps)
    output = train(load_config(file))
    (output / "run.json").unlink()  # as if killed before the end
    with pytest.raises(ValueError, match=says("checkpoint-2", "train.weight_decay", "never")):
        train(load_config(file, ["train.weight_decay=0.3"]))
    train(load_config(file, ["train.weight_decay=0.3", "train.resume=never"]))
    assert (output / "checkpoint-2").is_dir()


def test_stage_1_runs_first_and_hands_over_its_projector(tiny_config, tmp_path):
    stage1 = tiny_config("stage1")
    config = load_config(stage1, ["model.trainable=[projector]"])
    text = json.loads(stage1.read_text())
    stage1.write_text(json.dumps({**text, "model": {**text["model"], "trainable": ["projector"]}}))
    frozen = {"max_steps": 1, "learning_rate": 0.0, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    moved = tmp_path / "moved"
    stage2 = train(load_config(tiny_config("stage2", train=frozen, pretrain=f"{stage1} output_dir={moved}")))
    assert not Path(config.output_dir).exists()
    handed = load_file(moved / "projector.safetensors")
    kept = load_file(stage2 / "projector.safetensors")
    assert all(torch.equal(handed[name], kept[name]) for name in handed)


def test_a_finished_run_of_other_settings_is_refused_before_stage_1(tiny_config, tmp_path):
    stage1 = tiny_config("stage1")
    stage2 = tiny_config("stage2", pretrain=str(stage1))
    train(load_config(stage2))
    shutil.rmtree(tmp_path / "out/stage1")
    with pytest.raises(ConfigError, match=says("stage2", "finished", "train.learning_rate")):
        train(load_config(stage2, ["train.learning_rate=0.5"]))
    assert not (tmp_path / "out/stage1").exists()


def test_stage_1_must_have_the_same_parts(tiny_config, tiny_files, tmp_path):
    shutil.copytree(tiny_files / "llm", tmp_path / "other")
    stage1 = tiny_config("stage1")
    same = load_config(tiny_config("same", pretrain=f"{stage1} model.image_size=48"))  # what the tower has anyway
    assert stage1_config(same) is not None
    for override, key in (
        (f"model.language_model={tmp_path}/other", "language_model"),
        ("model.image_size=96", "image_size"),
    ):
        file = tiny_config("stage2", pretrain=f"{stage1} {override}")
        with pytest.raises(ConfigError, match=says("stage2.yaml", "pretrain", "stage1.yaml", f"model.{key}")):
            train(load_config(file))
    with pytest.raises(ConfigError, match=says("stage1.yaml", "data.train", "none.json")):
        train(load_config(tiny_config("stage2", pretrain=f"{stage1} data.train=none.json")))
    assert not (tmp_path / "out").exists()


def test_what_libraries_refuse_is_one_line(tiny_config, tiny_files, tmp_path):
    file = tiny_config()
    with pytest.raises(ConfigError, match=r"run.yaml: train: "):
        train(load_config(file, ["train.dataloader_prefetch_factor=2"]))
    broken = tmp_path / "broken"
    shutil.copytree(tiny_files / "llm", broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=rf"run.yaml: model.language_model {broken}: ") as error:
        train(load_config(file, [f"model.language_model={broken}"]))
    assert "\n" not in str(error.value)
    tower = tmp_path / "tower"
    shutil.copytree(tiny_files / "tower", tower)
    (tower / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match=rf"run.yaml: model.vision_tower {tower}: "):
        train(load_config(file, [f"model.vision_tower={tower}"]))


def test_data_are_prepared_when_missing(tiny_config, tmp_path, tiny_files):
    script = tmp_path / "make.py"
    script.write_text(f"import shutil, sys\nshutil.copytree({str(tiny_files / 'data')!r}, sys.argv[1])\n")
    made = tmp_path / "made"
    data = {"train": f"{made}/train.json", "image_root": f"{made}/images", "samples_per_batch": 2}
    file = tiny_config(data={**data, "prepare": [str(script), str(made)]})
    assert (train(load_config(file)) / "model.safetensors").is_file()
    script.write_text("raise SystemExit(3)")
    broken = tiny_config("broken", data={**data, "train": f"{made}/none.json", "prepare": [str(script), str(made)]})
    with pytest.raises(ValueError, match=says("data.prepare", "3")):
        train(load_config(broken))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_activation_checkpointing_changes_nothing(tiny_config, precision):
    arguments = {
        "max_steps": 2,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": precision == "bf16",
    }
    outputs = [
        train(load_config(tiny_config(f"gc{on}", train={**arguments, "gradient_checkpointing": on}, pyramid_drop=DROP)))
        for on in (False, True)
    ]
    one, two = (weights(output) for output in outputs)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


@pytest.fixture
def load(tiny_config, tmp_path: Path):
    """The config of a tiny run whose data is a mixture of all its records and of two text-only ones, one unusable."""
    file = tiny_config()
    config = load_config(file)
    turns = [{"from": "human", "value": "Yes?"}, {"from": "gpt", "value": "Yes"}]
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps([{"id": "good", "conversations": turns}, {"id": "bad", "conversations": turns[:1]}]))
    parts = [{"path": str(Path(config.data.train).resolve())}, {"path": str(extra)}]
    if config.data.image_root is not None:
        parts[0]["image_root"] = str(Path(config.data.image_root).resolve())
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(yaml.safe_dump({"parts": parts}))

    def read(*overrides: str):
        return load_config(file, [f"data.train={mixture}", *overrides])

    return read


def test_an_unusable_record_stops_the_run(load):
    config = load()
    with pytest.raises(ValueError, match=says("extra.json[1]", "bad", "no answer", "data.on_invalid=skip")):
        build_dataset(config, load_parts(config))


def test_skipping_lists_what_is_left_out(load):
    config = load("data.on_invalid=skip", "data.max_invalid=0.5")
    parts = load_parts(config)
    dataset = build_dataset(config, parts)
    (line,) = (Path(config.output_dir) / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "bad" and dataset.records[len(dataset) - 1].id == "good"
    with pytest.raises(ValueError, match=says("1 of", "records", "skipped.jsonl", "data.max_invalid")):
        build_dataset(load("data.on_invalid=skip", "data.max_invalid=0"), parts)


def test_a_model_without_tokenizer_is_named(tiny_config, tiny_files, tmp_path):
    parts = build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"))
    save_pretrained(parts.hf, parts.processor(), tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    model = {"path": str(tmp_path / "model"), "template": "qa"}
    file = tiny_config(model=model | {"language_model": None, "vision_tower": None})
    with pytest.raises(ConfigError, match=says("run.yaml", "model.path", str(tmp_path / "model"), "tokenizer.json")):
        load_parts(load_config(file))


def test_formats_are_checked(load):
    with pytest.raises(ConfigError, match=says("data.format", "'josn'", meant("jsonl"))):
        checked(load("data.format=josn"))


def test_a_changed_part_is_another_run(load, tmp_path):
    before = digest(load())
    assert digest(load()) == before == digest(load("data.cache=null"))
    (tmp_path / "extra.json").write_text("[]")
    assert digest(load()) != before


Break = Callable[[Path], object]


def torn(part: Path) -> None:
    (part / "model.safetensors").write_bytes(b"nothing")


def emptied(part: Path) -> None:
    shutil.rmtree(part)


def of_another_shape(part: Path) -> None:
    save_file({"unheard.of": torch.zeros(1)}, part / "model.safetensors")


def of_another_kind(part: Path) -> None:
    (part / "config.json").write_text('{"model_type": "unheard of"}')


def impossible(part: Path) -> None:
    text = (part / "config.json").read_text()
    assert text.count('"hidden_size": ') == 1
    (part / "config.json").write_text(text.replace('"hidden_size": ', '"hidden_size": "wide", "was": '))


def without_processor(part: Path) -> None:
    (part / "preprocessor_config.json").unlink()


def without_tokenizer(part: Path) -> None:
    for file in part.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("key", "spoil"),
    [
        *((key, spoil) for key in ("language_model", "vision_tower")
          for spoil in (torn, emptied, of_another_shape, of_another_kind, impossible)),
        ("vision_tower", without_processor),
        ("language_model", without_tokenizer),
    ],
)  # fmt: skip
def test_a_broken_part_is_named(
    tiny_config: Callable[..., Path], tiny_files: Path, tmp_path: Path, key: str, spoil: Break
) -> None:
    part = tmp_path / "part"
    shutil.copytree(tiny_files / {"language_model": "llm", "vision_tower": "tower"}[key], part)
    config = load_config(tiny_config())
    broken = replace(config, model=replace(config.model, **{key: str(part)}))
    spoil(part)
    with pytest.raises(ConfigError) as caught:
        load_parts(broken)
    assert caught.value.key == f"model.{key}"
    assert str(caught.value).startswith(f"{config.file}: model.{key} {part}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"nothing", {"unheard.of": torch.zeros(1)}])
def test_a_broken_projector_is_named(tiny_config: Callable[..., Path], tmp_path: Path, content: object) -> None:
    file = tmp_path / "projector.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, dict):
        save_file(content, file)
    config = load_config(tiny_config())
    with pytest.raises(ConfigError) as caught:
        load_parts(replace(config, model=replace(config.model, projector=str(file))))
    assert caught.value.key == "model.projector"
    assert str(caught.value).startswith(f"{config.file}: model.projector {file}: ")


def test_of_a_whole_model_the_path_is_named(tiny_config: Callable[..., Path], tiny_files: Path, tmp_path: Path) -> None:
    """Whatever it was made of: an original LLaVA has a tower beside it that the config does not name."""
    config = load_config(tiny_config())
    model = replace(config.model, path=str(tiny_files / "llm"), language_model=None, vision_tower=None)
    with pytest.raises(ConfigError) as caught:
        load_parts(replace(config, model=model))
    assert caught.value.key == "model.path" and f"model.path {tiny_files / 'llm'}: " in str(caught.value)


def test_without_a_config_the_error_carries_the_key(tiny_files: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tmp_path / "none"))
    assert caught.value.key == "model.vision_tower" and isinstance(caught.value, FileNotFoundError)


def test_a_bug_of_ours_is_blamed_on_no_part(tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "load_source", lambda *args: [1].index(5))
    with pytest.raises(ValueError, match="not in list") as caught:
        load_parts(load_config(tiny_config()))
    assert not isinstance(caught.value, UserError)
