"""Stage ``env``: which machine this is, and how fast its matrix products and its memory are."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llava_pdrop.bench.gpu.check import Check, machine
from llava_pdrop.report.environment import package_version

PACKAGES = (
    "transformers", "accelerate", "peft", "tokenizers", "triton", "numpy", "pillow", "omegaconf", "pytest", "datasets",
    "deepspeed", "flash-attn", "liger-kernel",
)  # fmt: skip

LENGTHS = (12512, 6656, 3728, 2264, 2940, 780, 420)
"""Tokens of LLaVA-NeXT's four stages with 4 samples of 5 tiles, and of a prefill's first and last ones."""


def run(check: Check) -> None:
    """Versions, card, rates of products in bfloat16 (a CPU: float32), of copies, and the error of rotary angles."""
    device, cuda, made = check.device, check.device.type == "cuda", machine(check.device, seed=0)
    check.put(
        gpu=made["device"] if cuda else None,
        memory_gib=made["device_memory_gib"],
        gpus=torch.cuda.device_count(),
        cudnn=torch.backends.cudnn.version() if cuda else None,
        commit=made["commit"] or "unknown",
        **{key: made[key] for key in ("driver", "cuda", "torch")},
        **{package.replace("-", "_"): package_version(package) for package in PACKAGES},
    )
    found = check.result
    check.note(f"{found['gpu'] or 'CPU'}, driver {found['driver']}, torch {found['torch']}, CUDA {found['cuda']}")
    check.note(", ".join(f"{package} {found[package.replace('-', '_')]}" for package in PACKAGES))
    dtype, size = (torch.bfloat16, 8192) if cuda else (torch.float32, 256)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    check.put(matmul_tflops=2 * size**3 / seconds_of(lambda: left @ right, device) / 1e12)
    check.note(f"product of two {size}x{size} matrices: {check.result['matmul_tflops']:.3g} TFLOP/s")
    check.put(linear_tflops={str(tokens): _linear(tokens, device, dtype, size) for tokens in LENGTHS})
    for tokens, rates in check.result["linear_tflops"].items():
        check.note(f"{tokens} tokens: " + ", ".join(f"{key} {rate:.3g} TFLOP/s" for key, rate in rates.items()))
    check.put(copy_tb_per_s=_copy(device) if cuda else None, rotary_error=_rotary(device))
    check.note(f"copy {check.result['copy_tb_per_s']} TB/s, rotary error {check.result['rotary_error']}")


def seconds_of(function: Callable[[], object], device: torch.device, repeat: int = 20) -> float:
    """Seconds of one call after three that are not counted: the mean of ``repeat``, on a CPU of one."""
    for _ in range(3):
        function()
    if device.type == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start_event, stop_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for _ in range(repeat):
        function()
    stop_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(stop_event) / 1000 / repeat


def _linear(tokens: int, device: torch.device, dtype: torch.dtype, size: int) -> dict[str, float]:
    """Rates of a decoder layer's products on ``tokens`` tokens (7B; a rehearsal: less)."""
    width, wide = (4096, 11008) if device.type == "cuda" else (size // 4, size)
    x_TD = torch.randn(tokens, width, device=device, dtype=dtype)
    rates = {}
    for out in (width, wide):
        weight = torch.randn(out, width, device=device, dtype=dtype)
        seconds = seconds_of(partial(F.linear, x_TD, weight), device)
        rates[f"{width}x{out}"] = 2 * tokens * width * out / seconds / 1e12
    return rates


def _copy(device: torch.device) -> float:
    """Bytes read and written by a copy on the device, in 1e12 a second."""
    source = torch.empty(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return round(2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, repeat=10) / 1e12, 2)


def _rotary(device: torch.device) -> dict[str, float]:
    """Largest error of a rotary cosine at 4,096 positions, as it is and with TF32 allowed in float32 products."""
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=4096, num_attention_heads=32)).to(device)
    position_T = torch.arange(4096, device=device)
    exact = (position_T[:, None].double() * rotary.inv_freq.double()).cos()
    before = torch.backends.cuda.matmul.allow_tf32
    errors = {}
    try:
        for name, allowed in (("float32", False), ("tf32", True)):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            cos_NE = rotary(torch.zeros(1, 1, device=device), position_T[None])[0][0]
            errors[name] = (cos_NE[:, : exact.shape[1]].double() - exact).abs().max().item()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return errors
