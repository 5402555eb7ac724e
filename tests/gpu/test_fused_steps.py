"""`model.kernels` on the device: the loss and gradients of eager kernels, and one kernel where those have many."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from llava_pdrop.model import kernels
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.types import PackedBatch
from tests.tiny import PYRAMID, make_tiny_hf, mixed_samples

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["torch", "liger"])
def choice(request) -> str:
    if reason := kernels.missing(request.param, torch.device("cuda")):
        pytest.skip(f"{request.param} {reason}")
    return request.param


def stepped(decoder: str, choice: str, recompute: bool, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, of vanilla in half precision, where near-tied tokens may be dropped differently."""
    options = {} if dtype != torch.float32 else {"schedule": PYRAMID}
    model = PyramidLlava(make_tiny_hf(decoder), **options, kernels=choice).train().cuda().to(dtype)
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    loss = model(PackedBatch.pack(mixed_samples()).to(torch.device("cuda"))).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("decoder", ["llama_gqa", "qwen3"])
def test_float32_is_eager(choice, decoder, recompute):
    (loss, gradients), (expected, exact) = (
        stepped(decoder, name, recompute, torch.float32) for name in (choice, "eager")
    )
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    assert gradients.keys() == exact.keys()
    for name, gradient in gradients.items():
        scale = exact[name].abs().max().item()
        torch.testing.assert_close(gradient, exact[name], atol=1e-3 * scale + 1e-6, rtol=1e-3, msg=name)


def test_bfloat16_is_as_near_to_float32_as_eager(choice):
    """Logits at every token, root of the mean square over a few models."""
    batch, distance = PackedBatch.pack(mixed_samples()).to(torch.device("cuda")), {choice: 0.0, "eager": 0.0}
    for seed in range(4):
        exact = PyramidLlava(make_tiny_hf("llama_gqa", seed=seed).cuda(), kernels="eager").logits(batch)
        for name in distance:
            half = PyramidLlava(make_tiny_hf("llama_gqa", seed=seed).cuda().bfloat16(), kernels=name).logits(batch)
            distance[name] += (half.float() - exact).square().mean().sqrt().item()
    assert 0 < distance[choice] <= 1.1 * distance["eager"]


def test_recomputation_computes_alike(choice):
    """Backward runs in a thread of its own here. Sums over tokens may be made in another order from call to call."""
    (loss, plain), (again, recomputed) = (
        stepped("llama_gqa", choice, again, torch.bfloat16) for again in (False, True)
    )
    assert torch.equal(loss, again)
    for name, gradient in plain.items():
        if "language_model.layers" in name:
            torch.testing.assert_close(recomputed[name], gradient, atol=1e-2 * gradient.abs().max().item(), rtol=0)


def test_a_norm_is_one_kernel_each_way(choice):
    model = PyramidLlava(make_tiny_hf(), kernels=choice).cuda().bfloat16()
    batch = PackedBatch.pack(mixed_samples()).to(torch.device("cuda"))
    model(batch).loss.backward()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as taken:
        model(batch).loss.backward()
    names = {entry.key for entry in taken.key_averages()}
    assert {"aten::_fused_rms_norm", "aten::_fused_rms_norm_backward"} <= names


def test_a_process_with_all_threads_of_the_machine_compiles(tmp_path):
    """Where nobody says how many threads there are, which is how training starts. (Here all tests have one.)"""
    command = [sys.executable, "-m", "llava_pdrop", "bench", "train", "--shape", "tiny", "--device", "cuda"]
    command += ["--kernels", "torch", "--steps", "1", "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
