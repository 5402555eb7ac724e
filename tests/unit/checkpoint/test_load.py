"""Reading is strict: every layout in every file format opens, and nothing that is spoilt does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.convert import convert
from llava_pdrop.checkpoint.layouts import rename
from llava_pdrop.checkpoint.load import load_projector, save_projector
from llava_pdrop.checkpoint.shards import Stored, open_tensors, write_shards
from tests.messages import says
from tests.unit.checkpoint.layout_files import FORMATS, LAYOUTS, MODELS, in_layout, original, write

EVERY = ("original", *LAYOUTS)
SPOILT = {"embedding": "embed_tokens.weight", "layer": "layers.3.mlp.up_proj.weight", "tower": "layers.1.mlp.fc1.bias"}


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """The reference LLaVA-1.5 in Hugging Face's layout, with its tower and its projector."""
    folder = tmp_path_factory.mktemp("hf")
    convert(str(write(folder / "source", *original())), folder / "hf", "llava-hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def weights(hf) -> dict[str, torch.Tensor]:
    return build_parts(str(hf)).hf.state_dict()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layout", EVERY)
def test_every_layout_opens_from_every_format(layout, kind, hf, weights, tmp_path):
    model = build_parts(str(write(tmp_path, *in_layout(layout, hf), kind))).hf
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("part", ["embedding", "layer", "projector"])
@pytest.mark.parametrize("layout", EVERY)
@pytest.mark.parametrize("spoil", ["remove", "rename", "reshape", "add"])
def test_a_spoilt_key_is_listed(layout, spoil, part, hf, tmp_path):
    config, tensors = in_layout(layout, hf)
    projector = "mm_projector.2.bias" if layout == "original" else "linear_2.bias"
    ends, listed = (projector, "linear_2.bias") if part == "projector" else (SPOILT[part], SPOILT[part])
    name = next(name for name in tensors if name.endswith(ends))
    expected = {"remove": "missing", "rename": "unexpected", "reshape": "wrong shape", "add": "unexpected"}[spoil]
    if spoil == "reshape":
        tensors[name] = tensors[name][:-1].clone()
    elif spoil == "add":
        tensors[f"{name}_more"] = torch.zeros(2)
    else:
        tensor = tensors.pop(name)
        tensors |= {f"{name}_misspelt": tensor} if spoil == "rename" else {}
    write(tmp_path, config, tensors, "safetensors-shards")
    with pytest.raises(ValueError, match=rf"{expected}: [^;]*{re.escape(listed)}"):
        build_parts(str(tmp_path))


def test_a_trained_tower_with_a_missing_key_is_not_mixed_with_the_one_beside(tmp_path):
    config, tensors = original("next_gqa")
    removed = next(name for name in tensors if name.endswith(SPOILT["tower"]))
    write(tmp_path, config, {name: tensor for name, tensor in tensors.items() if name != removed})
    with pytest.raises(ValueError, match=r"missing: model\.vision_tower\..*layers\.1\.mlp\.fc1\.bias$"):
        build_parts(str(tmp_path))


def test_a_tower_with_a_missing_key(tmp_path):
    config, tensors = original()
    tower = open_tensors(MODELS / "clip56")
    kept = {name: tensor.read() for name, tensor in tower.items() if not name.endswith(SPOILT["tower"])}
    write(tmp_path / "tower", json.loads((MODELS / "clip56" / "config.json").read_text()), kept)
    write(tmp_path / "model", config | {"mm_vision_tower": str(tmp_path / "tower")}, tensors)
    with pytest.raises(ValueError, match=r"tower .*CLIP.*missing: .*layers\.1\.mlp\.fc1\.bias$"):
        build_parts(str(tmp_path / "model"))


def test_a_raw_llm_with_a_missing_key(tmp_path):
    config, tensors = original()
    decoder = {k: v for k, v in tensors.items() if re.match(r"model\.(embed|layers|norm)", k)}  # without lm_head
    write(tmp_path, {k: v for k, v in config.items() if not k.startswith("mm_")} | {"model_type": "llama"}, decoder)
    for file in (MODELS.parent / "tokenizers" / "sp_legacy_false").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config["vocab_size"] = 1000
    decoder["model.embed_tokens.weight"] = torch.zeros(1000, 64)
    write(tmp_path, {k: v for k, v in config.items() if not k.startswith("mm_")} | {"model_type": "llama"}, decoder)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight$"):
        build_parts(language_model=str(tmp_path), vision_tower=str(MODELS / "clip56"))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_rows_are_told_as_the_files_have_them(tmp_path, name):
    """Not as many as they would be with those for <image> and <pad>, which the checkpoint does not have."""
    config, tensors = original("e2e_l15")
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    write(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=r"wrong shape: \S+\.weight \(1001, 48\) instead of \(1000, 48\)$") as error:
        build_parts(str(tmp_path))
    assert "1024" not in str(error.value)


def shards(tmp_path: Path, kind: str = "safetensors-shards") -> tuple[Path, list[Path], Path]:
    write(tmp_path, *original(), kind)
    suffix = kind.split("-")[0]
    return tmp_path, sorted(tmp_path.glob(f"*-of-*.{suffix}")), next(tmp_path.glob("*.index.json"))


@pytest.mark.parametrize("kind", ["safetensors-shards", "bin-shards"])
def test_a_missing_shard_is_named(tmp_path, kind):
    directory, files, _ = shards(tmp_path, kind)
    files[1].unlink()
    with pytest.raises(ValueError, match=says("index.json", "names", files[1].name)):
        build_parts(str(directory))


def test_a_missing_shard_is_noticed_without_an_index(tmp_path):
    directory, files, index = shards(tmp_path)
    index.unlink()
    assert len(open_tensors(directory)) == len(original()[1])
    files[2].unlink()
    with pytest.raises(ValueError, match=says("2 of 3")):
        build_parts(str(directory))


def test_a_shard_that_the_index_does_not_name(tmp_path):
    directory, files, index = shards(tmp_path)
    table = json.loads(index.read_text())
    table["weight_map"] = {k: v for k, v in table["weight_map"].items() if v != files[2].name}
    index.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=says("not name", files[2].name)):
        build_parts(str(directory))


