"""Every shipped config builds on the meta device, plans a batch, and costs what the paper says its row costs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from llava_pdrop.checkpoint.hf_models import make_hf_model
from llava_pdrop.config.load import load_config
from llava_pdrop.config.paths import number, part_configs
from llava_pdrop.cost.paper import paper_tflop
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.stream import StreamPlan
from llava_pdrop.model.vlm import PyramidLlava, geometry_of
from llava_pdrop.types import IGNORE_INDEX, ImageInput, PackedBatch, Sample

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name not in ("ablations", "schedules")
)


@pytest.mark.parametrize("path", CONFIGS)
def test_builds_on_meta(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    model = config.model
    decoder, tower = part_configs(model)
    assert decoder and tower, "neither config.json files nor model.reference_shape"
    vision = AutoConfig.for_model(**{**tower, "model_type": "clip_vision_model"})
    vision.image_size = model.image_size or vision.image_size
    geometry = ImageGeometry(
        vision.image_size, vision.patch_size, model.aspect, model.merge, model.pinpoints, model.rounding
    )
    with torch.device("meta"):
        hf = make_hf_model(AutoConfig.for_model(**decoder), vision, geometry, image_token_id=decoder["vocab_size"] - 1)
    built = PyramidLlava(hf, config.schedule, geometry, model.attention)
    assert len(built.hf.model.language_model.layers) == number(decoder, "num_hidden_layers")
    assert geometry_of(built.hf.config) == geometry
    if "7b" in path:
        assert sum(p.numel() for p in built.parameters()) == pytest.approx(7.06e9, rel=0.01)
    check_plan(built)


def check_plan(model: PyramidLlava) -> None:
    """Plans a batch of a picture between a question and an answer, and a text, without computing anything."""
    size = (640, 480)
    count, patch = model.geometry.num_tokens(size), model.geometry.tile
    ids = torch.arange(20 + count)
    labels = torch.where(ids >= len(ids) - 5, ids, IGNORE_INDEX)
    picture = ImageInput(torch.empty(model.geometry.num_tiles(size), 3, patch, patch, device="meta"), size)
    text = Sample("text", torch.arange(9), torch.arange(9).masked_fill(torch.arange(9) < 4, IGNORE_INDEX))
    batch = PackedBatch.pack([Sample("picture", ids, labels, (picture,), ((10, 10 + count),)), text])
    plan = StreamPlan.build(batch, model.schedule, model.geometry, torch.device("cpu"))
    kept = [model.schedule.kept(count, stage) for stage in range(len(model.schedule.layers))]
    assert plan.image_tokens == [count, *kept]
    assert [stage.layout.tokens for stage in plan.stages] == [29 + tokens for tokens in (count, *kept)]
    assert len(plan.image_row) == len(plan.feature_row) == count and len(plan.label_L) == 10


PRINTED = re.compile(r"([\d.]+) TFLOP")
"""The paper's figure in the first line of a config."""

ROWS = [path for path in CONFIGS if PRINTED.search((ROOT / path).read_text().splitlines()[0])]
DISAGREES = {"configs/llava15_7b/finetune_pdrop_5stages.yaml": 1.39}
"""Rows where the paper's table says something else than its formula, and what the formula says."""


RUNS = [path for path in CONFIGS if path.startswith("configs/llava")]
FULL_SIZE = ("llava15_7b", "llava15_13b", "llava_next_7b", "llava_next_7b_p9")


def first_line(path: str) -> str:
    return (ROOT / path).read_text().splitlines()[0]


@pytest.mark.parametrize("path", RUNS)
def test_the_first_line_says_what_the_paper_reports(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row, table and figures, each as in the section ``paper`` (of the stage 2 with the same schedule), or no row."""
    monkeypatch.chdir(ROOT)
    line = first_line(path)
    if re.search(r"[Nn]o row in the paper|Not in the paper", line):
        return
    stage2 = path.replace("/pretrain", "/finetune")
    paper = load_config(stage2).paper
    assert paper is not None and re.search(rf"Paper, Tables? {re.search(r'[0-9]+', paper.table)[0]}\b", line), line
    assert int(re.search(r"(\d+) GPU hours", line)[1]) == paper.gpu_hours
    if path != stage2:
        return
    assert float(PRINTED.search(line)[1]) == paper.tflop
    if cut := re.search(r"\(-([\d.]+) %\)", line):
        assert float(cut[1]) == pytest.approx(100 * (1 - paper.gpu_hours / paper.vanilla_gpu_hours), abs=0.05)
    if mean := re.search(r"mean of (\d) benchmarks (\d+\.\d)", line):
        scores = [value / 20 if name == "MME" else value for name, value in paper.scores.items()][: int(mean[1])]
        assert float(mean[2]) == pytest.approx(sum(scores) / len(scores), abs=0.06)
    for name, value in re.findall(r"([A-Z][\w-]+) (\d\d\.\d)", line):
        assert paper.scores[name] == float(value)


def test_every_model_has_both_stages_with_and_without_dropping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for model in FULL_SIZE:
        for stage in ("pretrain", "finetune"):
            assert not load_config(f"configs/{model}/{stage}.yaml").schedule.layers
            assert load_config(f"configs/{model}/{stage}_pdrop.yaml").schedule.ratios == (0.5, 0.25, 0.125)
    thirteen = "configs/llava15_13b/finetune_pdrop"
    assert load_config(f"{thirteen}.yaml").schedule.layers == (10, 20, 30)  # quarters of its 40 layers
    assert load_config(f"{thirteen}_official_layers.yaml").schedule.layers == (8, 16, 24)


def test_every_run_of_the_paper_is_there() -> None:
    printed = [PRINTED.search((ROOT / path).read_text().splitlines()[0])[1] for path in ROWS if "/base/" not in path]
    paper = ["3.82", "1.78", "1.54", "2.06", "2.13", "1.38", "2.01", "20.8", "9.46", "8.22", "11.0", "40.6", "18.1"]
    assert sorted(printed) == sorted(paper)


@pytest.mark.parametrize("path", ROWS)
def test_costs_what_the_paper_says(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    decoder, tower = part_configs(config.model)
    assert decoder and tower
    tile, patch = tower["image_size"], tower["patch_size"]
    canvases = config.model.pinpoints
    tiles = 1 + max((width * height // tile**2 for width, height in canvases), default=0)
    tokens = tiles * (tile // patch) ** 2  # the paper counts whole tiles, without newlines and unpadding
    layers, hidden, inner = (decoder[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    printed = PRINTED.search((ROOT / path).read_text().splitlines()[0])[1]
    counted = paper_tflop(tokens, layers, hidden, inner, config.schedule)
    assert f"{counted:.3g}" == f"{DISAGREES.get(path, float(printed)):.3g}"


@pytest.mark.parametrize("path", [path for path in CONFIGS if re.search(r"\db/finetune_", path)])
def test_stage_one_drops_alike(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's hours and scores are of runs that drop in both stages."""
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    stage1, *changes = config.pretrain.split()
    first = load_config(stage1, changes)
    assert first.schedule == config.schedule
    assert first.output_dir.startswith("checkpoints/") and first.output_dir != config.output_dir
