"""Two ranks with two micro-batches each do what one process does with four."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_pdrop.config import load_config
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from llava_pdrop.train.run import train

ROOT = Path(__file__).resolve().parents[3]
DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
TRAIN = {
    "num_train_epochs": 1,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_grad_norm": 0.05,  # low enough to clip every step: a gradient of the wrong size would show
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_equal_one(tiny_config):
    def file(name: str, accumulation: int) -> Path:
        arguments = {**TRAIN, "gradient_accumulation_steps": accumulation}
        model = {"trainable": ["projector", "language_model", "vision_tower"]}
        base = tiny_config(name, train=arguments, pyramid_drop=DROP)
        path = base.with_name(f"{name}_all.yaml")
        path.write_text(f"base: {base.name}\nmodel: {model}\ndata: {{samples_per_batch: 1}}\n")
        return path

    alone = train(load_config(file("alone", 4)))
    config = file("two", 2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, "-m", "llava_pdrop", "train", str(config)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    together = Path(load_config(config).output_dir)

    one, two = (load_file(directory / "model.safetensors") for directory in (alone, together))
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=1e-4, atol=1e-5), name
    rows = [[r for r in read_metrics(d / METRICS_FILE) if "loss" in r] for d in (alone, together)]
    assert len(rows[0]) == 3
    for a, b in zip(*rows):
        for key in ("loss", "grad_norm", "samples", "image_tokens_3", "tokens_0"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
