"""The flat training loop of the playground gives the losses of a real run, step by step, in both stages."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llava_pdrop.config.load import load_config
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from llava_pdrop.train.run import train

ROOT = Path(__file__).parents[2]
STEPS, WARMUP = 4, 2


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module, on few pages and for few steps."""
    spec = importlib.util.spec_from_file_location("train_loop", ROOT / "playground" / "train_loop.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PAGES = tmp_path_factory.mktemp("pages") / "forms"
    module.STEPS, module.WARMUP, module.SAMPLES = STEPS, WARMUP, 4
    counts = ["--pretrain", "12", "--train", "12", "--eval", "1"]  # more than an epoch in four steps of four samples
    command = [sys.executable, str(ROOT / "data/prepare/forms.py"), "--out", str(module.PAGES), *counts]
    subprocess.run(command, check=True, capture_output=True)
    return module


def losses_of_a_run(config: str, loop: ModuleType, out: Path, *changes: str) -> list[float]:
    """Those of ``train(config)`` on the same pages, for the same number of steps."""
    file = "pretrain.json" if "pretrain" in config else "train.json"
    words = [
        f"output_dir={out}", f"data.train={loop.PAGES}/{file}", f"data.image_root={loop.PAGES}", "data.prepare=null",
        "data.eval=null", f"data.samples_per_batch={loop.SAMPLES}", f"train.max_steps={STEPS}",
        f"train.warmup_steps={WARMUP}", "pretrain=null", *changes,
    ]  # fmt: skip
    train(load_config(ROOT / config, words))
    return [row["loss"] for row in read_metrics(out / METRICS_FILE) if "loss" in row]


def losses_of_the_loop(loop: ModuleType, schedule: Schedule, projector: Path, *args: object) -> list[float]:
    parts = loop.load_parts(projector)
    model = PyramidLlava(parts.hf, schedule, parts.geometry).train()
    found = list(loop.train(model, parts, *args, steps=STEPS))
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    return [loss for _, loss in found]


def test_both_stages_have_the_losses_of_a_run(loop, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths of configs are meant from the checkout
    first = losses_of_a_run("configs/tiny/pretrain.yaml", loop, tmp_path / "pretrain")
    shipped = ROOT / "data/tiny/projector/model.safetensors"
    mine = losses_of_the_loop(loop, Schedule(), shipped, "pretrain.json", loop.STAGE_1, 3e-3)
    assert mine == pytest.approx(first, abs=1e-5)

    projector = tmp_path / "pretrain" / "projector.safetensors"
    second = losses_of_a_run(
        "configs/tiny/finetune_pdrop.yaml", loop, tmp_path / "finetune", f"model.projector={projector}"
    )
    mine = losses_of_the_loop(loop, loop.PYRAMID, projector, "train.json", loop.STAGE_2, 3e-4)
    assert mine == pytest.approx(second, abs=1e-5)
    assert len(set(first + second)) == 2 * STEPS and max(first + second) < 3
