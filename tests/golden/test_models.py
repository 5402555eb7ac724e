"""Every model of the golden directories there and back between the layouts, bit by bit, and its logits on the way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from llava_pdrop.checkpoint.build import ModelParts, build_parts
from llava_pdrop.checkpoint.convert import convert
from llava_pdrop.checkpoint.layouts import CANONICAL, OBSOLETE
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch
from tests.golden.cases import Case, case_files, directories

LOGITS = 1e-4
SCHEDULE = {"layer_list": "[2, 4]", "image_token_ratio_list": [1.0, 0.5, 0.25]}


def model_directories() -> list[Path]:
    """Every LLaVA of the golden directories; what has no ``mm_vision_tower`` is a tower."""
    configs = [file for directory in directories() for file in sorted((directory / "models").glob("*/config.json"))]
    return [file.parent for file in configs if "mm_vision_tower" in json.loads(file.read_text())]


def identify(directory: Path) -> str:
    return f"{directory.parents[1].name}/{directory.name}"


@dataclass
class ConvertedCase(Case):
    """A golden case whose model was read from another directory."""

    read: ModelParts | None = None

    def parts(self, padded: bool = False) -> ModelParts:
        return self.read


@pytest.fixture(scope="module", params=model_directories(), ids=identify)
def trip(request, tmp_path_factory):
    """The model as it lies there, as llava-hf, back in the original layout, and as llava-hf again."""
    source, folder = request.param, tmp_path_factory.mktemp("trip")
    tower = str(source.parents[1] / json.loads((source / "config.json").read_text())["mm_vision_tower"])
    convert(str(source), folder / "hf", "llava-hf")
    convert(str(folder / "hf"), folder / "original", "llava", vision_tower=tower)
    convert(str(folder / "original"), folder / "again", "llava-hf")
    return source, folder


@pytest.fixture(autouse=True)
def counted(request, record_property):
    yield
    record_property("golden_model", identify(request.node.callspec.params["trip"]))


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def test_there_and_back_is_bit_exact(trip):
    source, folder = trip
    before = {k: v for k, v in load_file(source / "model.safetensors").items() if not OBSOLETE.search(k)}
    same_tensors(before, load_file(folder / "original" / "model.safetensors"))
    same_tensors(load_file(folder / "hf" / "model.safetensors"), load_file(folder / "again" / "model.safetensors"))


def test_config_comes_back(trip):
    source, folder = trip
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, folder / "original"))
    assert {name: after.get(name, "missing") for name in before if name != "mm_vision_tower"} == {
        name: value for name, value in before.items() if name != "mm_vision_tower"
    }


def test_hf_names_are_canonical_and_plain_transformers_opens_them(trip):
    source, folder = trip
    names = load_file(folder / "hf" / "model.safetensors").keys()
    assert all(CANONICAL.match(name) for name in names)
    model, report = AutoModelForImageTextToText.from_pretrained(folder / "hf", output_loading_info=True)
    assert not any(report.values()), report
    ours = build_parts(str(source)).hf.state_dict()
    same_tensors(dict(model.state_dict()), dict(ours))
    rows = json.loads((source / "config.json").read_text())["vocab_size"]
    assert model.config.image_token_id == rows and len(model.lm_head.weight) == -(-(rows + 2) // 64) * 64


def test_logits_are_the_golden_ones(trip, record_property):
    source, folder = trip
    file = next((file for file in case_files() if is_vanilla(file, source)), None)
    if file is None:
        pytest.skip(f"no case has recorded logits of {identify(source)} without dropping")
    rows = json.loads((source / "config.json").read_text())["vocab_size"]
    for name in ("hf", "original", "again"):
        case = ConvertedCase(**vars(Case.load(file)), read=build_parts(str(folder / name)))
        batch = PackedBatch.pack(case.samples(), query=case.query)
        model = PyramidLlava(case.parts().hf, Schedule(), case.geometry()).eval()
        logits = model.logits(batch)[:, :rows]
        if "vanilla.prefill_logits_last" in case.tensors:
            last = logits[torch.tensor(batch.seq_lens).cumsum(0) - 1]
            case.close("vanilla.prefill_logits_last", last, atol=LOGITS)
        else:
            for row, ours in enumerate(logits.split(batch.seq_lens)):
                theirs = case.tensors["vanilla.logits"][row, : len(ours)]
                case.close("vanilla.logits", ours, theirs, LOGITS)
        assert case.compared >= rows * len(batch.seq_lens)
    record_property("golden_logits", identify(source))


def is_vanilla(file: Path, model: Path) -> bool:
    """Whether a case has the logits of ``model``, as it is, without dropping."""
    case = Case.load(file)
    recorded = {"vanilla.prefill_logits_last", "vanilla.logits"} & case.tensors.keys()
    return case.model_directory == model and bool(recorded) and not case.flagged and not case.info["config_overrides"]


def test_the_schedule_travels(trip, tmp_path):
    source, _ = trip
    copy = tmp_path / "models" / "pdrop"
    copy.mkdir(parents=True)
    fields = json.loads((source / "config.json").read_text())
    tower = str(source.parents[1] / fields["mm_vision_tower"])
    (copy / "config.json").write_text(json.dumps({**fields, **SCHEDULE, "mm_vision_tower": tower}))
    (copy / "model.safetensors").symlink_to(source / "model.safetensors")
    convert(str(copy), tmp_path / "hf", "llava-hf")
    convert(str(tmp_path / "hf"), tmp_path / "original", "llava")
    for directory in (copy, tmp_path / "hf", tmp_path / "original"):
        assert build_parts(str(directory)).schedule == Schedule((2, 4), (0.5, 0.25)).at("renumber")
    assert build_parts(str(source)).schedule is None
    written = json.loads((tmp_path / "original" / "config.json").read_text())
    assert (written["layer_list"], written["image_token_ratio_list"]) == ([2, 4], [0.5, 0.25])
