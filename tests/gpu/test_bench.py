"""The benches on the GPU, at a shape of half a billion parameters in bfloat16 and at the tiny one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from llava_pdrop.__main__ import main
from llava_pdrop.bench import variants
from llava_pdrop.bench.prefill import generate
from llava_pdrop.bench.shapes import make_model, shape_named
from llava_pdrop.bench.subjects import PrefillCase, Prompt
from llava_pdrop.bench.train_step import BenchArm, BenchTrainer, measure_arms
from llava_pdrop.bench.workload import Workload
from llava_pdrop.cost.flops import ALL_LAYERS, Recomputed
from llava_pdrop.report.units import MIB
from llava_pdrop.runtime.clock import REGIONS, parts_of
from llava_pdrop.runtime.device import device_named
from tests.gpu.peaks import assert_predicted, cublas_workspaces

HALF_BILLION = replace(
    shape_named("llava-next-7b"),
    text=shape_named("llava-next-7b").text | dict(
        hidden_size=2048, intermediate_size=5504, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16
    ),
    vision=dict(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, image_size=336,
        patch_size=14, projection_dim=512,
    ),
    schedule=shape_named("tiny").schedule,
)  # fmt: skip


def arms(**options) -> list[BenchArm]:
    return variants.arms_of({"PyramidDrop": HALF_BILLION.schedule}, BenchArm("", **options))


@pytest.mark.parametrize("optimizer", ["adamw", "sharded", "none"])
@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_regions_add_up_and_the_peak_is_the_predicted_one(recompute, optimizer):
    trainer = BenchTrainer(HALF_BILLION, device_named("cuda"), Workload(HALF_BILLION, "full"), optimizer)
    recomputed = ALL_LAYERS if recompute else Recomputed()
    results = measure_arms(trainer, arms(recomputed=recomputed, kernels="eager"), steps=2, warmup=1)
    pixels = trainer.workload.batch(0, torch.device("cuda")).pixels.nbytes
    uncounted = (cublas_workspaces() + pixels) / MIB
    for result in results:
        for place in range(2):
            times = {name: result.seconds[name][place] for name in REGIONS}
            pieces = parts_of(times)
            assert all(piece >= 0 for piece in pieces.values())
            assert times["step"] == pytest.approx(sum(pieces.values()), rel=0.05)
            assert (times["ranking"] > 0) == bool(result.arm.schedule.layers)
        assert_predicted(result.peak_mib, result.predicted_peak_mib, uncounted)


def test_every_variant_has_the_loss_of_the_others():
    trainer = BenchTrainer(HALF_BILLION, device_named("cuda"), Workload(HALF_BILLION), "none")
    losses = {}
    for group in variants.compare(trainer, arms(), steps=1):
        for entry in group:
            if entry.results and entry.variant.group != "samples per micro-batch":
                losses[entry.variant.group, entry.variant.name] = entry.results[0].losses[0]
    first = losses["batch", "packed"]
    assert losses == {name: pytest.approx(first, rel=0.02) for name in losses}  # bfloat16
    assert ("attention", "varlen") in losses


def test_the_command(tmp_path):
    assert main(["bench", "train", "--shape", "tiny", "--steps", "2", "--device", "cuda", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    report = json.loads(file.read_text())
    assert report["clock"] == "CUDA events" and report["environment"]["device"] == torch.cuda.get_device_name()
    assert all(run["peak_mib"] > 0 and run["predicted_peak_mib"] > 0 for run in report["runs"])


def test_dropping_in_a_prefill_does_not_synchronise():
    device, shape = device_named("cuda"), shape_named("tiny")
    hf = make_model(shape, device).hf.eval()
    hf.set_attn_implementation("sdpa")
    case = PrefillCase(2, 50, 3)
    prompt = Prompt.make(hf, case, torch.randn(4, 3, 84, 84, device=device), seed=0)
    generate(hf, prompt, shape.schedule, 3, device)
    layers = hf.model.language_model.layers
    layers[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    layers[-1].register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    try:
        run = generate(hf, prompt, shape.schedule, 3, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.peak_bytes > run.cache_bytes
