"""A part of the model that cannot be read: the error names its config key, its value and why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_pdrop.checkpoint import build
from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.config.load import load_config
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.train.run import load_parts

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
