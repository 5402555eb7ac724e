"""Runs with different engines one after the other in the same processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_pdrop.compare.compare import RESULTS_FILE
from llava_pdrop.config.load import load_config
from tests.engines import FSDP2, deepspeed_arguments, needs_deepspeed
from tests.faults.processes import run_ranks

TRAIN = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 1}
DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}


@needs_deepspeed
@pytest.mark.parametrize(
    ("engine", "left"), [({}, "optimizer.pt"), (FSDP2, "pytorch_model_fsdp.bin")], ids=["ddp", "fsdp2"]
)
def test_stage_2_has_its_own_engine(tiny_config, tmp_path, engine, left):
    """Stage 1 is trained by ZeRO-2; what stage 2 leaves says by what it was trained."""
    first = tiny_config("stage1", train={**TRAIN, **deepspeed_arguments("zero2", tmp_path)})
    second = tiny_config("stage2", train={**TRAIN, **engine}, pretrain=str(first), pyramid_drop=DROP)
    ended = run_ranks(second, ranks=2)
    assert ended.codes == [0, 0], ended.texts
    before, after = (Path(load_config(file).output_dir) / "checkpoint-1" for file in (first, second))
    assert (before / "zero_to_fp32.py").is_file()
    assert (after / left).exists() and not (after / "zero_to_fp32.py").exists()


@needs_deepspeed
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_comparison_after_zero3_answers_with_whole_weights(tiny_config, tmp_path, ranks):
    section = {**TRAIN, **deepspeed_arguments("zero3", tmp_path)}
    evaluation = {"batch_size": 2, "max_new_tokens": 4, "limit": 4}
    file = tiny_config("job", train=section, pyramid_drop=DROP, eval=evaluation)
    ended = run_ranks(file, ranks=ranks, command="compare")
    assert ended.codes == [0] * ranks, ended.texts
    rows = json.loads((Path(load_config(file).output_dir) / RESULTS_FILE).read_text())["rows"]
    assert [row["name"] for row in rows][:2] == ["vanilla", "pyramid_drop"]
    assert all(row["accuracy"] is not None for row in rows)