def test_an_index_that_names_keys_its_shards_lack(tmp_path):
    directory, files, index = shards(tmp_path)
    table = json.loads(index.read_text())
    moved = next(name for name, file in table["weight_map"].items() if file == files[0].name)
    table["weight_map"] |= {"model.ghost": files[0].name, moved: files[1].name}
    index.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=says("missing", "shard")) as error:
        build_parts(str(directory))
    assert "model.ghost" in str(error.value) and f"{moved} ({files[1].name})" in str(error.value)


def test_a_key_that_the_index_forgot(tmp_path):
    directory, _, index = shards(tmp_path)
    table = json.loads(index.read_text())
    table["weight_map"].pop("lm_head.weight")
    index.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=says("in a shard", "lm_head.weight")):
        build_parts(str(directory))


def test_a_key_in_two_shards(tmp_path):
    directory, files, index = shards(tmp_path)
    index.unlink()
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(ValueError, match=says("another file")):
        build_parts(str(directory))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_truncated_file_is_named(tmp_path, kind):
    write(tmp_path, *original(), kind)
    file = next(tmp_path.glob(f"*.{kind}"))
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=says(file.name, "whole")):
        build_parts(str(tmp_path))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    write(tmp_path, *original(), "bin")
    torch.save({"lm_head.weight": Path("/")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=says("pytorch_model.bin", "whole file", "tensors")):
        build_parts(str(tmp_path))


def test_old_pickles_open(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert open_tensors(tmp_path / "old.bin")["a"].read().tolist() == [0, 1, 2]


def test_two_names_for_one_tensor():
    with pytest.raises(ValueError, match=says("twice")):
        rename({"model.vision_tower.vision_tower.a": 1, "model.vision_tower.vision_tower.vision_model.a": 2})


def test_shards_are_written_within_their_size(tmp_path):
    tensors = {f"t{i}": Stored.of(torch.full((50,), float(i))) for i in range(9)}
    write_shards(tmp_path, tensors, "1KB")
    files = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(files) == 2 and (tmp_path / "model.safetensors.index.json").is_file()
    again = open_tensors(tmp_path)
    assert {name: tensor.read()[0].item() for name, tensor in again.items()} == {f"t{i}": float(i) for i in range(9)}
    write_shards(tmp_path, {"t": tensors["t1"]})
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_only_one_shard_is_read_at_a_time(tmp_path, monkeypatch):
    held: list[int] = []
    monkeypatch.setattr(
        "llava_pdrop.checkpoint.shards.save_file", lambda shard, file, **_: (held.append(len(shard)), file.touch())
    )
    read: list[str] = []
    tensors = {f"t{i}": Stored((50,), torch.float32, lambda i=i: read.append(i) or torch.zeros(50)) for i in range(9)}
    write_shards(tmp_path, tensors, "1KB")
    assert max(held) == 5 and read == list(range(9))


def test_projector_files_go_in_and_out(hf, tmp_path):
    parts = build_parts(str(hf))
    projector = {k: v for k, v in original()[1].items() if "mm_projector" in k}
    torch.save({name: tensor + 1 for name, tensor in projector.items()}, tmp_path / "mm_projector.bin")
    before = parts.hf.model.multi_modal_projector.linear_1.weight.clone()
    load_projector(parts.hf, tmp_path / "mm_projector.bin")
    assert torch.equal(parts.hf.model.multi_modal_projector.linear_1.weight, before + 1)
    file = save_projector(parts.hf, tmp_path)
    assert file.stat().st_mode & 0o777 == 0o644, "others can read it, as all other weights"
    again = open_tensors(file)
    assert torch.equal(again["model.multi_modal_projector.linear_1.weight"].read(), before + 1)


@pytest.mark.parametrize("change", ["missing", "unexpected", "wrong shape"])
def test_a_spoilt_projector_is_listed(hf, tmp_path, change):
    projector = {k: v for k, v in original()[1].items() if "mm_projector" in k}
    name = "model.mm_projector.2.bias"
    if change == "missing":
        projector.pop(name)
    else:
        projector["model.mm_projector.4.bias" if change == "unexpected" else name] = torch.zeros(3)
    torch.save(projector, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=says("mm_projector.bin", "projector", f"{change}:")):
        load_projector(build_parts(str(hf)).hf, tmp_path / "mm_projector.bin")
