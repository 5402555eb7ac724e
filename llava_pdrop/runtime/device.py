"""The device: its precision, its memory, and the rate that MFU (model FLOP utilisation) is measured against."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from llava_pdrop.errors import UserError

PEAK_TFLOPS: dict[str, float] = {
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIE": 756.0,
    "H100": 989.4,
    "H800": 989.4,
    "GH200": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "A40": 149.7,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Part of a GPU's name -> dense bfloat16 tensor-core peak in 1e12 operations a second, accumulating in float32.

Source: NVIDIA's data sheets and architecture papers of each product (Hopper, Ampere and Ada). Where a data sheet gives
the rate with structured sparsity, this is half of it. A name that holds several of these keys takes the longest."""

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
MATMUL_SECONDS = 0.3

MIB = 2**20
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def device_named(name: str | None) -> torch.device:
    """The device called ``name`` (None: CUDA where there is one). A GPU comes with its number, and is from here on
    torch's current one.

    Raises:
        UserError: there is none of that name.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is no device: give cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r}: only cpu and cuda are measured")
    if device.type == "cpu":
        return device
    number = device.index or 0
    if number >= torch.cuda.device_count():
        build = "" if torch.version.cuda else f": torch {torch.__version__} is a build without CUDA"
        raise UserError(f"--device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices here{build}")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def device_label(device: torch.device) -> str:
    """The device in a file's name: ``cpu``, or the GPU's model."""
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return "-".join(label.lower().split())


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Operations a second that matrix products in ``dtype`` can reach on ``device``, and where the number is from: the
    published dense peak of a known GPU in half precision, else the measured rate of one large product."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        key = known_gpu(torch.cuda.get_device_name(device))
        if key is not None:
            return PEAK_TFLOPS[key] * 1e12, f"published dense peak of {key} ({PEAK_TFLOPS[key]:g} TFLOP/s)"
    size, kind = MATMUL_SIZE.get(device.type, MATMUL_SIZE["cpu"]), str(dtype).removeprefix("torch.")
    return matmul_flops(device, dtype, size), f"measured: product of two {size}x{size} {kind} matrices"


def known_gpu(name: str) -> str | None:
    """The key of `PEAK_TFLOPS` that a device's name holds as whole words, or None."""
    words = re.sub(r"[^A-Z0-9]+", " ", name.upper()).split()
    text = f" {' '.join(words)} "
    found = [key for key in PEAK_TFLOPS if f" {key} " in text]
    return max(found, key=len) if found else None


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a (size, size) x (size, size) product: the fastest of those of `MATMUL_SECONDS`.

    On the CPU a second is one of the processor's time shared out to the threads, as the bench counts its steps there,
    so the rate is that of one thread and comparable on a machine that others use too."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    best, stop = float("inf"), None
    while stop is None or time.perf_counter() < stop:
        _synchronize(device)
        start = clock()
        left @ right
        _synchronize(device)
        if stop is None:  # the first product warms up and is not counted
            stop = time.perf_counter() + MATMUL_SECONDS
            continue
        best = min(best, clock() - start)
    return 2 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Which precision a machine is good at.


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 in hardware. On an x86 processor without such instructions torch takes up
    to a hundred times as long as in float32."""
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # not known to be slow
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast_dtype(device: torch.device, bf16: bool = False, fp16: bool = False) -> torch.dtype | None:
    """The half precision asked for, or None where it would be slower than float32 (`has_fast_bfloat16`) or nothing is
    asked for."""
    if bf16:
        return torch.bfloat16 if has_fast_bfloat16(device) else None
    return torch.float16 if fp16 else None


def reset_peak_memory() -> None:
    """Lets `peak_memory` start from now, where the system can (Linux; not in every container)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        CLEAR_REFS.write_text("5", encoding="utf-8")


def peak_memory(device: torch.device) -> dict[str, float]:
    """Highest memory in MiB since `reset_peak_memory`: resident memory of this process and, where ``device`` is a GPU,
    of CUDA's allocator."""
    peaks = {"peak_rss_mib": _peak_rss() / MIB}
    if device.type == "cuda":
        peaks["peak_cuda_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return peaks


def release_memory() -> None:
    """Gives freed memory back to the system, so that the peak of the next run in this process is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def _peak_rss() -> int:
    with suppress(OSError):
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
